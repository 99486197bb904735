"""Lines that are chained by a hash each to the one before, so that a cut or an edit shows. Pure.

A line is a JSON object; its last key, `chain`, is the first 16 bytes of SHA-256 over the chain of the line
before and this line without that key. Files follow each other in one chain; the first line of a file says with
`before` what it goes on from, so that the oldest can go.

What this shows: that a line was changed, taken out or put in, by whoever cannot write the whole rest anew. What it
cannot show: that the owner of the machine rewrote all of it, unless somebody noted a chain value elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, cast

from meshd_plugins.api import Value

GENESIS: Final = "0" * 32
"""What the very first line goes on from."""
PROBLEMS_MAX: Final = 16

_encode: Final = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode
_MARK: Final = ',"chain":"'
_END: Final = '"}'


@dataclass(frozen=True, slots=True)
class Head:
    """The last line of a trail."""

    number: int = 0  # lines count from 1
    chain: str = GENESIS


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look over a whole trail found."""

    lines: int
    first: int  # number of the oldest line that is kept; 0 without one
    head: Head
    problems: tuple[str, ...]  # for people; none: it is as it was written

    def to_value(self) -> dict[str, Value]:
        """As plain data."""
        return {
            "lines": self.lines,
            "first": self.first,
            "last": self.head.number,
            "chain": self.head.chain,
            "problems": list(self.problems),
            "whole": not self.problems,
        }


def sealed(head: Head, fields: Mapping[str, Value]) -> tuple[str, Head]:
    """The next line, without its end, and the head after it."""
    number = head.number + 1
    body = _encode({"n": number, **fields})
    chain = _chained(head.chain, body)
    return body[:-1] + _MARK + chain + _END, Head(number, chain)


def opened(line: str) -> Mapping[str, Value] | None:
    """The fields of a line, its chain among them; None if it is none. The chain is not checked."""
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    fields = cast("dict[str, Value]", value)
    return fields if isinstance(fields.get("n"), int) else None


def verified(files: Iterable[tuple[str, Iterable[str]]], written: Head | None) -> Verdict:
    """Look over a whole trail.

    Args:
        files: name and lines of each, oldest first.
        written: the last line that is known to have been written, if that is known.
    """
    walk = _Walk()
    for name, lines in files:
        walk.file(name, lines)
    walk.end(written)
    return Verdict(walk.lines, walk.first, walk.head, tuple(walk.problems))


class _Walk:
    """One pass over a trail."""

    def __init__(self) -> None:
        self.head = Head()
        self.lines = 0
        self.first = 0
        self.problems: list[str] = []
        self._seen: dict[int, str] = {}

    def file(self, name: str, lines: Iterable[str]) -> None:
        for place, line in enumerate(lines, 1):
            fields = opened(line)
            where = f"{name} line {place}"
            if fields is None:
                self._problem(
                    f"{where}: it is no line of a trail; it was damaged, or cut by a power cut"
                )
                continue
            number = cast("int", fields["n"])
            if not self.lines:
                self._begin(where, number, fields)
            expected = self.head.chain
            body, mark, rest = line.rpartition(_MARK)
            chain = rest.removesuffix(_END)
            self.lines += 1
            if number != self.head.number + 1:
                self._problem(
                    f"{where}: number {number} stands where {self.head.number + 1} should"
                )
            elif not mark or chain != _chained(expected, body + "}"):
                self._problem(
                    f"{where}: line {number} or the one before it is not as it was written"
                )
            self.head = Head(number, chain)
            self._seen = {number: chain}

    def end(self, written: Head | None) -> None:
        if written is None or written.number == 0:
            return
        if self.head.number < written.number:
            missing = written.number - self.head.number
            self._problem(
                f"it ends at line {self.head.number}, and {written.number} were written: {missing}"
                " are missing at its end"
            )
        elif self._seen.get(written.number, written.chain) != written.chain:
            self._problem(f"line {written.number} is not the one that was written")

    def _begin(self, where: str, number: int, fields: Mapping[str, Value]) -> None:
        self.first = number
        before = fields.get("before")
        if number != 1 and not isinstance(before, str):
            self._problem(f"{where}: the trail begins in the middle; older lines were cut off")
        self.head = Head(number - 1, before if isinstance(before, str) else GENESIS)

    def _problem(self, text: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text)


def numbered(lines: Iterable[str]) -> Iterator[Mapping[str, Value]]:
    """The fields of those that are lines of a trail, without their chains."""
    for line in lines:
        fields = opened(line)
        if fields is not None:
            yield {key: value for key, value in fields.items() if key != "chain"}


def _chained(before: str, body: str) -> str:
    return hashlib.sha256(before.encode() + body.encode()).hexdigest()[:32]
