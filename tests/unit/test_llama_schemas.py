"""JSON Schemas become grammars: what a grammar describes is JSON and fits, over a generated corpus."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.unit.support_validator import problems
from tests.unit.support_walker import Walker

from meshd_plugins.builtin.llama.prompt.gbnf import GrammarError, parse
from meshd_plugins.builtin.llama.prompt.schema_merge import SchemaError
from meshd_plugins.builtin.llama.prompt.schemas import SCHEMA_BYTES_MAX, schema_grammar

NAMES = st.sampled_from(["a", "ab", "b", "name", 'q"t', "k\\", "é", "x y"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from(["", "a", "ab", 'x"y', "é\n"])
)
BOUNDS = st.tuples(st.integers(-1200, 1200), st.integers(0, 1500))


def bounded(kind: str, low: str, high: str, most: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.integers(0, most), st.integers(0, most)).map(
        lambda pair: {"type": kind, low: min(pair), high: max(pair)}
    )


def ranged(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    def build(pair: tuple[int, int], words: tuple[str, str], half: bool) -> dict[str, Any]:
        low, size = pair
        shift = 0.5 if half and kind == "number" else 0
        return {"type": kind, words[0]: low + shift, words[1]: low + size + 2 + shift}

    words = st.tuples(
        st.sampled_from(["minimum", "exclusiveMinimum"]),
        st.sampled_from(["maximum", "exclusiveMaximum"]),
    )
    return st.builds(build, BOUNDS, words, st.booleans())


LEAVES = st.one_of(
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
            {"type": "number", "minimum": 0, "maximum": 1},
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "integer", "maximum": -5},
            {"type": "integer", "multipleOf": 1},
            {"type": "string", "pattern": '^[A-Z]{2,3}-\\d+(\\.[x-z"]?|!)$'},
            {"type": "string", "pattern": "ab|c[^d]*"},
            {"type": "string", "pattern": "^\\w+@\\S+$", "minLength": 3},
            {"minLength": 2, "maxLength": 4},
        ]
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    bounded("string", "minLength", "maxLength", 8),
    ranged("integer"),
    ranged("number"),
    st.lists(SCALARS, min_size=1, max_size=5).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def an_object(properties: dict[str, Any], chance: int, more: Any) -> dict[str, Any]:
        names = list(properties)
        required = [name for number, name in enumerate(names) if chance >> number & 1]
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        return schema if more is None else {**schema, "additionalProperties": more}

    def an_array(pair: tuple[int, int], items: Any, prefix: list[Any]) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array", "minItems": min(pair), "maxItems": max(pair)}
        schema["items"] = items
        return {**schema, "prefixItems": prefix} if prefix else schema

    objects = st.builds(
        an_object,
        st.dictionaries(NAMES, inner, max_size=4),
        st.integers(0, 15),
        st.one_of(st.none(), st.just(False), inner),
    )
    return st.one_of(
        objects,
        st.builds(
            an_array,
            st.tuples(st.integers(0, 4), st.integers(0, 4)),
            inner,
            st.lists(inner, max_size=2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.tuples(objects, objects).map(lambda parts: {"allOf": list(parts)}),
        st.tuples(st.just({"type": "string", "maxLength": 3}), objects).map(
            lambda parts: {"oneOf": list(parts)}
        ),
        inner.map(lambda part: {"$ref": "#/$defs/x", "$defs": {"x": part}}),
    )


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=8)


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


@settings(max_examples=100, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32))
def test_what_a_grammar_describes_is_json_and_fits(drawn: Any, seed: int) -> None:
    schema = rooted(drawn)
    try:
        grammar = parse(schema_grammar(schema, "schema"))
    except SchemaError as error:
        # The corpus holds schemas that nothing fits, and pairs that cannot be merged.
        assume(
            not any(w in str(error) for w in ("nothing fits", "merged", "beside enum", "also fits"))
        )
        raise
    walker, chance = Walker(grammar), random.Random(seed)
    for _ in range(5):
        text = walker.walk(chance)
        assert problems(json.loads(text), schema) == [], text


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"type": "integer", "minimum": -3, "maximum": 12}, [str(n) for n in range(-3, 13)]),
        (
            {"enum": ["a", "ab", 1, None, {"x": [True]}]},
            ['"a"', '"ab"', "1", "null", '{"x": [true]}'],
        ),
        ({"type": "string", "pattern": "^a?[bc]$"}, ['"b"', '"c"', '"ab"', '"ac"']),
        ({"type": "number", "minimum": 5, "maximum": 5}, ["5"]),
        ({"type": "array", "prefixItems": [{"const": 1}], "items": False, "minItems": 1}, ["[1]"]),
    ],
)
def test_all_that_fits_a_small_schema_is_described(schema: Any, texts: list[str]) -> None:
    walker, chance = Walker(parse(schema_grammar(schema, "schema"))), random.Random(1)
    written = {json.dumps(json.loads(walker.walk(chance))) for _ in range(400)}
    assert written == {json.dumps(json.loads(text)) for text in texts}


def test_what_nothing_fits_is_left_out_where_it_may_be_absent() -> None:
    nothing = [
        {"type": "object", "properties": {}, "additionalProperties": False},
        {"type": "object", "required": ["a"]},
    ]
    schema = {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "additionalProperties": {"$ref": "#/$defs/d"},
        "required": ["a"],
        "$defs": {"d": {"allOf": nothing}},
    }
    walker, chance = Walker(parse(schema_grammar(schema, "schema"))), random.Random(1)
    assert {json.dumps(json.loads(walker.walk(chance))) for _ in range(50)} == {'{"a": null}'}


def test_a_schema_may_contain_itself() -> None:
    schema = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
            }
        },
    }
    walker, chance = Walker(parse(schema_grammar(schema, "schema"))), random.Random(3)
    depths = set()
    for _ in range(50):
        value = json.loads(walker.walk(chance))
        assert problems(value, schema) == []
        depths.add(json.dumps(value).count("next"))
    assert len(depths) > 1


def test_keys_that_are_not_named_differ_from_those_that_are() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "null"}, "ab": {"type": "null"}, 'q"': {"type": "null"}},
        "additionalProperties": {"type": "integer"},
    }
    walker, chance = Walker(parse(schema_grammar(schema, "schema"))), random.Random(5)
    keys: set[str] = set()
    for _ in range(300):
        value = json.loads(walker.walk(chance, long=20))
        assert problems(value, schema) == []
        keys |= value.keys()
    assert {"a", "ab"} <= keys
    assert len(keys) > 20


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"not": {}}, "s.not"),
        ({"properties": {"a": {"if": {}}}}, "s.properties.a.if"),
        ({"type": "array", "items": {"multipleOf": 3}}, "s.items.multipleOf"),
        ({"type": "array", "uniqueItems": True}, "s.uniqueItems"),
        ({"anyOf": [{}, {"type": "string", "format": "hostname"}]}, "s.anyOf[1].format"),
        ({"type": "string", "pattern": "(?=a)"}, "s.pattern"),
        ({"type": "string", "pattern": "a\\b"}, "s.pattern"),
        ({"type": "string", "pattern": "(a)\\1"}, "s.pattern"),
        ({"type": "string", "pattern": "a+", "maxLength": 5}, "s.maxLength"),
        ({"type": "string", "pattern": "["}, "s.pattern"),
        ({"type": "strin"}, "s.type"),
        ({"minLenght": 3}, "s.minLenght"),
        ({"minLength": -1}, "s.minLength"),
        ({"type": "string", "minLength": 3000}, "s.minLength"),
        ({"minimum": "1"}, "s.minimum"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "s"),
        ({"enum": []}, "s.enum"),
        ({"enum": 5}, "s.enum"),
        ({"type": "string", "enum": [1]}, "s.enum"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "s.properties.a"),
        ({"$ref": "https://example.com/x"}, "s.$ref"),
        ({"$ref": "#/$defs/none"}, "s.$ref"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "s.oneOf"),
        ({"oneOf": []}, "s.oneOf"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern"),
        ({"type": "object", "minProperties": 2}, "s.minProperties"),
        ({"properties": {"a": {}}, "maxProperties": 0}, "s.maxProperties"),
        ({"properties": []}, "s.properties"),
        ({"required": "a"}, "s.required"),
        ({"description": "x" * SCHEMA_BYTES_MAX}, "s"),
        ("nonsense", "s"),
    ],
)
def test_what_cannot_be_honoured_names_its_place(schema: Any, place: str) -> None:
    with pytest.raises(SchemaError) as caught:
        schema_grammar(schema, "s")
    assert place in str(caught.value).partition(":")[0]


def wide(depth: int) -> Any:
    """2 to the power of `depth` schemas, when followed."""
    rules = {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/0", "$defs": {**rules, str(depth): {"type": "integer"}}}


def nested(depth: int, wrap: Any) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}]},
        {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}},
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        wide(40),
        nested(200, lambda inner: {"type": "array", "items": inner}),
        nested(60, lambda inner: {"anyOf": [inner]}),
        nested(13, lambda inner: {"anyOf": [inner, inner]}),
        {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "maxItems": n} for n in range(7)]},
        {"type": "string", "pattern": "(a*)*"},
        {"type": "string", "pattern": "(a|a)*"},
        {"type": "string", "pattern": "(" * 400},
        {"type": "string", "pattern": "a?" * 200},
        {"enum": [str(n) for n in range(1500)]},
        {
            "type": "array",
            "prefixItems": [{"type": "string", "maxLength": 1999 - n} for n in range(60)],
        },
    ],
)
def test_a_hostile_schema_is_only_an_error(schema: Any) -> None:
    with pytest.raises((SchemaError, GrammarError)):
        schema_grammar(schema, "s")
