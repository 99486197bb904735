"""What can go wrong at the HTTP edge, and the one place where errors become HTTP statuses.

EdgeError
  EdgePortInUse       the TCP port is taken; nothing listens
  EdgeSocketInUse     another daemon answers on the Unix socket; its file was left alone
  EdgeSocketDenied    the Unix socket's file cannot be made; nothing listens
  EdgeNotSecured      to listen beyond loopback, a key or a usable certificate is missing

RequestError          the client's request is wrong; nothing was asked of the mesh
ClientGone            the client closed its connection; what it had asked for is cancelled

Errors from below arrive as `meshd_plugins.api.CapabilityError` and `meshd_naming.NamingError`;
`problem_of` maps all of them. Nothing else in the edge knows a status.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from meshd_naming import NamingError, NotServed
from meshd_plugins.api import BadRequest, CapabilityError, Failed, Refused, Value


class EdgeError(Exception):
    """Root of what opening the edge may raise. `code` is stable; the message says what to do."""

    code = "edge_error"


class EdgePortInUse(EdgeError):
    """Another process listens on the address. State: no socket of ours is open."""

    code = "edge_port_in_use"


class EdgeSocketInUse(EdgeError):
    """Another daemon answers on the Unix socket. State: its socket file is untouched."""

    code = "edge_socket_in_use"


class EdgeSocketDenied(EdgeError):
    """The Unix socket's file cannot be made there. State: no socket of ours is open."""

    code = "edge_socket_denied"


class EdgeNotSecured(EdgeError):
    """Others could reach the port, and it lacks what would keep them out. State: nothing is open."""

    code = "edge_not_secured"


class ClientGone(Exception):
    """The client closed its connection before it had its whole answer."""


class RequestError(Exception):
    """The request is wrong as it is. State: nothing was asked of the mesh.

    Args:
        message: for people; names what was found and what would be right.
        code: stable, for programs.
        param: the parameter at fault, in the client's own terms (`messages[0].content`).
        status: 400, or another one below 500 that `_KINDS` knows.
        retry_after_s: whole seconds after which it may be tried again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_value",
        param: str | None = None,
        status: int = 400,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as it goes out."""

    status: int
    kind: str  # OpenAI's "type"
    code: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None  # whole seconds, >= 1
    extra: Mapping[str, Value] = field(default_factory=dict[str, Value])  # column, suggestion

    def body(self) -> dict[str, Value]:
        """`{"error": {...}}` in OpenAI's shape, with our own fields beside theirs."""
        error: dict[str, Value] = {
            "message": self.message,
            "type": self.kind,
            "code": self.code,
            "param": self.param,
        }
        if self.retry_after_s is not None:
            error["retry_after_s"] = self.retry_after_s
        error.update(self.extra)
        return {"error": error}


# Codes of `Refused`: status and seconds after which a retry may succeed.
_REFUSED: Mapping[str, tuple[int, int | None]] = {
    "busy": (429, 1),
    "draining": (503, 2),
    "starting": (503, 2),
    "unavailable": (503, 2),
    "no_candidate": (404, None),
    "not_here": (404, None),
    "unknown_node": (404, None),
    "no_such_model": (404, None),
    "unsupported": (400, None),
    "unsupported_modality": (400, None),
    "privacy": (403, None),
    "access": (403, None),
    "caller": (403, None),
    "observer": (403, None),
    "not_an_issuer": (403, None),
    "too_large": (413, None),
    "hop_limit": (502, None),
}
_REFUSED_OTHER = (503, 2)  # a code from a newer peer: nothing was done, so it may be tried again

_FAILED: Mapping[str, int] = {"deadline_exceeded": 504, "peer_hung": 504, "worker_hung": 504}
_FAILED_OTHER = 502

_KINDS: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "invalid_request_error",  # as OpenAI has it
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    414: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    501: "invalid_request_error",
    502: "server_error",
    503: "server_error",
    504: "timeout_error",
    505: "invalid_request_error",
}


def problem_of(error: BaseException) -> Problem:
    """The one mapping from errors to HTTP. An error that is not ours to know becomes a bare 500."""
    error = unwrapped(error)
    match error:
        case RequestError():
            kind = _KINDS.get(error.status, "invalid_request_error")
            return Problem(
                error.status,
                kind,
                error.code,
                error.message,
                error.param,
                retry_after_s=error.retry_after_s,
            )
        case NotServed():  # nothing is wrong with the name: no column is at fault
            near = {"suggestion": error.suggestion} if error.suggestion else {}
            message = error.problem + (f'; nearest: "{error.suggestion}"' if near else "")
            return Problem(404, _KINDS[404], error.code, message, "model", extra=near)
        case NamingError():
            extra: dict[str, Value] = {"column": error.column, "text": error.text}
            if error.suggestion:
                extra["suggestion"] = error.suggestion
            return Problem(400, _KINDS[400], error.code, str(error), "model", extra=extra)
        case BadRequest():
            return Problem(400, _KINDS[400], error.code, error.message)
        case Refused():
            status, retry_after_s = _REFUSED.get(error.code, _REFUSED_OTHER)
            param = "model" if status == 404 and error.code != "unknown_node" else None
            return Problem(
                status,
                _KINDS[status],
                error.code,
                error.message,
                param,
                retry_after_s=retry_after_s,
            )
        case Failed():
            status = _FAILED.get(error.code, _FAILED_OTHER)
            return Problem(status, _KINDS[status], error.code, error.message)
        case CapabilityError():
            return Problem(502, _KINDS[502], error.code, error.message)
        case _:
            message = "meshd failed; its log has the details under this request's id"
            return Problem(500, _KINDS[500], "internal_error", message)


def is_expected(error: BaseException) -> bool:
    """Whether it is an error of the client, a peer or the environment, rather than our own bug."""
    return isinstance(unwrapped(error), RequestError | NamingError | CapabilityError)


def unwrapped(error: BaseException) -> BaseException:
    """A nursery wraps what its tasks raise; a group of one says no more than its one member."""
    found = error
    while isinstance(found, BaseExceptionGroup):
        members = cast("BaseExceptionGroup[BaseException]", found).exceptions
        if len(members) != 1:
            return error
        found = members[0]
    return found
