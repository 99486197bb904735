"""Deltas, digests and soft readings to and from tuples that msgpack carries.

The owner's id is not on the wire beside its public key: it is the key's hash. Decoders check types, exact
lengths and ranges, bound every list, and raise `CodecError` and nothing else; what a delta *claims* is
judged in merge.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from meshd_cms.entries import Wire, checked_value, entry_wire, pack_value
from meshd_cms.errors import CodecError, InvalidValue
from meshd_cms.packing import pack
from meshd_cms.soft import SOFT_KEY_BYTES_MAX, SOFT_VALUE_BYTES_MAX, SoftTold
from meshd_cms.types import (
    COUNTER_MAX,
    ENTRIES_MAX,
    ENTRY_BYTES_MAX,
    EPOCH_MAX,
    KEY_BYTES_MAX,
    LIVE_DIGEST_BYTES,
    NODE_ID_BYTES,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Delta,
    DigestLine,
    Entry,
    Epoch,
    Head,
    NodeId,
    Version,
    node_id_of,
)

DIGEST_LINES_MAX: Final = 4096
AGE_MS_MAX: Final = 10**12


def _fields(obj: object, count: int, what: str) -> Sequence[object]:
    if not isinstance(obj, list | tuple):
        raise CodecError(f"a {what} is not a list")
    fields = cast("Sequence[object]", obj)
    if len(fields) != count:
        raise CodecError(f"a {what} has {len(fields)} fields, not {count}")
    return fields


def _items(obj: object, limit: int, what: str) -> Sequence[object]:
    if not isinstance(obj, list | tuple):
        raise CodecError(f"{what} are not a list")
    items = cast("Sequence[object]", obj)
    if len(items) > limit:
        raise CodecError(f"{len(items)} {what}, at most {limit} are allowed")
    return items


def _counter(obj: object, what: str, least: int = 0, most: int = COUNTER_MAX) -> int:
    if not isinstance(obj, int) or isinstance(obj, bool) or not least <= obj <= most:
        raise CodecError(f"{what} is not a counter")
    return obj


def _epoch(obj: object) -> Epoch:
    return Epoch(_counter(obj, "an epoch", 1, EPOCH_MAX))


def _bytes(obj: object, size: int, what: str) -> bytes:
    if not isinstance(obj, bytes) or len(obj) != size:
        raise CodecError(f"{what} is not {size} bytes")
    return obj


def _text(obj: object, limit: int, what: str) -> str:
    if not isinstance(obj, str) or not 0 < len(obj) <= limit:
        raise CodecError(f"{what} is not 1 to {limit} characters")
    return obj


def _unpack_entry(obj: object) -> Entry:
    version, key, value, signature = _fields(obj, 4, "entry")
    if value is not None and not (isinstance(value, bytes) and len(value) <= ENTRY_BYTES_MAX):
        raise CodecError("an entry's value is not bytes of a bounded size")
    return Entry(
        _text(key, KEY_BYTES_MAX, "a key"),
        value,
        Version(_counter(version, "a version", 1)),
        _bytes(signature, SIGNATURE_BYTES, "an entry's signature"),
    )


def pack_delta(delta: Delta) -> Wire:
    """The delta as a tuple for msgpack."""
    head = delta.head
    return (
        head.public_key,
        head.epoch,
        head.max_version,
        head.floor,
        head.live_digest,
        head.signature,
        delta.since,
        delta.until,
        tuple(entry_wire(entry) for entry in delta.entries),
    )


def unpack_delta(obj: object) -> Delta:
    """The delta that `pack_delta` made, from whatever msgpack gave.

    Raises:
        CodecError: it is none.
    """
    key, epoch_, max_version, floor, digest, signature, since, until, entries = _fields(
        obj, 9, "delta"
    )
    public_key = _bytes(key, PUBLIC_KEY_BYTES, "a public key")
    owner = node_id_of(public_key)
    epoch = _epoch(epoch_)
    head = Head(
        owner,
        epoch,
        Version(_counter(max_version, "a maximal version", 1)),
        Version(_counter(floor, "a floor")),
        _bytes(digest, LIVE_DIGEST_BYTES, "a live digest"),
        public_key,
        _bytes(signature, SIGNATURE_BYTES, "a head's signature"),
    )
    return Delta(
        owner,
        epoch,
        Version(_counter(since, "a start")),
        Version(_counter(until, "an end", 1)),
        tuple(_unpack_entry(entry) for entry in _items(entries, ENTRIES_MAX, "entries")),
        head,
    )


def delta_size_bytes(delta: Delta) -> int:
    """The size of the encoded delta."""
    return len(pack(pack_delta(delta)))


def pack_digest(lines: Sequence[DigestLine]) -> Wire:
    """The lines as tuples for msgpack."""
    return tuple((line.owner, line.epoch, line.max_version, line.floor) for line in lines)


def unpack_digest(obj: object) -> tuple[DigestLine, ...]:
    """The lines that `pack_digest` made, no owner twice.

    Raises:
        CodecError: they are none.
    """
    lines: dict[NodeId, DigestLine] = {}
    for item in _items(obj, DIGEST_LINES_MAX, "digest lines"):
        owner_, epoch, max_version, floor = _fields(item, 4, "digest line")
        owner = NodeId(_bytes(owner_, NODE_ID_BYTES, "an owner"))
        if owner in lines:
            raise CodecError("a digest names an owner twice")
        lines[owner] = DigestLine(
            owner,
            _epoch(epoch),
            Version(_counter(max_version, "a maximal version")),
            Version(_counter(floor, "a floor")),
        )
    return tuple(lines.values())


def pack_soft(told: SoftTold) -> Wire:
    """The reading as a tuple for msgpack; its age in whole milliseconds."""
    return (told.sequence, told.key, told.value, round(told.age_s * 1000))


def unpack_soft(obj: object) -> SoftTold:
    """The reading that `pack_soft` made.

    Raises:
        CodecError: it is none.
    """
    sequence, key, value_, age_ms = _fields(obj, 4, "soft reading")
    value = checked_value(value_)
    try:
        size_bytes = len(pack_value(value))
    except InvalidValue as error:
        raise CodecError(str(error)) from error
    if size_bytes > SOFT_VALUE_BYTES_MAX:
        raise CodecError("a soft value is too large")
    return SoftTold(
        _counter(sequence, "a sequence number", 1),
        _text(key, SOFT_KEY_BYTES_MAX, "a soft key"),
        value,
        unpack_age_s(age_ms),
    )


def unpack_age_s(age_ms: object) -> float:
    """An age in seconds, out of whole milliseconds.

    Raises:
        CodecError: it is none.
    """
    return _counter(age_ms, "an age", 0, AGE_MS_MAX) / 1000
