"""From a tool's schema to a call in each model's own way, and back; templates of the field's kinds, in fragments."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from string import ascii_letters
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.unit.support_schemas import LEAVES, ODD, containers, objects
from tests.unit.support_validator import problems
from tests.unit.support_walker import Walker

from meshd_plugins.api import Operation, Value
from meshd_plugins.builtin.llama.prompt.answers import AnswerReader
from meshd_plugins.builtin.llama.prompt.conversation import (
    Conversations,
    Prepared,
    RequestUnusable,
)
from meshd_plugins.builtin.llama.prompt.gbnf import GrammarError, parse
from meshd_plugins.builtin.llama.prompt.history import SHORT_ID, History, find_history
from meshd_plugins.builtin.llama.prompt.schema_merge import SchemaError
from meshd_plugins.builtin.llama.prompt.schemas import KNOWN, SchemaCompiler
from meshd_plugins.builtin.llama.prompt.special import MessageCutter
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate
from meshd_plugins.builtin.llama.prompt.tools import (
    DEEPSEEK_CALL,
    DEEPSEEK_SEPARATOR,
    Tool,
    ToolFormat,
    ToolSyntax,
    call_rules,
    calls_expression,
    find_format,
)
from meshd_plugins.builtin.llama.serving.requests import worker_message

TOLD = "{% if tools %}{{ tools | tojson }}{% endif %}"
TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
QWEN_CODER = (
    TOLD
    + TURN
    + "{% for call in m.tool_calls or [] %}{% set call = call.function %}"
    + "<tool_call>\n<function={{ call.name }}>\n"
    + "{% for name, value in call.arguments|items %}<parameter={{ name }}>\n"
    + "{{ value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string }}"
    + "\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}{% endfor %}<|assistant|>"
)
GLM = (
    TOLD
    + TURN
    + "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}\n"
    + "{% for k, v in call.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
    + "<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>\n"
    + "{% endfor %}</tool_call>{% endfor %}{% endfor %}<|assistant|>"
)
MINIMAX = (
    TOLD
    + TURN
    + "{% if m.tool_calls %}<minimax:tool_call>\n{% for call in m.tool_calls %}"
    + '<invoke name="{{ call.function.name }}">\n{% for k, v in call.function.arguments.items() %}'
    + '<parameter name="{{ k }}">{{ v | tojson if v is not string else v }}</parameter>\n{% endfor %}'
    + "</invoke>\n{% endfor %}</minimax:tool_call>{% endif %}{% endfor %}<|assistant|>"
)
DEEPSEEK = (
    TOLD
    + TURN
    + "{% for call in m.tool_calls or [] %}"
    + f"{{{{ '{DEEPSEEK_CALL}' + call.function.name + '{DEEPSEEK_SEPARATOR}' + call.function.arguments }}}}"
    + "{% endfor %}{% endfor %}<|assistant|>"
)
MISTRAL = (
    TOLD
    + "{% for m in messages %}{% if loop.index0 % 2 == 0 and m.role == 'assistant' %}"
    + "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}"
    + "{% for call in m.tool_calls or [] %}{% if call.id|length != 9 %}{{ raise_exception('length 9!') }}{% endif %}"
    + "[TOOL_CALLS]{{ call.function | tojson }}, {{ call.id }}{% endfor %}"
    + "{% if m.role == 'tool' %}{% if m.tool_call_id|length != 9 %}{{ raise_exception('length 9!') }}{% endif %}"
    + "[of {{ m.tool_call_id }}]{% endif %}{% endfor %}<|assistant|>"
)
ARGUMENTS = {"city": "São Paulo", "days": 3, "tags": ["a", "b"]}
MESSAGES: list[Value] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_6",
                "type": "function",
                "function": {"name": "f", "arguments": json.dumps(ARGUMENTS)},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_6", "content": "rain"},
]
TOOLS: list[Value] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def model(template: str) -> Conversations:
    return Conversations(
        ChatTemplate(template, {"bos_token": "", "eos_token": ""}), MessageCutter(()), lambda: "x"
    )


def prepare(template: str, **body: Any) -> Prepared:
    asked = {"messages": MESSAGES, "tools": TOOLS, **body}
    return model(template).prepare(worker_message(Operation.CHAT, asked))


@pytest.mark.parametrize(
    ("template", "form", "shown"),
    [
        (
            QWEN_CODER,
            ToolFormat.FUNCTION_TAGS,
            "<tool_call>\n<function=f>\n<parameter=city>\nSão Paulo\n</parameter>\n"
            '<parameter=days>\n3\n</parameter>\n<parameter=tags>\n["a", "b"]\n</parameter>\n',
        ),
        (
            GLM,
            ToolFormat.ARGUMENT_TAGS,
            "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>São Paulo</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n",
        ),
        (
            MINIMAX,
            ToolFormat.INVOKE_TAGS,
            '<invoke name="f">\n<parameter name="city">São Paulo</parameter>\n'
            '<parameter name="days">3</parameter>\n',
        ),
        (DEEPSEEK, ToolFormat.DEEPSEEK, f'f{DEEPSEEK_SEPARATOR}{{"city": "São Paulo", "days": 3'),
        (MISTRAL, ToolFormat.MISTRAL, '[TOOL_CALLS]{"name": "f", "arguments": {"city": "São P'),
    ],
)
def test_a_template_is_known_and_prints_earlier_calls_as_it_wants_to(
    template: str, form: ToolFormat, shown: str
) -> None:
    assert find_format(template) == (form, True)
    text = "".join(map(str, prepare(template).parts))
    assert shown in text
    assert "rain" in text.partition("<|tool|>")[2]
    assert "You may call tools" not in text


def test_how_a_template_wants_earlier_calls_is_tried_out() -> None:
    def wanted(source: str) -> History:
        return find_history(ChatTemplate(source, {}))

    assert wanted(QWEN_CODER) == wanted(GLM) == History()
    assert wanted(DEEPSEEK) == History(as_text=True)
    assert wanted(MISTRAL) == History(short_ids=True)
    # One that prints an object as Python does.
    printed = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}"
    assert wanted(printed + "{% endfor %}{% endfor %}") == History(as_text=True)
    assert wanted("{% for m in messages %}{{ m.content }}{% endfor %}") == History()
    assert wanted("{{ raise_exception('no') }}") == History()


def test_short_ids_are_the_same_for_a_call_and_its_result() -> None:
    text = "".join(map(str, prepare(MISTRAL).parts))
    identity = text.partition("[of ")[2].partition("]")[0]
    assert SHORT_ID.fullmatch(identity)
    assert f", {identity}" in text


def test_an_earlier_call_that_was_cut_is_named_where_a_template_cannot_print_it() -> None:
    broken = json.loads(json.dumps(MESSAGES))
    broken[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Par'
    with pytest.raises(RequestUnusable, match=r"messages\[1\]\.tool_calls\[0\].*no object of JSON"):
        prepare(QWEN_CODER, messages=broken)
    assert '{"city": "Par' in "".join(map(str, prepare(DEEPSEEK, messages=broken).parts))


def test_other_tags_are_not_taken_for_those_that_are_read() -> None:
    for source in ("<tool_call>f<tool_sep><arg_key>a</arg_key><arg_value>", "<function=f>{}"):
        assert find_format(f"{TOLD}{source}") == (ToolFormat.HERMES, False)
    unknown = '<tool_call><invoke name="f"></invoke>'
    assert find_format(f"{TOLD}{unknown}") == (ToolFormat.HERMES, False)
    assert find_format("<tool_call><function=f><parameter=a></function>")[1] is False


# -- schemas, calls and back -------------------------------------------------------------------------------


def compiled(form: ToolFormat, schema: Any) -> tuple[Walker, ToolSyntax, tuple[str, ...]]:
    compiler = SchemaCompiler()
    call, kinds = call_rules(compiler, form, [Tool("f", "", schema)], ["s"])
    grammar = compiler.grammar(calls_expression(compiler, form, call, parallel=False, marked=True))
    syntax = ToolSyntax(form, frozenset({"f"}), kinds)
    return Walker(parse(grammar)), syntax, tuple(compiler.unenforced)


def walked(walker: Walker, syntax: ToolSyntax, chance: random.Random) -> tuple[Any, str]:
    """What a client is told of a call that was written at random."""
    text = walker.walk(chance)
    reader = AnswerReader(None, syntax, lambda: "x")
    parts, rest = reader.feed(text), reader.finish()
    told = [*parts.tool_calls, *rest.tool_calls]
    assert reader.called, text
    assert (parts.text + rest.text).strip() == "", text
    assert [each.name for each in told if each.name] == ["f"]
    return json.loads("".join(each.arguments for each in told)), text


SIMPLE = st.sampled_from(["a", "ab", "b", "name", "the_city", "x-y"])
INNER = st.one_of(LEAVES, containers(LEAVES))


@settings(max_examples=40, deadline=None)
@given(objects(INNER, SIMPLE), st.sampled_from(list(ToolFormat)), st.integers(0, 2**32))
def test_what_is_called_fits_its_schema_in_every_way_of_writing_it(
    schema: dict[str, Any], form: ToolFormat, seed: int
) -> None:
    try:
        walker, syntax, unenforced = compiled(form, schema)
    except SchemaError as error:
        assume("nothing fits" not in str(error))
        raise
    assume(not unenforced)
    chance = random.Random(seed)
    for _ in range(4):
        value, text = walked(walker, syntax, chance)
        assert problems(value, schema) == [], text


@pytest.mark.parametrize("form", [ToolFormat.FUNCTION_TAGS, ToolFormat.ARGUMENT_TAGS])
@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [objects_ := {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
                   {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}]},
        {"allOf": [objects_, {"properties": {"b": {"type": ["string", "null"]}}, "required": ["b"]}]},
        {"properties": {"a": {"$ref": "#/$defs/w"}}, "required": ["a"], "$defs": {"w": {"type": "string", "pattern": "^[<a-c]+$"}}},
        {"properties": {"a": {"enum": ["x", None, "</parameter>", "</arg_value>"]}}, "required": ["a"]},
        {"properties": {"a": {"anyOf": [{"enum": ["x"]}, {"type": "string", "minLength": 2, "maxLength": 3}, {"type": "null"}]}}},
        {"properties": {"a": {"type": "string", "not": {"const": ""}}}, "required": ["a"]},
        {"properties": {"a": {"type": "string"}, "b>": {"type": "string"}}, "additionalProperties": {"type": "string"}},
        {"additionalProperties": {"type": "integer"}, "minProperties": 1},
        {"properties": {"a": {"type": "string", "format": "date-time"}, "b": {"type": "string", "format": "uri"}}, "required": ["a", "b"]},
        {},
        True,
    ],
)  # fmt: skip
def test_strings_between_tags_are_bare_and_fit(form: ToolFormat, schema: Any) -> None:
    walker, syntax, unenforced = compiled(form, schema)
    assert unenforced == ()
    chance = random.Random(3)
    whole = {"type": "object", **schema} if schema and schema is not True else {"maxProperties": 0}
    for _ in range(60):
        value, text = walked(walker, syntax, chance)
        assert problems(value, whole) == [], text


def test_a_string_holds_what_begins_like_a_tag() -> None:
    walker, syntax, _ = compiled(
        ToolFormat.FUNCTION_TAGS,
        {"properties": {"a": {"type": "string"}}, "required": ["a"]},
    )
    chance = random.Random(3)
    values = [walked(walker, syntax, chance)[0]["a"] for _ in range(600)]
    assert any("<" in value for value in values)
    assert any("\n" in value for value in values)
    assert len(set(values)) > 150


def test_a_name_that_no_tag_can_hold_is_refused_only_where_it_is_needed() -> None:
    schema: Mapping[str, Any] = {"properties": {'a"b': {"type": "string"}}, "required": ['a"b']}
    with pytest.raises(SchemaError, match="nothing fits it"):
        compiled(ToolFormat.FUNCTION_TAGS, schema)
    compiled(ToolFormat.HERMES, schema)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), ODD, max_size=5), st.booleans())
def test_whatever_a_schema_holds_it_is_only_an_error(schema: dict[str, Any], strict: bool) -> None:
    compiler = SchemaCompiler()
    for form in (None, ToolFormat.HERMES, ToolFormat.FUNCTION_TAGS):
        try:
            if form is None:
                compiler.grammar(compiler.add(schema, "s", strict=strict))
            else:
                compiled(form, schema)
        except (SchemaError, GrammarError):
            continue


def test_hostile_parameters_are_only_an_error() -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}
    for schema in (
        {"properties": {"a": loop}, "$defs": {"a": loop}},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"properties": {"a": {"allOf": [{"$ref": "#/properties/a"}]}}},
    ):
        with pytest.raises((SchemaError, GrammarError)):
            compiled(ToolFormat.FUNCTION_TAGS, schema)


# -- what is told of keywords that are not held ------------------------------------------------------------


def test_an_answer_names_what_it_is_not_held_to() -> None:
    odd: Value = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    properties: Value = {"a": odd, "b": {"format": "regex"}}
    parameters: Value = {"type": "object", "properties": properties}
    tool: Value = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    places = (
        "tools[0].function.parameters.properties.a.uniqueItems",
        "tools[0].function.parameters.properties.b.format",
    )
    asked = worker_message(Operation.CHAT, {"messages": MESSAGES[:1], "tools": [tool]})
    for template in (QWEN_CODER, MISTRAL, DEEPSEEK):
        known = model(template)
        assert known.prepare(asked).unenforced == places
        assert known.prepare(asked).unenforced == places, "a grammar that is known says so too"
    assert prepare(GLM).unenforced == ()


def test_a_strict_format_is_refused_with_the_keywords_place() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "regex"}}}
    place = "response_format.json_schema.schema.properties.a.format"

    def asked(strict: bool | None) -> Prepared:
        inner: dict[str, Any] = {"schema": schema, "strict": strict}
        form = {"type": "json_schema", "json_schema": inner}
        return prepare(GLM, tools=None, messages=MESSAGES[:1], response_format=form)

    with pytest.raises(RequestUnusable) as caught:
        asked(True)
    assert caught.value.code == "unsupported_schema"
    assert str(caught.value).startswith(f"{place}: ")
    for loose in (False, None):
        assert asked(loose).unenforced == (place,)


def test_few_places_are_told() -> None:
    properties = {name: {"type": "string", "format": "regex"} for name in ascii_letters[:30]}
    inner = {"schema": {"type": "object", "properties": properties}}
    form = {"type": "json_schema", "json_schema": inner}
    told = prepare(GLM, tools=None, messages=MESSAGES[:1], response_format=form).unenforced
    assert len(told) == 17
    assert told[-1] == "and 14 more"
