"""The store: every owner's record, how records travel, and our own.

The invariants of a record are in record.py, the judgement of a delta in merge.py. What the store adds:

- only `set`, `delete`, `collect_tombstones` and `learn_epoch` write our own record; no delta ever does;
- a delta across a gap is parked, bounded, and applied when the gap closes;
- where a live digest contradicts a record of which a part was never proven (some relay left an entry out
  of a cut delta), the record is pulled again from 0 *beside* the old one, which is read until the new one is
  proven: reads never go back;
- forgotten owners leave their last epoch in a graveyard, so that no earlier life of theirs comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from meshd_cms.entries import (
    UNSIGNED,
    check_key,
    entry_size_bytes,
    head_is_signed,
    pack_value,
    read_value,
    sign_entry,
    sign_head,
)
from meshd_cms.entries import live_digest as live_digest_of
from meshd_cms.errors import RecordFull, SnapshotError, SnapshotReason, ValueTooLarge
from meshd_cms.exchange import cut, is_useless, start_for
from meshd_cms.merge import Contradicted, Merged, malformed, merge
from meshd_cms.record import ZERO, Record, changed_keys, extended
from meshd_cms.snapshot import Saved, pack_snapshot, proven_record, unpack_snapshot
from meshd_cms.types import (
    COUNTER_MAX,
    ENTRIES_MAX,
    ENTRY_BYTES_MAX,
    EPOCH_MAX,
    HEAD_BYTES_MAX,
    Applied,
    ApplyResult,
    Delta,
    DigestLine,
    Entry,
    Epoch,
    Head,
    Known,
    MeshId,
    NodeId,
    OwnEpochSeen,
    Parked,
    Rejected,
    RejectReason,
    Signer,
    StoreConfig,
    Value,
    Verifier,
    Version,
    node_id_of,
)


class Store:
    """All records this node holds. Synchronous and pure: told the time, given signer and verifier."""

    def __init__(
        self, config: StoreConfig, mesh: MeshId, signer: Signer, epoch: Epoch, verify: Verifier
    ) -> None:
        assert 1 <= epoch <= EPOCH_MAX, "an epoch is at least 1 and fits 48 bits"
        self._config = config
        self._mesh = mesh
        self._signer = signer
        self._owner = node_id_of(signer.public_key)
        self._epoch = epoch
        self._epoch_spent = False  # our own signature was seen on another record of this very epoch
        self._verify = verify
        self._records: dict[NodeId, Record] = {}
        self._rebuilds: dict[NodeId, Record | None] = {}  # see the module's third point
        self._pull_lines: dict[
            NodeId, DigestLine
        ] = {}  # of every record; kept by `_put` and `_drop`
        self._digest: tuple[DigestLine, ...] | None = (
            None  # the same, sorted; None: to be sorted again
        )
        self._parked: list[Delta] = []  # oldest first
        self._graveyard: dict[NodeId, Epoch] = {}
        self._updated_at_s: dict[NodeId, float] = {}
        self._confirmed_at_s: dict[NodeId, float] = {}

    @property
    def owner(self) -> NodeId:
        """Our own id."""
        return self._owner

    @property
    def epoch(self) -> Epoch:
        """Our own epoch."""
        return self._epoch

    # --- our own record ---------------------------------------------------------------------------

    def set(self, key: str, value: Value) -> Delta | None:
        """Write a key of our own record; returns the rumour, or None when the value is as before.

        Raises:
            InvalidKey: the key is empty, too long or not encodable.
            InvalidValue: msgpack cannot carry the value.
            ValueTooLarge: the entry with its proof is over `ENTRY_BYTES_MAX`.
            RecordFull: the key is new and the record holds `ENTRIES_MAX` entries, tombstones included.
                In all four cases nothing was changed.
        """
        check_key(key)
        packed = pack_value(value)
        own = self._records.get(self._owner)
        before = own.entries.get(key) if own else None
        if before and before.value == packed:
            return None
        # The size is that of the longest version: whether a value fits must not depend on the day.
        size_bytes = entry_size_bytes(Entry(key, packed, Version(COUNTER_MAX), UNSIGNED))
        if size_bytes > ENTRY_BYTES_MAX:
            raise ValueTooLarge(key, size_bytes, ENTRY_BYTES_MAX)
        if own and not before and len(own.entries) >= ENTRIES_MAX:
            raise RecordFull(key, ENTRIES_MAX)
        return self._write(key, packed)

    def delete(self, key: str) -> Delta | None:
        """Put a tombstone on a key of ours; returns the rumour, or None when there is no such key."""
        own = self._records.get(self._owner)
        before = own.entries.get(key) if own else None
        if before is None or before.value is None:
            return None
        return self._write(key, None)

    def collect_tombstones(self, keep: int) -> Delta | None:
        """Drop all but the newest `keep` tombstones of ours; returns the rumour that says so.

        The floor rises to the newest one dropped, and a version is spent on it. Peers that are behind
        the floor will need the whole record. None when there is nothing to drop.
        """
        assert keep >= 0
        own = self._records.get(self._owner)
        if own is None:
            return None
        tombstones = [entry.version for entry in own.by_version() if entry.value is None]
        if len(tombstones) <= keep:
            return None
        return self._advance(own, (), floor=tombstones[len(tombstones) - keep - 1])

    def learn_epoch(self, seen: Epoch) -> bool:
        """A peer knows an epoch of ours: go above it, and sign the live entries anew from version 1.

        False, with nothing changed, when it is not above ours (or equal and proven to be spent by
        another life of ours, see `OwnEpochSeen`), or is the last epoch there is. After True, save a
        snapshot before anything is said under the new epoch (an epoch must never be used twice, and the
        next restart counts from the saved one), then tell the new record with
        `delta_since(owner, 0, ...)`.
        """
        if seen < self._epoch or (seen == self._epoch and not self._epoch_spent):
            return False
        if seen >= EPOCH_MAX:
            return False
        self._epoch = Epoch(seen + 1)
        self._epoch_spent = False
        old = self._drop(self._owner)
        live = [entry for entry in old.by_version() if entry.value is not None] if old else []
        if live:
            entries = [
                self._signed(entry.key, entry.value, Version(version))
                for version, entry in enumerate(live, start=1)
            ]
            self._advance(None, entries, floor=ZERO)
        return True

    def _signed(self, key: str, value: bytes | None, version: Version) -> Entry:
        entry = Entry(key, value, version, UNSIGNED)
        return sign_entry(self._signer, self._mesh, self._owner, self._epoch, entry)

    def _write(self, key: str, value: bytes | None) -> Delta:
        own = self._records.get(self._owner)
        version = Version((own.max_version if own else 0) + 1)
        return self._advance(own, (self._signed(key, value, version),), own.floor if own else ZERO)

    def _advance(self, own: Record | None, entries: Sequence[Entry], floor: Version) -> Delta:
        since = own.max_version if own else ZERO
        until = Version(entries[-1].version if entries else since + 1)
        unsigned = Head(
            self._owner, self._epoch, until, floor, b"", self._signer.public_key, UNSIGNED
        )
        record = extended(own, entries, until, unsigned)
        head = replace(unsigned, live_digest=live_digest_of(record.leaves))
        record = replace(record, head=sign_head(self._signer, self._mesh, head))
        self._put(self._owner, record)
        return Delta(self._owner, self._epoch, since, until, tuple(entries), record.head)

    # --- reading ----------------------------------------------------------------------------------

    def owners(self) -> tuple[NodeId, ...]:
        """Those with a record, sorted; we are one of them from our first write on."""
        return tuple(sorted(self._records))

    def get(self, owner: NodeId, key: str) -> Value | None:
        """The value, a fresh object; None when there is none (or when it is None)."""
        record = self._records.get(owner)
        entry = record.entries.get(key) if record else None
        return None if entry is None or entry.value is None else read_value(entry.value)

    def items(self, owner: NodeId, prefix: str = "") -> tuple[tuple[str, Value], ...]:
        """The live keys that start with `prefix`, sorted, with their values."""
        record = self._records.get(owner)
        entries: Mapping[str, Entry] = record.entries if record else {}
        return tuple(
            (key, read_value(value))
            for key in sorted(entries)
            if key.startswith(prefix) and (value := entries[key].value) is not None
        )

    def public_key(self, owner: NodeId) -> bytes | None:
        """The key that the owner signs with; None without a record."""
        record = self._records.get(owner)
        return record.head.public_key if record else None

    def updated_at_s(self, owner: NodeId) -> float | None:
        """When the owner's record last moved, on the clock given to `apply`; None for our own."""
        return self._updated_at_s.get(owner)

    def age_s(self, owner: NodeId, now_s: float) -> float | None:
        """Seconds since the record moved or was confirmed as current; 0 for ours, None without one."""
        if owner == self._owner:
            return 0.0
        at_s = self._confirmed_at_s.get(owner)
        return None if at_s is None else max(0.0, now_s - at_s)

    def confirm(self, owner: NodeId, now_s: float) -> None:
        """The owner itself has said that what we hold of it is all there is."""
        if owner in self._confirmed_at_s:
            self._confirmed_at_s[owner] = max(now_s, self._confirmed_at_s[owner])

    # --- what we have and lack --------------------------------------------------------------------

    def line(self, owner: NodeId) -> DigestLine | None:
        """What is read here of the owner; what a state hash is made of."""
        record = self._records.get(owner)
        return record.line if record else None

    def digest(self) -> tuple[DigestLine, ...]:
        """What a peer needs to know to send us what we lack, by owner.

        It is `line` for every owner, except for a record that is pulled again from 0.
        """
        if self._digest is None:
            self._digest = tuple(self._pull_lines[owner] for owner in sorted(self._pull_lines))
        return self._digest

    def pull_line(self, owner: NodeId) -> DigestLine | None:
        """The owner's line in `digest`."""
        return self._pull_lines.get(owner)

    def _put(self, owner: NodeId, record: Record) -> None:
        """Hold this record of the owner; a rebuild of it is over."""
        self._records[owner] = record
        self._rebuilds.pop(owner, None)
        self._pull_lines[owner] = record.line
        self._digest = None

    def _rebuild(self, owner: NodeId, record: Record | None) -> None:
        """Go on reading what is held of the owner, and pull its record again, beyond this part of it."""
        self._rebuilds[owner] = record
        epoch = self._records[owner].epoch
        self._pull_lines[owner] = record.line if record else DigestLine(owner, epoch, ZERO, ZERO)
        self._digest = None

    def _drop(self, owner: NodeId) -> Record | None:
        """Hold nothing of the owner; returns what was held."""
        self._rebuilds.pop(owner, None)
        self._pull_lines.pop(owner, None)
        self._digest = None
        return self._records.pop(owner, None)

    def wants(self, lines: Sequence[DigestLine]) -> tuple[NodeId, ...]:
        """The owners of whom a peer with this digest has more than we do, in its order.

        We are among them when the peer knows a life or a version of ours that we do not: its delta is
        then what proves it (see `OwnEpochSeen`), as a digest is signed by nobody.
        """
        return tuple(line.owner for line in lines if self._wants(line))

    def _wants(self, line: DigestLine) -> bool:
        if line.max_version == 0:
            return False
        ours = self._pull_lines.get(line.owner)
        if ours is None:
            if line.owner == self._owner:
                return line.epoch >= self._epoch
            return self._has_room(line.owner) and line.epoch >= self._graveyard.get(line.owner, 0)
        return (line.epoch, line.max_version) > (ours.epoch, ours.max_version)

    def _has_room(self, owner: NodeId) -> bool:
        # A place is kept for our own record, whether it has begun or not.
        others = len(self._records) - (self._owner in self._records)
        return owner in self._records or others + 1 < self._config.owners_max

    def delta_since(self, owner: NodeId, since: Version, bytes_max: int) -> Delta | None:
        """What we hold of an owner above `since`, cut at a version so that it encodes to `bytes_max`.

        None when there is nothing above, or not even its first entry fits.
        """
        record = self._records.get(owner)
        if record is None or owner in self._rebuilds:
            return None
        found = cut(record, since, bytes_max)
        return found[0] if found else None

    def deltas_for(
        self, lines: Sequence[DigestLine], bytes_max: int, among: Iterable[NodeId] | None = None
    ) -> tuple[Delta, ...]:
        """What a peer with this digest lacks: unknown owners first, then the most stale.

        With `among`, only owners named there are looked at. The encoded sizes of the deltas add up to at most `bytes_max`; what does not fit is cut at
        versions, newest first. With `bytes_max >= RUMOUR_BYTES_MAX` at least one entry moves.
        """
        theirs = {line.owner: line for line in lines}
        lacking: list[tuple[bool, int, NodeId, Version]] = []
        for owner in self._records if among is None else among:
            record, line = self._records.get(owner), theirs.get(owner)
            since = None if record is None else start_for(record, line)
            if record is not None and since is not None and owner not in self._rebuilds:
                lacking.append((line is not None, since - record.max_version, owner, since))
        lacking.sort()
        deltas: list[Delta] = []
        left_bytes = bytes_max
        for _, _, owner, since in lacking:
            if left_bytes < HEAD_BYTES_MAX:
                break
            found = cut(self._records[owner], since, left_bytes)
            if found and not is_useless(found[0], theirs.get(owner)):
                deltas.append(found[0])
                left_bytes -= found[1]
        return tuple(deltas)

    # --- what comes in ----------------------------------------------------------------------------

    def apply(self, delta: Delta, now_s: float) -> ApplyResult:
        """Judge a delta and, if it is good, move the record; then what was parked behind it.

        A refusal leaves every record as it was. `Applied` and `Parked` are returned only for what the
        owner signed; `Known` costs no cryptography and proves nothing.
        """
        owner = delta.owner
        if owner == self._owner:
            return self._see_ourselves(delta)
        if owner not in self._records:
            if not self._has_room(owner):
                return Rejected(owner, RejectReason.TOO_MANY_OWNERS)
            if delta.epoch < self._graveyard.get(owner, 0):
                return Rejected(owner, RejectReason.STALE_EPOCH)
        before = self._records.get(owner)
        result = self._apply_one(delta)
        match result:
            case Parked():
                self._park(delta)
                return result
            case Applied():
                reset = result.reset | self._apply_parked(owner)
            case Known() | Rejected():
                return result
            case _:
                assert_never(result)
        after = self._records.get(owner)
        if after is None or after is before:  # it went to a rebuild, which is not read yet
            return Applied(owner, (), reset=False)
        self._graveyard.pop(owner, None)
        self._updated_at_s[owner] = self._confirmed_at_s[owner] = now_s
        return Applied(owner, changed_keys(before, after), reset)

    def _apply_one(self, delta: Delta) -> Applied | Known | Parked | Rejected:
        owner = delta.owner
        held = self._records.get(owner)
        rebuilding = owner in self._rebuilds and held is not None and held.epoch == delta.epoch
        base = self._rebuilds[owner] if rebuilding else held
        verdict = merge(base, delta, self._mesh, self._verify)
        match verdict:
            case Merged(record=record, reset=reset):
                if rebuilding and held and not _supersedes(record, held):
                    self._rebuild(owner, record)
                    return Applied(owner, (), reset=False)
                self._put(owner, record)
                return Applied(owner, (), reset or rebuilding)
            case Contradicted():
                self._rebuild(owner, None)
                return Rejected(owner, RejectReason.BAD_LIVE_DIGEST)
            case Known() | Parked() | Rejected():
                return verdict
            case _:
                assert_never(verdict)

    def _see_ourselves(self, delta: Delta) -> ApplyResult:
        own = self._records.get(self._owner)
        if delta.epoch < self._epoch:
            return Rejected(self._owner, RejectReason.STALE_EPOCH)
        if delta.epoch == self._epoch and own:
            newer = delta.head.max_version > own.max_version
            if delta.head == own.head or not (newer or delta.head.max_version == own.max_version):
                return Known(self._owner)
        if reason := malformed(delta):
            return Rejected(self._owner, reason)
        if not head_is_signed(self._verify, self._mesh, delta.head):
            return Rejected(self._owner, RejectReason.BAD_HEAD_SIGNATURE)
        if delta.epoch == self._epoch:
            self._epoch_spent = True
        return OwnEpochSeen(delta.epoch)

    def _park(self, delta: Delta) -> None:
        if len(delta.entries) > self._config.parked_entries_max or delta in self._parked:
            return
        of_owner = [one for one in self._parked if one.owner == delta.owner]
        if len(of_owner) >= self._config.parked_per_owner_max:
            self._parked.remove(of_owner[0])
        elif len(self._parked) >= self._config.parked_max:
            del self._parked[0]
        self._parked.append(delta)

    def _apply_parked(self, owner: NodeId) -> bool:
        """Apply what the gap held back; returns whether one of them replaced the record."""
        waiting = sorted(
            (delta for delta in self._parked if delta.owner == owner),
            key=lambda delta: (delta.epoch, delta.since),
        )
        reset = False
        for delta in waiting:
            match self._apply_one(delta):
                case Parked():
                    continue
                case Applied(reset=one):
                    reset |= one
                case Known() | Rejected():
                    pass
            self._parked.remove(delta)
        return reset

    def forget(self, owner: NodeId) -> None:
        """Drop all of an owner who is gone for good; only its epoch is remembered, bounded.

        Not for ourselves. The same life may come back (a long partition), an earlier one may not.
        """
        assert owner != self._owner, "our own record is never forgotten"
        record = self._drop(owner)
        self._updated_at_s.pop(owner, None)
        self._confirmed_at_s.pop(owner, None)
        self._parked = [delta for delta in self._parked if delta.owner != owner]
        if record:
            self._graveyard[owner] = record.epoch
            if len(self._graveyard) > self._config.graveyard_max:
                del self._graveyard[next(iter(self._graveyard))]

    # --- disk -------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Every other owner's record with its proofs, and our epoch, to be written to disk."""
        others = (self._records[owner] for owner in self.owners() if owner != self._owner)
        records = tuple(record.as_delta() for record in others)
        return pack_snapshot(Saved(self._mesh, self._owner, self._epoch, records))

    @staticmethod
    def restore(
        data: bytes,
        config: StoreConfig,
        mesh: MeshId,
        signer: Signer,
        epoch: Epoch,
        verify: Verifier,
        *,
        as_of_s: float,
    ) -> Store:
        """A store with the records of a snapshot, in a new life of ours.

        Our epoch becomes max(saved + 1, `epoch`); save a snapshot before anything is said under it. Our
        own record starts empty. `as_of_s` is when the
        snapshot was true on the clock of `apply` (mostly: now less the file's age). A head's signature
        and the live digest prove all live entries of a complete record at once (see
        docs/decisions/0001), so a start costs one verification an owner.

        Raises:
            SnapshotError: the bytes are damaged, of another mesh or node, or hold a record that is not
                proven. Nothing else is raised, whatever the bytes are.
        """
        saved = unpack_snapshot(data)
        if saved.mesh != mesh:
            raise SnapshotError(SnapshotReason.OTHER_MESH)
        if saved.owner != node_id_of(signer.public_key):
            raise SnapshotError(SnapshotReason.OTHER_NODE)
        if saved.epoch >= EPOCH_MAX:
            raise SnapshotError(SnapshotReason.MALFORMED, "the last epoch there is")
        store = Store(config, mesh, signer, Epoch(max(saved.epoch + 1, epoch)), verify)
        for delta in saved.records:
            if delta.owner in store._records or delta.owner == saved.owner:
                raise SnapshotError(SnapshotReason.MALFORMED, "an owner twice")
            if not store._has_room(delta.owner):
                raise SnapshotError(SnapshotReason.TOO_LARGE, "more owners than we may hold")
            store._put(delta.owner, proven_record(delta, mesh, verify))
            store._updated_at_s[delta.owner] = store._confirmed_at_s[delta.owner] = as_of_s
        return store


def _supersedes(rebuilt: Record, held: Record) -> bool:
    """Whether a rebuilt record is proven and not behind the one that is read."""
    return rebuilt.complete and (rebuilt.floor, rebuilt.max_version) >= (
        held.floor,
        held.max_version,
    )
