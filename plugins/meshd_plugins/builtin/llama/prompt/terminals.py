"""Pieces of grammars for JSON: literals, strings, numbers within bounds, dates. Expressions in GBNF."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.gbnf import REPETITIONS_MAX

DIGITS_MAX: Final = 15  # of a number without bounds: what a double holds exactly
BOUND_MAX: Final = 10**18
_ESCAPED: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

PLAIN_CHARACTER: Final = r'[^"\\\x00-\x1F\x7F\uD800-\uDFFF]'
"""What stands for itself in a string of JSON."""

BASIC_RULES: Final = {
    "ws": r'(" " | "\n" [ \t]{0,12})?',
    # Half a surrogate pair is no character: two of them would count as one, or as none.
    "hex": "[0-9a-fA-F]",
    "char": rf'{PLAIN_CHARACTER} | "\\" (["\\/bfnrt] | "u" ([0-9a-ceA-CEfF] hex | [dD] [0-7]) hex hex)',
    "string": r'"\"" char* "\""',
    "integer": rf'"0" | "-"? [1-9] [0-9]{{0,{DIGITS_MAX - 1}}}',
    "fraction": rf'"." [0-9]{{1,{DIGITS_MAX}}}',
    "fraction-above": rf'"." [0-9]{{0,{DIGITS_MAX - 1}}} [1-9]',  # not zero
    "number": rf'"-"? ("0" | [1-9] [0-9]{{0,{DIGITS_MAX - 1}}}) fraction? ([eE] [-+]? [0-9] [0-9]?)?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "pair": 'string ws ":" ws value',
    "object": '"{" ws (pair (ws "," ws pair)* ws)? "}"',
    "array": '"[" ws (value (ws "," ws value)* ws)? "]"',
    "value": "object | array | string | number | boolean | null",
    "year": "[12] [0-9] [0-9] [0-9]",
    "month-day": '"02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]) | ("04" | "06" | "09" | "11") "-" '
    '("0" [1-9] | [12] [0-9] | "30") | ("01" | "03" | "05" | "07" | "08" | "10" | "12") "-" '
    '("0" [1-9] | [12] [0-9] | "3" [01])',
    "date": 'year "-" month-day',
    "clock": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?',
    "offset": '"Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]',
    "octet": '"25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9]? [0-9]',
    "label": "[a-z0-9] ([a-z0-9-]{0,20} [a-z0-9])?",
}
"""Rules that others may name; only those in use go into a grammar."""

FORMATS: Final = {  # with the shortest and the longest text
    "date": ("date", 10, 10),
    "time": ("clock offset", 9, 21),
    "date-time": ('date "T" clock offset', 20, 32),
    "uuid": (
        'hex{8} "-" hex{4} "-" [1-8] hex{3} "-" [89abAB] hex{3} "-" hex{12}',
        36,
        36,
    ),
    "ipv4": ('octet "." octet "." octet "." octet', 7, 15),
    "email": ('[a-z0-9] ([a-z0-9._+-]{0,20} [a-z0-9])? "@" label ("." label){1,3}', 5, 120),
}


def literal(text: str) -> str:
    """The text itself, as an expression."""
    parts: list[str] = []
    for character in text:
        if character in _ESCAPED:
            parts.append(_ESCAPED[character])
        elif ord(character) < 0x20 or ord(character) == 0x7F:
            parts.append(f"\\x{ord(character):02X}")
        else:
            parts.append(character)
    return f'"{"".join(parts)}"'


def json_text(value: Any) -> str:
    """A value as the model is to write it."""
    return json.dumps(value, ensure_ascii=False)


def choice(alternatives: Iterable[str]) -> str:
    """One of them, as a unit."""
    found = list(dict.fromkeys(alternatives))
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def choice_of_texts(texts: Sequence[str], rule: Callable[[str], str]) -> str:
    """One of the texts, with common beginnings written once: so one text is read in one way.

    `rule` makes a rule of an expression and returns its name.
    """
    ends = "" in texts
    heads: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        if text:
            heads.setdefault(text[0], []).append(text)
    branches: list[str] = []
    for group in heads.values():
        shared = _common(group)
        rests = [text[len(shared) :] for text in group]
        if len(rests) == 1:
            branches.append(literal(shared))
        else:
            branches.append(f"{literal(shared)} {rule(choice_of_texts(rests, rule))}")
    if ends:
        branches.append('""')
    return choice(branches)


def other_key(names: Sequence[str], rule: Callable[[str], str]) -> str:
    """A key of JSON that is none of the names: told apart where it leaves them, letter by letter."""
    texts = [json_text(name)[1:-1] for name in names]
    return f'"\\"" {_other(texts, rule)}'


def _other(texts: Sequence[str], rule: Callable[[str], str]) -> str:
    heads: dict[str, list[str]] = {}
    for text in texts:
        if text:
            heads.setdefault(text[0], []).append(text[1:])
    out = "".join(f"\\U{ord(head):08X}" for head in heads)
    branches = [f'[^"\\\\\\x00-\\x1F\\x7F\\uD800-\\uDFFF{out}] {PLAIN_CHARACTER}* "\\""']
    for head, rests in heads.items():
        if head != "\\":  # such names can be told apart no further: they are not written
            branches.append(f"{literal(head)} {rule(_other(rests, rule))}")
    if "" not in texts:
        branches.append('"\\""')
    return choice(branches)


def _common(texts: Sequence[str]) -> str:
    shortest = min(texts, key=len)
    length = next(
        (i for i in range(len(shortest)) if len({t[i] for t in texts}) > 1), len(shortest)
    )
    return shortest[:length]


def repeated(item: str, least: int, most: int | None) -> str:
    """An expression so many times; more than `REPETITIONS_MAX` are not asked for."""
    if most is None:
        return f"{item}{{{least},}}" if least > 1 else f"{item}{'+' if least else '*'}"
    return f"{item}{{{least},{min(most, REPETITIONS_MAX)}}}"


def integers(low: int | None, high: int | None) -> str | None:
    """The whole numbers within bounds, both included; None when there are none."""
    if low is None and high is None:
        return "integer"
    if low is None:
        assert high is not None
        low = min(-(10**DIGITS_MAX) + 1, high * 10 if high < 0 else 0)
    if high is None:
        high = max(10**DIGITS_MAX - 1, low * 10)
    if low > high:
        return None
    alternatives: list[str] = []
    if low < 0:
        below = _natural(max(1, -high), -low)
        alternatives.append(f'"-" {choice(below)}')
    if high >= 0:
        alternatives += _natural(max(0, low), high)
    return choice(alternatives)


def _natural(low: int, high: int) -> list[str]:
    """Numbers from 0 on: those of each length."""
    found: list[str] = []
    whole: list[int] = []  # lengths of which all numbers are within
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = 10 ** (length - 1) if length > 1 else 0, 10**length - 1
        if length > 1 and low <= first and last <= high:
            whole.append(length)
        else:
            found += _digits(str(max(low, first)), str(min(high, last)))
    if whole:
        found.append(f"[1-9] [0-9]{{{whole[0] - 1},{whole[-1] - 1}}}")
    return found


def _digits(low: str, high: str) -> list[str]:
    """Digits between two texts of the same length."""
    if low == high:
        return [literal(low)]
    if len(low) == 1:
        return [f"[{low}-{high}]"]
    if low[0] == high[0]:
        return [f"{literal(low[0])} {choice(_digits(low[1:], high[1:]))}"]
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    found: list[str] = []
    if low[1:] != "0" * rest:
        found.append(f"{literal(low[0])} {choice(_digits(low[1:], '9' * rest))}")
        first += 1
    ending: list[str] = []
    if high[1:] != "9" * rest:
        ending.append(f"{literal(high[0])} {choice(_digits('0' * rest, high[1:]))}")
        last -= 1
    if first <= last:
        found.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return found + ending


def numbers(low: float, high: float, *, above: bool, below: bool) -> str | None:
    """Numbers within bounds, one of them finite; `above` and `below` leave the bound itself out.

    Some of them: whole ones, and those between two whole ones that are within. None: there are none such.
    """
    whole = integers(_up(low, strictly=above), _down(high, strictly=below))
    positive, negative = _between(low, high), _between(-high, -low)
    found = [whole] if whole is not None else []
    if positive is not None:
        found.append(f"{positive} fraction-above")
    if negative is not None:
        found.append(f'"-" {negative} fraction-above')
    return choice(found) if found else None


def _between(low: float, high: float) -> str | None:
    """Whole numbers n from 0 on of which all that lies between n and n + 1 is within the bounds."""
    first, last = _up(low, strictly=False), _down(high, strictly=False)
    first = max(0, first if first is not None else 0)
    last = last - 1 if last is not None else 10**DIGITS_MAX - 1
    return integers(first, last) if first <= last else None


def _up(bound: float, *, strictly: bool) -> int | None:
    if math.isinf(bound):
        return None
    whole = math.ceil(bound)
    return whole + (strictly and whole == bound)


def _down(bound: float, *, strictly: bool) -> int | None:
    if math.isinf(bound):
        return None
    whole = math.floor(bound)
    return whole - (strictly and whole == bound)
