"""What the network does to what is sent, and how a machine's clock goes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from meshd.core.config import SEALING_BYTES

HEADER_BYTES = 42
"""Ethernet, IPv4 and UDP headers of a datagram."""

SEGMENT_BYTES = 1448
SEGMENT_HEADER_BYTES = 66
"""A TCP segment's payload and its headers (with the timestamp option)."""

RETRANSMIT_FIRST_S = 0.2
RETRANSMISSIONS_MAX = 8
"""What Linux does with a lost segment: again after 0.2 s, doubling; an orphaned one is given up."""


def datagram_bytes(payload: bytes) -> int:
    """What a datagram costs on the wire."""
    return len(payload) + SEALING_BYTES + HEADER_BYTES


def stream_bytes(payload: bytes) -> int:
    """What a message on an open stream costs on the wire, with one acknowledgement for two segments."""
    segments = -(-len(payload) // SEGMENT_BYTES)
    return len(payload) + segments * SEGMENT_HEADER_BYTES * 3 // 2


@dataclass(slots=True)
class Network:
    """What the network does. Streams are slower, but neither lost nor reordered."""

    latency_least_s: float = 0.0002
    latency_most_s: float = 0.0015
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # share of datagrams delayed by up to `reorder_most_s` more
    reorder_most_s: float = 0.1
    loss_in: dict[int, float] = field(default_factory=dict[int, float])  # by node: it is deaf
    loss_out: dict[int, float] = field(default_factory=dict[int, float])  # by node: it is mute
    lag_s: dict[int, float] = field(default_factory=dict[int, float])  # by node, either way
    walled: set[int] = field(
        default_factory=set[int]
    )  # behind a firewall: streams pass, no datagram
    cuts: set[tuple[int, int]] = field(
        default_factory=set[tuple[int, int]]
    )  # (from, to); asked only

    def is_cut(self, source: int, target: int) -> bool:
        """Whether nothing passes in that direction."""
        return (source, target) in self.cuts

    def is_lost(self, rng: random.Random, source: int, target: int) -> bool:
        """Whether this one packet is lost."""
        if self.loss and rng.random() < self.loss:
            return True
        if self.loss_out and rng.random() < self.loss_out.get(source, 0.0):
            return True
        return bool(self.loss_in) and rng.random() < self.loss_in.get(target, 0.0)

    def delay_s(self, rng: random.Random, source: int, target: int) -> float:
        """How long this one packet takes."""
        delay_s = rng.uniform(self.latency_least_s, self.latency_most_s)
        if self.lag_s:
            delay_s += self.lag_s.get(source, 0.0) + self.lag_s.get(target, 0.0)
        return delay_s

    def segment_s(self, rng: random.Random, source: int, target: int, trips: int) -> float:
        """How long a stream takes for so many one-way trips, lost segments being sent again."""
        total_s = 0.0
        for _ in range(trips):
            again_s = RETRANSMIT_FIRST_S
            for _ in range(RETRANSMISSIONS_MAX):
                if not self.is_lost(rng, source, target):
                    break
                total_s += again_s
                again_s *= 2
            total_s += self.delay_s(rng, source, target)
            source, target = target, source
        return total_s


class Clock:
    """A machine's monotonic clock: since its own boot, at its own rate; it may leap."""

    def __init__(self, offset_s: float, rate: float = 1.0) -> None:
        self._since_s = 0.0  # true time of the last change
        self._read_s = offset_s  # what it showed then
        self._rate = rate

    def at(self, true_s: float) -> float:
        """What it shows."""
        return self._read_s + (true_s - self._since_s) * self._rate

    def when(self, shown_s: float) -> float:
        """The true time at which it will show this."""
        return self._since_s + (shown_s - self._read_s) / self._rate

    def drift(self, true_s: float, rate: float) -> None:
        """From now on it goes at this rate."""
        self._read_s, self._since_s, self._rate = self.at(true_s), true_s, rate

    def leap(self, true_s: float, by_s: float) -> None:
        """It shows that much more at once; less only for time in which nobody looked."""
        self._read_s, self._since_s = self.at(true_s) + by_s, true_s
