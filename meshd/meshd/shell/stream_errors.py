"""What can go wrong between peers on a stream.

StreamError                code stream_error
  StreamLost               code stream_lost: the connection broke; what was under way may have been done
    PeerUnreachable        code unreachable: no connection came about; nothing was sent
      PeerRejected         code = why, e.g. other_mesh, other_node, version_mismatch, bad_certificate
  RemoteRefused            code = the peer's: not taken, nothing was done
  RemoteFailed             code = the peer's: broke, or (`callers_fault`) can never be served
"""

from __future__ import annotations

from meshd_cms.types import Value


class StreamError(Exception):
    """Root of what a call or message to a peer can end with."""

    code = "stream_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class StreamLost(StreamError):
    """The connection broke, or the peer hangs. State: the peer may have done any part of it."""

    code = "stream_lost"


class PeerUnreachable(StreamLost):
    """No connection came about. State: nothing was sent; another peer may be asked."""

    code = "unreachable"


class PeerRejected(PeerUnreachable):
    """Somebody answered, but not the peer we meant, or one that we cannot talk to."""

    code = "rejected"


class RemoteRefused(StreamError):
    """The peer did not take the call. State: nothing was done there."""

    code = "busy"

    def __init__(self, code: str, message: str, load: Value) -> None:
        super().__init__(message, code=code)
        self.load = load


class RemoteFailed(StreamError):
    """The peer ended the call with an error. `callers_fault`: any other peer would say the same."""

    code = "failed"

    def __init__(self, code: str, message: str, load: Value, *, callers_fault: bool) -> None:
        super().__init__(message, code=code)
        self.load = load
        self.callers_fault = callers_fault
