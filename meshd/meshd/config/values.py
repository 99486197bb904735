"""From what a file, a variable or an option holds to the value of a field, or to a sentence about it.

Two sources differ: a file is typed already, so `port = "80"` there is a mistake; a variable or an
option is text and is read by the field's type.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import cast

from meshd.config.fields import About, Tables
from meshd_plugins.api import Value

DEPTH_MAX = 16  # of tables and lists inside a table that is passed through

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


class Unsuitable(ValueError):
    """The value does not suit the field; the text says what would."""


def convert(raw: object, kind: type, about: About, *, base: Path, text: bool) -> object:
    """The field's value from a raw one.

    `text`: raw may be the text of an option or a variable. `base`: what a relative path is relative to.
    Raises Unsuitable with what is expected.
    """
    if text and isinstance(raw, str):
        raw = _read(raw, kind)
    if kind is tuple:
        return _texts(raw, about)
    if kind is Tables:
        return _tables(raw)
    if kind is dict:
        return passed_through(raw)
    if kind is bool:
        if not isinstance(raw, bool):
            raise Unsuitable("expected true or false")
        return raw
    if kind is int or kind is float:
        return _number(raw, kind is int, about)
    if kind is Path:
        return _path(raw, base)
    if issubclass(kind, StrEnum):
        choices = [member.value for member in kind]
        if not isinstance(raw, str) or raw not in choices:
            raise Unsuitable(f"expected one of {', '.join(choices)}")
        return kind(raw)
    assert kind is str, f"no rule for a field of type {kind!r}"
    if not isinstance(raw, str):
        raise Unsuitable("expected text in quotes")
    return _matching(raw, about)


def passed_through(raw: object) -> Mapping[str, Value]:
    """A table that somebody else checks: only what msgpack can carry. Raises Unsuitable."""
    if not isinstance(raw, Mapping):
        raise Unsuitable("expected a table")
    return cast("Mapping[str, Value]", _plain(cast("Mapping[str, object]", raw), DEPTH_MAX))


def _tables(raw: object) -> Tables:
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise Unsuitable("expected tables, each under a line with its name in double brackets")
    return Tables(passed_through(item) for item in cast("Sequence[object]", raw))


def read_toml_value(text: str) -> object:
    """The text as TOML reads a value (`3`, `true`, `["a"]`), or the text itself where it is none."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def _read(text: str, kind: type) -> object:
    word = text.strip()
    if kind is tuple:
        if word.startswith("["):
            return read_toml_value(word)
        return [part.strip() for part in word.split(",") if part.strip()]
    if kind is dict or kind is Tables:
        return read_toml_value(word)
    if kind is bool:
        folded = word.lower()
        return True if folded in _TRUE else False if folded in _FALSE else text
    if kind is int:
        return int(word.replace("_", "")) if re.fullmatch(r"[+-]?\d[\d_]{0,30}", word) else text
    if kind is float:
        try:
            return float(word)
        except ValueError:
            return text
    return text


def _number(raw: object, whole: bool, about: About) -> int | float:
    expected = "expected a whole number" if whole else "expected a number"
    if about.minimum is not None and about.maximum is not None:
        expected += f" from {about.minimum:.12g} to {about.maximum:.12g}"
    if isinstance(raw, bool) or not isinstance(raw, int if whole else (int, float)):
        raise Unsuitable(expected)
    if not math.isfinite(raw):
        raise Unsuitable(expected)
    if (about.minimum is not None and raw < about.minimum) or (
        about.maximum is not None and raw > about.maximum
    ):
        raise Unsuitable(expected)
    return raw if whole else float(raw)


def _path(raw: object, base: Path) -> Path:
    if isinstance(raw, Path):
        raw = str(raw)
    if not isinstance(raw, str) or not raw or "\0" in raw:
        raise Unsuitable("expected a path in quotes")
    try:
        path = Path(raw).expanduser()
    except RuntimeError as error:
        raise Unsuitable("expected a path; the user after ~ is not known") from error
    return base / path


def _texts(raw: object, about: About) -> tuple[str, ...]:
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise Unsuitable('expected a list of texts, such as ["one", "two"]')
    texts: list[str] = []
    for item in cast("Sequence[object]", raw):
        if not isinstance(item, str):
            raise Unsuitable('expected a list of texts, such as ["one", "two"]')
        texts.append(_matching(item, about))
    if about.maximum is not None and len(texts) > about.maximum:
        raise Unsuitable(f"expected at most {about.maximum:.12g} of them")
    return tuple(texts)


def _matching(text: str, about: About) -> str:
    if about.pattern is not None and not about.pattern.fullmatch(text):
        raise Unsuitable(f"expected {about.pattern_means}")
    return text


def _plain(raw: object, depth: int) -> Value:
    if depth == 0:
        raise Unsuitable(f"expected at most {DEPTH_MAX} levels of tables and lists")
    match raw:
        case None | bool() | int() | float() | str() | bytes():
            return raw
        case Mapping():
            table = cast("Mapping[str, object]", raw)
            return {name: _plain(value, depth - 1) for name, value in table.items()}
        case Sequence():
            return [_plain(value, depth - 1) for value in cast("Sequence[object]", raw)]
        case Path():
            return str(raw)
        case _:
            raise Unsuitable("dates and times are not supported: write them as text in quotes")


def kind_in_words(kind: type) -> str:
    """The type of a setting, for people."""
    if issubclass(kind, StrEnum):
        return "one of " + ", ".join(member.value for member in kind)
    return _IN_WORDS[kind]


_IN_WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    tuple: "list of texts",
    dict: "table",
    Tables: "tables",
}
