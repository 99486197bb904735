"""JSON Schemas put together: references followed, `allOf` merged, alternatives told apart. Pure.

A schema is a map or a truth value, as JSON has them. What is merged fits exactly what fits all of its parts;
where that cannot be said with the keywords that exist, `unsupported` is told of the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias, cast

Schema: TypeAlias = "Mapping[str, Any] | bool"

ANNOTATIONS: Final = frozenset(
    {
        "$schema",
        "$id",
        "$comment",
        "$anchor",
        "$defs",
        "definitions",
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "$vocabulary",
        "$dynamicAnchor",
        "externalDocs",
        "xml",
    }
)
"""Say nothing about what fits."""

TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")
_LOWER: Final = ("minimum", "minLength", "minItems", "minProperties")
_UPPER: Final = ("maximum", "maxLength", "maxItems", "maxProperties")


def as_list(value: object) -> list[Any] | None:
    """The value, if it is a list."""
    return cast("Any", value) if isinstance(value, list) else None


def as_map(value: object) -> Mapping[str, Any] | None:
    """The value, if it is an object."""
    return cast("Any", value) if isinstance(value, Mapping) else None


class SchemaError(Exception):
    """The schema cannot be honoured. The message is for people and begins with the place."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class Impossible(Exception):
    """Nothing fits the schema at this place."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


Unsupported: TypeAlias = Callable[[str, str], None]
"""Told of the place of a keyword that cannot be honoured, and why: raises SchemaError, or makes a note."""


class References:
    """Follows `$ref` within one document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def find(self, reference: object, path: str) -> Schema:
        """The schema that is meant. Raises SchemaError."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise SchemaError(
                f"{path}.$ref", "only references within the schema (#/...) are followed"
            )
        node: Any = self._document
        for part in reference[1:].split("/")[1:] if reference != "#" else ():
            key = part.replace("~1", "/").replace("~0", "~")
            listed, mapped = as_list(node), as_map(node)
            if listed is not None and key.isdecimal() and int(key[:9]) < len(listed):
                node = listed[int(key[:9])]
            elif mapped is not None and key in mapped:
                node = mapped[key]
            else:
                raise SchemaError(f"{path}.$ref", f"{reference[:80]!r} is not in the schema")
        return checked(node, f"{path}.$ref")


def checked(schema: object, path: str) -> Schema:
    """The value, if it can be a schema. Raises SchemaError."""
    if isinstance(schema, bool):
        return schema
    found = as_map(schema)
    if found is None:
        raise SchemaError(path, "a schema is an object, true or false")
    return found


def constraining(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that say something."""
    return {k: v for k, v in schema.items() if k not in ANNOTATIONS and not k.startswith("x-")}


def types_of(schema: Mapping[str, Any], path: str) -> tuple[str, ...] | None:
    """What `type` names; None: nothing. Raises SchemaError."""
    named = schema.get("type")
    if named is None:
        return None
    types = [named] if isinstance(named, str) else as_list(named)
    if not types or not all(each in TYPES for each in types):
        raise SchemaError(f"{path}.type", f"must be one or several of {', '.join(TYPES)}")
    if schema.get("nullable") is True and "null" not in types:
        types = [*types, "null"]
    return tuple(dict.fromkeys(types))


def type_of(value: object) -> str:
    """The narrowest type of a value of JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def is_type(value: object, types: Iterable[str]) -> bool:
    """Whether the value is of one of them."""
    narrow = type_of(value)
    return narrow in types or (narrow == "integer" and "number" in types)


def same(one: object, other: object) -> bool:
    """Whether two values of JSON are equal: true is not 1, but 1.0 is."""
    return canonical(one) == canonical(other)


def canonical(value: object) -> str:
    """A text that equal values share."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if (listed := as_list(value)) is not None:
        return [_plain(each) for each in listed]
    if (mapped := as_map(value)) is not None:
        return {key: _plain(each) for key, each in mapped.items()}
    return value


def values_of(schema: Mapping[str, Any], path: str) -> list[Any] | None:
    """What `enum` and `const` leave; None: anything. Raises SchemaError."""
    values = as_list(schema.get("enum"))
    if values is None and "enum" in schema:
        raise SchemaError(f"{path}.enum", "must be a list")
    if "const" in schema:
        constant = schema["const"]
        return [v for v in (values if values is not None else [constant]) if same(v, constant)]
    return values


class Merger:
    """Merges schemas of one document; counts, so that a hostile one ends."""

    def __init__(
        self, references: References, step: Callable[[str], None], unsupported: Unsupported
    ) -> None:
        self._references = references
        self._step = step  # raises SchemaError when there were too many
        self._unsupported = unsupported

    def merge(self, one: Schema, other: Schema, path: str) -> Schema:
        """What fits both. Raises SchemaError."""
        self._step(path)
        one, other = self.flat(one, path), self.flat(other, path)
        if one is False or other is False:
            return False
        if one is True or other is True:
            return other if one is True else one
        left, right = constraining(one), constraining(other)
        if not left or not right:
            return right or left or True
        merged: dict[str, Any] = {}
        for keyword in dict.fromkeys((*left, *right)):
            if keyword in ("type", "enum", "const", "nullable", *_OBJECT, *_ARRAY):
                continue
            if keyword in left and keyword in right:
                merged[keyword] = self._both(keyword, left[keyword], right[keyword], path)
            else:
                merged[keyword] = left.get(keyword, right.get(keyword))
        types = _common_types(types_of(left, path), types_of(right, path))
        values, others = values_of(left, path), values_of(right, path)
        if values is not None and others is not None:
            wanted = {canonical(each) for each in others}
            values = [value for value in values if canonical(value) in wanted]
        elif values is None:
            values = others
        if values == [] or types == ():
            return False
        if types is not None:
            merged["type"] = list(types)
        if values is not None:
            merged["enum"] = values
        merged.update(self._objects(left, right, path))
        merged.update(self._arrays(left, right, path))
        return merged

    def flat(self, schema: Schema, path: str) -> Schema:
        """The schema without `$ref` and `allOf` at its top. Raises SchemaError."""
        if isinstance(schema, bool):
            return schema
        if isinstance(schema.get("items"), list):
            schema = _modern(schema)
        if "$ref" in schema:
            self._step(path)
            rest = {k: v for k, v in schema.items() if k != "$ref"}
            target = self.flat(self._references.find(schema["$ref"], path), path)
            return self.merge(target, rest, path) if constraining(rest) else target
        if "allOf" in schema:
            parts = as_list(schema["allOf"])
            if not parts:
                raise SchemaError(f"{path}.allOf", "must be a list that is not empty")
            merged: Schema = {k: v for k, v in schema.items() if k != "allOf"}
            for number, part in enumerate(parts):
                here = f"{path}.allOf[{number}]"
                merged = self.merge(merged, checked(part, here), here)
            return merged
        return schema

    def _both(self, keyword: str, one: Any, other: Any, path: str) -> Any:
        if same(one, other):
            return one
        numeric = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (one, other))
        if numeric and keyword in (*_LOWER, "exclusiveMinimum"):
            return max(one, other)
        if numeric and keyword in (*_UPPER, "exclusiveMaximum"):
            return min(one, other)
        if numeric and keyword == "multipleOf" and isinstance(one, int) and isinstance(other, int):
            return math.lcm(one, other)
        if keyword == "uniqueItems":
            return True in (one, other)
        if keyword == "not":
            return {"anyOf": [one, other]}
        self._unsupported(f"{path}.{keyword}", "two different ones cannot be merged")
        return one

    def _objects(
        self, one: Mapping[str, Any], other: Mapping[str, Any], path: str
    ) -> dict[str, Any]:
        """The keywords about properties: each side's `additionalProperties` is about its own ones."""
        merged: dict[str, Any] = {}
        properties, others = properties_of(one, path), properties_of(other, path)
        more = checked(one.get("additionalProperties", True), f"{path}.additionalProperties")
        others_more = checked(
            other.get("additionalProperties", True), f"{path}.additionalProperties"
        )
        if properties or others:
            merged["properties"] = {
                name: self.merge(
                    properties.get(name, more),
                    others.get(name, others_more),
                    f"{path}.properties.{name}",
                )
                for name in dict.fromkeys((*properties, *others))
            }
        if "additionalProperties" in one or "additionalProperties" in other:
            merged["additionalProperties"] = self.merge(more, others_more, path)
        required = dict.fromkeys((*required_of(one, path), *required_of(other, path)))
        if required:
            merged["required"] = list(required)
        return merged

    def _arrays(
        self, one: Mapping[str, Any], other: Mapping[str, Any], path: str
    ) -> dict[str, Any]:
        """The keywords about items: what one side says of all others may be about the other's first ones."""
        merged: dict[str, Any] = {}
        first, others_first = prefix_of(one, path), prefix_of(other, path)
        rest = checked(one.get("items", True), f"{path}.items")
        others_rest = checked(other.get("items", True), f"{path}.items")
        if first or others_first:
            merged["prefixItems"] = [
                self.merge(
                    first[number] if number < len(first) else rest,
                    others_first[number] if number < len(others_first) else others_rest,
                    f"{path}.prefixItems[{number}]",
                )
                for number in range(max(len(first), len(others_first)))
            ]
        if "items" in one or "items" in other:
            merged["items"] = self.merge(rest, others_rest, f"{path}.items")
        return merged

    def disjoint(self, one: Schema, other: Schema, path: str) -> bool:
        """Whether it is plain that nothing fits both."""
        one, other = self.flat(one, path), self.flat(other, path)
        if isinstance(one, bool) or isinstance(other, bool):
            return one is False or other is False
        values, others = values_of(one, path), values_of(other, path)
        types, others_types = types_of(one, path), types_of(other, path)
        if values is not None and others is not None:
            return not {canonical(each) for each in values} & {canonical(each) for each in others}
        if values is not None and others_types is not None:
            return not any(is_type(value, others_types) for value in values)
        if others is not None and types is not None:
            return not any(is_type(value, types) for value in others)
        if types is None or others_types is None:
            return False
        common = _common_types(types, others_types)
        return not common or (common == ("object",) and self._told_apart(one, other, path))

    def _told_apart(self, one: Mapping[str, Any], other: Mapping[str, Any], path: str) -> bool:
        """Whether a property that must be there differs, or may not be there in the other."""
        properties, others = properties_of(one, path), properties_of(other, path)
        needed, others_needed = set(required_of(one, path)), set(required_of(other, path))
        for name in sorted(needed & others_needed):
            both = name in properties and name in others
            if both and self.disjoint(properties[name], others[name], path):
                return True
        return any(
            name not in there and schema.get("additionalProperties") is False
            for names, there, schema in (
                (needed, others, other),
                (others_needed, properties, one),
            )
            for name in names
        )


_OBJECT: Final = ("properties", "additionalProperties", "required")
_ARRAY: Final = ("items", "prefixItems")


def _modern(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Items as they are written today: older schemas list the first ones in `items`."""
    rest = {k: v for k, v in schema.items() if k not in ("items", "additionalItems")}
    more = schema.get("additionalItems", True)
    return {"prefixItems": schema["items"], **rest, "items": more}


def prefix_of(schema: Mapping[str, Any], path: str) -> list[Schema]:
    """What the first items are to be. Raises SchemaError."""
    found = as_list(schema.get("prefixItems", []))
    if found is None:
        raise SchemaError(f"{path}.prefixItems", "must be a list of schemas")
    return [checked(part, f"{path}.prefixItems[{number}]") for number, part in enumerate(found)]


def properties_of(schema: Mapping[str, Any], path: str) -> dict[str, Schema]:
    """The properties by name. Raises SchemaError."""
    found = as_map(schema.get("properties", {}))
    if found is None:
        raise SchemaError(f"{path}.properties", "must be an object")
    return {str(k): checked(v, f"{path}.properties.{k}") for k, v in found.items()}


def required_of(schema: Mapping[str, Any], path: str) -> list[str]:
    """The names that must be there. Raises SchemaError."""
    found = as_list(schema.get("required", []))
    if found is None or not all(isinstance(name, str) for name in found):
        raise SchemaError(f"{path}.required", "must be a list of names")
    return found


def _common_types(
    one: tuple[str, ...] | None, other: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    if one is None or other is None:
        return other if one is None else one
    found: dict[str, None] = {}
    for each in one:
        if each in other:
            found[each] = None
        elif (each == "integer" and "number" in other) or (each == "number" and "integer" in other):
            found["integer"] = None
    return tuple(found)
