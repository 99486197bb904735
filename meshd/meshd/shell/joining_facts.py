"""What joiners are told of a running node's mesh: the `MeshFacts` of its desk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshd.core.effects import Address
from meshd.shell.addresses import Whereabouts
from meshd.shell.trust_state import TrustState
from meshd_cms import NodeId


@dataclass(frozen=True, slots=True)
class TrustFacts:
    """Reads them from the parts that hold them.

    Attributes:
        trust: keys and decrees.
        whereabouts: of this node.
        peers: where nodes are that are alive.
    """

    trust: TrustState
    whereabouts: Whereabouts
    peers: Callable[[], Sequence[Address]]

    def datagram_key(self) -> tuple[int, bytes]:
        """Generation and key in force."""
        current = self.trust.ring.current
        return current.generation, current.key

    def decrees(self) -> Sequence[bytes]:
        """The decrees that hold, as they travel."""
        return [decree.raw for decree in self.trust.decrees.all()]

    def addresses(self) -> Sequence[Address]:
        """Where this node is reached: what it tells everybody, then what it announces."""
        best = self.whereabouts.address
        others = [(host, best[1]) for host in self.whereabouts.announced()]
        return [best, *(each for each in others if each != best)]

    def members(self) -> Sequence[Address]:
        """Where other nodes of the mesh are."""
        return self.peers()

    def is_revoked(self, node: NodeId) -> bool:
        """Whether a node is out."""
        return self.trust.decrees.is_revoked(node)

    def may_issue(self) -> bool:
        """Whether the authority that we issue with still holds."""
        return self.trust.is_issuer
