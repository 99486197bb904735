# ruff: noqa: RUF001 (the typographic signs are meant: people type and paste them)
"""Text to tokens, then spoken forms ("divided by", "twenty-five") to the tokens they stand for.

Every character belongs to a token or is white space; nothing raises. What is not understood becomes
JUNK with its place, for the parser to point at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from fractions import Fraction
from typing import Final

LITERAL_EXPONENT_MAX: Final = 5_000
"""Largest power of ten in a literal such as 1e300; beyond it the literal is JUNK."""


class Kind(Enum):
    """What a token is."""

    NUMBER = auto()
    OPERATOR = auto()  # + - * / ^ % ! ² ³ mod of x
    FUNCTION = auto()  # sqrt, sum, ...
    VERB = auto()  # add, subtract, multiply, divide: "subtract 4 from 10"
    OPEN = auto()
    CLOSE = auto()
    COMMA = auto()
    EQUALS = auto()
    WORD = auto()
    PUNCTUATION = auto()  # . ? ; : and quotes
    NEWLINE = auto()
    JUNK = auto()
    END = auto()


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the text; `text` is normalised, `start` and `end` say where it was written."""

    kind: Kind
    text: str
    start: int
    end: int
    value: Fraction = Fraction(0)  # of a NUMBER
    spoken: bool = False  # written in words


_PATTERN: Final = re.compile(
    r"""
    (?P<newline>[ \t]*\n\s*)
  | (?P<space>\s+)
  | (?P<dotted>\d+(?:\.\d+){2,}\w*)                       # 3.11.2 and 10.0.0.1 are no numbers
  | (?P<based>0[xX][0-9a-fA-F]+|0[bB][01]+)(?![\w.])
  | (?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)
  | (?P<word>°?[^\W\d_²³]+(?:['’][^\W\d_²³]+)?(?![^\W²³]))
  | (?P<cross>[xX](?=\d))
  | (?P<operator>\*\*|[-+*/^%!√²³−×·⋅÷])
  | (?P<identifier>\w+)
  | (?P<open>[(\[]) | (?P<close>[)\]]) | (?P<comma>,) | (?P<equals>=)
  | (?P<punctuation>[.?;:"'“”‘’])
  | (?P<junk>.)
    """,
    re.VERBOSE,
)

_KIND: Final[dict[str, Kind]] = {
    "newline": Kind.NEWLINE,
    "word": Kind.WORD,
    "operator": Kind.OPERATOR,
    "open": Kind.OPEN,
    "close": Kind.CLOSE,
    "comma": Kind.COMMA,
    "equals": Kind.EQUALS,
    "punctuation": Kind.PUNCTUATION,
}
_SAME: Final[dict[str, str]] = {
    "**": "^",
    "−": "-",
    "×": "*",
    "·": "*",
    "⋅": "*",
    "÷": "/",
    "[": "(",
    "]": ")",
}

# The longest phrase wins. "in", "to", "and", "from", "by" keep their words: their place decides.
_PHRASES: Final[dict[tuple[str, ...], tuple[Kind, str]]] = {
    tuple(phrase.split()): (kind, text)
    for kind, text, phrases in (
        (Kind.OPERATOR, "+", "plus|added to"),
        (Kind.OPERATOR, "-", "minus"),
        (Kind.OPERATOR, "*", "times|multiplied by"),
        (Kind.OPERATOR, "/", "divided by|over"),
        (
            Kind.OPERATOR,
            "^",
            "to the power of|to the power|raised to the power of|raised to the power|raised to",
        ),
        (Kind.OPERATOR, "²", "squared"),
        (Kind.OPERATOR, "³", "cubed"),
        (Kind.OPERATOR, "%", "percent|per cent"),
        (Kind.OPERATOR, "mod", "mod|modulo"),
        (Kind.OPERATOR, "of", "of"),
        (Kind.FUNCTION, "sqrt", "sqrt|sqrt of|square root|square root of"),
        (Kind.FUNCTION, "cbrt", "cbrt|cube root|cube root of"),
        (Kind.FUNCTION, "abs", "abs|absolute value|absolute value of"),
        (Kind.FUNCTION, "factorial", "factorial|factorial of"),
        (Kind.FUNCTION, "gcd", "gcd|gcd of|greatest common divisor|greatest common divisor of"),
        (Kind.FUNCTION, "lcm", "lcm|lcm of|least common multiple|least common multiple of"),
        (Kind.FUNCTION, "min", "minimum of|smallest of"),
        (Kind.FUNCTION, "max", "max|max of|maximum of|largest of"),
        (Kind.FUNCTION, "floor", "floor|floor of"),
        (Kind.FUNCTION, "ceil", "ceil|ceiling|ceiling of"),
        (Kind.FUNCTION, "round", "round"),
        (Kind.FUNCTION, "sum", "sum|sum of"),
        (Kind.FUNCTION, "product", "product|product of"),
        (Kind.FUNCTION, "difference", "difference between|difference of"),
        (Kind.FUNCTION, "quotient", "quotient of"),
        (Kind.FUNCTION, "mean", "mean|mean of|average|average of"),
        (Kind.VERB, "add", "add"),
        (Kind.VERB, "subtract", "subtract"),
        (Kind.VERB, "multiply", "multiply"),
        (Kind.VERB, "divide", "divide"),
    )
    for phrase in phrases.split("|")
}
_PHRASE_WORDS_MAX: Final = max(map(len, _PHRASES))

_SMALL: Final[dict[str, int]] = {
    word: number
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
}
_TENS: Final[dict[str, int]] = {
    word: 10 * number
    for number, word in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2
    )
}
_SCALES: Final[dict[str, int]] = {
    "thousand": 1000,
    "million": 1_000_000,
    "billion": 1_000_000_000,
}


def tokenize(text: str) -> tuple[Token, ...]:
    """Cut a text into tokens; the last is END. Raises nothing."""
    tokens: list[Token] = []
    call_parentheses: list[bool] = []  # whether each open one holds the arguments of a function
    position = 0
    while position < len(text):
        match = _PATTERN.match(text, position)
        assert match is not None, "the last alternative matches any character"
        start, position = match.span()
        if match.lastgroup == "space":
            continue
        token = _token(match)
        if token.kind is Kind.NUMBER and "," in match.group() and any(call_parentheses):
            # In gcd(100,200) the comma parts arguments: read the digits before it only.
            position = start + match.group().index(",")
            digits = text[start:position]
            token = Token(Kind.NUMBER, digits, start, position, Fraction(int(digits)))
        elif token.kind is Kind.OPEN:
            call_parentheses.append(bool(tokens) and _names_function(tokens[-1]))
        elif token.kind is Kind.CLOSE and call_parentheses:
            call_parentheses.pop()
        tokens.append(token)
    tokens.append(Token(Kind.END, "", len(text), len(text)))
    return _spoken(tokens)


def _names_function(token: Token) -> bool:
    return token.kind is Kind.WORD and (
        token.text.lower() == "min"
        or _PHRASES.get((token.text.lower(),), (Kind.WORD, ""))[0] is Kind.FUNCTION
    )


def _token(match: re.Match[str]) -> Token:
    written, (start, end) = match.group(), match.span()
    match match.lastgroup:
        case "number":
            plain = written.replace(",", "")
            exponent = plain.lower().partition("e")[2]
            if len(exponent) > 6 or abs(int(exponent or "0")) > LITERAL_EXPONENT_MAX:
                return Token(Kind.JUNK, written, start, end)
            if len(plain) > LITERAL_EXPONENT_MAX - 1000:  # beyond what int() converts
                return Token(Kind.JUNK, written, start, end)
            shown = f"0{plain}" if plain.startswith(".") else plain
            return Token(Kind.NUMBER, shown, start, end, Fraction(plain))
        case "based":
            if len(written) > LITERAL_EXPONENT_MAX:
                return Token(Kind.JUNK, written, start, end)
            value = int(written, 0)
            return Token(Kind.NUMBER, str(value), start, end, Fraction(value))
        case "cross":
            return Token(Kind.OPERATOR, "x", start, end)
        case "word" if written in ("x", "X"):
            return Token(Kind.OPERATOR, "x", start, end)
        case str() as group:
            text = _SAME.get(written, written).replace("’", "'")
            return Token(_KIND.get(group, Kind.JUNK), text, start, end)
        case None:
            raise AssertionError("every alternative is named")


def _spoken(tokens: list[Token]) -> tuple[Token, ...]:
    """Replace spoken operators and numbers by what they stand for."""
    result: list[Token] = []
    index = 0
    while index < len(tokens):
        token = tokens[index]
        used = 0
        if token.kind is Kind.WORD:
            spoken, used = _spoken_number(tokens, index)
            if not used:
                spoken, used = _phrase(tokens, index)
            if used:
                token = spoken
        result.append(token)
        index += max(used, 1)
    return tuple(result)


def _phrase(tokens: list[Token], index: int) -> tuple[Token, int]:
    words: list[str] = []
    for token in tokens[index : index + _PHRASE_WORDS_MAX]:
        if token.kind is not Kind.WORD:
            break
        words.append(token.text.lower())
    for used in range(len(words), 0, -1):
        found = _PHRASES.get(tuple(words[:used]))
        if found is not None:
            kind, text = found
            start, end = tokens[index].start, tokens[index + used - 1].end
            if kind is Kind.FUNCTION and text == "factorial" and _ends_value(tokens, index):
                kind, text = Kind.OPERATOR, "!"  # "10 factorial"
            return Token(kind, text, start, end, spoken=True), used
    return tokens[index], 0


def _ends_value(tokens: list[Token], index: int) -> bool:
    return index > 0 and tokens[index - 1].kind in (Kind.NUMBER, Kind.CLOSE)


def _spoken_number(tokens: list[Token], index: int) -> tuple[Token, int]:
    """Read "two hundred and five" or "twenty-five" from `index`; used is 0 when there is none."""
    total = current = 0
    used = 0
    last = ""  # "small", "tens", "hundred" or "scale": what may follow depends on it
    position = index
    while position < len(tokens) and tokens[position].kind is Kind.WORD:
        word = tokens[position].text.lower()
        if word in _SMALL and last != "small" and not (last == "tens" and _SMALL[word] >= 10):
            current, last = current + _SMALL[word], "small"
        elif word in _TENS and last not in ("small", "tens"):
            current, last = current + _TENS[word], "tens"
        elif word == "hundred" and last == "small" and 0 < current < 10:
            current, last = current * 100, "hundred"
        elif word in _SCALES and last and last != "scale" and current:
            total, current, last = total + current * _SCALES[word], 0, "scale"
        elif word == "and" and last in ("hundred", "scale") and _is_small(tokens, position + 1):
            position += 1
            continue
        else:
            break
        position += 1
        used = position - index
        if last == "tens" and _hyphened(tokens, position):
            position += 1
    if not used:
        return tokens[index], 0
    value = total + current
    start, end = tokens[index].start, tokens[index + used - 1].end
    return Token(Kind.NUMBER, str(value), start, end, Fraction(value), spoken=True), used


def _is_small(tokens: list[Token], index: int) -> bool:
    word = tokens[index].text.lower()
    return word in _SMALL or word in _TENS


def _hyphened(tokens: list[Token], index: int) -> bool:
    """Whether a hyphen without spaces and a unit digit follow: the "-five" of "twenty-five"."""
    if tokens[index].text != "-" or tokens[index].start != tokens[index - 1].end:
        return False
    after = tokens[index + 1]
    return after.start == tokens[index].end and 0 < _SMALL.get(after.text.lower(), 0) < 10
