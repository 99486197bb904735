"""`not`, where a grammar can say it: as what is left when values, types or properties are taken away.

What a schema forbids becomes a schema that says what it allows: types without those that are out, properties
that may not be there, values that are left of those that were named. Single values that are out stay as
`{"not": {"enum": [...]}}`, for the makers of strings and numbers to write around.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.schema_merge import (
    TYPES,
    Impossible,
    Merger,
    Schema,
    Unsupported,
    as_list,
    as_map,
    checked,
    constraining,
    is_type,
    required_of,
    type_of,
    types_of,
    values_of,
)

_WRITTEN_AROUND: Final = ("string", "integer", "number")


class Negation:
    """Of the schemas in one document."""

    def __init__(
        self, merger: Merger, step: Callable[[str], None], unsupported: Unsupported
    ) -> None:
        self._merger = merger
        self._step = step  # raises SchemaError when there were too many
        self._unsupported = unsupported

    def without(self, schema: Mapping[str, Any], path: str) -> Schema:
        """The schema with its `not` said in other words. Raises SchemaError, Impossible.

        The schema is flat, and names no values.
        """
        rest: Schema = {key: value for key, value in schema.items() if key != "not"}
        unwanted: list[Any] = []
        for part in self._parts(schema["not"], f"{path}.not"):
            values = _only_values(part, path)
            if values is not None:
                unwanted += values
                continue
            left = self._taken(rest, part, path) if isinstance(rest, Mapping) else rest
            if left is None:
                self._unsupported(f"{path}.not", "is supported for values, types and properties")
            else:
                rest = left
        if not unwanted or not isinstance(rest, Mapping):
            return rest
        return self._without_values(rest, unwanted, path)

    def _parts(self, unwanted: object, path: str) -> list[Mapping[str, Any]]:
        """What may not fit, each by itself: none of several is none of each."""
        self._step(path)
        schema = self._merger.flat(checked(unwanted, path), path)
        if schema is False:
            return []
        said = constraining(schema) if isinstance(schema, Mapping) else {}
        if not said:
            raise Impossible(path)
        parts = as_list(said.get("anyOf"))
        if list(said) == ["anyOf"] and parts:
            return [found for part in parts for found in self._parts(part, path)]
        return [said]

    def _taken(
        self, schema: Mapping[str, Any], unwanted: Mapping[str, Any], path: str
    ) -> Schema | None:
        """What is left of the schema; None: that cannot be said."""
        keywords = set(unwanted)
        types = types_of(schema, path)
        if keywords == {"type"}:
            return _without_types(schema, types, types_of(unwanted, path) or (), path)
        if keywords == {"required"} or (
            keywords == {"required", "type"}
            and types == ("object",)
            and types_of(unwanted, path) == ("object",)
        ):
            # Whatever is no object has all properties that are asked for, as JSON Schema sees it.
            names = required_of(unwanted, path)
            absent: list[Schema] = [{"type": "object", "properties": {n: False}} for n in names]
            if not absent:
                raise Impossible(f"{path}.not")
            base: dict[str, Any] = dict(schema)
            if not schema.get("properties"):  # one that names any has no others unless asked for
                base = {"properties": {}, "additionalProperties": True, **schema}
            return self._merger.merge(base, _any_of(absent), path)
        return None

    def _without_values(
        self, schema: Mapping[str, Any], unwanted: Sequence[Any], path: str
    ) -> Schema:
        types = types_of(schema, path) or [name for name in TYPES if name != "integer"]
        left: list[Schema] = []
        whole: list[str] = []  # types that no value is taken from
        for name in types:
            values = [value for value in unwanted if is_type(value, (name,))]
            if not values:
                whole.append(name)
            elif name == "boolean":
                left += [
                    {"const": v} for v in (True, False) if not any(v is each for each in values)
                ]
            elif name in _WRITTEN_AROUND:
                kept = {key: value for key, value in schema.items() if key != "nullable"}
                left.append({**kept, "type": name, "not": {"enum": values}})
            elif name != "null":
                self._unsupported(f"{path}.not", f"{type_of(values[0])}s cannot be told apart")
                whole.append(name)
        if whole:
            left.append({**schema, "type": whole, "nullable": False})
        if not left:
            raise Impossible(f"{path}.not")
        return _any_of(left)


def is_written_around(schema: Mapping[str, Any], path: str) -> bool:
    """Whether all that is left of `not` are values of the one type that the schema has."""
    types, inner = types_of(schema, path), as_map(schema["not"])
    if types is None or len(types) != 1 or types[0] not in _WRITTEN_AROUND:
        return False
    values = as_list(inner.get("enum")) if inner is not None and len(inner) == 1 else None
    return values is not None and all(is_type(value, types) for value in values)


def _any_of(parts: Sequence[Schema]) -> Schema:
    return parts[0] if len(parts) == 1 else {"anyOf": list(parts)}


def _only_values(schema: Mapping[str, Any], path: str) -> list[Any] | None:
    """The values that a schema consists of; None: there is more to it."""
    if not set(schema) <= {"enum", "const", "type"}:
        return None
    values, types = values_of(schema, path), types_of(schema, path)
    return None if values is None else [v for v in values if types is None or is_type(v, types)]


def _without_types(
    schema: Mapping[str, Any], types: tuple[str, ...] | None, unwanted: Sequence[str], path: str
) -> Schema | None:
    own = [name for name in (types or TYPES) if types is not None or name != "integer"]
    if "integer" in unwanted and "number" not in unwanted and "number" in own:
        return None  # numbers that are not whole
    gone = {*unwanted, "integer"} if "number" in unwanted else set(unwanted)
    left = [name for name in own if name not in gone]
    if not left:
        raise Impossible(f"{path}.not")
    return {**schema, "type": left, "nullable": False}
