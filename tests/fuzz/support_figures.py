"""What a fuzz run measures, and the exception that says an oracle saw what must not be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class Broken(AssertionError):
    """Something happened that no input may make happen."""


@dataclass(slots=True)
class Kind:
    """Inputs of one kind, such as `Ping+Claim`."""

    count: int = 0
    total_s: float = 0.0
    worst_s: float = 0.0
    worst_ratio: float = 0.0  # bytes sent in answer, at once, per byte received
    worst_datagrams: int = 0
    slowest: bytes = b""


@dataclass(slots=True)
class Figures:
    """Sums over inputs; figures of workers add up."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    kinds: dict[str, Kind] = field(default_factory=dict[str, Kind])
    largest: dict[str, int] = field(default_factory=dict[str, int])  # container -> its length
    received_bytes: int = 0
    answered_bytes: int = 0

    def note(
        self, kind: str, data: bytes, took_s: float, ratio: float = 0.0, datagrams: int = 0
    ) -> None:
        """One input."""
        one = self.kinds.setdefault(kind, Kind())
        one.count += 1
        one.total_s += took_s
        one.worst_ratio = max(one.worst_ratio, ratio)
        one.worst_datagrams = max(one.worst_datagrams, datagrams)
        if took_s > one.worst_s:
            one.worst_s, one.slowest = took_s, data[:2048]

    def hold(self, lengths: dict[str, int]) -> None:
        """Container lengths, of which the largest is kept."""
        for where, length in lengths.items():
            self.largest[where] = max(length, self.largest.get(where, 0))

    def add(self, other: Figures) -> None:
        """Take in what another run measured."""
        self.outcomes += other.outcomes
        self.received_bytes += other.received_bytes
        self.answered_bytes += other.answered_bytes
        self.hold(other.largest)
        for name, theirs in other.kinds.items():
            ours = self.kinds.setdefault(name, Kind())
            ours.count += theirs.count
            ours.total_s += theirs.total_s
            ours.worst_ratio = max(ours.worst_ratio, theirs.worst_ratio)
            ours.worst_datagrams = max(ours.worst_datagrams, theirs.worst_datagrams)
            if theirs.worst_s > ours.worst_s:
                ours.worst_s, ours.slowest = theirs.worst_s, theirs.slowest
