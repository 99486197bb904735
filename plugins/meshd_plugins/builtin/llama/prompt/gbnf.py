"""Grammars in llama.cpp's notation (GBNF), read as llama.cpp reads them.

What is read are plain rules, with repetitions and groups written out as llama.cpp does it, for
`gbnf_check` to judge them and for tests to walk over them. What is too large or too deep is refused here.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

GRAMMAR_BYTES_MAX: Final = 256 * 1024
NESTING_MAX: Final = 32  # of parentheses
REPETITIONS_MAX: Final = 2000  # llama.cpp's own bound
ELEMENTS_MAX: Final = 60_000  # after repetitions are written out

_WORD: Final = frozenset(string.ascii_letters + string.digits + "-")
_ESCAPES: Final = {
    "t": "\t",
    "r": "\r",
    "n": "\n",
    "\\": "\\",
    '"': '"',
    "[": "[",
    "]": "]",
    "-": "-",
}
_HEX: Final = {"x": 2, "u": 4, "U": 8}
UNICODE_MAX: Final = 0x10FFFF

Range: TypeAlias = tuple[int, int]


class GrammarError(Exception):
    """The grammar cannot be used. The message is for people."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set."""

    ranges: tuple[Range, ...]  # both ends included, sorted, apart


Element: TypeAlias = "Chars | int"  # an int is a rule
Sequence: TypeAlias = tuple[Element, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules without repetitions and groups: each is a choice of sequences."""

    rules: tuple[tuple[Sequence, ...], ...]
    root: int


def parse(text: str) -> Grammar:
    """Read a grammar. Raises GrammarError."""
    size = len(text.encode("utf-8", "replace"))
    if size > GRAMMAR_BYTES_MAX:
        raise GrammarError(f"the grammar has {size} bytes; at most {GRAMMAR_BYTES_MAX} are taken")
    return _Parser(text).grammar()


@dataclass(slots=True)
class _Parser:
    """Reads the notation; the position is where the next character stands."""

    text: str
    at: int = 0
    names: dict[str, int] = field(default_factory=dict[str, int])
    rules: dict[int, tuple[Sequence, ...]] = field(default_factory=dict[int, tuple[Sequence, ...]])
    count: int = 0  # of rules that have a number
    elements: int = 0

    def grammar(self) -> Grammar:
        self._space(lines=True)
        while self.at < len(self.text):
            name = self._name()
            self._space(lines=False)
            if not self.text.startswith("::=", self.at):
                raise self._error(f"'::=' is missing behind the rule's name {name[:40]!r}")
            self.at += 3
            self._space(lines=True)
            self.rules[self._rule(name)] = self._alternates(0)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                raise self._error("a rule ends with its line")
            self._space(lines=True)
        if "root" not in self.names:
            raise GrammarError("the grammar has no rule 'root'")
        for name, number in self.names.items():
            if number not in self.rules:
                raise GrammarError(f"the grammar has no rule {name[:40]!r}, which another one uses")
        return Grammar(
            tuple(self.rules[number] for number in range(self.count)), self.names["root"]
        )

    def _error(self, message: str) -> GrammarError:
        line = self.text.count("\n", 0, self.at) + 1
        return GrammarError(f"the grammar is malformed in line {line}: {message}")

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def _rule(self, name: str) -> int:
        if name not in self.names:
            self.names[name] = self._new()
        return self.names[name]

    def _add(self, alternates: tuple[Sequence, ...]) -> int:
        number = self._new()
        self.rules[number] = alternates
        self._count(sum(len(sequence) + 1 for sequence in alternates))
        return number

    def _count(self, elements: int) -> None:
        self.elements += elements
        if self.elements > ELEMENTS_MAX:
            raise GrammarError("the grammar is too large with its repetitions written out")

    def _space(self, *, lines: bool) -> None:
        text = self.text
        while self.at < len(text):
            if text[self.at] == "#":
                while self.at < len(text) and text[self.at] not in "\r\n":
                    self.at += 1
            elif text[self.at] in (" \t\r\n" if lines else " \t"):
                self.at += 1
            else:
                return

    def _name(self) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] in _WORD:
            self.at += 1
        if start == self.at:
            raise self._error("a rule's name is expected")
        return self.text[start : self.at]

    def _alternates(self, depth: int) -> tuple[Sequence, ...]:
        if depth > NESTING_MAX:
            raise self._error(f"more than {NESTING_MAX} parentheses within each other")
        alternates = [self._sequence(depth)]
        while self.text.startswith("|", self.at):
            self.at += 1
            self._space(lines=True)
            alternates.append(self._sequence(depth))
        self._count(sum(len(sequence) + 1 for sequence in alternates))
        return tuple(alternates)

    def _sequence(self, depth: int) -> Sequence:
        done: list[Element] = []
        last: list[Element] = []  # what a repetition would apply to
        while self.at < len(self.text):
            character = self.text[self.at]
            if character in "*+?{":
                least, most = self._times(character)
                if not last:
                    raise self._error(f"nothing stands before {character!r}")
                last = self._repeated(last, least, most)
            elif character in _WORD or character in '"[(.':
                done += last
                last = self._item(character, depth)
            elif character in "<!":
                raise self._error("tokens as parts of a grammar are not supported")
            else:
                break
            self._space(lines=depth > 0)
        return tuple(done + last)

    def _item(self, character: str, depth: int) -> list[Element]:
        if character == '"':
            self.at += 1
            return list(self._literal())
        if character == "[":
            self.at += 1
            return [self._set()]
        if character == ".":
            self.at += 1
            return [Chars(((0, UNICODE_MAX),))]
        if character == "(":
            self.at += 1
            self._space(lines=True)
            number = self._new()
            self.rules[number] = self._alternates(depth + 1)
            if not self.text.startswith(")", self.at):
                raise self._error("')' is missing")
            self.at += 1
            return [number]
        return [self._rule(self._name())]

    def _repeated(self, item: list[Element], least: int, most: int | None) -> list[Element]:
        """As llama.cpp does it: what is optional becomes rules that end, or go on with the next one."""
        self._count(len(item) * max(least, most or 0, 1))
        repeated = item * least
        if most is None:
            number = self._new()
            self.rules[number] = ((*item, number), ())
            return [*repeated, number]
        following: list[Element] = []
        for _ in range(most - least):
            following = [self._add(((*item, *following), ()))]
        return repeated + following

    def _times(self, character: str) -> tuple[int, int | None]:
        self.at += 1
        if character != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        least = self._integer()
        most: int | None = least
        if self.text.startswith(",", self.at):
            self.at += 1
            self._space(lines=False)
            most = None if self.text.startswith("}", self.at) else self._integer()
        if not self.text.startswith("}", self.at):
            raise self._error("'}' is missing")
        self.at += 1
        if most is not None and most < least:
            raise self._error("a repetition has its bounds the wrong way round")
        return least, most

    def _integer(self) -> int:
        self._space(lines=False)
        start = self.at
        while self.at < len(self.text) and self.text[self.at] in string.digits:
            self.at += 1
        digits = self.text[start : self.at]
        if not digits or len(digits) > 4 or int(digits) > REPETITIONS_MAX:
            raise self._error(f"a number of repetitions is from 0 to {REPETITIONS_MAX}")
        self._space(lines=False)
        return int(digits)

    def _literal(self) -> Iterator[Chars]:
        while True:
            if self.at >= len(self.text):
                raise self._error("a string has no end")
            if self.text[self.at] == '"':
                self.at += 1
                return
            point = self._character()
            yield Chars(((point, point),))

    def _set(self) -> Chars:
        negated = self.text.startswith("^", self.at)
        self.at += negated
        found: list[Range] = []
        while not self.text.startswith("]", self.at):
            low = high = self._character()
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                self.at += 1
                high = self._character()
            if low > high:
                raise self._error("a range of characters has its ends the wrong way round")
            found.append((low, high))
        self.at += 1
        ranges = merged(found)
        return Chars(inverted(ranges) if negated else ranges)

    def _character(self) -> int:
        if self.at >= len(self.text):
            raise self._error("it ends in the middle of a string or a set of characters")
        character = self.text[self.at]
        self.at += 1
        if character == "\0" or 0xD800 <= ord(character) <= 0xDFFF:
            raise self._error("a character that no text holds")
        if character != "\\":
            return ord(character)
        escape = self.text[self.at : self.at + 1]
        self.at += 1
        if escape in _HEX:
            digits = self.text[self.at : self.at + _HEX[escape]]
            self.at += len(digits)
            if len(digits) == _HEX[escape] and all(digit in string.hexdigits for digit in digits):
                return int(digits, 16)
        elif escape in _ESCAPES:
            return ord(_ESCAPES[escape])
        raise self._error(f"unknown escape {chr(92) + escape!r}")


def merged(ranges: list[Range]) -> tuple[Range, ...]:
    """Sorted, and apart from each other."""
    done: list[Range] = []
    for low, high in sorted(ranges):
        if done and low <= done[-1][1] + 1:
            done[-1] = (done[-1][0], max(done[-1][1], high))
        else:
            done.append((low, high))
    return tuple(done)


def inverted(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """All characters that are in none of them."""
    done: list[Range] = []
    begin = 0
    for low, high in ranges:
        if low > begin:
            done.append((begin, low - 1))
        begin = high + 1
    if begin <= UNICODE_MAX:
        done.append((begin, UNICODE_MAX))
    return tuple(done)
