"""The saved state of a store, and how its bytes are checked.

Layout: magic (8 bytes), format (2), length of the payload (8), blake2b-16 of format, length and payload
(16), payload. The payload is msgpack of (mesh, owner, our epoch, every other owner's whole record as a
delta from 0). Our own record is not in it: a restart is a new epoch and says everything anew.

Any bytes give either what was saved or a `SnapshotError`; the checksum finds damage, and the proofs of the
records, which `Store.restore` checks, find tampering by somebody who can also write the checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from meshd_cms.codec import pack_delta, unpack_delta
from meshd_cms.entries import entry_is_signed, head_is_signed
from meshd_cms.errors import CodecError, SnapshotError, SnapshotReason
from meshd_cms.merge import entry_fits, malformed
from meshd_cms.packing import pack, unpack
from meshd_cms.record import Record, extended
from meshd_cms.types import (
    EPOCH_MAX,
    MESH_ID_BYTES,
    NODE_ID_BYTES,
    Delta,
    Epoch,
    MeshId,
    NodeId,
    Verifier,
)

MAGIC: Final = b"meshdcms"
FORMAT: Final = 1
SNAPSHOT_BYTES_MAX: Final = 64 * 1024 * 1024

_FORMAT_AT: Final = len(MAGIC)
_LENGTH_AT: Final = _FORMAT_AT + 2
_CHECKSUM_AT: Final = _LENGTH_AT + 8
_PAYLOAD_AT: Final = _CHECKSUM_AT + 16


@dataclass(frozen=True, slots=True)
class Saved:
    """What a snapshot holds; its records are not verified yet."""

    mesh: MeshId
    owner: NodeId
    epoch: Epoch  # of the store that was saved
    records: tuple[Delta, ...]  # each from 0


def _checksum(covered: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(covered + payload, digest_size=16).digest()


def pack_snapshot(saved: Saved) -> bytes:
    """The bytes to write to disk; equal states give equal bytes."""
    records = tuple(pack_delta(record) for record in saved.records)
    payload = pack((saved.mesh, saved.owner, saved.epoch, records))
    covered = FORMAT.to_bytes(2, "big") + len(payload).to_bytes(8, "big")
    return MAGIC + covered + _checksum(covered, payload) + payload


def unpack_snapshot(data: bytes) -> Saved:
    """What was saved in these bytes.

    Raises:
        SnapshotError: they are damaged or no snapshot; nothing else is raised on any bytes.
    """
    if not MAGIC.startswith(data[:_FORMAT_AT]):
        raise SnapshotError(SnapshotReason.NOT_A_SNAPSHOT)
    if len(data) < _PAYLOAD_AT:
        raise SnapshotError(SnapshotReason.TRUNCATED, f"{len(data)} bytes")
    if len(data) > SNAPSHOT_BYTES_MAX:
        raise SnapshotError(SnapshotReason.TOO_LARGE, f"{len(data)} bytes")
    covered = data[_FORMAT_AT:_CHECKSUM_AT]
    payload = data[_PAYLOAD_AT:]
    if (form := int.from_bytes(covered[:2], "big")) != FORMAT:
        raise SnapshotError(SnapshotReason.UNKNOWN_FORMAT, f"format {form}, this is {FORMAT}")
    if (length := int.from_bytes(covered[2:], "big")) > len(payload):
        raise SnapshotError(SnapshotReason.TRUNCATED, f"{len(payload)} of {length} bytes")
    if _checksum(covered, payload) != data[_CHECKSUM_AT:_PAYLOAD_AT]:
        raise SnapshotError(SnapshotReason.CHECKSUM)
    try:
        return _read(unpack(payload))
    except CodecError as error:
        raise SnapshotError(SnapshotReason.MALFORMED, str(error)) from error


def _read(obj: object) -> Saved:
    if not isinstance(obj, list) or len(cast("list[object]", obj)) != 4:
        raise CodecError("not four fields")
    mesh, owner, epoch, records = cast("list[object]", obj)
    if not isinstance(mesh, bytes) or len(mesh) != MESH_ID_BYTES:
        raise CodecError("no mesh id")
    if not isinstance(owner, bytes) or len(owner) != NODE_ID_BYTES:
        raise CodecError("no owner")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 1 <= epoch <= EPOCH_MAX:
        raise CodecError("no epoch")
    if not isinstance(records, list):
        raise CodecError("no records")
    deltas = tuple(unpack_delta(item) for item in cast("Sequence[object]", records))
    return Saved(MeshId(mesh), NodeId(owner), Epoch(epoch), deltas)


def proven_record(delta: Delta, mesh: MeshId, verify: Verifier) -> Record:
    """The record that was saved as this delta, its proofs checked (docs/decisions/0001).

    Raises:
        SnapshotError: it is no whole record, or not what its owner signed.
    """
    if malformed(delta) or delta.since != 0 or not all(map(entry_fits, delta.entries)):
        raise SnapshotError(SnapshotReason.MALFORMED, "a record no owner writes")
    record = extended(None, delta.entries, delta.until, delta.head)
    if not head_is_signed(verify, mesh, delta.head):
        raise SnapshotError(SnapshotReason.BAD_PROOF, "a head")
    if record.complete and not record.digest_matches:
        raise SnapshotError(SnapshotReason.BAD_PROOF, "a live digest")
    for entry in delta.entries:
        proven = record.complete and entry.value is not None
        if not (proven or entry_is_signed(verify, mesh, delta.head, entry)):
            raise SnapshotError(SnapshotReason.BAD_PROOF, "an entry")
    return record
