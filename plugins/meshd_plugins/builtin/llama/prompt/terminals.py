"""Pieces of grammars for JSON: literals, strings, keys, formats. Expressions in GBNF."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.gbnf import REPETITIONS_MAX

DIGITS_MAX: Final = 15  # of a number without bounds: what a double holds exactly
BOUND_MAX: Final = 10**18
_NAME: Final = string.ascii_letters + string.digits + "_.-"
_ESCAPED: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

PLAIN_CHARACTER: Final = r'[^"\\\x00-\x1F\x7F\uD800-\uDFFF]'
"""What stands for itself in a string of JSON."""

BARE_CHARACTER: Final = r"[^<\x00-\x08\x0B-\x1F\x7F\uD800-\uDFFF]"
"""What stands for itself between tags, but for what might begin one."""

BASIC_RULES: Final = {
    "ws": r'(" " | "\n" [ \t]{0,12})?',
    # Half a surrogate pair is no character: two of them would count as one, or as none.
    "hex": "[0-9a-fA-F]",
    "char": rf'{PLAIN_CHARACTER} | "\\" (["\\/bfnrt] | "u" ([0-9a-ceA-CEfF] hex | [dD] [0-7]) hex hex)',
    "string": r'"\"" char* "\""',
    "integer": rf'"0" | "-"? [1-9] [0-9]{{0,{DIGITS_MAX - 1}}}',
    "fraction": rf'"." [0-9]{{1,{DIGITS_MAX}}}',
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
    "host": 'label ("." label){0,5}',
    "part": '[A-Za-z0-9._~!$&\'()*+,;=:@-] | "%" hex hex',  # of a path
    "query": '("?" (part | [/?])*)? ("#" (part | [/?])*)?',
    "path": '"/" (part+ ("/" part*)*)?',
    "uri": '[a-zA-Z] [a-zA-Z0-9+.-]{0,15} ":" '
    '("//" host (":" [0-9]{1,5})? path? | path | part+ ("/" part*)*) query',
    "group": "hex{1,4}",  # of an IPv6 address
    "count": "[0-9]{1,6}",
    "span-time": '"T" (count "H" (count "M" (count "S")?)? | count "M" (count "S")? | count "S")',
    "span-date": 'count "Y" (count "M" (count "D")?)? | count "M" (count "D")? | count "D"',
}
"""Rules that others may name; only those in use go into a grammar."""

_UUID: Final = 'hex{{8}} "-" hex{{4}} "-" {} hex{{3}} "-" [89abAB] hex{{3}} "-" hex{{12}}'
_EMAIL: Final = '[a-z0-9] ([a-z0-9._+-]{0,20} [a-z0-9])? "@" label ("." label){1,3}'


def _ipv6() -> str:
    """Eight groups, or up to six around the place where those that are 0 were left out."""
    found = ['group (":" group){7}', '"::" (group (":" group){0,6})?']
    for before in range(1, 7):
        leading = "group" if before == 1 else f'group (":" group){{{before - 1}}}'
        after = "group" if before == 6 else f'group (":" group){{0,{6 - before}}}'
        found.append(f'{leading} "::" ({after})?')
    return f"({' | '.join(found)})"


FORMATS: Final[Mapping[str, tuple[str, int, int | None]]] = {
    "date": ("date", 10, 10),
    "time": ("clock offset", 9, 21),
    "date-time": ('date "T" clock offset', 20, 32),
    "duration": ('"P" (count "W" | span-date span-time? | span-time)', 3, None),
    "uuid": (_UUID.format("[1-8]"), 36, 36),
    **{f"uuid{n}": (_UUID.format(f'"{n}"'), 36, 36) for n in range(1, 9)},
    "ipv4": ('octet "." octet "." octet "." octet', 7, 15),
    "ipv6": (_ipv6(), 2, 39),
    "email": (_EMAIL, 5, 114),
    "idn-email": (_EMAIL, 5, 114),
    "hostname": ("host", 1, 137),
    "idn-hostname": ("host", 1, 137),
    **dict.fromkeys(("uri", "url", "iri"), ("uri", 3, None)),
    **dict.fromkeys(("uri-reference", "iri-reference"), ("(uri | path query)", 1, None)),
    "json-pointer": ('("/" [A-Za-z0-9._-]*)*', 0, None),
}
"""What holds the strings of a format, with the shortest and the longest text; some of what fits, without `<`."""

HINTS: Final = frozenset({"password", "path"})
"""Formats that say nothing about a string's characters."""


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


def one_of(characters: Iterable[str]) -> str:
    """One of these characters."""
    return f"[{_points(characters)}]"


def but_for(characters: Iterable[str]) -> str:
    """Any character that may stand between tags, but for these."""
    return BARE_CHARACTER.replace("<", _points(characters))


def _points(characters: Iterable[str]) -> str:
    return "".join(f"\\U{ord(each):08X}" for each in dict.fromkeys(characters))


def other_name(names: Sequence[str], rule: Callable[[str], str]) -> str:
    """A name of letters, digits, `_`, `-` and `.` that is none of these."""
    return _other_name(["", *names], rule)


def _other_name(texts: Sequence[str], rule: Callable[[str], str]) -> str:
    heads: dict[str, list[str]] = {}
    for text in texts:
        if text and text[0] in _NAME:
            heads.setdefault(text[0], []).append(text[1:])
    branches = [f"{one_of(sorted(set(_NAME) - set(heads)))} [a-zA-Z0-9_.\\-]*"]
    branches += [
        f"{literal(head)} {rule(_other_name(rests, rule))}" for head, rests in heads.items()
    ]
    if "" not in texts:
        branches.append('""')
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
