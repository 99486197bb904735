"""What can go wrong when a device joins. Every message says what is wrong and what to do.

JoinError                code join_error
  TokenWrong             code token_wrong: it cannot be one as it is: a typo, cut short, another format
  InviterUnreachable     code inviter_unreachable: nobody answers where the invitation points
  InviterWrong           code inviter_wrong: who answers is not who the invitation is from
  JoinRefused            code: that of the `Refusal`; the inviter says no
  JoinBroken             code join_broken: the connection broke, or what came was no answer
MalformedMessage         the peer's fault: bytes that are no message of the join channel
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Refusal(StrEnum):
    """Why an inviter says no; the value goes over the wire."""

    WRONG_SECRET = "wrong_secret"  # noqa: S105 - a code
    UNKNOWN = "unknown"
    USED = "used"
    EXPIRED = "expired"
    REVOKED = "revoked"
    WRONG_PIN = "wrong_pin"
    NO_PIN = "no_pin"
    TOO_MANY_ATTEMPTS = "too_many_attempts"
    BUSY = "busy"
    MALFORMED = "malformed"
    OTHER_RELEASE = "other_release"
    NOT_AN_ISSUER = "not_an_issuer"
    NODE_REVOKED = "node_revoked"
    NO_EDGE = "no_edge"
    NOT_KEPT = "not_kept"


_ANOTHER: Final = "ask for another one (`meshd invite`)"
_SAID: Final[Mapping[Refusal, str]] = {
    Refusal.WRONG_SECRET: (
        f"the inviter knows this token, and its secret is wrong: it was changed on its way; {_ANOTHER}"
    ),
    Refusal.UNKNOWN: (
        "the inviter does not know this token: it was made long ago, or by a node that has lost its state "
        f"since; {_ANOTHER}"
    ),
    Refusal.USED: f"this token was used already; {_ANOTHER}",
    Refusal.EXPIRED: f"this token has expired; {_ANOTHER}",
    Refusal.REVOKED: f"this token was revoked by the inviter; {_ANOTHER}",
    Refusal.WRONG_PIN: (
        "the PIN is wrong: look at it again on the inviter. After three wrong ones it is void"
    ),
    Refusal.NO_PIN: (
        "the inviter shows no PIN now: it was used, has expired, or was void after three wrong attempts; "
        "run `meshd invite --pin` there again"
    ),
    Refusal.TOO_MANY_ATTEMPTS: (
        "too many attempts failed at the inviter, so it takes none for a minute: try again then"
    ),
    Refusal.BUSY: "too many devices join at once: try again in a few seconds",
    Refusal.MALFORMED: "the inviter could not read what this device sent: install one release on both",
    Refusal.OTHER_RELEASE: (
        "the inviter runs a release of meshd that joins in another way: install one release on both"
    ),
    Refusal.NOT_AN_ISSUER: (
        "the inviter may let nobody in any more, or not with that role; ask for an invitation of another "
        "issuer, such as the node that founded the mesh"
    ),
    Refusal.NODE_REVOKED: "the mesh has revoked this device's key: join again with a new one",
    Refusal.NO_EDGE: (
        "this token is for a client, and the inviter's HTTP edge is not reachable from other machines: set "
        "[http] host there to an address beyond loopback, such as 0.0.0.0, and restart it"
    ),
    Refusal.NOT_KEPT: (
        "the inviter's disk refuses, so it cannot note that the token is used: free some space there"
    ),
}


class JoinError(Exception):
    """Root of what joining may raise. State: this device has no new identity."""

    code = "join_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class TokenWrong(JoinError):
    """The text is no token. Nobody was asked."""

    code = "token_wrong"


class InviterUnreachable(JoinError):
    """Nobody answers. Nothing was told to anybody, and the invitation is as good as before."""

    code = "inviter_unreachable"


class InviterWrong(JoinError):
    """Who answers is somebody else. Nothing was told to it; the invitation is as good as before."""

    code = "inviter_wrong"


class JoinBroken(JoinError):
    """The exchange ended in the middle. Trying again with the same key does not count twice."""

    code = "join_broken"


class JoinRefused(JoinError):
    """The inviter says no."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(_SAID[refusal])
        self.refusal = refusal
        self.code = refusal.value


class MalformedMessage(ValueError):
    """Bytes that are no message of the join channel. Nothing was changed."""
