# ruff: noqa: RUF001 (the typographic signs are meant: people type and paste them)
"""A plain-language question to one expression, when every word of it is understood.

What may be left out is listed here word by word: openings ("what is", "please compute"), endings
("?", "exactly", "="). Any other word would change the meaning, so it is an error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from meshd_plugins.expressions.errors import ExpressionError
from meshd_plugins.expressions.nodes import Convert, Node, Unit
from meshd_plugins.expressions.parser import parse_all, unit_at
from meshd_plugins.expressions.tokens import Kind, Token, tokenize

LENGTH_MAX: Final = 1_000
"""Longest question in characters; raising it raises the worst time of an evaluation."""

EXAMPLE: Final = "for example: 17 + 25, 15% of 80, or 12 km in miles"

CUES: Final = frozenset(
    {
        "what",
        "what's",
        "whats",
        "calculate",
        "compute",
        "evaluate",
        "solve",
        "convert",
        "much",
        "many",
    }
)
"""Words that announce a calculation."""

OPENINGS: Final = CUES | frozenset(
    [
        "how",
        "is",
        "are",
        "work",
        "out",
        "find",
        "the",
        "result",
        "value",
        "answer",
        "to",
        "exact",
        "please",
        "can",
        "could",
        "would",
        "you",
        "will",
        "tell",
        "me",
        "us",
        "give",
        "show",
        "i",
        "need",
        "want",
        "know",
        "let's",
        "so",
        "now",
        "then",
        "and",
        "also",
        "hey",
        "hello",
        "hi",
        "ok",
        "okay",
        "does",
        "do",
        "exactly",
        "it's",
    ]
)
"""Words that may stand before an expression without changing what it means."""

_ENDINGS: Final = frozenset(
    [
        "please",
        "exactly",
        "equal",
        "equals",
        "is",
        "thanks",
        "thank",
        "you",
        "now",
        "precisely",
        "be",
        "make",
        "makes",
        "give",
    ]
)
_BETWEEN: Final = frozenset(
    [
        "are",
        "is",
        "in",
        "there",
        "make",
        "makes",
        "equal",
        "equals",
        "do",
        "does",
        "make",
        "up",
        "to",
    ]
)


def parse_question(text: str) -> Node:
    """Read a question or an expression, whole.

    Raises:
        ExpressionError: not_arithmetic when words remain or nothing is there; else what the parser
            says, with its column.
    """
    if len(text) > LENGTH_MAX:
        raise ExpressionError(
            f"the text has {len(text)} characters; at most {LENGTH_MAX} are read", code="too_large"
        )
    tokens = [token for token in tokenize(text) if token.kind is not Kind.NEWLINE]
    start = skip_openings(tokens, 0)
    end = _skip_endings(tokens, start)
    target, start = asked_unit(tokens, start)
    body = [*tokens[start:end], Token(Kind.END, "", tokens[end].start, tokens[end].start)]
    _require_arithmetic(body)
    node = parse_all(body)
    if target is not None:
        if isinstance(node, Convert):
            raise ExpressionError("two target units are named", code="ambiguous")
        node = Convert(node, target)
    return node


def skip_openings(tokens: Sequence[Token], index: int) -> int:
    """Index of the first token that is no opening."""
    while True:
        token = tokens[index]
        word = token.text.lower()
        if (
            (token.kind is Kind.WORD and word in OPENINGS)
            or (
                token.text == "of"
                and index
                and tokens[index - 1].text.lower() in ("result", "value")
            )
            or (token.kind in (Kind.PUNCTUATION, Kind.COMMA) and token.text in ",:;.\"'“‘")
        ):
            index += 1
        else:
            return index


def _skip_endings(tokens: Sequence[Token], start: int) -> int:
    """Index after the last token that belongs to the expression."""
    end = len(tokens) - 1
    while end > start:
        token = tokens[end - 1]
        if token.kind in (Kind.PUNCTUATION, Kind.EQUALS, Kind.COMMA) or (
            token.kind is Kind.WORD and token.text.lower() in _ENDINGS
        ):
            end -= 1
        else:
            break
    return end


def asked_unit(tokens: Sequence[Token], start: int) -> tuple[Unit | None, int]:
    """Read "(how many) miles is", where a unit stands before the quantity."""
    if start == 0 or tokens[start - 1].text.lower() != "many":
        return None, start
    unit, after = unit_at(tokens, start)
    if unit is None or tokens[after].text.lower() not in _BETWEEN:
        return None, start
    while tokens[after].kind is Kind.WORD and tokens[after].text.lower() in _BETWEEN:
        after += 1
    return unit, after


def _require_arithmetic(tokens: Sequence[Token]) -> None:
    """Tell a text that is no arithmetic from arithmetic with a mistake in it."""
    numbers = [token for token in tokens if token.kind is Kind.NUMBER]
    if not numbers and not any(unit_at(tokens, index)[0] for index in range(len(tokens) - 1)):
        raise ExpressionError(f"no expression found; {EXAMPLE}", code="not_arithmetic")
    strange = [token for token in tokens if token.kind is Kind.WORD and not _known(tokens, token)]
    if strange:
        words = ", ".join(repr(token.text) for token in strange[:5])
        raise ExpressionError(
            f"these words are not arithmetic: {words}; {EXAMPLE}",
            column=strange[0].start + 1,
            code="not_arithmetic",
        )


_KNOWN: Final = frozenset(
    [
        "in",
        "to",
        "into",
        "as",
        "and",
        "by",
        "from",
        "with",
        "per",
        "a",
        "an",
        "half",
        "third",
        "quarter",
        "double",
        "twice",
        "triple",
        "square",
        "sq",
        "cubic",
        "degree",
        "degrees",
        "deg",
        "min",
    ]
)


def _known(tokens: Sequence[Token], token: Token) -> bool:
    if token.text.lower() in _KNOWN:
        return True
    return unit_at([token, tokens[-1]], 0)[0] is not None
