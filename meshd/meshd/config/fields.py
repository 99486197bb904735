"""How a field of a section says what it is: its text for people and the bounds of its value.

The dataclass is the only place where a setting is described: the loader, `meshd config show` and the
example file all read it from there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshd_plugins.api import Value

_KEY = "meshd.config"


class Tables(tuple[Mapping[str, Value], ...]):
    """The tables of a setting such as [[access.rules]], in their order, as written."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class About:
    """What is known of one setting beside its type and default."""

    doc: str  # unit, effect of raising it; for people
    minimum: float | None = None  # inclusive
    maximum: float | None = None  # inclusive
    pattern: re.Pattern[str] | None = None  # the whole text, or each element of a list
    pattern_means: str = ""  # the pattern in words
    derived: str = ""  # where the default comes from when it depends on the machine
    secret: bool = False


def about(
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    pattern: str | None = None,
    pattern_means: str = "",
    derived: str = "",
    secret: bool = False,
) -> dict[str, About]:
    """Metadata for `dataclasses.field`."""
    compiled = re.compile(pattern) if pattern is not None else None
    return {_KEY: About(doc, minimum, maximum, compiled, pattern_means, derived, secret)}


def about_of(metadata: Mapping[str, object]) -> About:
    """What `about` put there. A field without it is our bug."""
    found = metadata[_KEY]
    assert isinstance(found, About)
    return found


def default_of(field: dataclasses.Field[object]) -> object:
    """The field's default."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    assert field.default is not dataclasses.MISSING, f"setting {field.name} has no default"
    return field.default


def kind_of(field: dataclasses.Field[object]) -> type:
    """The type of the setting, which is its default's: a tuple is a list of texts, a dict a table."""
    default = default_of(field)
    return Path if isinstance(default, Path) else type(default)
