"""How valid bytes are spoilt: blindly, and with an eye for what msgpack bytes mean."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import msgpack

from meshd_cms.packing import pack

_msgpack: Any = msgpack
BYTES_MAX: Final = 262_144  # no mutant is larger than the largest message
NUMBERS: Final = (
    *(
        sign * (2**bits + more)
        for bits in (0, 7, 8, 15, 16, 31, 32, 53, 62, 63)
        for sign in (1, -1)
        for more in (-1, 0)
    ),
    2**64 - 1,
    2**63 + 1,
    0,
)
_EMPTY: tuple[object, ...] = (list[object](), dict[str, object](), [None], {"a": None})
ODD: Final[tuple[object, ...]] = (
    None, True, False, 0.0, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), 5e-324,
    "", "\x00", "a" * 64, "a" * 65, "ä" * 45, "\x1b[2J", "..", "::1", "0.0.0.0", "255.255.255.255", "224.0.0.251",
    b"", b"\x00" * 16, b"\xff" * 16, b"\xff" * 8, b"\x00" * 32, b"\x00" * 64, *_EMPTY,
)  # fmt: skip
_HEADERS: Final = (
    b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xde\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x00", b"\xc1", b"\xd6\xff\x00\x00\x00\x00", b"\xc4\x00",
    b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7, b"\xcb\x7f\xf8" + b"\x00" * 6, b"\x91" * 40, b"\x81\xa1a" * 40,
)  # fmt: skip


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits are another way round."""
    out = bytearray(data or b"\x00")
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A byte, or a length in front of something, is an extreme one."""
    out = bytearray(data or b"\x00")
    at = rng.randrange(len(out))
    if rng.random() < 0.5:
        out[at] = rng.choice((0, 1, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xC0, 0xC1, 0xCF, 0xDC, 0xFF))
    else:
        head = rng.choice(_HEADERS)
        out[at : at + (len(head) if rng.random() < 0.5 else 0)] = head
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """The end is missing, or there is more after it."""
    if rng.random() < 0.7:
        return data[: rng.randrange(len(data) + 1)]
    return data + rng.randbytes(rng.choice((1, 2, 16, 300)))


def cut_out(data: bytes, rng: random.Random) -> bytes:
    """A piece is missing, or stands there twice."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 2, 3, 8, 64)))
    piece = b"" if rng.random() < 0.5 else data[start:end] * 2
    return data[:start] + piece + data[end:]


def junk(data: bytes, rng: random.Random) -> bytes:
    """Random bytes of about the same length."""
    return rng.randbytes(rng.randrange(1 + min(1400, 2 * len(data))))


_BLIND: Final[tuple[Callable[[bytes, random.Random], bytes], ...]] = (
    flip,
    flip,
    overwrite,
    truncate,
    cut_out,
    junk,
)


def splice(one: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one and the end of another."""
    return one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other) + 1) :]


# -- with an eye for msgpack -------------------------------------------------------------------------------


def _paths(value: object, path: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    found = [path]
    if isinstance(value, list):
        for index, item in enumerate(cast("list[object]", value)):
            found += _paths(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in cast("dict[str, object]", value).items():
            found += _paths(item, (*path, key))
    return found


def _other(value: object, pool: Sequence[object], rng: random.Random) -> object:
    """Something that stands in for a value, mostly of its kind."""
    if isinstance(value, bool):
        return rng.choice((not value, 0, 1, None))
    if isinstance(value, int) and rng.random() < 0.8:
        near = value + rng.choice((-1, 1, 2, -2, 1000))
        return rng.choice((near, rng.choice(NUMBERS), rng.getrandbits(63)))
    if isinstance(value, bytes) and rng.random() < 0.7:
        return rng.choice(
            (flip(value, rng), value[:-1], value + b"\x00", rng.randbytes(len(value)))
        )
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice((value + "x", value[:-1], value * 9, value.upper()))
    if isinstance(value, list) and rng.random() < 0.7:
        items = cast("list[object]", value)
        if items and rng.random() < 0.5:
            return items[: rng.randrange(len(items))]
        return items * rng.choice((2, 2, 17)) if len(items) < 2000 else []
    others: tuple[Sequence[object], ...] = (ODD, NUMBERS, pool)
    return rng.choice(rng.choice(others))


def _replaced(value: object, path: tuple[int | str, ...], new: object) -> object:
    if not path:
        return new
    if isinstance(value, list):
        items = list(cast("list[object]", value))
        index = cast("int", path[0])
        items[index] = _replaced(items[index], path[1:], new)
        return items
    fields = dict(cast("dict[object, object]", value))
    fields[path[0]] = _replaced(fields[path[0]], path[1:], new)
    return fields


def _at(value: object, path: tuple[int | str, ...]) -> object:
    for step in path:
        value = cast("Any", value)[step]
    return value


def restructure(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Some values inside are others, taken from nowhere or from another valid message."""
    try:
        value, donor = _unpacked(data), _unpacked(other)
    except ValueError:
        return flip(data, rng)
    pool = [_at(donor, path) for path in _paths(donor)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(_paths(value))
        value = _replaced(value, path, _other(_at(value, path), pool, rng))
    try:
        return pack(value)
    except (ValueError, OverflowError, TypeError):  # a number that msgpack does not carry
        return overwrite(data, rng)


def _unpacked(data: bytes) -> object:
    try:
        return cast("object", _msgpack.unpackb(data, raw=False, strict_map_key=False))
    except (ValueError, TypeError, _msgpack.UnpackException) as error:
        raise ValueError("no msgpack") from error


def mutant(corpus: Sequence[bytes], rng: random.Random) -> bytes:
    """One valid input, spoilt in one way or several."""
    data = rng.choice(corpus)
    way = rng.random()
    if way < 0.5:
        out = restructure(data, rng.choice(corpus), rng)
    elif way < 0.6:
        out = splice(data, rng.choice(corpus), rng)
    elif way < 0.65:
        return data
    else:
        out = rng.choice(_BLIND)(data, rng)
    if rng.random() < 0.1:
        out = rng.choice(_BLIND)(out, rng)
    return out[:BYTES_MAX]
