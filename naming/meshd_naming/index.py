"""Every offer known, found by name.

A trie of labels under each kind. Invariants: an offer stands at exactly the node of its name; a trie node
without offers and without children does not exist; `generation` changes whenever an answer of `lookup`
could. Order of what is returned depends on what is stored, never on the order in which it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

from meshd_cms.types import NodeId
from meshd_naming.grammar import ANY_LABEL, ANY_REST, Kind, Name
from meshd_naming.offers import Offer

OFFERS_PER_OWNER_MAX = 512  # as many entries as one record holds
OFFERS_MAX = 65_536


@dataclass(slots=True)
class _Branch:
    """One label of the trie."""

    children: dict[str, _Branch] = field(default_factory=dict[str, "_Branch"])
    offers: dict[tuple[NodeId, str], Offer] = field(default_factory=dict[tuple[NodeId, str], Offer])


class Index:
    """Offers by name and by owner. Not for concurrent use: one task owns it."""

    def __init__(self) -> None:
        self._roots: dict[Kind, _Branch] = {kind: _Branch() for kind in Kind}
        self._owners: dict[NodeId, dict[str, Offer]] = {}
        self._confirmed_s: dict[NodeId, float] = {}
        self._count = 0
        self._paths: tuple[tuple[str, tuple[str, ...]], ...] = ()
        self._paths_generation = 0
        self.generation = 0

    def __len__(self) -> int:
        return self._count

    def put(self, offer: Offer) -> bool:
        """Add it, or replace what has the same owner and id. False: over a bound, nothing changed."""
        assert offer.name.is_bare, offer.name
        assert not offer.name.is_pattern, offer.name
        mine = self._owners.get(offer.owner, {})
        known = mine.get(offer.capability_id)
        if known == offer:
            return True
        if known is None and (len(mine) >= OFFERS_PER_OWNER_MAX or self._count >= OFFERS_MAX):
            return False
        if known is not None:
            self._unlink(known)
        branch = self._roots[offer.name.kind]
        for label in offer.name.labels:
            branch = branch.children.setdefault(label, _Branch())
        branch.offers[offer.owner, offer.capability_id] = offer
        self._owners.setdefault(offer.owner, {})[offer.capability_id] = offer
        self._count += known is None
        self.generation += 1
        self.confirm(offer.owner, offer.updated_at_s)
        return True

    def discard(self, owner: NodeId, capability_id: str) -> bool:
        """Remove one offer; False when it was not there."""
        mine = self._owners.get(owner)
        offer = mine.pop(capability_id, None) if mine else None
        if offer is None or mine is None:
            return False
        if not mine:
            del self._owners[owner]
            self._confirmed_s.pop(owner, None)
        self._unlink(offer)
        self._count -= 1
        self.generation += 1
        return True

    def discard_owner(self, owner: NodeId) -> int:
        """Remove all offers of an owner; how many there were."""
        ids = tuple(self._owners.get(owner, ()))
        for capability_id in ids:
            self.discard(owner, capability_id)
        return len(ids)

    def confirm(self, owner: NodeId, now_s: float) -> None:
        """The owner's record was seen to be current at `now_s`; ages count from the latest of these.

        Costs no replanning: only ages change. Nothing happens for an owner without offers.
        """
        if owner in self._owners and now_s > self._confirmed_s.get(owner, -inf):
            self._confirmed_s[owner] = now_s

    @property
    def confirmed_s(self) -> Mapping[NodeId, float]:
        """For each owner that has offers, when its record was last known to be current. A live view."""
        return self._confirmed_s

    def owned(self, owner: NodeId) -> tuple[Offer, ...]:
        """All offers of an owner, by capability id."""
        mine = self._owners.get(owner, {})
        return tuple(mine[capability_id] for capability_id in sorted(mine))

    def at(self, kind: Kind, labels: tuple[str, ...]) -> tuple[Offer, ...]:
        """Offers under exactly these labels, by owner and id."""
        branch = self._roots[kind]
        for label in labels:
            found = branch.children.get(label)
            if found is None:
                return ()
            branch = found
        return tuple(branch.offers[key] for key in sorted(branch.offers))

    def lookup(self, query: Name) -> tuple[Offer, ...]:
        """Offers whose kind and labels match, by path, owner and id; node and constraints are not read."""
        if not query.is_pattern:
            return self.at(query.kind, query.labels)
        found: list[Offer] = []
        _collect(self._roots[query.kind], query.labels, found)
        found.sort(key=lambda offer: (offer.name.labels, offer.owner, offer.capability_id))
        return tuple(found)

    def offers(self) -> Iterator[Offer]:
        """Every offer, by owner and id."""
        for owner in sorted(self._owners):
            yield from self.owned(owner)

    def paths(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Every name served, as (path, labels), sorted. Kept until the index changes."""
        if self._paths_generation != self.generation:
            names = {one.name for mine in self._owners.values() for one in mine.values()}
            self._paths = tuple(sorted((name.path, name.labels) for name in names))
            self._paths_generation = self.generation
        return self._paths

    def _unlink(self, offer: Offer) -> None:
        branch = self._roots[offer.name.kind]
        walked: list[tuple[_Branch, str]] = []
        for label in offer.name.labels:
            walked.append((branch, label))
            branch = branch.children[label]
        del branch.offers[offer.owner, offer.capability_id]
        for parent, label in reversed(walked):
            child = parent.children[label]
            if child.offers or child.children:
                return
            del parent.children[label]


def _collect(branch: _Branch, labels: tuple[str, ...], found: list[Offer]) -> None:
    """Append what matches `labels` below `branch`. Depth is bounded by the grammar."""
    if not labels:
        found.extend(branch.offers.values())
        return
    head, rest = labels[0], labels[1:]
    if head == ANY_REST:
        found.extend(branch.offers.values())
        for child in branch.children.values():
            _collect(child, labels, found)
    elif head == ANY_LABEL:
        for child in branch.children.values():
            _collect(child, rest, found)
    elif (one := branch.children.get(head)) is not None:
        _collect(one, rest, found)
