"""Sequences that were computed and are kept outside of the context, within a bound of bytes.

What is true, whatever the order of calls:
- the states kept take at most `bytes_max` together, each counted as its own `size_bytes` says;
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
        self.bytes = 0
        self.evicted = 0  # since the start

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Kept[StateT]]:
        """From what goes first to what goes last."""
        return iter(self._entries)

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
        if size > self.bytes_max:
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
        while self.bytes + size > self.bytes_max:
            self._drop(next((e for e in self._entries if not e.pinned), self._entries[0]))
            self.evicted += 1
        self._entries.append(entry)
        self.bytes += size
        return True

    def _drop(self, entry: Kept[StateT]) -> None:
        self._entries.remove(entry)
        self.bytes -= entry.state.size_bytes
