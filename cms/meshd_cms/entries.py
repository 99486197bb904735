"""What an owner signs, and the canonical bytes of values.

Signatures are over messages that cannot be taken for one another: each starts with a domain of its own,
then the mesh id and the owner, and every part that follows is of fixed size or carries its length.

The live digest is blake2b-16 over the live (not deleted) entries, sorted by the key's UTF-8 bytes, each as
key length, key, version, blake2b-16 of the value. It is what makes an entry that a relay left out visible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias, cast

from meshd_cms.errors import CodecError, InvalidKey, InvalidValue
from meshd_cms.packing import pack, unpack
from meshd_cms.types import (
    KEY_BYTES_MAX,
    LIVE_DIGEST_BYTES,
    SIGNATURE_BYTES,
    VALUE_DEPTH_MAX,
    Entry,
    Epoch,
    Head,
    MeshId,
    NodeId,
    Signer,
    Value,
    Verifier,
)

_ENTRY_DOMAIN: Final = b"meshd.cms.entry.v1\x00"
_HEAD_DOMAIN: Final = b"meshd.cms.head.v1\x00"
Wire: TypeAlias = tuple[object, ...]
"""A tuple of what msgpack carries."""

UNSIGNED: Final = bytes(SIGNATURE_BYTES)  # stands in while a size is computed


def check_key(key: str) -> None:
    """Raise `InvalidKey` unless the key may be written."""
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise InvalidKey(f"the key {key!r} cannot be encoded as UTF-8") from error
    if not 0 < size_bytes <= KEY_BYTES_MAX:
        raise InvalidKey(f"a key is 1 to {KEY_BYTES_MAX} bytes, {key[:40]!r} is {size_bytes}")


def _canonical(value: Value, depth: int) -> object:
    if depth > VALUE_DEPTH_MAX:
        raise InvalidValue(f"a value is nested deeper than {VALUE_DEPTH_MAX}")
    match value:
        case None | bool() | int() | float() | str() | bytes():
            return value
        case Mapping():
            keys: list[object] = list(value)
            names = [key for key in keys if isinstance(key, str)]
            if len(names) != len(keys):
                raise InvalidValue("the keys of a map are strings")
            return {key: _canonical(value[key], depth + 1) for key in sorted(names)}
        case Sequence():
            return [_canonical(item, depth + 1) for item in value]
        case _:
            # Typed callers cannot get here; a plugin's untyped value can.
            raise InvalidValue(f"a value cannot hold {type(value).__name__}")


def pack_value(value: Value) -> bytes:
    """The canonical msgpack of a value: equal values give equal bytes (maps are sorted by key).

    Raises:
        InvalidValue: msgpack cannot carry it, or it is nested deeper than `VALUE_DEPTH_MAX`.
    """
    try:
        return pack(_canonical(value, 0))
    except (
        ValueError,
        OverflowError,
        TypeError,
    ) as error:  # integers over 64 bits, lone surrogates
        raise InvalidValue(str(error)) from error


def _check_decoded(value: object, depth: int) -> None:
    if depth > VALUE_DEPTH_MAX:
        raise CodecError("a value is nested too deeply")
    match value:
        case None | bool() | int() | float() | str() | bytes():
            return
        case list():
            for item in cast("list[object]", value):
                _check_decoded(item, depth + 1)
        case dict():
            for key, item in cast("dict[object, object]", value).items():
                if not isinstance(key, str):
                    raise CodecError("a map has a key that is not a string")
                _check_decoded(item, depth + 1)
        case _:
            raise CodecError(f"a value holds {type(value).__name__}")


def checked_value(value: object) -> Value:
    """The same object, known to be a `Value`; raises `CodecError`."""
    _check_decoded(value, 0)
    return cast("Value", value)


def unpack_value(data: bytes) -> Value:
    """The value of these bytes, which may come from anywhere; raises `CodecError`."""
    return checked_value(unpack(data))


def read_value(data: bytes) -> Value:
    """The value of bytes that `unpack_value` has accepted before."""
    return cast("Value", unpack(data))


def entry_wire(entry: Entry) -> Wire:
    """The entry as it stands in an encoded delta."""
    return (entry.version, entry.key, entry.value, entry.signature)


def entry_size_bytes(entry: Entry) -> int:
    """The size of the encoded entry with its proof; what `ENTRY_BYTES_MAX` bounds."""
    return len(pack(entry_wire(entry)))


def entry_message(mesh: MeshId, owner: NodeId, epoch: Epoch, entry: Entry) -> bytes:
    """What the owner signs of one entry."""
    key = entry.key.encode()
    return b"".join(
        (
            _ENTRY_DOMAIN,
            mesh,
            owner,
            epoch.to_bytes(8, "big"),
            entry.version.to_bytes(8, "big"),
            len(key).to_bytes(2, "big"),
            key,
            b"\x00" if entry.value is None else b"\x01" + entry.value,
        )
    )


def head_message(mesh: MeshId, head: Head) -> bytes:
    """What the owner signs of its record as a whole."""
    return b"".join(
        (
            _HEAD_DOMAIN,
            mesh,
            head.owner,
            head.epoch.to_bytes(8, "big"),
            head.max_version.to_bytes(8, "big"),
            head.floor.to_bytes(8, "big"),
            head.live_digest,
        )
    )


def sign_entry(signer: Signer, mesh: MeshId, owner: NodeId, epoch: Epoch, entry: Entry) -> Entry:
    """The entry with its owner's signature."""
    return replace(entry, signature=signer.sign(entry_message(mesh, owner, epoch, entry)))


def sign_head(signer: Signer, mesh: MeshId, head: Head) -> Head:
    """The head with its owner's signature."""
    return replace(head, signature=signer.sign(head_message(mesh, head)))


def entry_is_signed(verify: Verifier, mesh: MeshId, head: Head, entry: Entry) -> bool:
    """Whether the owner of the head signed the entry, in the head's epoch."""
    message = entry_message(mesh, head.owner, head.epoch, entry)
    return verify(head.public_key, message, entry.signature)


def head_is_signed(verify: Verifier, mesh: MeshId, head: Head) -> bool:
    """Whether the holder of the head's public key signed it."""
    return verify(head.public_key, head_message(mesh, head), head.signature)


def leaf_of(entry: Entry) -> bytes:
    """What a live entry adds to the live digest."""
    assert entry.value is not None, "tombstones are not live"
    key = entry.key.encode()
    value_hash = hashlib.blake2b(entry.value, digest_size=16).digest()
    return len(key).to_bytes(2, "big") + key + entry.version.to_bytes(8, "big") + value_hash


def live_digest(leaves: Mapping[str, bytes]) -> bytes:
    """The digest over the leaves of all live entries, by key."""
    # Python compares strings by code point, which is the order of their UTF-8 bytes.
    joined = b"".join(leaves[key] for key in sorted(leaves))
    return hashlib.blake2b(joined, digest_size=LIVE_DIGEST_BYTES).digest()
