"""Schemas at random: what clients send, in all its keywords."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from meshd_plugins.builtin.llama.prompt.schemas import KNOWN
from meshd_plugins.builtin.llama.prompt.terminals import FORMATS

NAMES = st.sampled_from(["a", "ab", "b", "name", 'q"t', "k\\", "é", "x y"])
WORDS = ["", "a", "ab", 'x"y', "é\n"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from(WORDS), st.just(1.5)
)
BOUNDS = st.tuples(st.integers(-1200, 1200), st.integers(0, 1500))


def _bounded(kind: str, low: str, high: str, most: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.integers(0, most), st.integers(0, most)).map(
        lambda pair: {"type": kind, low: min(pair), high: max(pair)}
    )


def _ranged(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    def build(pair: tuple[int, int], words: tuple[str, str], shift: float) -> dict[str, Any]:
        low, size = pair
        shift = shift if kind == "number" else 0
        return {"type": kind, words[0]: low + shift, words[1]: low + size / 10 + 2 + shift}

    words = st.tuples(
        st.sampled_from(["minimum", "exclusiveMinimum"]),
        st.sampled_from(["maximum", "exclusiveMaximum"]),
    )
    return st.builds(build, BOUNDS, words, st.sampled_from([0, 0.5, 0.125, 0.7]))


def _multiple(divisor: float, pair: tuple[int, int], which: int) -> dict[str, Any]:
    low, size = pair
    schema: dict[str, Any] = {"type": "number" if divisor < 1 else "integer", "multipleOf": divisor}
    if which & 1:
        schema["minimum"] = low
    if which & 2:
        schema["maximum"] = low + size + 400
    return schema


HELD = st.one_of(
    st.sampled_from(
        [
            True,
            {},
            {"type": "string"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "boolean"},
            {"type": ["string", "null"]},
            {"type": "integer", "nullable": True},
            {"type": "string", "nullable": True},
            {"type": "number", "minimum": 0, "maximum": 1},
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "number", "exclusiveMinimum": 0.25, "maximum": 0.7},
            {"type": "number", "minimum": -0.05, "exclusiveMaximum": 0.05},
            {"type": "integer", "maximum": -5},
            {"type": "integer", "multipleOf": 1},
            {"type": "string", "pattern": '^[A-Z]{2,3}-\\d+(\\.[x-z"]?|!)$'},
            {"type": "string", "pattern": "ab|c[^d]*"},
            {"type": "string", "pattern": "^\\w+@\\S+$", "minLength": 3},
            {"type": "string", "format": "password", "minLength": 1},
            {"minLength": 2, "maxLength": 4},
            {"type": "string", "contentEncoding": "base64"},
        ]
    ),
    st.sampled_from(sorted(FORMATS)).map(lambda name: {"type": "string", "format": name}),
    _bounded("string", "minLength", "maxLength", 8),
    _ranged("integer"),
    _ranged("number"),
    st.builds(
        _multiple,
        st.sampled_from([2, 3, 5, 7, 10, 12, 25, 60, 100, 0.1, 0.01, 0.25]),
        BOUNDS,
        st.integers(0, 3),
    ),
    st.lists(SCALARS, min_size=1, max_size=5).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(lambda values: {"enum": values}),
)
DENIED = st.one_of(
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"not": {"enum": values}}),
    st.tuples(st.sampled_from(["string", "integer", "number", "boolean"]), SCALARS).map(
        lambda pair: {"type": pair[0], "not": {"const": pair[1]}}
    ),
    st.tuples(BOUNDS, st.integers(-5, 5)).map(
        lambda drawn: {
            "type": "integer",
            "minimum": drawn[0][0],
            "maximum": drawn[0][0] + drawn[0][1],
            "not": {"enum": [drawn[0][0], drawn[0][0] + drawn[1]]},
        }
    ),
    st.sampled_from(
        [
            {"not": {"type": "null"}},
            {"not": {"type": ["string", "number"]}},
            {"type": ["string", "null", "integer"], "not": {"type": "null"}},
            {"not": {"anyOf": [{"type": "object"}, {"const": 5}, {"type": "array"}]}},
            {"type": "string", "minLength": 0, "not": {"const": ""}},
            {"enum": ["a", 5, None, 7.5], "not": {"minimum": 6}},
            {"enum": ["a", "abc", [1, 1], [1, 2], {"a": 1}], "uniqueItems": True, "minLength": 2},
            {"enum": [0.3, 0.25, 3], "multipleOf": 0.1},
            {"type": "object", "not": {"required": ["a"]}},
            {
                "type": "object",
                "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
                "not": {"required": ["a", "b"]},
            },
        ]
    ),
)
UNIQUE = st.builds(
    lambda items, least, most: {
        "type": "array",
        "items": items,
        "uniqueItems": True,
        "minItems": least,
        "maxItems": most,
    },
    st.one_of(
        st.lists(SCALARS, min_size=2, max_size=5).map(lambda values: {"enum": values}),
        st.sampled_from([{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": 4}]),
    ),
    st.integers(0, 1),
    st.integers(1, 4),
)
NAMED = st.builds(
    lambda names, least: {
        "type": "object",
        "propertyNames": names,
        "additionalProperties": {"type": "null"},
        "minProperties": least,
    },
    st.sampled_from([{"type": "string"}, {"pattern": "^[a-c]+$"}, {"enum": ["a", "ab"]}, True]),
    st.integers(0, 1),
)
COUNTED = st.builds(
    lambda required, most: {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
        "required": required,
        "additionalProperties": {"type": "null"},
        "minProperties": len(required),
        "maxProperties": most,
    },
    st.sampled_from([[], ["a"], ["b"], ["a", "b"]]),
    st.integers(3, 5),
)
OLD_TUPLES = st.sampled_from(
    [
        {"type": "array", "items": [{"type": "null"}, {"const": 1}], "additionalItems": False},
        {"type": "array", "items": [{"const": 1}], "additionalItems": {"const": 2}, "minItems": 2},
    ]
)
LEAVES = st.one_of(HELD, HELD, DENIED, UNIQUE, NAMED, COUNTED, OLD_TUPLES)

NOT_HELD = st.sampled_from(
    [
        {"type": "string", "format": "regex"},
        {"type": "string", "pattern": "^(?=a)b"},
        {"type": "string", "pattern": "^(a|a)*$"},
        {"type": "string", "format": "date", "pattern": "^2"},
        {"type": "string", "pattern": "a+", "maxLength": 3},
        {"type": "string", "maxLength": 2, "not": {"const": "a"}},
        {"type": "string", "not": {"pattern": "a"}},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"type": "array", "contains": {"const": 1}, "minContains": 2},
        {"type": "integer", "multipleOf": 97},
        {"type": "object", "patternProperties": {"^a": {"type": "null"}}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "object", "minProperties": 3},
        {"type": "object", "unevaluatedProperties": False},
        {"if": {"type": "string"}, "then": {"minLength": 2}},
        {"type": "string", "minLenght": 3},
        {"oneOf": [{"type": "integer"}, {"minimum": 3}]},
    ]
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas of objects, arrays and alternatives with others in them."""

    def an_array(pair: tuple[int, int], items: Any, prefix: list[Any]) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array", "minItems": min(pair), "maxItems": max(pair)}
        schema["items"] = items
        return {**schema, "prefixItems": prefix} if prefix else schema

    return st.one_of(
        objects(inner),
        st.builds(
            an_array,
            st.tuples(st.integers(0, 4), st.integers(0, 4)),
            inner,
            st.lists(inner, max_size=2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.tuples(st.just({"type": "string", "maxLength": 3}), objects(inner)).map(
            lambda parts: {"oneOf": list(parts)}
        ),
    )


def objects(
    inner: st.SearchStrategy[Any], names: st.SearchStrategy[str] = NAMES
) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of objects."""

    def build(properties: dict[str, Any], chance: int, more: Any) -> dict[str, Any]:
        required = [name for number, name in enumerate(properties) if chance >> number & 1]
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        return schema if more is None else {**schema, "additionalProperties": more}

    return st.builds(
        build,
        st.dictionaries(names, inner, max_size=4),
        st.integers(0, 15),
        st.one_of(st.none(), st.just(False), inner),
    )


def merged(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas that hold for the same value, and such that stand elsewhere."""
    return st.one_of(
        containers(inner),
        st.tuples(objects(inner), objects(inner)).map(lambda parts: {"allOf": list(parts)}),
        inner.map(lambda part: {"$ref": "#/$defs/x", "$defs": {"x": part}}),
    )


SCHEMAS = st.recursive(LEAVES, merged, max_leaves=8)
LOOSE = st.recursive(st.one_of(HELD, NOT_HELD), containers, max_leaves=6)
"""With keywords that no grammar holds; no schemas that are merged, so that each keyword has its place."""


ODD = st.recursive(
    st.one_of(
        st.sampled_from([None, True, False, 0, 1, -1, 2.5, 1e300, -0.0, 10**30, "", "a", "^a(", "#", "#/$defs/a"]),
        st.sampled_from(["string", "integer", "number", "object", "array", "null", "boolean", "date", "uri"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*sorted(KNOWN), "a", "$ref", "allOf", "$defs", "if", "x-y"]), inner, max_size=4),
    ),
    max_leaves=12,
)  # fmt: skip
"""What looks like a schema here and there."""


def rooted(schema: Any) -> Any:
    """Definitions stand at the root, where references look for them."""
    definitions: dict[str, Any] = {}

    def lift(part: Any) -> Any:
        if isinstance(part, list):
            return [lift(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$defs" in part and "$ref" in part:
            name = f"d{len(definitions)}"
            definitions[name] = None
            definitions[name] = lift(part["$defs"]["x"])
            return {"$ref": f"#/$defs/{name}"}
        return {key: each if key in ("enum", "const") else lift(each) for key, each in part.items()}

    lifted = lift(schema)
    return {**lifted, "$defs": definitions} if isinstance(lifted, dict) and definitions else lifted
