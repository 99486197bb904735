"""Calls with their parameters between tags, and DeepSeek's: whatever a model writes is read, and never wrongly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_calls import read

from meshd_plugins.builtin.llama.prompt.constraint import Reasoning
from meshd_plugins.builtin.llama.prompt.markup import ParameterKind
from meshd_plugins.builtin.llama.prompt.markup_reader import VALUE_MAX
from meshd_plugins.builtin.llama.prompt.tools import (
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_ENDS,
    DEEPSEEK_CALLS,
    DEEPSEEK_CALLS_END,
    DEEPSEEK_SEPARATOR,
    ToolFormat,
)

FUNCTION, PAIRS, INVOKE, PLAIN, FENCED = (
    ToolFormat.FUNCTION_TAGS,
    ToolFormat.ARGUMENT_TAGS,
    ToolFormat.INVOKE_TAGS,
    ToolFormat.DEEPSEEK,
    ToolFormat.DEEPSEEK_FENCED,
)
MARKED = (FUNCTION, PAIRS, INVOKE)
TEXT, NULLABLE = ParameterKind.TEXT, ParameterKind.TEXT_OR_NULL
KINDS = {"f": {"t": TEXT, "o": NULLABLE, "": ParameterKind.JSON}}

# What stands before a value and behind it, by format.
TAGS = {
    FUNCTION: ("<parameter={}>\n", "\n</parameter>\n"),
    PAIRS: ("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n"),
    INVOKE: ('<parameter name="{}">', "</parameter>\n"),
}
CALLS = {
    FUNCTION: ("<tool_call>\n<function={}>\n", "</function>\n</tool_call>"),
    PAIRS: ("<tool_call>{}\n", "</tool_call>"),
    INVOKE: (
        '<minimax:tool_call>\n<invoke name="{}">\n',
        "</invoke>\n</minimax:tool_call>",
    ),
}


def call(form: ToolFormat, name: str = "f", **parameters: str) -> str:
    opens, closes = CALLS[form]
    before, behind = TAGS[form]
    inner = "".join(f"{before.format(key)}{value}{behind}" for key, value in parameters.items())
    return f"{opens.format(name)}{inner}{closes}"


def arguments(text: str, form: ToolFormat) -> Any:
    found = read([text], form, kinds=KINDS)
    assert found.called, found
    return json.loads(found.calls[0][2])


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"t": "Paris"}, {"t": "Paris"}),
        ({"t": "5"}, {"t": "5"}),
        ({"t": "null"}, {"t": "null"}),
        ({"t": ""}, {"t": ""}),
        ({"t": 'a < b </param\n</p "c" \\ <arg_\té'}, {"t": 'a < b </param\n</p "c" \\ <arg_\té'}),
        ({"t": "\nindented\n\n"}, {"t": "\nindented\n\n"}),
        ({"o": "null"}, {"o": None}),
        ({"o": "None"}, {"o": None}),
        ({"o": "nullify"}, {"o": "nullify"}),
        ({"o": "nu"}, {"o": "nu"}),
        ({"n": "5"}, {"n": 5}),
        ({"n": "True", "m": "false", "o": "x"}, {"n": True, "m": False, "o": "x"}),
        ({"n": '{"a": [1, "</x>"]}'}, {"n": {"a": [1, "</x>"]}}),
        ({"n": '"quoted"'}, {"n": "quoted"}),
        ({"n": "no JSON"}, {"n": "no JSON"}),
        ({"n": "NaN"}, {"n": "NaN"}),
        ({"n": "[" * 5000}, {"n": "[" * 5000}),
        ({"n": "9" * 5000}, {"n": "9" * 5000}),
        ({"n": "x" * (VALUE_MAX + 9)}, {"n": "x" * (VALUE_MAX + 9)}),
        ({}, {}),
    ],
)
def test_parameters_are_read_as_what_they_are(
    form: ToolFormat, written: dict[str, str], meant: dict[str, Any]
) -> None:
    assert arguments(call(form, **written), form) == meant


def test_white_space_and_tags_that_models_forget_do_no_harm() -> None:
    tight = "<tool_call><function=f><parameter=t>a</parameter></function></tool_call>"
    assert arguments(tight, FUNCTION) == {"t": "a"}
    forgot = "Well.\n<function=f>\n<parameter=t>\na\n</parameter>\n</function>"
    assert arguments(forgot, FUNCTION) == {"t": "a"}
    assert arguments("<tool_call>f</tool_call>", PAIRS) == {}
    pair = "<tool_call>\nf<arg_key>t</arg_key><arg_value>a</arg_value></tool_call>"
    assert arguments(pair, PAIRS) == {"t": "a"}


@pytest.mark.parametrize("form", MARKED)
def test_text_may_stand_before_several_calls(form: ToolFormat) -> None:
    both = call(form, t="a") + "\n" + call(form, "g", x="1")
    found = read([f"<think>hm</think>\n\nLet me see.\n{both}\n"], form, THINKS, KINDS)
    assert (found.reasoning, found.text) == ("hm", "Let me see.")
    assert [each[1:] for each in found.calls.values()] == [["f", '{"t": "a"}'], ["g", '{"x": 1}']]
    assert found.called


def test_several_calls_share_the_outer_tags_of_some() -> None:
    opens, closes = CALLS[INVOKE]
    text = call(INVOKE, t="a").replace(closes, f'</invoke>\n<invoke name="g">\n{closes}')
    assert text.startswith(opens[:10])
    found = read([text], INVOKE, kinds=KINDS)
    assert [each[1:] for each in found.calls.values()] == [["f", '{"t": "a"}'], ["g", "{}"]]
    assert found.text == ""


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (f'{DEEPSEEK_CALLS}{DEEPSEEK_CALL}f{DEEPSEEK_SEPARATOR}{{"a": 1}}{DEEPSEEK_CALL_ENDS}'
         f"{DEEPSEEK_CALL}g{DEEPSEEK_SEPARATOR}{{}}{DEEPSEEK_CALL_ENDS}{DEEPSEEK_CALLS_END}", PLAIN),
        (f'{DEEPSEEK_CALLS}{DEEPSEEK_CALL}function{DEEPSEEK_SEPARATOR}f\n```json\n{{"a": 1}}\n```{DEEPSEEK_CALL_ENDS}\n'
         f"{DEEPSEEK_CALL}function{DEEPSEEK_SEPARATOR}g\n```json\n{{}}\n```{DEEPSEEK_CALL_ENDS}{DEEPSEEK_CALLS_END}", FENCED),
        (f'{DEEPSEEK_CALL}f{DEEPSEEK_SEPARATOR}{{"a": 1}}{DEEPSEEK_CALL_ENDS}'
         f"{DEEPSEEK_CALL}g{DEEPSEEK_SEPARATOR}{{}}", PLAIN),
    ],
)  # fmt: skip
def test_calls_of_deepseek_are_read(text: str, form: ToolFormat) -> None:
    found = read(["Well. ", text], form)
    assert [each[1:] for each in found.calls.values()] == [["f", '{"a": 1}'], ["g", "{}"]]
    assert (found.text, found.called) == ("Well.", True)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (call(FUNCTION, "unknown", t="a"), FUNCTION),
        ("<tool_call>\n<function=f", FUNCTION),
        ("<tool_call>\n<function=f>\n<param", FUNCTION),
        ("<tool_call>\n<function=f>\nHello", FUNCTION),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', FUNCTION),
        ("a <function in C, and <func", FUNCTION),
        (call(PAIRS, "unknown"), PAIRS),
        ("<tool_call>f is what one writes", PAIRS),
        ("<tool_call></tool_call>", PAIRS),
        (call(INVOKE, "unknown"), INVOKE),
        ("<minimax:tool_call>\n</minimax:tool_call>", INVOKE),
        (f"{DEEPSEEK_CALLS}{DEEPSEEK_CALL}unknown{DEEPSEEK_SEPARATOR}{{}}", PLAIN),
        (f"{DEEPSEEK_CALLS}{DEEPSEEK_CALL}f{DEEPSEEK_SEPARATOR}no", PLAIN),
        (f"{DEEPSEEK_CALL}function{DEEPSEEK_SEPARATOR}f\n```py", FENCED),
    ],
)
def test_what_is_no_call_is_text_and_none_of_it_is_lost(text: str, form: ToolFormat) -> None:
    for pieces in ([text], list(text)):
        found = read(pieces, form, kinds=KINDS)
        assert (found.text, found.calls, found.called) == (text, {}, False)


@pytest.mark.parametrize("form", MARKED)
def test_strings_are_told_as_they_come_and_a_call_that_is_cut_is_none(form: ToolFormat) -> None:
    opens, before = CALLS[form][0], TAGS[form][0]
    text = f"{opens.format('f')}{before.format('t')}half of it"
    found = read([text], form, kinds=KINDS)
    assert found.calls == {0: ["id0", "f", '{"t": "half of it']}
    assert not found.called


@pytest.mark.parametrize("form", MARKED)
def test_what_belongs_to_no_parameter_ends_a_call_as_text(form: ToolFormat) -> None:
    closes = CALLS[form][1]
    text = call(form, t="a").replace(closes, f"and now? {closes}")
    found = read([text, call(form, "g")], form, kinds=KINDS)
    assert found.calls[0][1:] == ["f", '{"t": "a"']
    assert found.calls[1][1:] == ["g", "{}"]
    assert "and now?" in found.text


THINKS = Reasoning("<think>", "</think>")
SCRAPS = st.lists(
    st.sampled_from(
        [
            "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "<function=f>", "</function>",
            "<parameter=", "<parameter=t>", "<parameter=o>", "</parameter>", "<arg_key>", "t</arg_key>", "</arg_key>",
            "<arg_value>", "</arg_value>", "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', 'f">',
            "</invoke>", '<parameter name="', 't">', '<parameter name="n">', "f", "g", ">", "<", "</", "\n", " ",
            "null", "None", "True", "5", '{"a": 1}', '"', "\\", "word", "é", "x" * 300,
            DEEPSEEK_CALLS, DEEPSEEK_CALL, DEEPSEEK_SEPARATOR, DEEPSEEK_CALL_ENDS, DEEPSEEK_CALLS_END, "```json", "```",
            "function", "{", "}",
            call(FUNCTION, t="a\n<b", n="1"), call(PAIRS, o="null", t="a<b"), call(INVOKE, n="{}", t="c"),
        ]
    ),
    max_size=14,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    SCRAPS,
    st.sampled_from([*MARKED, PLAIN, FENCED]),
    st.sampled_from([None, THINKS]),
    st.data(),
)
def test_however_it_is_cut_the_same_comes_out(
    scraps: list[str], form: ToolFormat, reasoning: Reasoning | None, data: st.DataObject
) -> None:
    text = "".join(scraps)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], form, reasoning, KINDS)
    for cut in (pieces, list(text)):
        found = read(cut, form, reasoning, KINDS)
        found.reasoning_tokens = whole.reasoning_tokens  # counted by the piece
        assert found == whole
    if whole.called and len(whole.calls) == 1:
        assert isinstance(json.loads(whole.calls[0][2]), dict) or form in (PLAIN, FENCED)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MARKED),
    st.dictionaries(
        st.sampled_from(["t", "o", "n"]), st.text(st.characters(codec="utf-8")), max_size=3
    ),
    st.integers(1, 9),
)
def test_any_text_survives_between_tags(
    form: ToolFormat, values: dict[str, str], size: int
) -> None:
    ends = TAGS[form][1].strip()
    values = {key: value for key, value in values.items() if ends not in value}
    text = call(form, **values)
    found = read([text[at : at + size] for at in range(0, len(text), size)], form, kinds=KINDS)
    assert found.called
    told = json.loads(found.calls[0][2])
    assert list(told) == list(values)
    for key, value in values.items():
        if key == "t" or (key == "o" and value not in ("null", "None")):
            assert told[key] == value
