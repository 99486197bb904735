"""What is known of a request before its endpoint runs."""

from __future__ import annotations

import re
import secrets
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import structlog

from meshd.edge.errors import is_expected, unwrapped
from meshd.edge.gate import LOCAL, Access

if TYPE_CHECKING:
    from starlette.types import Scope

    from meshd_plugins.api import Logger

CONTEXT_KEY: Final = "meshd.context"
READING_KEY: Final = (
    "meshd.reading"  # set in the scope by an endpoint that turns out to change nothing
)
UNIX_KEY: Final = "meshd.unix"  # set in the scope by the server for requests on the Unix socket

_FRAMES_MAX: Final = 6
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACE: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One HTTP request's identity, and who makes it."""

    request_id: str  # the client's x-request-id where it is fit, otherwise 16 random hex digits
    idempotency_id: str
    trace: str  # W3C traceparent, "" when absent or malformed
    unix: bool  # came in through the Unix socket
    headers: tuple[tuple[bytes, bytes], ...]  # that every answer carries
    access: Access = LOCAL  # who calls; of requests over TCP the front finds out


def make_context(scope: Scope) -> RequestContext:
    """Read the identity of a request from its headers."""
    request_id = idempotency_id = trace = ""
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            request_id = _fit(value, _ID)
        elif key == b"idempotency-key":
            idempotency_id = _fit(value, _ID)
        elif key == b"traceparent":
            trace = _fit(value, _TRACE)
    request_id = request_id or secrets.token_hex(8)
    raw_id = request_id.encode("ascii")
    return RequestContext(
        request_id=request_id,
        idempotency_id=idempotency_id,
        trace=trace,
        unix=scope.get(UNIX_KEY) is True,
        headers=((b"x-request-id", raw_id), (b"x-meshd-request-id", raw_id)),
    )


def context_of(scope: Scope) -> RequestContext:
    """The context that the application's front put into the scope."""
    return cast("RequestContext", scope[CONTEXT_KEY])


def _fit(value: bytes, pattern: re.Pattern[str]) -> str:
    text = value.decode("latin-1")
    return text if pattern.fullmatch(text) else ""


log = cast("Logger", structlog.get_logger("meshd.edge"))


def log_unexpected(context: RequestContext, scope: Scope, error: Exception) -> None:
    """Log an error that is our own bug. How an ask ended is the mesh's line to write, not the edge's."""
    if not is_expected(error):
        log.error(
            "request.failed",
            request_id=context.request_id,
            path=scope["path"],
            **description_of(error),
        )


def description_of(error: BaseException) -> dict[str, object]:
    """Kind and place of an error, innermost frame last.

    Not its message, nor a traceback: some renderers print local variables, and both can hold prompts.
    """
    error = unwrapped(error)
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_MAX:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": type(error).__name__, "places": places}
