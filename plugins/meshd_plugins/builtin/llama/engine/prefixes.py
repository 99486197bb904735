"""Sequences that were computed and are kept outside of the context, within a bound of bytes.

What is true, whatever the order of calls:
- the states kept, and those held while they are handed over, take at most `bytes_max` together, each counted
  once, as its own `size_bytes` says;
- an entry is found only by its own caller, or by everybody where it is pinned;
- no entry is the beginning of another one of the same caller: the longer one serves both.

What was used longest ago goes first; pinned entries (prompts that the operator named) go last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic

from meshd_plugins.builtin.llama.engine.jobs import Scope, StateT
from meshd_plugins.builtin.llama.engine.sequences import common_prefix


@dataclass(frozen=True, slots=True)
class Kept(Generic[StateT]):
    """One sequence."""

    tokens: tuple[int, ...]
    state: StateT
    scope: Scope
    tag: bytes = b""
    pinned: bool = False

    def serves(self, scope: Scope) -> bool:
        """Whether a request of this scope may profit from it."""
        return self.pinned or self.scope.caller == scope.caller


class PrefixStore(Generic[StateT]):
    """Bounded by bytes; the entry used last is at the end."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._entries: list[Kept[StateT]] = []
        self._held: list[Kept[StateT]] = []  # on their way in or out, kept here or not
        self.evicted = 0  # since the start

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Kept[StateT]]:
        """From what goes first to what goes last."""
        return iter(self._entries)

    @property
    def bytes(self) -> int:
        """What the entries take, and what is held beside them."""
        beside = (h for h in self._held if not any(h is entry for entry in self._entries))
        return sum(e.state.size_bytes for e in self._entries) + sum(
            h.state.size_bytes for h in beside
        )

    @property
    def room_bytes(self) -> int:
        """What one more could take at most: all but what is held."""
        return self.bytes_max - sum(held.state.size_bytes for held in self._held)

    def hold(self, entry: Kept[StateT]) -> bool:
        """Count a state until `let_go`, whether it is kept or not. False: there is no room for it."""
        if not any(entry is kept for kept in self._entries):
            size = entry.state.size_bytes
            if size > self.room_bytes:
                return False
            self._make_room(size)
        self._held.append(entry)
        return True

    def let_go(self, entry: Kept[StateT]) -> None:
        """It is handed over, or will not be."""
        self._held = [held for held in self._held if held is not entry]

    def find(self, tokens: tuple[int, ...], scope: Scope) -> tuple[Kept[StateT] | None, int]:
        """Return the entry that has most of a prompt in common with it, and how many tokens."""
        best: Kept[StateT] | None = None
        common = 0
        for entry in self._entries:
            if entry.serves(scope) and (n := common_prefix(entry.tokens, tokens)) > common:
                best, common = entry, n
        return best, common

    def used(self, entry: Kept[StateT]) -> None:
        """It helped a request just now: it goes later."""
        self._entries.remove(entry)
        self._entries.append(entry)

    def put(self, entry: Kept[StateT]) -> bool:
        """Keep an entry. False: it is larger than all that may be kept, or another one holds all of it."""
        size = entry.state.size_bytes
        if size > self.room_bytes:
            return False
        for other in tuple(self._entries):
            if other.pinned != entry.pinned or other.scope.caller != entry.scope.caller:
                continue
            common = common_prefix(other.tokens, entry.tokens)
            if common == len(entry.tokens):
                self.used(other)
                return False
            if common == len(other.tokens):
                self._drop(other)
        self._make_room(size)
        self._entries.append(entry)
        return True

    def _make_room(self, size: int) -> None:
        """Drop what was used longest ago until so many bytes, at most `room_bytes`, are free."""
        while self.bytes + size > self.bytes_max:
            # To drop what is held frees nothing.
            free = [e for e in self._entries if not any(e is held for held in self._held)]
            self._drop(next((e for e in free if not e.pinned), free[0]))
            self.evicted += 1

    def _drop(self, entry: Kept[StateT]) -> None:
        self._entries = [each for each in self._entries if each is not entry]
