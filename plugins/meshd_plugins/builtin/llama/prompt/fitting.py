"""Whether one value of JSON fits a schema: for values that a schema names itself (`enum`, `const`, `not`).

Not for answers: patterns and formats are left undecided, so that no regular expression of a stranger runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from meshd_plugins.builtin.llama.prompt.schema_merge import (
    References,
    Schema,
    as_list,
    as_map,
    canonical,
    checked,
    constraining,
    is_type,
    properties_of,
    required_of,
    types_of,
    values_of,
)


class Undecided(Exception):
    """A keyword that is not looked at here."""


class Fitting:
    """Of the values in one document."""

    def __init__(self, references: References, step: Callable[[str], None]) -> None:
        self._references = references
        self._step = step  # raises SchemaError when there were too many
        self._listed: dict[int, frozenset[str]] = {}  # values that a schema names, by its identity

    def fits(self, value: Any, schema: Schema, path: str) -> bool:
        """Whether the value fits. Raises SchemaError, Undecided."""
        self._step(path)
        if isinstance(schema, bool):
            return schema
        said = constraining(schema)
        return all(self.holds(value, keyword, schema, path) for keyword in said)

    def holds(self, value: Any, keyword: str, schema: Mapping[str, Any], path: str) -> bool:
        """Whether one keyword of the schema lets the value pass. Raises SchemaError, Undecided."""
        wanted = schema[keyword]
        here = f"{path}.{keyword}"
        match keyword:
            case "type" | "nullable":
                types = types_of(schema, path)
                return types is None or is_type(value, types)
            case "enum" | "const":
                if id(schema) not in self._listed:
                    named = values_of(schema, path) or ()
                    self._listed[id(schema)] = frozenset(canonical(each) for each in named)
                return canonical(value) in self._listed[id(schema)]
            case "$ref":
                return self.fits(value, self._references.find(wanted, path), here)
            case "not":
                return not self.fits(value, checked(wanted, here), here)
            case "anyOf" | "oneOf" | "allOf":
                parts = [checked(part, here) for part in as_list(wanted) or ()]
                count = sum(self.fits(value, part, here) for part in parts)
                least, most = {"anyOf": (1, len(parts)), "oneOf": (1, 1)}.get(
                    keyword, (len(parts), len(parts))
                )
                return least <= count <= most
            case _:
                return self._holds_of_kind(value, keyword, schema, path)

    def _holds_of_kind(
        self, value: Any, keyword: str, schema: Mapping[str, Any], path: str
    ) -> bool:
        wanted = schema[keyword]
        if keyword in _BOUNDS:
            applies, holds = _BOUNDS[keyword]
            if isinstance(wanted, bool) or not isinstance(wanted, int | float):
                raise Undecided(keyword)
            return not applies(value) or holds(value, wanted)
        listed, mapped = as_list(value), as_map(value)
        match keyword:
            case "pattern" | "format":
                if isinstance(value, str):
                    raise Undecided(keyword)
                return True
            case "uniqueItems":
                return wanted is not True or listed is None or not _repeats(listed)
            case "items" | "prefixItems":
                return listed is None or self._items(listed, keyword, schema, path)
            case "properties" | "additionalProperties":
                return mapped is None or self._members(mapped, keyword, schema, path)
            case "required":
                return mapped is None or all(name in mapped for name in required_of(schema, path))
            case _:
                raise Undecided(keyword)

    def _items(self, value: list[Any], keyword: str, schema: Mapping[str, Any], path: str) -> bool:
        prefix = as_list(schema.get("prefixItems", [])) or []
        if keyword == "prefixItems":
            pairs = list(zip(value, prefix, strict=False))
        else:
            pairs = [(each, schema["items"]) for each in value[len(prefix) :]]
        here = f"{path}.{keyword}"
        return all(self.fits(each, checked(part, here), here) for each, part in pairs)

    def _members(
        self, value: Mapping[str, Any], keyword: str, schema: Mapping[str, Any], path: str
    ) -> bool:
        named = properties_of(schema, path)
        here = f"{path}.{keyword}"
        if keyword == "properties":
            return all(self.fits(value[name], named[name], here) for name in named if name in value)
        more = checked(schema[keyword], here)
        return all(self.fits(each, more, here) for name, each in value.items() if name not in named)


def _repeats(values: list[Any]) -> bool:
    return len({canonical(value) for value in values}) < len(values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_multiple(value: float, of: float) -> bool:
    """As they are written: 0.3 is a multiple of 0.1."""
    return of > 0 and Fraction(str(value)) % Fraction(str(of)) == 0


_BOUNDS: Mapping[str, tuple[Callable[[Any], bool], Callable[[Any, Any], bool]]] = {
    "minimum": (_is_number, lambda value, bound: value >= bound),
    "maximum": (_is_number, lambda value, bound: value <= bound),
    "exclusiveMinimum": (_is_number, lambda value, bound: value > bound),
    "exclusiveMaximum": (_is_number, lambda value, bound: value < bound),
    "multipleOf": (_is_number, _is_multiple),
    "minLength": (lambda value: isinstance(value, str), lambda value, bound: len(value) >= bound),
    "maxLength": (lambda value: isinstance(value, str), lambda value, bound: len(value) <= bound),
    "minItems": (lambda value: isinstance(value, list), lambda value, bound: len(value) >= bound),
    "maxItems": (lambda value: isinstance(value, list), lambda value, bound: len(value) <= bound),
    "minProperties": (
        lambda value: isinstance(value, Mapping),
        lambda value, bound: len(value) >= bound,
    ),
    "maxProperties": (
        lambda value: isinstance(value, Mapping),
        lambda value, bound: len(value) <= bound,
    ),
}
