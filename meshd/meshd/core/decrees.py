"""What the authorities of a mesh decree: who is out, and which datagram key is in force. Pure.

A decree is a few signed bytes that every node keeps and passes on. Who signed it, and that this authority was
appointed by the mesh's root, is checked by a `DecreeVerifier` that is given in: this package handles no key.

Invariant: two nodes that have been offered the same decrees, in whatever order, hold the same ones and draw
the same conclusions. So accepting is a merge law, and no clock decides anything:

* revocations only grow. A revoked node stays revoked; it can come back under a new key, as another node.
* of each authority's key generations only its highest is held, and the highest of all is in force; of two with
  one number, the one whose bytes sort higher.
* what an authority decreed is void once a higher-ranking one has revoked its holder, whatever came first. The
  rank is the length of its chain: the founder's is 1, that of an issuer it let in 2. Authorities of one rank
  can revoke each other, and then both are out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from meshd_cms.types import NodeId

DECREE_BYTES_MAX: Final = 1_200
"""One decree with its proofs; it has to fit a datagram."""
DECREES_MAX: Final = 1_024
"""Held at most: about one megabyte."""
DECREE_ID_BYTES: Final = 8
COMMITMENT_BYTES: Final = 32
GENERATION_MAX: Final = 2**32 - 1


class DecreeKind(IntEnum):
    """What a decree is about. Numbers are never reused."""

    REVOCATION = 1
    KEY_GENERATION = 2


@dataclass(frozen=True, slots=True)
class Decree:
    """A decree whose signature and authority were found good."""

    kind: DecreeKind
    authority: NodeId  # the node that signed it
    rank: int  # certificates between the root and that authority: 1 for the founder
    made_at_s: float  # wall clock of the authority, seconds since 1970: for people
    raw: bytes  # as it travels, at most DECREE_BYTES_MAX
    node: NodeId | None = None  # REVOCATION: who is out
    reason: str = ""  # REVOCATION: for people, at most 64 characters
    generation: int = 0  # KEY_GENERATION: the founder's key is 0
    commitment: bytes = b""  # KEY_GENERATION: BLAKE2b-256 of the key

    @property
    def id(self) -> bytes:
        """Eight bytes that tell it from other decrees."""
        return decree_id(self.raw)


def decree_id(raw: bytes) -> bytes:
    """Eight bytes that tell a decree from others."""
    return hashlib.blake2b(raw, digest_size=DECREE_ID_BYTES).digest()


DecreeVerifier: TypeAlias = Callable[[bytes], Decree | None]
"""The decree of these bytes, or None: not well-formed, not signed, or by no authority. Never raises."""


class Decrees:
    """The decrees that hold, as one node knows them."""

    def __init__(self, verify: DecreeVerifier = lambda _raw: None) -> None:
        self._verify = verify
        self._held: dict[bytes, Decree] = {}
        self._revoked: dict[NodeId, Decree] = {}  # the highest-ranking revocation of each
        self._generation: Decree | None = None
        self._hash = bytes(DECREE_ID_BYTES)

    def __len__(self) -> int:
        """How many are held."""
        return len(self._held)

    def __contains__(self, identifier: bytes) -> bool:
        """Whether the decree with this id is held."""
        return identifier in self._held

    @property
    def hash(self) -> bytes:
        """Eight bytes, equal on nodes that hold the same; zeros while there are none."""
        return self._hash

    @property
    def generation(self) -> Decree | None:
        """The datagram key in force, as decreed; None: the founder's."""
        return self._generation

    def holds(self, raw: bytes) -> bool:
        """Whether exactly this decree is held."""
        held = self._held.get(decree_id(raw))
        return held is not None and held.raw == raw

    def revoked(self) -> tuple[NodeId, ...]:
        """Who is out, sorted."""
        return tuple(sorted(self._revoked))

    def is_revoked(self, node: NodeId) -> bool:
        """Whether a node is out."""
        return node in self._revoked

    def revocation(self, node: NodeId) -> Decree | None:
        """Why a node is out."""
        return self._revoked.get(node)

    def all(self) -> tuple[Decree, ...]:
        """What is held, revocations first, by id."""
        return tuple(sorted(self._held.values(), key=lambda each: (each.kind, each.id)))

    def ids(self) -> tuple[bytes, ...]:
        """The ids of what is held, sorted."""
        return tuple(sorted(self._held))

    def raw(self, identifier: bytes) -> bytes | None:
        """The decree with this id, as it travels."""
        held = self._held.get(identifier)
        return None if held is None else held.raw

    def check(self, raw: bytes) -> Decree | None:
        """The decree of these bytes if its signature is good; it is not taken."""
        return self._verify(raw) if len(raw) <= DECREE_BYTES_MAX else None

    def add(self, decree: Decree) -> bool:
        """Take a decree that was checked; whether anything changed. What it makes void is dropped."""
        if decree.id in self._held or self._is_void(decree):
            return False
        if len(self._held) >= DECREES_MAX and decree.kind is DecreeKind.REVOCATION:
            return False
        self._settle([*self._held.values(), decree])
        return decree.id in self._held

    def load(self, raws: Iterable[bytes]) -> int:
        """Take decrees from a disk; how many of them were not good."""
        bad = 0
        for raw in raws:
            decree = self.check(raw)
            if decree is None:
                bad += 1
            else:
                self.add(decree)
        return bad

    def _is_void(self, decree: Decree) -> bool:
        by = self._revoked.get(decree.authority)
        return by is not None and by.rank < decree.rank

    def _settle(self, candidates: list[Decree]) -> None:
        """Draw the conclusions from the highest rank down."""
        revoked: dict[NodeId, Decree] = {}
        kept: list[Decree] = []
        for decree in sorted(candidates, key=lambda each: (each.rank, each.id)):
            by = revoked.get(decree.authority)
            if by is not None and by.rank < decree.rank:
                continue
            kept.append(decree)
            if decree.node is not None:
                revoked.setdefault(decree.node, decree)
        latest: dict[NodeId, Decree] = {}  # the highest generation of each authority
        for decree in kept:
            if decree.kind is DecreeKind.KEY_GENERATION:
                held = latest.setdefault(decree.authority, decree)
                if _order(held) < _order(decree):
                    latest[decree.authority] = decree
        revocations = [each for each in kept if each.kind is DecreeKind.REVOCATION]
        self._held = {each.id: each for each in (*revocations, *latest.values())}
        self._revoked = revoked
        self._generation = max(latest.values(), key=_order, default=None)
        joined = b"".join(sorted(self._held))
        self._hash = hashlib.blake2b(joined, digest_size=DECREE_ID_BYTES).digest()


def _order(decree: Decree) -> tuple[int, bytes]:
    return decree.generation, decree.raw
