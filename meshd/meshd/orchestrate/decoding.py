"""Reading plain values that somebody else sent: each reader returns the type it names or says why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TypeVar

from meshd_plugins.api import Value

_T = TypeVar("_T")
COUNT_MAX = 2**63 - 1


class Malformed(ValueError):
    """A value from elsewhere is not what it should be. State: nothing was changed."""


def mapping(value: Value, where: str) -> Mapping[str, Value]:
    """A map with text keys."""
    if not isinstance(value, Mapping):
        raise Malformed(f"{where}: expected a map, got {type(value).__name__}")
    if not all(type(key) is str for key in value):
        raise Malformed(f"{where}: expected a map with text keys")
    return value


def sequence(value: Value, where: str) -> Sequence[Value]:
    """A list; text and bytes are none."""
    if not isinstance(value, list | tuple):
        raise Malformed(f"{where}: expected a list, got {type(value).__name__}")
    return value


def number(value: Value, where: str) -> float:
    """A finite integer or float, not negative: every figure here is a rate, a time or a share."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed(f"{where}: expected a number, got {type(value).__name__}")
    if not (0 <= value <= COUNT_MAX and isfinite(value)):  # compared first: huge integers overflow
        raise Malformed(f"{where}: expected a finite number that is not negative")
    return float(value)


def count(value: Value, where: str) -> int:
    """An integer from 0 to `COUNT_MAX`; a truth value is none."""
    found = typed(value, int, where)
    if not 0 <= found <= COUNT_MAX:
        raise Malformed(f"{where}: expected a count, got {found if found < 0 else 'more'}")
    return found


def text(value: Value, where: str) -> str:
    """A text."""
    return typed(value, str, where)


def typed(value: object, kind: type[_T], where: str) -> _T:
    """A value of exactly this type; a truth value is no integer."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Malformed(f"{where}: expected {kind.__name__}, got {type(value).__name__}")
    return value
