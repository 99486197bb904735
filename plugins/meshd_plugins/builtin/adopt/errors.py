"""What can go wrong between us and a server that we adopted.

ServerError        root; the message is for people and quotes nothing of a prompt or an answer
  Unreachable      no connection came about; nothing was asked
  Broken           the connection ended, or what came on it is not the protocol it should be
  Slow             a deadline passed
  TooLarge         more came than is taken
  NotOurs          it answers, and is nothing that may be adopted
  Denied           it wants a key, or another one
  Loading          it is up and has no model ready yet
"""

from __future__ import annotations


class ServerError(Exception):
    """Root. State: the connection is closed."""


class Unreachable(ServerError):
    """No connection came about. State: nothing was asked."""


class Broken(ServerError):
    """The connection ended early, or what came is malformed. State: part of an answer may have come."""


class Slow(ServerError):
    """A deadline passed. State: as `Broken`."""


class TooLarge(ServerError):
    """More came than is taken. State: as `Broken`."""


class NotOurs(ServerError):
    """It speaks, and may not be adopted: no OpenAI-compatible server, or a meshd (that would be a loop)."""


class Denied(ServerError):
    """It wants a key that we do not have."""


class Loading(ServerError):
    """It is starting, or too busy to say what it has."""
