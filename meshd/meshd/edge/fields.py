"""Reading the fields of a request's JSON: each reader returns what it names or says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshd.edge.errors import RequestError
from meshd_plugins.api import Value

NESTING_MAX: Final = 100


def missing(value: Value) -> str:
    """The code for a value that is not of the type that is wanted."""
    return "missing_required_parameter" if value is None else "invalid_type"


def utf8(text: str, param: str) -> str:
    """The text, if UTF-8 can carry it: JSON can smuggle in half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"`{param}` holds half a surrogate pair at character {error.start}", param=param
        ) from error
    return text


def number(
    payload: Mapping[str, Value], name: str, low: float, high: float, within: str = ""
) -> float | None:
    """A number within bounds; None when there is none."""
    value = payload.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(
            f"`{within}{name}` must be a number from {low:g} to {high:g}", param=f"{within}{name}"
        )
    return float(value)


def integer(payload: Mapping[str, Value], name: str, low: int, high: int) -> int | None:
    """An integer within bounds; None when there is none."""
    value = payload.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"`{name}` must be an integer from {low} to {high}", param=name)
    return value


def boolean(payload: Mapping[str, Value], name: str, *, default: bool, within: str = "") -> bool:
    """A truth value."""
    value = payload.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"`{within}{name}` must be true or false", param=f"{within}{name}")
    return value


def listed(value: Value, param: str, most: int) -> list[Value]:
    """A list of bounded length."""
    if not isinstance(value, list):
        raise RequestError(f"`{param}` must be a list", param=param, code=missing(value))
    if len(value) > most:
        raise RequestError(f"`{param}` holds more than {most}", param=param)
    return value


def mapped(value: Value, param: str) -> Mapping[str, Value]:
    """An object."""
    if not isinstance(value, Mapping):
        raise RequestError(f"`{param}` must be an object", param=param, code=missing(value))
    return value


def plain(value: Value, param: str) -> Value:
    """A value that may travel: no halves of surrogate pairs, and not endlessly deep."""
    level: list[Value] = [value]
    for _ in range(NESTING_MAX):
        below: list[Value] = []
        for each in level:
            if isinstance(each, str):
                utf8(each, param)
            elif isinstance(each, Mapping):
                below += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                below += each
        if not below:
            return value
        level = below
    raise RequestError(
        f"`{param}` is more than {NESTING_MAX} levels deep", param=param, code="too_deep"
    )


def unsupported(param: str, why: str) -> RequestError:
    """What is refused although it is well-formed."""
    return RequestError(f"`{param}`: {why}", param=param, code="unsupported_parameter")
