"""Writes texts at random that a grammar describes."""

from __future__ import annotations

import random

from meshd_plugins.builtin.llama.prompt.gbnf import Chars, Grammar, Sequence

FAR = 10**9


class Walker:
    """Of one grammar; a walk ends soon after it has become `long` characters."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._shortest = [FAR] * len(grammar.rules)  # characters of the shortest text of each rule
        changed = True
        while changed:
            changed = False
            for number, alternates in enumerate(grammar.rules):
                least = min(map(self._length, alternates))
                if least < self._shortest[number]:
                    self._shortest[number] = least
                    changed = True

    def _length(self, sequence: Sequence) -> int:
        lengths = [1 if isinstance(e, Chars) else self._shortest[e] + 1 for e in sequence]
        return min(FAR, sum(lengths))

    def walk(self, chance: random.Random, long: int = 150) -> str:
        """One text."""
        text: list[str] = []
        todo: list[int | Chars] = [self._grammar.root]
        while todo:
            element = todo.pop()
            if isinstance(element, Chars):
                low, high = chance.choice(element.ranges)
                text.append(chr(chance.randint(low, min(high, low + 200))))
                continue
            alternates = self._grammar.rules[element]
            sequence = (
                chance.choice([a for a in alternates if self._length(a) < FAR])
                if len(text) < long
                else min(alternates, key=self._length)
            )
            todo += reversed(sequence)
        return "".join(text)
