"""OpenAI request bodies: what is passed on, what is refused, and under which name."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.edge.errors import RequestError, problem_of
from meshd.edge.openai_request import parse_chat, parse_completion
from meshd.edge.targets import Models
from meshd_plugins.api import BadRequest, Failed, Refused

USER: dict[str, Any] = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [USER], **fields}


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({"messages": [USER]}, "model"),
        (chat(model=3), "model"),
        ({"model": "auto"}, "messages"),
        (chat(messages=[]), "messages"),
        (chat(messages="Hi"), "messages"),
        (chat(messages=[USER, 7]), "messages[1]"),
        (chat(messages=[{"content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "robot", "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "function", "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "user"}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": "\ud800"}]), "messages[0].content"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content[0].image_url",
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "messages[0].content[0].text",
        ),
        (
            chat(messages=[{"role": "assistant", "content": "", "tool_calls": [{}]}]),
            "messages[0].tool_calls[0].function",
        ),
        (chat(temperature=3), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(top_p="1"), "top_p"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_completion_tokens=1.5), "max_completion_tokens"),
        (chat(seed=1 << 70), "seed"),
        (chat(stop=[1]), "stop"),
        (chat(stop=["x"] * 17), "stop"),
        (chat(stream="yes"), "stream"),
        (chat(stream_options={"include_usage": True}), "stream_options"),
        (chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
        (chat(tools=[{}]), "tools[0].type"),
        (chat(tools=[{"type": "function"}]), "tools[0].function"),
        (chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name"),
        (
            chat(tools=[{"type": "function", "function": {"name": "f", "parameters": 1}}]),
            "tools[0].function.parameters",
        ),
        (chat(tools=5), "tools"),
        (chat(tool_choice="required"), "tool_choice"),
        (chat(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
        (chat(response_format={"type": "yaml"}), "response_format.type"),
        (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
            "response_format.json_schema.schema",
        ),
        (
            chat(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"schema": {}, "strict": "yes"},
                }
            ),
            "response_format.json_schema.strict",
        ),
        (chat(grammar=5), "grammar"),
        (chat(meshd={"grammar": 5}), "meshd.grammar"),
        (chat(grammar="x", response_format={"type": "json_object"}), "grammar"),
        (chat(logit_bias={"x": 1}), "logit_bias"),
        (chat(logit_bias={"1": 101}), "logit_bias"),
        (chat(chat_template_kwargs=1), "chat_template_kwargs"),
        (chat(chat_template_kwargs={"a": "\ud800"}), "chat_template_kwargs"),
        (chat(n=2), "n"),
        (chat(logprobs=3), "logprobs"),
        (chat(top_logprobs=3), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat(meshd=1), "meshd"),
        (chat(meshd={"deadline_s": 0}), "meshd.deadline_s"),
        (chat(meshd={"privacy": "moon"}), "meshd.privacy"),
        (chat(meshd={"split": 1}), "meshd.split"),
        (chat(meshd={"privcy": "local"}), "meshd.privcy"),
    ],
)
def test_what_is_wrong_is_named(payload: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(payload)
    assert caught.value.param == param
    assert problem_of(caught.value).status == 400
    assert param.rpartition(".")[2].partition("[")[0] in caught.value.message


def test_parameters_that_ask_for_nothing_pass() -> None:
    parsed = parse_chat(
        chat(
            tools=[],
            tool_choice="none",
            n=1,
            logprobs=False,
            logit_bias={},
            response_format={"type": "text"},
            user="me",
            store=True,
            no_such_thing={"deep": []},
            temperature=None,
        )
    )
    assert parsed.body == {"messages": [USER]}


def test_parts_and_roles_are_brought_to_one_form() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parsed = parse_chat(
        chat(messages=[{"role": "developer", "content": parts}], max_completion_tokens=4)
    )
    assert parsed.body == {"messages": [{"role": "system", "content": "ab"}], "max_tokens": 4}


@pytest.mark.parametrize("prompt", [None, 5, [1, 2], ["a", "b"]])
def test_completion_prompts_are_one_string(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion({"model": "auto", "prompt": prompt})
    assert caught.value.param == "prompt"
    assert parse_completion({"model": "auto", "prompt": ["a"]}).body == {"prompt": "a"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "model",
        "messages",
        "stream",
        "stop",
        "seed",
        "tools",
        "n",
        "meshd",
        "prompt",
        "stream_options",
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=6))
def test_any_object_parses_or_is_refused(payload: dict[str, Any]) -> None:
    for parse in (parse_chat, parse_completion):
        with suppress(RequestError):  # anything else is a bug
            assert parse(payload).model == payload["model"]


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Refused("x"), 429, True),
        (Refused("x", code="draining"), 503, True),
        (Refused("x", code="a_code_of_tomorrow"), 503, True),
        (Refused("x", code="not_here"), 404, False),
        (Refused("x", code="too_large"), 413, False),
        (Failed("x"), 502, False),
        (Failed("x", code="deadline_exceeded"), 504, False),
        (BadRequest("x", code="context_length_exceeded"), 400, False),
        (ExceptionGroup("of one", [ExceptionGroup("of one", [Refused("x")])]), 429, True),
        (KeyError("secret"), 500, False),
    ],
)
def test_statuses(error: Exception, status: int, retry: bool) -> None:
    problem = problem_of(error)
    assert problem.status == status
    assert (problem.retry_after_s is not None) == retry
    assert "secret" not in str(problem.body())


class _Catalogue:
    def __init__(self) -> None:
        self.reads = 0

    def capabilities(self) -> list[Any]:
        self.reads += 1
        return [{"name": "knowledge.gpt/general", "node_name": "pi", "model": "Qwen 3 (odd)"}]


def test_the_catalogue_is_read_once_a_second() -> None:
    now_s = 0.0
    catalogue = _Catalogue()
    models = Models(catalogue, clock=lambda: now_s)
    for _ in range(5):
        assert models.target_for("knowledge.gpt/any?context>=1") == "knowledge.gpt/any?context>=1"
    assert catalogue.reads == 0
    for _ in range(5):
        with pytest.raises(RequestError, match="does not exist"):
            models.target_for("gpt-4")
    assert catalogue.reads == 1
    now_s = 1.0
    assert list(models.listed()) == [
        "auto",
        "knowledge.gpt/general",
    ]  # a family no constraint can say
    assert catalogue.reads == 2
