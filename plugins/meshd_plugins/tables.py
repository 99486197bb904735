"""For authors of plugins: reading the configuration table, with errors that say what would be right.

Each function reads one key of a table, or all keys of it; `where` is how the table is named in an error, such as
"plugins.dice" or "plugins.dice.tables[0]". All raise PluginConfigError.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from meshd_plugins.api import PluginConfigError, Value


def reject_unknown(table: Mapping[str, Value], known: Sequence[str], where: str) -> None:
    """Raise unless every key is one of these; the nearest of them is named, or else all."""
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
            )
            raise PluginConfigError(f"{where} has the unknown key {key!r}{hint}")


def read_boolean(table: Mapping[str, Value], name: str, where: str, *, default: bool) -> bool:
    """A key that is true or false."""
    value = table.get(name, default)
    if not isinstance(value, bool):
        raise PluginConfigError(f"{where}.{name} is {value!r}: true or false")
    return value


def read_integer(
    table: Mapping[str, Value], name: str, where: str, least: int, most: int, *, default: int
) -> int:
    """A key that is a whole number within bounds."""
    value = table.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PluginConfigError(f"{where}.{name} is {value!r}: an integer from {least} to {most}")
    return value


def read_number(
    table: Mapping[str, Value], name: str, where: str, least: float, most: float, *, default: float
) -> float:
    """A key that is a number within bounds, whole or not."""
    value = table.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise PluginConfigError(f"{where}.{name} is {value!r}: a number from {least:g} to {most:g}")
    return float(value)


def read_choice(
    table: Mapping[str, Value], name: str, where: str, choices: Sequence[str], *, default: str
) -> str:
    """A key that is one of these words; an empty one, where it may be left empty, is not named in the error."""
    value = table.get(name, default)
    if not isinstance(value, str) or value not in choices:
        named = ", ".join(choice for choice in choices if choice)
        raise PluginConfigError(f"{where}.{name} is {value!r}: one of {named}")
    return value
