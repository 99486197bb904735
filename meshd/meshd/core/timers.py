"""The core's timer heap. Invariant: a timer fires at most once, in order of (due time, creation).

A cancelled timer stays in the heap until it comes up or the heap is mostly dead wood; nothing of it is
visible from outside. Timers hold plain callables: they never leave the process.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Final

_COMPACT_ABOVE: Final = 64


class Timer:
    """A pending call; `cancel` is idempotent and does nothing after the timer fired."""

    __slots__ = ("_owner", "call", "due_s")

    def __init__(self, owner: Timers, due_s: float, call: Callable[[], None]) -> None:
        self._owner = owner
        self.due_s = due_s
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Never fire."""
        if self.call is not None:
            self.call = None
            self._owner.note_cancelled()


class Timers:
    """A deterministic set of timers; it never looks at a clock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._created = 0
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def at(self, due_s: float, call: Callable[[], None]) -> Timer:
        """Have `call` made by the first `pop_due(now_s)` with now_s >= due_s."""
        assert math.isfinite(due_s), due_s
        timer = Timer(self, due_s, call)
        self._created += 1
        heapq.heappush(self._heap, (due_s, self._created, timer))
        return timer

    def deadline_s(self) -> float:
        """When the next timer is due; `math.inf` when there is none."""
        while self._heap and self._heap[0][2].call is None:
            heapq.heappop(self._heap)
            self._dead -= 1
        return self._heap[0][0] if self._heap else math.inf

    def pop_due(self, now_s: float) -> Callable[[], None] | None:
        """Take the next due timer; the caller makes the call."""
        if self.deadline_s() > now_s:
            return None
        _, _, timer = heapq.heappop(self._heap)
        call, timer.call = timer.call, None
        return call

    def postpone(self, by_s: float) -> None:
        """Move every timer `by_s` later, as if this process's clock had stood still."""
        assert by_s >= 0.0, by_s
        moved: list[tuple[float, int, Timer]] = []
        for due_s, created, timer in self._heap:
            if timer.call is not None:
                timer.due_s = due_s + by_s
                moved.append((timer.due_s, created, timer))
        heapq.heapify(moved)
        self._heap, self._dead = moved, 0

    def clear(self) -> None:
        """Cancel every timer."""
        for _, _, timer in self._heap:
            timer.call = None
        self._heap, self._dead = [], 0

    def note_cancelled(self) -> None:
        """A timer of ours was cancelled; only `Timer.cancel` calls this."""
        self._dead += 1
        if self._dead > _COMPACT_ABOVE and self._dead * 2 > len(self._heap):
            self._heap = [item for item in self._heap if item[2].call is not None]
            heapq.heapify(self._heap)
            self._dead = 0
