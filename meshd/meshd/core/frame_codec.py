"""Frames to bytes and back, strictly. Pure.

A frame on the wire is a 4-byte big-endian length and that many bytes of one msgpack array,
`[type, call id, ...]`; the call id is 0 for frames of the connection. docs/protocol.md has the table.
Whatever a peer may send, `decode` returns a frame or raises `ProtocolError`, never anything else; and
what `encode` lets out, a peer's `decode` takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeGuard, cast

import msgpack

from meshd.core.frames import (
    CLOCK_MAX_S,
    FRAME_BYTES_MAX,
    FRAME_BYTES_MIN,
    PROTOCOL_VERSION,
    Call,
    CallHeader,
    Cancel,
    Chunk,
    Credit,
    End,
    Error,
    Fault,
    Frame,
    FrameTooLarge,
    FrameType,
    Goaway,
    Gossip,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    Refuse,
    UnsendableError,
    VersionMismatch,
    WarmHint,
)
from meshd.core.prefixes import TAG_BYTES, TAGS_MAX, pack_tags, unpack_tags
from meshd_cms.types import Epoch, MeshId, NodeId, Value

LENGTH_BYTES: Final = 4
DEPTH_MAX: Final = 32
"""Containers in containers in a body, chunk, trailer or load."""

_msgpack: Any = msgpack  # ships no types
_ARRAY_ITEMS_MAX: Final = 1 << 16
_TEXT_BYTES_MAX: Final = 1024
_ID_BYTES: Final = 16
_NUMBER_MAX: Final = 2**63 - 1


def encode(frame: Frame, frame_bytes_max: int = FRAME_BYTES_MAX) -> bytes:
    """The frame with its length in front; a peer's `decode` accepts it.

    Raises:
        FrameTooLarge: longer than `frame_bytes_max`.
        UnsendableError: something in it is not a `Value`.
    """
    packer = _msgpack.Packer(autoreset=False)
    try:
        packer.pack(_fields(frame))
    except UnsendableError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise UnsendableError(f"not a value that can travel: {error}") from error
    with packer.getbuffer() as packed:  # a photo is copied once from here, and not twice
        if len(packed) > frame_bytes_max:
            raise FrameTooLarge(
                f"a frame of {len(packed)} bytes; at most {frame_bytes_max} may be sent"
            )
        return b"".join((len(packed).to_bytes(LENGTH_BYTES, "big"), packed))


def _fields(frame: Frame) -> tuple[object, ...]:
    match frame:
        case Chunk(call, value):
            return (2, call, _own(value))
        case Call(call, header, body):
            return (1, call, _header_fields(header), _own(body))
        case End(call, trailer, load):
            return (3, call, _own(trailer), _own(load))
        case Credit(call, count):
            return (7, call, count)
        case Refuse(call, code, message, load):
            return (4, call, _clip(code), _clip(message), _own(load))
        case Error(call, code, message, callers_fault, load):
            return (5, call, _clip(code), _clip(message), callers_fault, _own(load))
        case Cancel(call, reason):
            return (6, call, _clip(reason))
        case Ping(token):
            return (8, 0, token)
        case Pong(token):
            return (9, 0, token)
        case Gossip(payload):
            return (10, 0, payload)
        case Goaway(reason):
            return (11, 0, _clip(reason))
        case Hello(mesh, node, epoch, frame_bytes_max, window_bytes, clock_s, version):
            clock_s = float(clock_s)
            return (0, 0, version, mesh, node, epoch, frame_bytes_max, window_bytes, clock_s)


def _header_fields(header: CallHeader) -> tuple[object, ...]:
    texts = (header.request_id, header.name, header.capability_id, header.operation, header.trace)
    more = (header.idempotency_id, header.principal, header.passport, header.caller)
    if max(len(text) for text in (*texts, *more)) > _TEXT_BYTES_MAX:
        raise UnsendableError(f"a text of the call's header exceeds {_TEXT_BYTES_MAX} characters")
    if not (
        0 <= header.remaining_s < math.inf and 0 <= header.hops < 256 and 0 <= header.privacy < 256
    ):
        raise UnsendableError(f"a number of the call's header is out of range: {header}")
    tags = pack_tags(header.tags)
    if len(tags) > TAGS_MAX * TAG_BYTES or any(len(tag) != TAG_BYTES for tag in header.tags):
        raise UnsendableError("the tags of the call's header are no tags")
    return (
        header.request_id,
        header.name,
        header.capability_id,
        header.operation,
        header.caller,
        header.principal,
        header.passport,
        header.privacy,
        header.trace,
        float(header.remaining_s),
        header.hops,
        header.idempotency_id,
        tags,
        _hint_fields(header.hint),
    )


def _hint_fields(hint: WarmHint | None) -> tuple[object, ...] | None:
    if hint is None:
        return None
    if (
        len(hint.node) != _ID_BYTES
        or len(hint.tag) != TAG_BYTES
        or not 0 <= hint.tokens <= _NUMBER_MAX
    ):
        raise UnsendableError("the hint of the call's header is none")
    return hint.node, hint.tag, hint.tokens


def _own(value: Value, depth: int = DEPTH_MAX) -> Value:
    """`value`, once it is sure that the peer will take it: a bug here must not cost the connection."""
    if isinstance(value, (str, bytes, int, float, type(None))):
        return value
    if depth == 0:
        raise UnsendableError(f"values nest deeper than {DEPTH_MAX}")
    if len(value) >= _ARRAY_ITEMS_MAX:
        raise UnsendableError(
            f"{len(value)} items in one container; fewer than {_ARRAY_ITEMS_MAX} fit"
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UnsendableError(f"the key {key!r:.40} of a mapping is not text")
            _own(item, depth - 1)
    else:
        for item in value:
            if type(item) not in _SCALARS:
                _own(item, depth - 1)
    return value


def _clip(text: str) -> str:
    """Messages are for people: a long one is cut rather than refused."""
    if len(text) * 4 <= _TEXT_BYTES_MAX:
        return text
    return text.encode("utf-8", "replace")[:_TEXT_BYTES_MAX].decode("utf-8", "ignore")


def decode(packed: bytes | memoryview) -> Frame:
    """The frame in `packed` (without its length).

    Raises:
        ProtocolError: it is not one, with `BAD_FRAME` and what was wrong.
        VersionMismatch: a HELLO of another version, whatever else is in it.
    """
    try:
        items = _unpack(packed)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise _bad(f"not msgpack: {error}") from error
    if not _is_list(items) or len(items) < 2:
        raise _bad("not an array of type and call id")
    kind = _number(items[0], "the frame type")
    if kind >= len(_DECODERS):
        raise _bad(f"unknown frame type {kind}")
    call = _number(items[1], "the call id")
    count, decoder = _DECODERS[kind]
    if len(items) != count and kind != FrameType.HELLO:
        raise _bad(f"{FrameType(kind).name} has {len(items)} fields, not {count}")
    if (call == 0) != (kind in _CONNECTION_FRAMES):
        raise _bad(f"{FrameType(kind).name} with call id {call}")
    return decoder(items)


def _unpack(packed: bytes | memoryview) -> object:
    # Room for the items that a header announces is made before they are read: never for more than there are bytes.
    items_max = min(_ARRAY_ITEMS_MAX, len(packed))
    return cast(
        "object",
        _msgpack.unpackb(packed, max_array_len=items_max, max_map_len=items_max, max_ext_len=0),
    )


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return type(value) is list


def _is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return type(value) is dict


def _bad(message: str) -> ProtocolError:
    return ProtocolError(Fault.BAD_FRAME, message)


def _text(value: Any, what: str, bytes_max: int = _TEXT_BYTES_MAX) -> str:
    if type(value) is not str or len(value) > bytes_max:
        raise _bad(f"{what} is not text of at most {bytes_max} characters")
    return value


def _number(value: Any, what: str, *, least: int = 0, most: int = _NUMBER_MAX) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _bad(f"{what} is not a number from {least} to {most}")
    return value


def _octets(value: Any, what: str, length: int | None = None) -> bytes:
    if type(value) is not bytes or (length is not None and len(value) != length):
        raise _bad(f"{what} is not {'bytes' if length is None else f'{length} bytes'}")
    return value


def _short_octets(value: Any, what: str) -> bytes:
    octets = _octets(value, what)
    if len(octets) > _TEXT_BYTES_MAX:
        raise _bad(f"{what} is longer than {_TEXT_BYTES_MAX} bytes")
    return octets


_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})


def _value(value: Any, depth: int = DEPTH_MAX) -> Value:
    """`value`, once it is sure that nothing but `Value` is in it (msgpack knows timestamps, too)."""
    if type(value) in _SCALARS:
        return cast("Value", value)
    if depth == 0:
        raise _bad(f"values nest deeper than {DEPTH_MAX}")
    if _is_list(value):
        for item in value:
            if type(item) not in _SCALARS:
                _value(item, depth - 1)
    elif _is_dict(value):
        for key, item in value.items():
            if type(key) is not str:
                raise _bad("a key of a mapping is not text")
            if type(item) not in _SCALARS:
                _value(item, depth - 1)
    else:
        raise _bad(f"{type(value).__name__} is not a value")
    return cast("Value", value)


def _decode_hello(items: list[Any]) -> Hello:
    if len(items) < 3:
        raise _bad("HELLO without a version")
    version = _number(items[2], "the version")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(PROTOCOL_VERSION, version)
    if len(items) != 9:
        raise _bad(f"HELLO has {len(items)} fields, not 9")
    clock_s = items[8]
    if type(clock_s) is not float or not 0.0 <= clock_s <= CLOCK_MAX_S:
        raise _bad("the clock is not a number of seconds since 1970")
    return Hello(
        version=version,
        mesh=MeshId(_octets(items[3], "the mesh", _ID_BYTES)),
        node=NodeId(_octets(items[4], "the node", _ID_BYTES)),
        epoch=Epoch(_number(items[5], "the epoch", least=1)),
        frame_bytes_max=_number(items[6], "frame_bytes_max", least=FRAME_BYTES_MIN),
        window_bytes=_number(items[7], "window_bytes", least=1),
        clock_s=clock_s,
    )


def _decode_header(value: Any) -> CallHeader:
    if not _is_list(value) or len(value) != 14:
        raise _bad("the header of CALL is not an array of 14")
    remaining = value[9]
    if type(remaining) not in (int, float) or not 0 <= remaining < math.inf:
        raise _bad("remaining_s is not a duration")
    return CallHeader(
        request_id=_text(value[0], "request_id"),
        name=_text(value[1], "name"),
        capability_id=_text(value[2], "capability_id"),
        operation=_text(value[3], "operation"),
        caller=_short_octets(value[4], "caller"),
        principal=_text(value[5], "principal"),
        passport=_short_octets(value[6], "passport"),
        privacy=_number(value[7], "privacy", most=255),
        trace=_text(value[8], "trace"),
        remaining_s=float(remaining),
        hops=_number(value[10], "hops", most=255),
        idempotency_id=_text(value[11], "idempotency_id"),
        tags=_decode_tags(value[12]),
        hint=None if value[13] is None else _decode_hint(value[13]),
    )


def _decode_tags(value: Any) -> tuple[bytes, ...]:
    try:
        return unpack_tags(_short_octets(value, "tags"))
    except ValueError as error:
        raise _bad(str(error)) from error


def _decode_hint(value: Any) -> WarmHint:
    if not _is_list(value) or len(value) != 3:
        raise _bad("the hint is not an array of 3")
    return WarmHint(
        node=NodeId(_octets(value[0], "the node of the hint", _ID_BYTES)),
        tag=_octets(value[1], "the tag of the hint", TAG_BYTES),
        tokens=_number(value[2], "the tokens of the hint"),
    )


def _decode_call(items: list[Any]) -> Call:
    return Call(items[1], _decode_header(items[2]), _value(items[3]))


def _decode_chunk(items: list[Any]) -> Chunk:
    return Chunk(items[1], _value(items[2]))


def _decode_end(items: list[Any]) -> End:
    return End(items[1], _value(items[2]), _value(items[3]))


def _decode_refuse(items: list[Any]) -> Refuse:
    code, message = _text(items[2], "the code"), _text(items[3], "the message")
    return Refuse(items[1], code, message, _value(items[4]))


def _decode_error(items: list[Any]) -> Error:
    if type(items[4]) is not bool:
        raise _bad("callers_fault is not a boolean")
    code, message = _text(items[2], "the code"), _text(items[3], "the message")
    return Error(items[1], code, message, items[4], _value(items[5]))


def _decode_cancel(items: list[Any]) -> Cancel:
    return Cancel(items[1], _text(items[2], "the reason"))


def _decode_credit(items: list[Any]) -> Credit:
    return Credit(items[1], _number(items[2], "the credit"))


def _decode_ping(items: list[Any]) -> Ping:
    return Ping(_number(items[2], "the token"))


def _decode_pong(items: list[Any]) -> Pong:
    return Pong(_number(items[2], "the token"))


def _decode_gossip(items: list[Any]) -> Gossip:
    return Gossip(_octets(items[2], "the payload"))


def _decode_goaway(items: list[Any]) -> Goaway:
    return Goaway(_text(items[2], "the reason"))


_DECODERS: Final[tuple[tuple[int, Callable[[list[Any]], Frame]], ...]] = (
    (8, _decode_hello),
    (4, _decode_call),
    (3, _decode_chunk),
    (4, _decode_end),
    (5, _decode_refuse),
    (6, _decode_error),
    (3, _decode_cancel),
    (3, _decode_credit),
    (3, _decode_ping),
    (3, _decode_pong),
    (3, _decode_gossip),
    (3, _decode_goaway),
)
"""Number of fields and decoder, by `FrameType`."""

_CONNECTION_FRAMES: Final = frozenset(
    {FrameType.HELLO, FrameType.PING, FrameType.PONG, FrameType.GOSSIP, FrameType.GOAWAY}
)
