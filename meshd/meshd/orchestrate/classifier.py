"""What is being asked, and is it one question? A simple, honest first classifier.

Three kinds of evidence, nothing learnt: an exact expression in the text (arithmetic), the name of a data
object that the catalogue holds, or neither (a language model). A text is *compound* when it holds an
expression to be computed and, apart from it, a request that needs a model, or several independent
requests joined by a conjunction that starts a new clause.

The rules err towards *not* splitting: a wrong split loses the thread of a question, a missed split costs
only a poorer answer to its second half. Precision and recall on a committed set of prompts are printed
by `tests/bench/bench_splitting.py` (decision 0013).

Invariants: nothing is raised, whatever the text; the parts of a compound question are disjoint pieces of
it, in order; between them stand only punctuation and words that link; a part for the calculator is one
that the calculator understands. Work is bounded by `QUESTION_CHARS_MAX`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from meshd_naming import NamingError, parse_name
from meshd_plugins.api import Operation
from meshd_plugins.expressions import is_expression

ARITHMETIC = "knowledge.gpt/arithmetic"
GENERAL = "knowledge.gpt/general"
CLAUSES_MAX = 8
QUESTION_CHARS_MAX = (
    2_000  # longer is a question with material to work on; it goes to a model whole
)


class Need(Enum):
    """What a piece of a question needs."""

    CALCULATOR = "calculator"
    DATA = "data"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class Part:
    """One independent piece of a question."""

    need: Need
    name: str  # the semantic name it goes to
    operation: Operation
    text: str  # what is asked of it
    reason: str


@dataclass(frozen=True, slots=True)
class Classification:
    """What a question is made of; one part unless it is compound."""

    parts: tuple[Part, ...]
    reason: str

    @property
    def compound(self) -> bool:
        """Whether it should be split."""
        return len(self.parts) > 1


# A verb that opens a request of its own. The second clause of "write X and compute Y" must start with
# one, so that "salt and pepper" or "compare A and B" stay whole.
_REQUEST = (
    r"(?:what(?:'s)?|who(?:'s|se|m)?|when|where|why|how|which|is|are|was|were|does|do|did|can|"
    r"tell|explain|describe|write|name|list|give|define|compute|calculate|work out|evaluate|add|"
    r"multiply|divide|subtract|convert|translate|summari[sz]e|say|show|fetch|get|read|print|find|open|"
    r"suggest|recommend|compose|draft|greet|make|invent|"
    r"the (?:value|result|sum|product|difference|quotient) of)"
)
_POLITE = r"(?:please,?\s+|can you\s+|could you\s+|would you\s+|kindly\s+|i want you to\s+)*"
_LINK = r"(?:(?:and|then|also|plus|finally|next|besides),?\s+)*"
_LEADING_LINK = re.compile(
    r"^(?:(?:first|firstly|secondly|then|also|and|finally|next),?\s+)+", re.IGNORECASE
)
_ONLY_LINKS = re.compile(r"(?:and|then|also|plus|finally|next|besides|please|\s)+", re.IGNORECASE)
# What stands between two requests: a sentence's end, or punctuation or a conjunction before a request.
# A run of blanks is entered at its first one only, so that a long run costs no quadratic time.
_JOINT = re.compile(
    rf"(?:(?<=[.?!;])\s+|(?<!\s)\s*[.?!;,]\s+{_LINK}(?={_POLITE}{_REQUEST}\b)"
    rf"|(?<!\s)\s+(?:and|then|plus)\s+{_LINK}(?={_POLITE}{_REQUEST}\b))",
    re.IGNORECASE,
)
_AROUND = " \t\r\n,;"
# What follows refers back: splitting it off would lose its meaning.
_REFERS_BACK = re.compile(
    r"\b(?:it|its|it's|that|this|them|they|their|those|these|he|she|his|her|him|the (?:result|answer|sum|"
    r"product|total|same|former|latter|above|previous|first one|second one)(?!\s+of\b))\b",
    re.IGNORECASE,
)
_FETCH = re.compile(
    r"\b(?:show|fetch|get|read|print|give|open|display|send|bring|download|cat|see|what does)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z0-9]+")
_DATA_NAME = re.compile(r"\bdata\.gpt/[a-z0-9][a-z0-9\-_./]*[a-z0-9]|\bdata\.gpt/[a-z0-9]")
# What a request for an object says beside the object. Any other word asks for something else: "ideas for
# a network plan" does not ask for the object network/plan.
_FETCH_WORDS = frozenset(
    _WORD.findall(
        "a all an and bring can cat contents could display document does download fetch file first for "
        "from full get give i in is kindly like ll me my need of on open our page please print read s "
        "say says see send show text the then to up us want what whole will would you your"
    )
)


def classify(text: str, data_names: Iterable[str] = (), *, split: bool = True) -> Classification:
    """Name the parts of a question.

    Args:
        text: the question, as typed.
        data_names: canonical names of the data objects that the mesh holds now.
        split: False keeps it whole whatever it holds.
    """
    known = tuple(data_names)
    if len(text) > QUESTION_CHARS_MAX:
        part = Part(
            Need.MODEL, GENERAL, Operation.CHAT, text, "too long to be a calculation or name"
        )
        return Classification((part,), part.reason)
    spans = _clauses(text) if split else ()
    if len(spans) < 2:
        return _whole(text, known)
    found = [_part(text[start:end], known) for start, end in spans]
    if all(part.need is Need.MODEL for part in found):
        return _whole(text, known, because="its clauses all go to a language model")
    parts = _joined(text, spans, found)
    return Classification(parts, f"{len(parts)} independent requests")


def _whole(text: str, known: Sequence[str], because: str = "") -> Classification:
    part = _part(text, known)
    reason = f"{part.reason}; {because}" if because else part.reason
    return Classification((part,), reason)


def _clauses(text: str) -> tuple[tuple[int, int], ...]:
    """Where the independent requests of a text are, in order; () when it is one request."""
    edges = [0]
    for joint in _JOINT.finditer(text):
        edges += joint.span()
    edges.append(len(text))
    spans: list[tuple[int, int]] = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        piece = text[start:end]
        start += len(piece) - len(piece.lstrip(_AROUND))
        end -= len(piece) - len(piece.rstrip(_AROUND))
        if start < end and not _ONLY_LINKS.fullmatch(text, start, end):
            spans.append((start, end))
    if not 2 <= len(spans) <= CLAUSES_MAX:
        return ()
    if any(_REFERS_BACK.search(text, start, end) for start, end in spans[1:]):
        return ()
    return tuple(spans)


def _part(clause: str, known: Sequence[str]) -> Part:
    data = _data_name(clause, known)
    if data is not None:
        return Part(Need.DATA, data, Operation.FETCH, clause, f"names the data object {data}")
    sum_asked = _LEADING_LINK.sub("", clause.lstrip())
    if is_expression(sum_asked):
        return Part(Need.CALCULATOR, ARITHMETIC, Operation.CHAT, sum_asked, "an exact calculation")
    return Part(Need.MODEL, GENERAL, Operation.CHAT, clause, "needs a language model")


def _data_name(clause: str, known: Sequence[str]) -> str | None:
    """The data object a clause asks for: named in full, or by words that single one out."""
    literal = _DATA_NAME.search(clause)
    if literal is not None:
        name = literal.group()
        return name if _is_name(name) and (name in known or _asks_for(clause, name)) else None
    asked = [name for name in known if _asks_for(clause, name)]
    most = max((len(_words_of(name)) for name in asked), default=0)
    best = [name for name in asked if len(_words_of(name)) == most]
    return best[0] if len(best) == 1 else None


def _is_name(text: str) -> bool:
    try:
        parse_name(text)
    except NamingError:
        return False
    return True


def _asks_for(clause: str, name: str) -> bool:
    """Whether a clause says to fetch, names the object in full or by all its words, and no more."""
    if clause.strip(" .?!") == name:
        return True
    wanted = _words_of(name)
    words = set(_WORD.findall(clause.lower().replace(name, " ")))
    named = name in clause or (wanted and wanted <= words)
    return bool(named and _FETCH.search(clause) and words - wanted <= _FETCH_WORDS)


def _words_of(name: str) -> frozenset[str]:
    """The words of a name's labels."""
    return frozenset(_WORD.findall(name.partition(".gpt/")[2].lower()))


def _joined(text: str, spans: Sequence[tuple[int, int]], parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring parts for a model are one request again, with what stood between them."""
    merged: list[Part] = []
    began = 0
    for (start, end), part in zip(spans, parts, strict=True):
        if merged and merged[-1].need is Need.MODEL and part.need is Need.MODEL:
            merged[-1] = replace(merged[-1], text=text[began:end])
        else:
            began = start
            merged.append(part)
    return tuple(merged)
