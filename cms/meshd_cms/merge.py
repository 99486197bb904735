"""Whether and how a delta moves a record: the one place where another node's claims are judged.

Cheap checks come first, then the head's signature, then those of the entries that are new, then the live
digest: a flood of junk costs a few comparisons, a repetition costs no cryptography at all. The function is
pure; a refusal has nothing to undo.

Where the floor stands decides what fits (f, m: ours; F, until: the delta's):

- F > f and F > m: tombstones that we never saw are gone. Only a delta from 0 helps, on an empty record.
- F < f and until < f: the sender's entries may be ones whose tombstones, below f, we will never be sent
  again. Refused.
- otherwise a delta fits when its `since` is not above m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from meshd_cms.entries import entry_is_signed, entry_size_bytes, head_is_signed, unpack_value
from meshd_cms.errors import CodecError
from meshd_cms.record import ZERO, Record, extended
from meshd_cms.types import (
    COUNTER_MAX,
    ENTRIES_MAX,
    ENTRY_BYTES_MAX,
    EPOCH_MAX,
    KEY_BYTES_MAX,
    LIVE_DIGEST_BYTES,
    Delta,
    Entry,
    Head,
    Known,
    MeshId,
    Parked,
    Rejected,
    RejectReason,
    Verifier,
    node_id_of,
)


@dataclass(frozen=True, slots=True)
class Merged:
    """The record to hold from now on."""

    record: Record
    reset: bool  # nothing of the base is left in it


@dataclass(frozen=True, slots=True)
class Contradicted:
    """All is signed, yet the live digest differs and our own unproven span may be what is wrong."""


Verdict: TypeAlias = Merged | Known | Parked | Rejected | Contradicted


def malformed(delta: Delta) -> RejectReason | None:
    """What makes the delta one that no owner of ours writes; no cryptography."""
    head = delta.head
    if head.owner != delta.owner or head.epoch != delta.epoch:
        return RejectReason.MALFORMED
    if not 1 <= head.epoch <= EPOCH_MAX or len(head.live_digest) != LIVE_DIGEST_BYTES:
        return RejectReason.MALFORMED
    if not 0 <= delta.since < delta.until <= head.max_version <= COUNTER_MAX:
        return RejectReason.MALFORMED
    if not 0 <= head.floor <= head.max_version:
        return RejectReason.MALFORMED
    if len(delta.entries) > ENTRIES_MAX:
        return RejectReason.TOO_MANY_ENTRIES
    before = delta.since
    keys: set[str] = set()
    for entry in delta.entries:
        if not before < entry.version <= delta.until or entry.key in keys:
            return RejectReason.MALFORMED
        before = entry.version
        keys.add(entry.key)
    if node_id_of(head.public_key) != delta.owner:
        return RejectReason.BAD_KEY
    return None


def entry_fits(entry: Entry) -> bool:
    """Whether the entry keeps the bounds of one, its value being msgpack that we can read."""
    try:
        if not 0 < len(entry.key.encode()) <= KEY_BYTES_MAX:
            return False
        if entry_size_bytes(entry) > ENTRY_BYTES_MAX:
            return False
        if entry.value is not None:
            unpack_value(entry.value)
    except (CodecError, UnicodeEncodeError):
        return False
    return True


def _conflicts(ours: Head, theirs: Head) -> bool:
    """Whether an honest owner cannot have signed both; they are of one epoch."""
    if ours.max_version == theirs.max_version:
        return ours.floor != theirs.floor or ours.live_digest != theirs.live_digest
    older, newer = sorted((ours, theirs), key=lambda head: head.max_version)
    return newer.floor < older.floor


def merge(base: Record | None, delta: Delta, mesh: MeshId, verify: Verifier) -> Verdict:
    """The verdict on a delta, given what we hold of its owner (who is not ourselves).

    `Parked` is returned only for a delta whose head the owner has signed.
    """
    owner, head = delta.owner, delta.head
    if base and delta.epoch < base.epoch:
        return Rejected(owner, RejectReason.STALE_EPOCH)
    same = base if base and delta.epoch == base.epoch else None
    if same and not _is_behind(same, head) and delta.until <= same.max_version:
        return Known(owner)
    if reason := malformed(delta):
        return Rejected(owner, reason)
    known_head = same is not None and head == same.head
    if same and _conflicts(same.head, head):
        reason = RejectReason.CONFLICTING_HEAD
        signed = head_is_signed(verify, mesh, head)
        return Rejected(owner, reason if signed else RejectReason.BAD_HEAD_SIGNATURE)
    start = None if same and _is_behind(same, head) else same
    reached = start.max_version if start else ZERO
    news = tuple(entry for entry in delta.entries if entry.version > reached)
    if not all(map(entry_fits, news)):
        return Rejected(owner, RejectReason.MALFORMED)
    if not (known_head or head_is_signed(verify, mesh, head)):
        return Rejected(owner, RejectReason.BAD_HEAD_SIGNATURE)
    if delta.since > reached:
        return Parked(owner, reached)
    if start and head.floor < start.floor and delta.until < start.floor:
        return Rejected(owner, RejectReason.BEHIND_FLOOR)
    verdict = _extend(start, news, delta, mesh, verify)
    if isinstance(verdict, Record):
        return Merged(verdict, reset=start is None and base is not None)
    return verdict


def _is_behind(ours: Record, theirs: Head) -> bool:
    """Whether tombstones that we never saw are gone under their head (of the same epoch)."""
    return theirs.floor > ours.floor and theirs.floor > ours.max_version


def _extend(
    start: Record | None, news: tuple[Entry, ...], delta: Delta, mesh: MeshId, verify: Verifier
) -> Record | Contradicted | Rejected:
    owner, head = delta.owner, delta.head
    if start and start.head.max_version >= head.max_version:
        head = start.head
    candidate = extended(start, news, delta.until, head)
    if len(candidate.entries) > ENTRIES_MAX:
        return Rejected(owner, RejectReason.TOO_MANY_ENTRIES)
    if not all(entry_is_signed(verify, mesh, head, entry) for entry in news):
        return Rejected(owner, RejectReason.BAD_ENTRY_SIGNATURE)
    if candidate.complete and not candidate.digest_matches:
        if start and not start.complete:
            return Contradicted()
        return Rejected(owner, RejectReason.BAD_LIVE_DIGEST)
    return candidate
