# ruff: noqa: RUF001, RUF002 (the typographic signs are meant: people type and paste them)
"""Expressions inside prose, as in "Write a poem about the sea and compute 37 * 43.".

Prose is full of numbers that are no arithmetic (dates, versions, telephone numbers, ranges, screen
sizes), so an expression counts in one of three cases: it is the whole text; a cue ("compute", "what
is") stands right before it; or its form leaves no doubt (it has +, *, ×, ÷, ^, a root or another
function). A lone minus, slash, x, percent, unit or spoken operator leaves doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from meshd_plugins.expressions.errors import ExpressionError
from meshd_plugins.expressions.nodes import (
    Binary,
    Call,
    Compound,
    Convert,
    Negate,
    Node,
    Number,
    Percent,
    Quantity,
    has_units,
    render,
)
from meshd_plugins.expressions.parser import parse_prefix_of
from meshd_plugins.expressions.question import CUES, OPENINGS, asked_unit, parse_question
from meshd_plugins.expressions.tokens import Kind, Token, tokenize

TEXT_MAX: Final = 10_000
"""Characters searched; what lies beyond is not looked at."""

_SURE_SIGNS: Final = frozenset("+*×÷^√") | {"**", "·", "⋅"}
_TOUCHING: Final = frozenset("_-./@#$€£:+*\\^=%~&'’")
_TWO_WORD_CUES: Final = frozenset(
    {("work", "out"), ("figure", "out"), ("result", "of"), ("value", "of")}
)
_VERB_CUES: Final = frozenset({"add", "subtract", "multiply", "divide"})


@dataclass(frozen=True, slots=True)
class Span:
    """An expression found in a text."""

    start: int  # of the expression, index of its first character
    end: int  # after its last character
    expression: str  # normalised, as `render` writes it
    cue: str = ""  # "compute", "what is": the words right before it that announce it, "" without
    cue_start: int = 0  # index of the cue's first character; == start without a cue


def is_expression(text: str) -> bool:
    """Whether a whole text is a calculation that the parser understands, question words and all."""
    try:
        node = parse_question(text)
    except ExpressionError:
        return False
    return _computes(node)


def find_expressions(text: str) -> tuple[Span, ...]:
    """Find the expressions in a text, in order and disjoint. Raises nothing."""
    tokens = tokenize(text[:TEXT_MAX])
    whole = len(text) <= TEXT_MAX and is_expression(text)
    spans: list[Span] = []
    index = 0
    while tokens[index].kind is not Kind.END:
        if tokens[index].text.lower() == "many":
            asked, index = _asked_conversion(text, tokens, index)
            spans.extend(asked)
            continue
        if not _may_begin(tokens, index):
            index += 1
            continue
        try:
            node, after = parse_prefix_of(tokens, index, lenient=True)
        except ExpressionError:
            index += 1
            continue
        after = _without_exclamation(tokens, index, after)
        if after <= index:
            index += 1
            continue
        try:
            node, after = parse_prefix_of((*tokens[index:after], tokens[-1]), 0, lenient=True)
        except ExpressionError:
            index += 1
            continue
        after += index
        if _computes(node) and _stands_alone(text, tokens, index, after):
            span = _span(tokens, index, after, node)
            if whole or span.cue or _sure(text, tokens, index, after, node):
                spans.append(span)
        index = after
    return tuple(spans)


def _asked_conversion(
    text: str, tokens: Sequence[Token], index: int
) -> tuple[tuple[Span, ...], int]:
    """Read "how many seconds are in 3 hours" from its "many"; the index where to go on."""
    unit, start = asked_unit(tokens, index + 1)
    if unit is None:
        return (), index + 1
    try:
        node, after = parse_prefix_of(tokens, start, lenient=True)
    except ExpressionError:
        return (), index + 1
    if isinstance(node, Convert) or not has_units(node):
        return (), index + 1
    if not _stands_alone(text, tokens, start, after):
        return (), after
    first = index - 1 if index and tokens[index - 1].text.lower() == "how" else index
    begin, end = tokens[index + 1].start, tokens[after - 1].end
    return (Span(begin, end, render(Convert(node, unit)), "how many", tokens[first].start),), after


def _may_begin(tokens: Sequence[Token], index: int) -> bool:
    token = tokens[index]
    if token.kind in (Kind.NUMBER, Kind.OPEN, Kind.FUNCTION, Kind.VERB) or token.text == "√":
        return True
    if token.kind is Kind.OPERATOR and token.text == "-":
        return tokens[index + 1].start == token.end  # a sign touches its number; a dash does not
    return token.kind is Kind.WORD and token.text.lower() in ("half", "double", "twice", "triple")


def _without_exclamation(tokens: Sequence[Token], index: int, after: int) -> int:
    """Leave out a closing "!" that ends a sentence: after a blank-separated text it is no factorial."""
    last = tokens[after - 1]
    ends_sentence = tokens[after].kind in (Kind.END, Kind.NEWLINE) or (
        tokens[after].kind is Kind.WORD and tokens[after].text[:1].isupper()
    )
    others = any(token.kind is Kind.OPERATOR for token in tokens[index : after - 1])
    return after - 1 if last.text == "!" and not last.spoken and ends_sentence and others else after


def _computes(node: Node) -> bool:
    """Whether there is anything to compute: a bare number or quantity is not."""
    match node:
        case Number() | Quantity() | Compound():
            return False
        case Negate(operand) | Percent(operand):
            return _computes(operand)
        case Binary() | Call() | Convert():
            return True


def _stands_alone(text: str, tokens: Sequence[Token], index: int, after: int) -> bool:
    """Whether the expression is not a piece of something longer that was not understood."""
    start, end = tokens[index].start, tokens[after - 1].end
    before = text[start - 1] if start else " "
    behind = text[end] if end < len(text) else " "
    if before.isalnum() or before in _TOUCHING or behind.isalnum() or behind in "_-@#$€£/\\^*=":
        return False
    if index and tokens[index - 1].kind in (Kind.OPERATOR, Kind.EQUALS, Kind.JUNK):
        previous = tokens[index - 1]
        if previous.text != "of" and not previous.spoken:
            return False
    following = tokens[after]
    match following.kind:
        case Kind.EQUALS:
            return tokens[after + 1].kind in (Kind.END, Kind.PUNCTUATION, Kind.NEWLINE)
        case Kind.OPERATOR:
            # "37 * 43 - and then" has a dash; "37 * 43 * k" is a formula.
            dash = following.text == "-" and text[following.end : following.end + 1].isspace()
            closing = following.text == "!" and tokens[after - 1].text != "!"
            return (dash and tokens[after + 1].kind is Kind.WORD) or closing
        case Kind.PUNCTUATION:
            return not text[following.end : following.end + 1].isdigit()
        case _:
            return following.kind is not Kind.JUNK


def _span(tokens: Sequence[Token], index: int, after: int, node: Node) -> Span:
    start, end = tokens[index].start, tokens[after - 1].end
    first = index
    while first and _opens(tokens, first - 1):
        first -= 1
    while first < index and tokens[first].text.lower() in ("and", "then", "so", "also", ",", ":"):
        first += 1
    words = tuple(token.text.lower() for token in tokens[first:index])
    announced = bool(CUES.intersection(words)) or any(
        pair in _TWO_WORD_CUES for pair in pairwise(words)
    )
    if tokens[index].kind is Kind.VERB:
        announced = True
    if not announced:
        return Span(start, end, render(node), "", start)
    cue_start = tokens[first].start
    cue = " ".join(words) or tokens[index].text
    return Span(start, end, render(node), cue, cue_start)


def _opens(tokens: Sequence[Token], index: int) -> bool:
    token = tokens[index]
    if token.kind is Kind.WORD:
        return token.text.lower() in OPENINGS
    return token.text == ":" or (
        token.text == "of" and index > 0 and tokens[index - 1].text.lower() in ("result", "value")
    )


def _sure(text: str, tokens: Sequence[Token], index: int, after: int, node: Node) -> bool:
    """Whether the form alone leaves no doubt."""
    if _has_implied_product(node):
        return False
    for token in tokens[index:after]:
        if token.spoken and token.kind is Kind.NUMBER:
            return False
        if token.kind is Kind.FUNCTION and token.text in ("sqrt", "cbrt", "gcd", "lcm"):
            return True
        written = text[token.start : token.end]
        if token.kind is Kind.OPERATOR and not token.spoken and written in _SURE_SIGNS:
            return True
    return False


def _has_implied_product(node: Node) -> bool:
    match node:
        case Binary():
            return node.implied or any(map(_has_implied_product, (node.left, node.right)))
        case Negate(operand) | Percent(operand) | Convert(operand):
            return _has_implied_product(operand)
        case Call():
            return any(map(_has_implied_product, node.arguments))
        case Number() | Quantity() | Compound():
            return False
