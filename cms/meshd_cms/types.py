"""The vocabulary of the Capability Metadata Store: ids, entries, heads, deltas and results."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NewType, Protocol, TypeAlias

NodeId = NewType("NodeId", bytes)
"""16 bytes: the first half of SHA-256 of the raw Ed25519 public key."""

MeshId = NewType("MeshId", bytes)
"""16 bytes; every signature is bound to it, so a record of one mesh proves nothing in another."""

Epoch = NewType("Epoch", int)
"""One life of a process, >= 1, below 2**48. A restart takes a higher one."""

Version = NewType("Version", int)
"""The owner's counter over its whole record within an epoch, >= 1; 0 stands for nothing yet."""

Value: TypeAlias = "bool | int | float | str | bytes | Sequence[Value] | Mapping[str, Value] | None"
"""What msgpack can carry. Read back, sequences are lists and mappings are dicts."""

NODE_ID_BYTES: Final = 16
MESH_ID_BYTES: Final = 16
PUBLIC_KEY_BYTES: Final = 32  # raw Ed25519
SIGNATURE_BYTES: Final = 64  # raw Ed25519
LIVE_DIGEST_BYTES: Final = 16

# Bounds every node of a mesh must agree on: an owner and its peers apply the same ones.
ENTRY_BYTES_MAX: Final = 1024  # encoded entry with its proof
KEY_BYTES_MAX: Final = 128  # UTF-8
VALUE_DEPTH_MAX: Final = 16  # containers in containers
ENTRIES_MAX: Final = 512  # entries in one record and in one delta, tombstones included
COUNTER_MAX: Final = 2**63 - 1  # versions
EPOCH_MAX: Final = 2**48 - 1  # as milliseconds since 1970, the year 10889

HEAD_BYTES_MAX: Final = 167  # what a delta costs on the wire beside its entries, at most
RUMOUR_BYTES_MAX: Final = HEAD_BYTES_MAX + ENTRY_BYTES_MAX  # any one-entry delta fits in this


def node_id_of(public_key: bytes) -> NodeId:
    """The id of the node with this raw public key."""
    return NodeId(hashlib.sha256(public_key).digest()[:NODE_ID_BYTES])


def node_id_text(node: NodeId) -> str:
    """The whole id as people read and type it: 26 characters of lower-case base32."""
    return base64.b32encode(node).decode("ascii").rstrip("=").lower()


def node_id_parse(text: str) -> NodeId:
    """The id that `node_id_text` printed, in either case.

    Raises:
        ValueError: the text is not 26 characters of base32, or not the one spelling of an id.
    """
    try:
        raw = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        raw = b""
    node = NodeId(raw)
    if len(raw) != NODE_ID_BYTES or node_id_text(node) != text.lower():
        raise ValueError(f"{text!r} is not a node id (26 characters of a-z and 2-7)")
    return node


def node_id_short(node: NodeId) -> str:
    """The first 8 characters of the id: for logs and tables, never for look-ups."""
    return node_id_text(node)[:8]


class Signer(Protocol):
    """Holds the private key of this node; injected, so that this package handles no key."""

    @property
    def public_key(self) -> bytes:
        """32 bytes, raw Ed25519."""
        ...

    def sign(self, message: bytes) -> bytes:
        """64 bytes, raw Ed25519; deterministic."""
        ...


Verifier: TypeAlias = Callable[[bytes, bytes, bytes], bool]
"""`(public_key, message, signature) -> ok`. Pure, and never raises whatever the bytes are."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as its owner wrote it."""

    key: str
    value: bytes | None  # msgpack, canonical (maps sorted); None is a tombstone
    version: Version
    signature: bytes  # over the mesh, owner, epoch, version, key and value: see entries.py


@dataclass(frozen=True, slots=True)
class Head:
    """What the owner says of its whole record at one version."""

    owner: NodeId
    epoch: Epoch
    max_version: Version
    floor: Version  # tombstones at or below it are gone: who is behind it starts again from 0
    live_digest: bytes  # over the live entries at max_version: see entries.py
    public_key: bytes  # hashes to `owner`
    signature: bytes


@dataclass(frozen=True, slots=True)
class Delta:
    """An owner's entries with `since < version <= until`: complete over that span.

    `entries` are sorted by version. A key that was written again later than `until`, as far as the
    sender knows, is not in it. `until <= head.max_version`; it is smaller where the delta was cut.
    """

    owner: NodeId
    epoch: Epoch
    since: Version
    until: Version
    entries: tuple[Entry, ...]
    head: Head


@dataclass(frozen=True, slots=True)
class DigestLine:
    """How much of an owner's history somebody holds."""

    owner: NodeId
    epoch: Epoch
    max_version: Version
    floor: Version


class RejectReason(StrEnum):
    """Why a delta was refused; the value is the label of a counter."""

    STALE_EPOCH = "stale_epoch"  # of an earlier life of its owner
    MALFORMED = "malformed"  # counters, order or sizes that no owner of ours writes
    BAD_KEY = "bad_key"  # the public key is not the owner's
    BAD_HEAD_SIGNATURE = "bad_head_signature"
    BAD_ENTRY_SIGNATURE = "bad_entry_signature"
    BAD_LIVE_DIGEST = "bad_live_digest"  # entries were left out or put in
    BEHIND_FLOOR = "behind_floor"  # could bring back keys whose tombstones are gone
    CONFLICTING_HEAD = "conflicting_head"  # the owner signed two heads for one version
    TOO_MANY_ENTRIES = "too_many_entries"
    TOO_MANY_OWNERS = "too_many_owners"


@dataclass(frozen=True, slots=True)
class Applied:
    """The record moved forward."""

    owner: NodeId
    changed_keys: tuple[str, ...]  # sorted; keys whose value differs from before, removed ones too
    reset: bool  # the record was replaced as a whole: a new epoch, or it was behind the floor


@dataclass(frozen=True, slots=True)
class Known:
    """A true repetition: nothing new in it. The common fate of a rumour; no fault of anybody."""

    owner: NodeId


@dataclass(frozen=True, slots=True)
class Parked:
    """There is a gap before this delta: pull what lies between from whoever has it."""

    owner: NodeId
    since: Version  # ask from here: what we hold (0: everything)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Refused; the store is as it was."""

    owner: NodeId
    reason: RejectReason


@dataclass(frozen=True, slots=True)
class OwnEpochSeen:
    """Our own signature on a record we do not hold: an earlier life of ours is still told.

    The store is as it was. Call `Store.learn_epoch(epoch)`, then announce the new record.
    """

    epoch: Epoch


ApplyResult: TypeAlias = Applied | Known | Parked | Rejected | OwnEpochSeen


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Bounds of one store."""

    owners_max: int = 2048  # records held, ours included; raising it costs memory only when used
    parked_per_owner_max: int = 4  # deltas that wait for a gap to close; more are pulled again
    parked_max: int = 64  # the same, over all owners
    parked_entries_max: int = 16  # a longer delta is not kept while it waits
    graveyard_max: int = 1024  # forgotten owners whose last epoch is remembered
