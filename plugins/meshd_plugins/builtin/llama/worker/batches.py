"""Which texts of which calls go into the next batch of an embedding model.

Texts are whole: a text is one sequence of one batch. Start-time fair queuing decides whose is next: the
call that has had the fewest tokens computed, where one that comes later begins with what the one that has
had the least has now. A text that does not fit any more waits for the next batch, and with it its call;
others may fill the gap.

Invariants, whatever the order of `submit`, `cancel` and `take`:
- a text is in exactly one batch, unless its call was cancelled before, and those of a call are in order;
- a batch holds at most `texts` texts and `tokens` tokens, or one text that is longer than that;
- of two calls that both have texts left, neither is ahead by more than a batch and a text.

Pure: no clock, no I/O. llama.cpp knows no padding, so texts are not sorted by length: nothing would be won.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sizes of a batch."""

    tokens: int
    texts: int


class Member(NamedTuple):
    """A text of a batch."""

    call: int
    text: int  # its number in its call
    tokens: int


@dataclass(slots=True)
class _Waiting:
    """A call with texts left."""

    lengths: Sequence[int]
    next: int = 0


class BatchFormer:
    """Drive it with `submit`, `cancel` and, while `busy`, `take`."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._calls: dict[int, _Waiting] = {}
        self._order: list[tuple[int, int, int]] = []  # heap: tokens had, turn of arrival, call
        self._turn = 0

    @property
    def busy(self) -> bool:
        """Whether any text waits."""
        return bool(self._calls)

    def submit(self, call: int, lengths: Sequence[int]) -> None:
        """Take the texts of a call: their lengths in tokens, at least one, each at least 1."""
        assert call not in self._calls, "a call comes once"
        assert lengths, "a call has a text"
        assert min(lengths) > 0, "a text has a token"
        self._calls[call] = _Waiting(lengths)
        self._turn += 1
        least = self._order[0][0] if self._order else 0
        heapq.heappush(self._order, (least, self._turn, call))

    def cancel(self, call: int) -> None:
        """Forget a call. One that has no texts left, or never came, is ignored."""
        if self._calls.pop(call, None) is not None:
            self._order = [entry for entry in self._order if entry[2] != call]
            heapq.heapify(self._order)

    def take(self) -> tuple[Member, ...]:
        """Return the texts of the next batch, those of each call in order; empty when none waits."""
        members: list[Member] = []
        left = self._limits.tokens
        too_long: list[tuple[int, int, int]] = []
        while self._order and len(members) < self._limits.texts:
            had, turn, call = entry = heapq.heappop(self._order)
            waiting = self._calls[call]
            tokens = waiting.lengths[waiting.next]
            if members and tokens > left:
                too_long.append(entry)
                continue
            members.append(Member(call, waiting.next, tokens))
            left -= tokens
            waiting.next += 1
            if waiting.next < len(waiting.lengths):
                heapq.heappush(self._order, (had + tokens, turn, call))
            else:
                del self._calls[call]
        for entry in too_long:
            heapq.heappush(self._order, entry)
        return tuple(members)
