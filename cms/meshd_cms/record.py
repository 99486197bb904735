"""One owner's record, as anybody holds it.

The invariant, for a record with `max_version` m under a head of version h >= m and floor f:

- *Prefix.* It holds every entry of the owner with version <= m, except those that the owner has written
  again (then at a version <= h), and except tombstones at or below f. A tombstone it holds is above f.
- *Proof.* The head and each entry carry the owner's signature. Where m = h, the live entries hash to the
  head's live digest: the record is then *proven*, nothing was left out. Where m < h (a delta was cut), what
  was left out can only show once m reaches h.
- *Order.* (epoch, floor, m) never falls, compared from the left. Within an epoch every head has a version
  of its own (collecting tombstones takes one too), and a head of a higher version has no lower floor.

A record is never changed in place: a merge makes a new one or leaves the old, so a refused delta cannot
leave half of itself behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshd_cms.entries import leaf_of, live_digest
from meshd_cms.types import Delta, DigestLine, Entry, Epoch, Head, NodeId, Version

ZERO = Version(0)


@dataclass(frozen=True, slots=True)
class Record:
    """See the invariant above. The mappings are never written to once the record is made."""

    head: Head
    max_version: Version
    entries: Mapping[str, Entry]  # by key, tombstones included
    leaves: Mapping[str, bytes]  # by key, of the live entries

    @property
    def owner(self) -> NodeId:
        """Whose record it is."""
        return self.head.owner

    @property
    def epoch(self) -> Epoch:
        """The owner's life the record belongs to."""
        return self.head.epoch

    @property
    def floor(self) -> Version:
        """Tombstones at or below it are gone."""
        return self.head.floor

    @property
    def complete(self) -> bool:
        """Whether the record reaches its head; a stored record that does is proven."""
        return self.max_version == self.head.max_version

    @property
    def digest_matches(self) -> bool:
        """Whether the live entries are those that the head says; only telling when complete."""
        return live_digest(self.leaves) == self.head.live_digest

    @property
    def line(self) -> DigestLine:
        """What a digest says of it."""
        return DigestLine(self.owner, self.epoch, self.max_version, self.floor)

    def by_version(self, since: Version = ZERO) -> list[Entry]:
        """The entries above `since`, sorted by version."""
        above = [entry for entry in self.entries.values() if entry.version > since]
        above.sort(key=lambda entry: entry.version)
        return above

    def as_delta(self) -> Delta:
        """The whole record as a delta from 0."""
        return Delta(
            self.owner, self.epoch, ZERO, self.max_version, tuple(self.by_version()), self.head
        )


def _is_collected(entry: Entry, head: Head) -> bool:
    return entry.value is None and entry.version <= head.floor


def extended(base: Record | None, entries: Iterable[Entry], until: Version, head: Head) -> Record:
    """The base (or nothing) with newer entries laid over it, up to `until`, under `head`.

    The caller has made sure that the entries are complete over (base's max, until].
    """
    held = dict(base.entries) if base else {}
    leaves = dict(base.leaves) if base else {}
    if base and head.floor > base.floor:
        held = {key: entry for key, entry in held.items() if not _is_collected(entry, head)}
    for entry in entries:
        if _is_collected(entry, head):
            held.pop(entry.key, None)
        else:
            held[entry.key] = entry
        if entry.value is None:
            leaves.pop(entry.key, None)
        else:
            leaves[entry.key] = leaf_of(entry)
    return Record(head, until, held, leaves)


def changed_keys(before: Record | None, after: Record) -> tuple[str, ...]:
    """The keys that read differently, sorted."""
    old: Mapping[str, Entry] = before.entries if before else {}
    new = after.entries
    touched = {key for key, entry in new.items() if old.get(key) is not entry}
    touched |= old.keys() - new.keys()
    return tuple(sorted(key for key in touched if _value(old, key) != _value(new, key)))


def _value(entries: Mapping[str, Entry], key: str) -> bytes | None:
    entry = entries.get(key)
    return entry.value if entry else None
