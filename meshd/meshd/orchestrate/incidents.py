"""What happened lately: events and counters of the last minutes, bounded.

A counter since the start says little after a month: three stalls in five minutes are an overload, three in
a year are none. So the counters that health depends on are sampled, and read as what was added lately.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Final

import trio

from meshd.core.effects import Address
from meshd.core.events import (
    AddressContested,
    Event,
    MemberJoined,
    MemberUpdated,
    MeshJoined,
    SeedUnreachable,
    SelfEpochRaised,
)
from meshd_cms import NodeId, node_id_short

SAMPLE_INTERVAL_S: Final = 10.0
WINDOW_S: Final = 300.0
CONTESTED_MAX: Final = 32
SILENT_SEEDS_MAX: Final = 256
MOVERS_MAX: Final = 256  # nodes whose addresses are remembered; who moved longest ago makes room
MOVES_MAX: Final = 8  # of each

Counters = Mapping[str, int]


class Incidents:
    """Remembers for `WINDOW_S`.

    Args:
        sample: the counters now.
        clock: monotonic seconds.
    """

    def __init__(self, sample: Callable[[], Counters], clock: Callable[[], float]) -> None:
        self._sample = sample
        self._clock = clock
        self._began_s = clock()
        self._samples: deque[tuple[float, Counters]] = deque(
            maxlen=int(WINDOW_S / SAMPLE_INTERVAL_S)
        )
        self._contested: deque[tuple[float, AddressContested]] = deque(maxlen=CONTESTED_MAX)
        self._raised: deque[float] = deque(maxlen=CONTESTED_MAX)
        self._silent: dict[Address, None] = {}
        self._moves: OrderedDict[NodeId, deque[tuple[float, Address]]] = OrderedDict()

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await trio.sleep(SAMPLE_INTERVAL_S)
            self._samples.append((self._clock(), self._sample()))

    def note(self, event: Event) -> None:
        """An event of the node core."""
        match event:
            case AddressContested():
                self._contested.append((self._clock(), event))
            case SelfEpochRaised():
                self._raised.append(self._clock())
            case SeedUnreachable(address=address):
                if len(self._silent) < SILENT_SEEDS_MAX:
                    self._silent[address] = None
            case (
                MemberJoined(node=node, address=address) | MemberUpdated(node=node, address=address)
            ):
                self._note_address(node, address)
            case MeshJoined(address=address):
                self._silent.pop(address, None)
            case _:
                pass

    @property
    def window_s(self) -> float:
        """How far back `lately` looks: less after a start."""
        began_s = self._samples[0][0] if self._is_full else self._began_s
        return self._clock() - began_s

    def lately(self) -> Counters:
        """What was added to each counter within the window."""
        before: Counters = self._samples[0][1] if self._is_full else {}
        return {name: count - before.get(name, 0) for name, count in self._sample().items()}

    def epochs_raised(self) -> int:
        """Times that this node had to take a new epoch within the window."""
        return sum(at_s > self._clock() - WINDOW_S for at_s in self._raised)

    def contested(self) -> tuple[tuple[Address, NodeId, NodeId], ...]:
        """Addresses that two members claimed within the window: address, holder, other."""
        oldest_s = self._clock() - WINDOW_S
        found = {
            (event.address, event.holder, event.other): None
            for at_s, event in self._contested
            if at_s > oldest_s
        }
        return tuple(found)

    def doubles(self) -> Mapping[NodeId, tuple[Address, ...]]:
        """Nodes that came back to an address which they had left, with their addresses, in the window.

        A node that moves has one address after the other; two processes with one identity take turns.
        """
        oldest_s = self._clock() - WINDOW_S
        found: dict[NodeId, tuple[Address, ...]] = {}
        for node, moves in self._moves.items():
            recent = [address for at_s, address in moves if at_s > oldest_s]
            distinct = tuple(dict.fromkeys(recent))
            if len(recent) > len(distinct) > 1:
                found[node] = distinct
        return found

    def is_silent(self, address: Address) -> bool:
        """Whether a seed was asked again and again and did not answer since."""
        return address in self._silent

    def _note_address(self, node: NodeId, address: Address) -> None:
        moves = self._moves.setdefault(node, deque(maxlen=MOVES_MAX))
        if not moves or moves[-1][1] != address:
            moves.append((self._clock(), address))
            self._moves.move_to_end(node)
        if len(self._moves) > MOVERS_MAX:
            self._moves.popitem(last=False)

    @property
    def _is_full(self) -> bool:
        return len(self._samples) == self._samples.maxlen


def event_name(event: Event) -> str:
    """`member.joined` of `MemberJoined`: what a log line of it is called."""
    words = re.findall(r"[A-Z][a-z]*", type(event).__name__)
    return f"{words[0]}.{'_'.join(words[1:])}".lower()


def event_fields(event: Event) -> dict[str, object]:
    """An event as log fields; ids in the form that people type."""
    return {
        field.name: node_id_short(NodeId(value)) if isinstance(value, bytes) else value
        for field in fields(event)
        for value in (getattr(event, field.name),)
    }
