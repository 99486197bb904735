"""From when on, and to what, the text of an answer is constrained. Pure.

A constraint is a grammar and a gate. The gate looks at the text of the answer so far and says where in it the
grammar begins: at once, behind a marker of the model (the end of its reasoning, the beginning of a tool
call), or never. What stands behind that place has to fit the grammar, so a token that contains the end of a
marker and something else is chosen again if that does not fit. Grammars that llama.cpp itself starts lazily
end the process in this case: they are not used (decision 0026).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

HELD_CHARACTERS_MAX: Final = 4_096  # of an answer that may still become a tool call


class Verdict(Enum):
    """What a gate says that does not name a place."""

    WAIT = "wait"  # not decided: look again with more text
    FREE = "free"  # never


Opened: TypeAlias = "int | Verdict"
"""Where in the text the grammar begins, or a verdict."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The markers around what a model thinks before it answers."""

    opens: str  # "<think>"
    closes: str  # "</think>"
    opened: bool = False  # the prompt ends within it
    forbidden: bool = False  # it is over before the answer begins


@dataclass(frozen=True, slots=True)
class Gate:
    """Says where the grammar begins.

    Attributes:
        markers: it begins behind the first of these; without any, with the answer.
        bare: a pattern of what an answer begins with that is constrained from its beginning; used where
            there are no markers.
        reasoning: what may stand before everything, and is not constrained.
    """

    markers: tuple[str, ...] = ()
    bare: str = ""
    reasoning: Reasoning | None = None

    @property
    def at_once(self) -> bool:
        """Whether nothing may come before the grammar."""
        return not self.markers and not self.bare and self.reasoning is None

    @property
    def bound(self) -> bool:
        """Whether the answer has to fit the grammar, and not only if it turns into what that is for."""
        return not self.markers and not self.bare

    @property
    def skips_reasoning(self) -> bool:
        """Whether an answer that does not begin with reasoning has to fit from its first token."""
        return self.bound and self.reasoning is not None and not self.reasoning.opened

    def look(self, text: str) -> Opened:
        """Say where in the whole text of the answer the grammar begins."""
        start = self._behind_reasoning(text)
        if isinstance(start, Verdict):
            return start
        if self.markers:
            found = [at + len(m) for m in self.markers if (at := text.find(m, start)) >= 0]
            return min(found) if found else Verdict.WAIT
        if self.bare:
            return self._look_bare(text, start)
        return start

    def _behind_reasoning(self, text: str) -> Opened:
        reasoning = self.reasoning
        if reasoning is None or reasoning.forbidden:
            return 0
        if not reasoning.opened:
            begun = text.lstrip()
            if not begun.startswith(reasoning.opens):
                return Verdict.WAIT if reasoning.opens.startswith(begun) else 0
        end = text.find(reasoning.closes)
        if end < 0:
            return Verdict.WAIT
        return _behind_space(text, end + len(reasoning.closes))

    def _look_bare(self, text: str, start: int) -> Opened:
        begin = _behind_space(text, start)
        if re.match(self.bare, text[begin:]):
            return begin
        # A pattern that still may fit fits a prefix of itself: its pieces are tried one by one.
        if len(text) - begin > HELD_CHARACTERS_MAX or (text[begin:] and text[begin] not in "{<["):
            return Verdict.FREE
        return Verdict.WAIT


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer has to look like."""

    grammar: str
    gate: Gate = Gate()
