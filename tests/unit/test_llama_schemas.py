"""JSON Schemas become grammars: what a grammar describes is JSON and fits, over a generated corpus."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.unit.support_schemas import LOOSE, SCHEMAS, rooted
from tests.unit.support_validator import problems
from tests.unit.support_walker import Walker

from meshd_plugins.builtin.llama.prompt.gbnf import GrammarError, parse
from meshd_plugins.builtin.llama.prompt.schema_merge import SchemaError
from meshd_plugins.builtin.llama.prompt.schemas import (
    SCHEMA_BYTES_MAX,
    SchemaCompiler,
    schema_grammar,
)


@settings(max_examples=50, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32))
def test_what_a_grammar_describes_is_json_and_fits(drawn: Any, seed: int) -> None:
    schema = rooted(drawn)
    try:
        grammar = parse(schema_grammar(schema, "schema"))
    except SchemaError as error:
        # The corpus holds schemas that nothing fits, and pairs that cannot be merged.
        impossible = (
            "nothing fits",
            "merged",
            "also fits",
            "beside",
            "told apart",
            "as many",
            "few values",
        )
        assume(not any(words in str(error) for words in impossible))
        raise
    walker, chance = Walker(grammar), random.Random(seed)
    for _ in range(5):
        text = walker.walk(chance)
        assert problems(json.loads(text), schema) == [], text


def described(schema: Any) -> set[str]:
    """All that a small grammar describes."""
    walker, chance = Walker(parse(schema_grammar(schema, "schema"))), random.Random(1)
    return {json.dumps(json.loads(walker.walk(chance))) for _ in range(400)}


def without(schema: Any, place: str) -> Any:
    """The schema without the keyword at a place such as `s.properties.a.anyOf[1].format`."""
    steps = re.findall(r"\[(\d+)\]|\.([^.\[]+)", place)
    node = schema
    for number, name in steps[:-1]:
        node = node[int(number)] if number else node[name]
    del node[steps[-1][1]]
    return schema


@settings(max_examples=50, deadline=None)
@given(LOOSE, st.integers(0, 2**32))
def test_what_no_grammar_can_say_is_noted_and_all_else_is_held(drawn: Any, seed: int) -> None:
    assume(isinstance(drawn, dict))
    compiler = SchemaCompiler()
    try:
        grammar = parse(compiler.grammar(compiler.add(drawn, "s", strict=False)))
    except SchemaError as error:
        assume("nothing fits" not in str(error))
        raise
    if compiler.unenforced:
        with pytest.raises(SchemaError) as caught:
            schema_grammar(drawn, "s")
        assert caught.value.path in compiler.unenforced
    held = json.loads(json.dumps(drawn))
    for place in compiler.unenforced:
        held = without(held, place)
    walker, chance = Walker(grammar), random.Random(seed)
    for _ in range(5):
        text = walker.walk(chance)
        assert problems(json.loads(text), held) == [], (text, compiler.unenforced)


@pytest.mark.parametrize(
    ("schema", "places"),
    [
        ({"type": "string", "format": "regex", "minLength": 2}, ["s.format"]),
        ({"type": "string", "format": "email", "pattern": "^(?!a).*$"}, ["s.pattern"]),
        ({"type": "object", "properties": {"a": {"minLenght": 1}}}, ["s.properties.a.minLenght"]),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, ["s.uniqueItems"]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["s.oneOf"]),
        ({"allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}, ["s.allOf[1].pattern"]),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"if": {}}}}, ["s(#/$defs/a).if"]),
        ({"title": "A", "x-order": 1, "default": 5, "format": "int32", "type": "integer"}, []),
    ],
)
def test_what_is_an_annotation_names_its_place(schema: Any, places: list[str]) -> None:
    compiler = SchemaCompiler()
    compiler.grammar(compiler.add(schema, "s", strict=False))
    assert list(compiler.unenforced) == places


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"type": "integer", "minimum": -7, "maximum": 9, "multipleOf": 3}, ["-6", "-3", "0", "3", "6", "9"]),
        ({"type": "integer", "minimum": 1, "maximum": 400, "multipleOf": 100}, ["100", "200", "300", "400"]),
        ({"type": "number", "minimum": 0.75, "maximum": 0.8, "multipleOf": 0.01}, ["0.75", "0.76", "0.77", "0.78", "0.79", "0.8"]),
        ({"type": "number", "exclusiveMinimum": -0.2, "exclusiveMaximum": 0, "multipleOf": 0.1}, ["-0.1"]),
        ({"type": "integer", "minimum": 1, "maximum": 5, "not": {"enum": [1, 3, "x"]}}, ["2", "4", "5"]),
        ({"enum": ["a", "b", "abc", 7], "not": {"const": "b"}, "maxLength": 2}, ['"a"', "7"]),
        ({"type": ["boolean", "null"], "not": {"enum": [True]}}, ["null", "false"]),
        ({"type": ["boolean", "null"], "not": {"type": "boolean"}}, ["null"]),
        (
            {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 1},
            ["[1]", "[2]", "[1, 2]", "[2, 1]"],
        ),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, ["[]", "[null]"]),
        (
            {"allOf": [{"prefixItems": [{"const": 1}]}, {"items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2, "type": "array"}]},
            ["[1, 1]", "[1, 2]"],
        ),
        ({"type": "integer", "maximum": 2**64, "minimum": 10**18}, [str(10**18)]),
    ],
)  # fmt: skip
def test_all_that_fits_such_keywords_is_described(schema: Any, texts: list[str]) -> None:
    assert described(schema) == {json.dumps(json.loads(text)) for text in texts}


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
    assert described(schema) == {json.dumps(json.loads(text)) for text in texts}


def test_an_object_may_have_many_properties_that_are_not_needed() -> None:
    names = [f"a{number}" for number in range(33)]
    schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
    walker, chance = Walker(parse(schema_grammar(schema, "s"))), random.Random(2)
    seen: set[str] = set()
    for _ in range(100):
        seen |= json.loads(walker.walk(chance)).keys()
    assert {"a0", "a1", "a2"} <= seen <= set(names)


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
        ({"type": "array", "items": {"multipleOf": 97}}, "s.items.multipleOf"),
        ({"type": "array", "uniqueItems": True}, "s.uniqueItems"),
        ({"anyOf": [{}, {"type": "string", "format": "regex"}]}, "s.anyOf[1].format"),
        ({"not": {"minimum": 3}}, "s.not"),
        ({"type": "integer", "not": {"type": "number"}}, "s.not"),
        ({"type": "string", "format": "date", "pattern": "^2"}, "s.format"),
        ({"type": "number", "multipleOf": 0}, "s.multipleOf"),
        ({"type": "number", "multipleOf": 0.0000001}, "s.multipleOf"),
        ({"enum": ["a"], "pattern": "b"}, "s.pattern"),
        ({"enum": ["a"], "minLength": 2}, "s.enum"),
        ({"minimum": 2e18}, "s.minimum"),
        (
            {
                "properties": {"a": {}},
                "propertyNames": {"maxLength": 2},
                "additionalProperties": True,
            },
            "s.propertyNames",
        ),
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
        {"type": "array", "items": {"enum": list(range(100))}, "uniqueItems": True},
        {"type": "array", "items": {"enum": list(range(999))}, "uniqueItems": True, "maxItems": 2},
        {"not": nested(60, lambda inner: {"not": inner})},
        {"enum": [1, 2], "not": {"$ref": "#"}},
        {"enum": [1, 2], "anyOf": [{"$ref": "#"}]},
        nested(60, lambda inner: {"allOf": [{"not": {"not": inner}}]}),
        {
            "enum": list(range(1000)),
            "not": {"anyOf": [{"enum": list(range(n, n + 900))} for n in range(9)]},
        },
        {
            "type": "array",
            "prefixItems": [{"type": "string", "maxLength": 1999 - n} for n in range(60)],
        },
    ],
)
def test_a_hostile_schema_is_only_an_error(schema: Any) -> None:
    with pytest.raises((SchemaError, GrammarError)):
        schema_grammar(schema, "s")
