r"""Regular expressions of JSON schemas, as grammars of strings in JSON, or of bare texts.

The subset: characters, `.`, sets, `\d \w \s` and their opposites, groups, alternatives, `* + ? {m,n}`,
and anchors at the ends. A text that fits as a whole also fits somewhere, so a pattern without anchors
is taken as one with them. What is not in the subset (looking around, references back, `\b`) is refused.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Final

from meshd_plugins.builtin.llama.prompt.gbnf import (
    REPETITIONS_MAX,
    Range,
    inverted,
    merged,
)
from meshd_plugins.builtin.llama.prompt.terminals import literal

PATTERN_CHARACTERS_MAX: Final = 512
NESTING_MAX: Final = 16

_DIGIT: Final = ((0x30, 0x39),)
_WORD: Final = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Final = ((0x20, 0x20),)  # of all kinds of space the plainest is enough
_ALL_SPACE: Final = (
    (0x09, 0x0D),
    (0x20, 0x20),
    (0x85, 0x85),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)
_ALL_WORD: Final = (*_WORD, (0x80, 0x10FFFF))  # what other engines take for a letter is left out
_ALL_DIGIT: Final = (*_DIGIT, (0x80, 0x10FFFF))
_CLASSES: Final[dict[str, tuple[Range, ...]]] = {
    "d": _DIGIT,
    "w": _WORD,
    "s": _SPACE,
    "D": inverted(_ALL_DIGIT),
    "W": inverted(_ALL_WORD),
    "S": inverted(_ALL_SPACE),
}
_CONTROLS: Final = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}
_UNWRITTEN: Final = merged([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)])
NOT_BARE: Final = merged([(0, 8), (0xB, 0x1F), (0x3C, 0x3C), (0x7F, 0x7F), (0xD800, 0xDFFF)])
_ESCAPED: Final = {0x22: '\\"', 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x0C: "\\f"}


class PatternError(Exception):
    """The pattern is malformed, or not in the subset. The message is for people."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a pattern describes."""

    expression: str  # GBNF, without the quotes of the string
    least: int  # characters
    most: int | None  # None: no bound


def read_pattern(text: str, *, bare: bool = False) -> Pattern:
    """Turn a pattern into a grammar. Raises PatternError.

    Args:
        text: the pattern.
        bare: of the characters themselves, none of which is `<`, rather than as JSON writes them.
    """
    if len(text) > PATTERN_CHARACTERS_MAX:
        raise PatternError(f"it has {len(text)} characters; at most {PATTERN_CHARACTERS_MAX}")
    reader = _Reader(text, bare=bare)
    found = reader.alternatives(0)
    if reader.at < len(text):
        raise PatternError("')' without '('")
    return found


class _Reader:
    def __init__(self, text: str, *, bare: bool) -> None:
        self.text = text
        self.at = 0
        self._of_set = _of_bare_set if bare else _of_set

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise PatternError("it ends too early")
        self.at += 1
        return character

    def alternatives(self, depth: int) -> Pattern:
        if depth > NESTING_MAX:
            raise PatternError(f"more than {NESTING_MAX} groups within each other")
        found = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            found.append(self._sequence(depth))
        if len(found) == 1:
            return found[0]
        most = None
        lengths = [each.most for each in found]
        if None not in lengths:
            most = max(length for length in lengths if length is not None)
        expression = " | ".join(each.expression for each in found)
        return Pattern(f"({expression})", min(each.least for each in found), most)

    def _sequence(self, depth: int) -> Pattern:
        parts: list[str] = []
        least, most = 0, 0
        unbounded = False
        if depth == 0 and self._peek() == "^":
            self.at += 1
        while (character := self._peek()) and character not in "|)":
            if (
                character == "$"
                and depth == 0
                and self.text[self.at + 1 : self.at + 2] in ("", "|")
            ):
                self.at += 1
                break
            item = self._quantified(self._atom(depth))
            parts.append(item.expression)
            least += item.least
            most += item.most or 0
            unbounded = unbounded or item.most is None
        return Pattern(" ".join(parts) or '""', least, None if unbounded else most)

    def _atom(self, depth: int) -> Pattern:
        character = self._take()
        if character == "(":
            return self._group(depth)
        if character == "[":
            return self._of_set(self._set())
        if character == ".":
            return self._of_set(inverted(((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))))
        if character == "\\":
            return self._of_set(self._escape())
        if character in "*+?{":
            raise PatternError(f"nothing stands before {character!r}")
        if character in "^$":
            raise PatternError(f"{character!r} is supported at the ends only")
        return self._of_set(((ord(character), ord(character)),))

    def _group(self, depth: int) -> Pattern:
        if self._peek() == "?":
            rest = self.text[self.at :]
            if rest.startswith("?:"):
                self.at += 2
            elif rest.startswith(("?<", "?P<")) and not rest.startswith(("?<=", "?<!")):
                end = rest.find(">")
                if end < 0:
                    raise PatternError("a group's name has no end")
                self.at += end + 1
            else:
                raise PatternError("looking around is not supported")
        found = self.alternatives(depth + 1)
        if self._take() != ")":
            raise PatternError("')' is missing")
        return Pattern(f"({found.expression})", found.least, found.most)

    def _quantified(self, item: Pattern) -> Pattern:
        mark = self._peek()
        if mark == "{":
            least, most = self._braces()
        elif mark and mark in "*+?":
            self.at += 1
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[mark]
        else:
            return item
        if self._peek() and self._peek() in "?+":  # lazy or possessive: the same texts
            self.at += 1
        bound = f"{least},{'' if most is None else most}"
        longest = None if most is None or item.most is None else item.most * most
        return Pattern(f"({item.expression}){{{bound}}}", item.least * least, longest)

    def _braces(self) -> tuple[int, int | None]:
        end = self.text.find("}", self.at)
        first, comma, second = self.text[self.at + 1 : max(end, 0)].partition(",")
        if end < 0 or not first.isdecimal() or (second and not second.isdecimal()):
            raise PatternError("'{' is not followed by a number of repetitions")
        self.at = end + 1
        least = int(first[:6])
        most = (int(second[:6]) if second else None) if comma else least
        if least > REPETITIONS_MAX or (most is not None and most < least):
            raise PatternError(f"repetitions are from 0 to {REPETITIONS_MAX}")
        return least, None if most is None else min(most, REPETITIONS_MAX)

    def _escape(self) -> tuple[Range, ...]:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character in _CONTROLS:
            point = _CONTROLS[character]
        elif character in "xu":
            size = 2 if character == "x" else 4
            digits = self.text[self.at : self.at + size]
            self.at += size
            if len(digits) != size or not all(digit in string.hexdigits for digit in digits):
                raise PatternError(f"'\\{character}' is not followed by {size} hexadecimal digits")
            point = int(digits, 16)
        elif character.isalnum():
            raise PatternError(f"'\\{character}' is not supported")
        else:
            point = ord(character)
        return ((point, point),)

    def _set(self) -> tuple[Range, ...]:
        negated = self._peek() == "^"
        self.at += negated
        found: list[Range] = []
        while self._peek() != "]":
            ranges = self._member()
            low = ranges[0][0]
            single = len(ranges) == 1 and low == ranges[0][1]
            if single and self._peek() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                upper = self._member()
                if len(upper) != 1 or upper[0][0] != upper[0][1] or upper[0][0] < low:
                    raise PatternError("a range of characters has no order")
                ranges = ((low, upper[0][0]),)
            found += ranges
        self.at += 1
        ranges = merged(found)
        return inverted(ranges) if negated else ranges

    def _member(self) -> tuple[Range, ...]:
        character = self._take()
        if character == "\\":
            if self._peek() == "b":
                raise PatternError("'\\b' is not supported")
            return self._escape()
        return ((ord(character), ord(character)),)


def _of_set(ranges: tuple[Range, ...]) -> Pattern:
    """One character out of a set, as JSON writes it."""
    plain = inverted(merged([*inverted(ranges), *_UNWRITTEN]))
    choices = [f"[{''.join(_range(low, high) for low, high in plain)}]"] if plain else []
    narrow = sum(high - low + 1 for low, high in ranges) <= 256
    for point, written in _ESCAPED.items():
        # In a wide set such as [^a] nobody misses them; in a narrow one they may be what is meant.
        if any(low <= point <= high for low, high in ranges) and (narrow or not plain):
            choices.append(literal(written))
    if not choices:
        raise PatternError("a set of characters that no string can hold")
    expression = choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"
    return Pattern(expression, 1, 1)


def _of_bare_set(ranges: tuple[Range, ...]) -> Pattern:
    """One character out of a set, as it is."""
    plain = inverted(merged([*inverted(ranges), *NOT_BARE]))
    if not plain:
        raise PatternError("a set of characters that no text can hold")
    return Pattern(f"[{''.join(_range(low, high) for low, high in plain)}]", 1, 1)


def _range(low: int, high: int) -> str:
    return f"{_point(low)}-{_point(high)}" if low < high else _point(low)


def _point(point: int) -> str:
    character = chr(point)
    return character if character.isascii() and character.isalnum() else f"\\U{point:08X}"
