"""The little HTTP that the endpoints share, on raw ASGI: bodies in, JSON out, the client that leaves.

Requests are answered with `send` directly, and not with response objects: a forwarded request has a
budget of two milliseconds, and those objects with their per-request wrappers are a good part of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import trio

from meshd.edge.errors import ClientGone, Problem, RequestError
from meshd_plugins.api import Refused

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.core.bodies import BodyShare
    from meshd_plugins.api import Value

    ObjectHook: TypeAlias = Callable[[dict[str, Value]], dict[str, Value]]

JSON_TYPE: Final = b"application/json"
SHARE_KEY: Final = "meshd.body_share"  # in the scope: what the request may hold, from its front
_READ_KEY: Final = "meshd.body_read"
# What a client may still send after its error before the connection is closed under it: closing at once
# resets the connection, and the client would see the reset and not the answer.
_DRAIN_BYTES_MAX: Final = 16 << 20
_DRAIN_S: Final = 1.0


def _plain(value: object) -> object:
    """What JSON has no notion of: bytes become hex, any mapping a dict, any other sequence a list."""
    match value:
        case bytes() | bytearray():
            return value.hex()
        case Mapping():
            return dict(cast("Mapping[object, object]", value))
        case tuple() | set() | frozenset():
            return list(cast("tuple[object, ...]", value))
        case _:
            raise TypeError(f"{type(value).__name__} is not plain data")


_encode = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain
).encode


def _finite(value: object) -> object:
    """The same value with figures that JSON cannot write (infinities, NaN) as null."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            items = cast("Mapping[object, object]", value).items()
            return {key: _finite(member) for key, member in items}
        case list() | tuple():
            return [_finite(member) for member in cast("list[object]", value)]
        case _:
            return value


def to_json(value: object) -> bytes:
    """Compact UTF-8 JSON. What UTF-8 or JSON cannot carry becomes `?` (surrogates) or null (NaN)."""
    try:
        text = _encode(value)
    except ValueError:
        text = _encode(_finite(value))
    return text.encode("utf-8", "replace")


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def from_json(raw: bytes, object_hook: ObjectHook | None = None) -> dict[str, Value]:
    """The JSON object in `raw`.

    Args:
        raw: UTF-8, or one of the others that JSON may come in.
        object_hook: makes of each object in it what stands for it, the innermost first.

    Raises:
        RequestError: not JSON (with line and column), or not an object.
    """
    try:
        value: object = json.loads(raw, parse_constant=_no_constant, object_hook=object_hook)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise RequestError(
            f"The body is not JSON: {error.msg} at {where}", code="invalid_json"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The body is not UTF-8: byte {error.start} is wrong", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise RequestError("The body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise RequestError(f"The body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object", code="invalid_json")
    return cast("dict[str, Value]", value)


def header(scope: Scope, name: bytes) -> str:
    """The first header of that lower-case name, "" when absent."""
    for key, value in scope["headers"]:
        if key == name:
            return cast("bytes", value).decode("latin-1")
    return ""


async def read_body(scope: Scope, receive: Receive, bytes_max: int, deadline_s: float) -> bytes:
    """The whole body.

    Raises:
        RequestError: 413 once it is known to be over `bytes_max` (the rest is not read); 408 when it
            is not whole within `deadline_s`.
        Refused: `busy`: too much of other bodies is held now.
        ClientGone: the connection closed first.
    """
    declared = header(scope, b"content-length")
    if declared.isdecimal() and int(declared) > bytes_max:
        raise too_large(bytes_max)
    share = cast("BodyShare | None", scope.get(SHARE_KEY))
    parts: list[bytes] = []
    size = 0
    with trio.move_on_after(deadline_s):
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            part: bytes = message.get("body", b"")
            if part:
                size += len(part)
                if size > bytes_max:
                    raise too_large(bytes_max)
                if share is not None and not share.grow(size):
                    raise Refused("too many large requests are in flight here", code="busy")
                parts.append(part)
            if not message.get("more_body", False):
                scope[_READ_KEY] = True
                return b"".join(parts)
    raise RequestError(
        f"The body did not arrive within {deadline_s:g} s", code="body_too_slow", status=408
    )


def too_large(bytes_max: int) -> RequestError:
    """The 413 of a body over `bytes_max`."""
    return RequestError(
        f"The body is larger than {bytes_max} bytes (http.request_bytes_max)",
        code="request_too_large",
        status=413,
    )


async def send_json(
    send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """A complete JSON answer."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", JSON_TYPE),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_problem(
    scope: Scope,
    receive: Receive,
    send: Send,
    problem: Problem,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """A complete error answer. Of a body that was not read, a little more is read and discarded."""
    if problem.retry_after_s is not None:
        headers = (*headers, (b"retry-after", b"%d" % problem.retry_after_s))
    body = to_json(problem.body())
    if not _has_unread_body(scope):
        await send_json(send, problem.status, body, headers)
        return
    start_headers = [
        (b"content-type", JSON_TYPE),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": problem.status, "headers": start_headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _drain(receive)
    await send({"type": "http.response.body", "body": b""})


def _has_unread_body(scope: Scope) -> bool:
    if scope.get(_READ_KEY):
        return False
    declared = header(scope, b"content-length")
    return bool(header(scope, b"transfer-encoding")) or declared not in ("", "0")


async def _drain(receive: Receive) -> None:
    size = 0
    with trio.move_on_after(_DRAIN_S):
        while size < _DRAIN_BYTES_MAX:
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                return
            size += len(message.get("body", b""))


async def wait_gone(receive: Receive) -> None:
    """Return when the client has closed its connection. The body must have been read."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
