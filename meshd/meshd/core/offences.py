"""Who misbehaves: offences by node, bounded, for a person to read.

An offence is what no honest node commits often. Counting decides nothing by itself; what is done about an
offence is said where it is found. A member can write another's id on what it sends (all members share
the datagram key), so a name here is where to look first, and no proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Final

from meshd_cms.types import NodeId

OFFENDERS_MAX: Final = 256
"""Nodes that are remembered; the one with the fewest offences makes room."""


class Offence(Enum):
    """What a node did."""

    ACCUSATIONS_REFUTED = "accusations_refuted"  # accused others again and again who were there
    CLAIMS_FORGED = "claims_forged"  # sent an accusation in our name that we never made
    EPOCH_ABSURD = "epoch_absurd"  # told of a life of another that no clock can have begun
    RECORD_REJECTED = "record_rejected"  # sent a record that its owner did not sign
    JOINS_EXCESS = "joins_excess"  # joins far faster than a node that starts
    VERSION_UNFOUNDED = (
        "version_unfounded"  # announced a version of its record that it does not have
    )
    DECREE_REJECTED = "decree_rejected"  # sent a decree that no authority of the mesh signed
    MALFORMED = "malformed"  # sealed with the mesh's key, and no message of this protocol


class Offences:
    """Counts offences by node and kind."""

    def __init__(self) -> None:
        self._by_node: dict[NodeId, Counter[Offence]] = {}

    def note(self, node: NodeId, kind: Offence) -> None:
        """One more."""
        counts = self._by_node.get(node)
        if counts is None:
            if len(self._by_node) >= OFFENDERS_MAX:
                least = min(self._by_node, key=lambda one: self._by_node[one].total())
                del self._by_node[least]
            counts = self._by_node[node] = Counter()
        counts[kind] += 1

    def report(self) -> Mapping[NodeId, Mapping[str, int]]:
        """Counts since the start by node, by the value of the kind; most first."""
        ordered = sorted(self._by_node.items(), key=lambda item: (-item[1].total(), item[0]))
        return {
            node: {kind.value: counts[kind] for kind in Offence if counts[kind]}
            for node, counts in ordered
        }
