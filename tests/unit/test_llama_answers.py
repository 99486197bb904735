"""What a model writes is sorted into thought, text and calls, however it is cut into pieces."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_calls import read

from meshd_plugins.builtin.llama.prompt.constraint import Reasoning
from meshd_plugins.builtin.llama.prompt.tools import ToolFormat

THINKS = Reasoning("<think>", "</think>")


def test_thoughts_are_apart_from_the_answer() -> None:
    found = read(["<think>\nLet me", " see.\n</think>\n\n", "It is 4. "], None, THINKS)
    assert (found.reasoning, found.text) == ("Let me see.", "It is 4. ")
    assert found.reasoning_tokens == 2


@pytest.mark.parametrize(
    ("text", "reasoning", "thought", "said"),
    [
        ("hm</think>yes", replace(THINKS, opened=True), "hm", "yes"),
        ("hm</think>yes", replace(THINKS, forbidden=True), "", "hm</think>yes"),
        ("hm", replace(THINKS, opened=True), "hm", ""),
        ("no <think>x</think>", THINKS, "", "no <think>x</think>"),
        ("<thin", THINKS, "", "<thin"),
        ("<think></think>\n\nyes", THINKS, "", "yes"),
        ("  <think>a </thin b", THINKS, "a </thin b", ""),
        (" yes", None, "", " yes"),
    ],
)
def test_where_thoughts_begin_and_end(
    text: str, reasoning: Reasoning | None, thought: str, said: str
) -> None:
    found = read([text], None, reasoning)
    assert (found.reasoning, found.text) == (thought, said)


HERMES, MISTRAL, ARGS, LLAMA3 = (
    ToolFormat.HERMES,
    ToolFormat.MISTRAL,
    ToolFormat.MISTRAL_ARGS,
    ToolFormat.LLAMA3,
)
F = '{"name": "f", "arguments": {"a": "}{\\"</tool_call>"}}'
CALLS = [
    (f"<tool_call>\n{F}\n</tool_call>", HERMES, "", ["f"]),
    (
        f'Well. <tool_call>{F}</tool_call>\n<tool_call>{{"name":"g","arguments":{{}}}}</tool_call>\n',
        HERMES,
        "Well.",
        ["f", "g"],
    ),
    (f"<tool_call>{F}</tool_call> and more", HERMES, " and more", ["f"]),
    ('<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>', HERMES, "", ["g"]),
    ('<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', HERMES, "", ["g"]),
    ('<tool_call>{"name": "f", "arguments": {}, "id": "x{"}</tool_call>', HERMES, "", ["f"]),
    (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}, "id": "abc"}, {"name": "g", "arguments": {}}]',
        MISTRAL,
        "",
        ["f", "g"],
    ),
    ('ok [TOOL_CALLS]{"name": "f", "arguments": {}}', MISTRAL, "ok", ["f"]),
    ('[TOOL_CALLS]f[ARGS]{"a": {}}[TOOL_CALLS]get_weather[ARGS]{}', ARGS, "", ["f", "get_weather"]),
    (
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        LLAMA3,
        "",
        ["f", "g"],
    ),
    ('<|python_tag|>{"name": "f", "parameters": {}}', LLAMA3, "", ["f"]),
]
NO_CALLS = [
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call> x', HERMES),
    ("<tool_call> is what one writes", HERMES),
    ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', HERMES),
    ('<tool_call>{"name": "f"', HERMES),
    ("<tool_call>{broken}</tool_call>", HERMES),
    ("a < b and <tool", HERMES),
    ("[TOOL_CALLS]unknown[ARGS]{}", ARGS),
    ("[TOOL_CALLS][]", MISTRAL),
    ("[TOOL_CALLS]f[ARG", ARGS),
    ('{"answer": 42} is it', LLAMA3),
    ('{"name": "unknown", "parameters": {}}', LLAMA3),
    ("{", LLAMA3),
]


@pytest.mark.parametrize(("text", "form", "said", "names"), CALLS)
def test_calls_are_read(text: str, form: ToolFormat, said: str, names: list[str]) -> None:
    found = read([text], form)
    assert found.text == said
    assert [call[1] for call in found.calls.values()] == names
    assert [call[0] for call in found.calls.values()] == [f"id{n}" for n in range(len(names))]
    assert all(isinstance(json.loads(call[2]), dict) for call in found.calls.values())
    assert found.called


@pytest.mark.parametrize(("text", "form"), NO_CALLS)
def test_what_is_no_call_is_text_and_none_of_it_is_lost(text: str, form: ToolFormat) -> None:
    found = read([text], form)
    assert (found.text, found.calls, found.called) == (text, {}, False)


def test_arguments_are_told_as_they_come_and_may_be_cut_off() -> None:
    found = read(['<tool_call>{"name": "f", "argu', 'ments": {"a": ', '"Par', "is"], HERMES)
    assert found.calls == {0: ["id0", "f", '{"a": "Paris']}
    assert not found.called


SCRAPS = st.lists(
    st.sampled_from(
        [
            "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[", "]", ",", ";",
            "<|python_tag|>", F, '{"name": "g", "parameters": {}}', '{"name": "', 'f"', ', "arguments": ', "{}",
            "}", "{", '"', "\\", " ", "\n", "f", "word", "<", "</",
        ]
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    SCRAPS,
    st.sampled_from([None, *ToolFormat]),
    st.sampled_from([None, THINKS, replace(THINKS, opened=True), replace(THINKS, forbidden=True)]),
    st.data(),
)
def test_however_it_is_cut_the_same_comes_out(
    scraps: list[str], form: ToolFormat | None, reasoning: Reasoning | None, data: st.DataObject
) -> None:
    text = "".join(scraps)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], form, reasoning)
    for cut in (pieces, list(text)):
        found = read(cut, form, reasoning)
        assert (found.text, found.reasoning, found.calls, found.called) == (
            whole.text,
            whole.reasoning,
            whole.calls,
            whole.called,
        )


@settings(max_examples=100, deadline=None)
@given(SCRAPS, st.sampled_from(list(ToolFormat)))
def test_without_a_call_all_of_the_text_comes_out(scraps: list[str], form: ToolFormat) -> None:
    text = "".join(scraps)
    found = read([text], form)
    if not found.calls:
        assert found.text == text
