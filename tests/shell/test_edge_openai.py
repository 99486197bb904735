"""The OpenAI endpoints, asked by the real `openai` client over a real socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
import trio
from openai import OpenAI
from tests.shell.support_fake_mesh import FAMILY, FakeMesh, serving

from meshd_plugins.api import Operation, Privacy

T = TypeVar("T")
HELLO = "Hello, wörld"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def with_client(folder: Path, mesh: FakeMesh, use: Callable[[OpenAI], T]) -> T:
    """Run `use`, which blocks, in a thread beside the server."""

    async def main() -> T:
        async with serving(mesh, folder) as sockets:

            def use_and_close() -> T:
                url = f"http://127.0.0.1:{sockets.port}/v1"
                with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=10) as client:
                    return use(client)

            return await trio.to_thread.run_sync(use_and_close)

    return trio.run(main)


def test_chat_answers_with_provenance(tmp_path: Path) -> None:
    mesh = FakeMesh()

    def use(client: OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(
            model="knowledge.gpt/general",
            messages=MESSAGES,
            max_tokens=20,
            temperature=0.5,
            stop="END",
            extra_body={"meshd": {"deadline_s": 9, "privacy": "lan", "split": False}},
        )
        answer = raw.parse()
        assert answer.choices[0].message.content == HELLO
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 8)
        assert answer.model == "knowledge.gpt/general"
        assert raw.headers["x-meshd-served-by"] == "pi"
        request_id = raw.headers["x-meshd-request-id"]
        assert answer.id == f"chatcmpl-{request_id}"
        extension: Any = answer.model_extra
        assert extension["meshd"]["request_id"] == request_id
        assert [part["node"] for part in extension["meshd"]["parts"]] == ["pi"]
        assert mesh.asks[0].request_id == request_id

    with_client(tmp_path, mesh, use)
    ask = mesh.asks[0]
    assert ask.operation is Operation.CHAT
    assert ask.body == {
        "messages": MESSAGES,
        "max_tokens": 20,
        "temperature": 0.5,
        "stop": ["END"],
    }
    assert (ask.deadline_s, ask.privacy, ask.split) == (9, Privacy.LAN, False)


def test_chat_streams(tmp_path: Path) -> None:
    def use(client: OpenAI) -> None:
        stream = client.chat.completions.create(
            model="auto",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert stream.response.headers["x-meshd-served-by"] == "pi"
        texts = [c.choices[0].delta.content for c in chunks if c.choices]
        assert [text for text in texts if text] == ["Hello", ", ", "wörld"]
        assert chunks[0].choices[0].delta.role == "assistant"
        ends = [c for c in chunks if c.choices and c.choices[0].finish_reason]
        assert [c.choices[0].finish_reason for c in ends] == ["stop"]
        extension: Any = ends[0].model_extra
        assert extension["meshd"]["parts"][0]["node"] == "pi"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 8
        assert len({c.id for c in chunks}) == 1

    with_client(tmp_path, FakeMesh(), use)


@pytest.mark.parametrize("stream", [False, True])
def test_completions(tmp_path: Path, stream: bool) -> None:
    mesh = FakeMesh()

    def use(client: OpenAI) -> str:
        answer: Any = client.completions.create(
            model="knowledge.gpt/general", prompt="Once", stream=stream, seed=3
        )
        if not stream:
            assert answer.choices[0].finish_reason == "stop"
            return str(answer.choices[0].text)
        chunks = list(answer)
        assert chunks[-1].choices[0].finish_reason == "stop"
        return "".join(chunk.choices[0].text for chunk in chunks)

    assert with_client(tmp_path, mesh, use) == HELLO
    assert mesh.asks[0].operation is Operation.COMPLETE
    assert mesh.asks[0].body == {"prompt": "Once", "seed": 3}


def test_models_are_names_and_families(tmp_path: Path) -> None:
    def use(client: OpenAI) -> None:
        listed = [model.id for model in client.models.list()]
        assert listed == ["auto", "computation.gpt/arithmetic", "knowledge.gpt/general", FAMILY]
        one: Any = client.models.retrieve("knowledge.gpt/general")
        assert one.id == "knowledge.gpt/general"
        assert one.meshd["nodes"] == ["pi"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")

    with_client(tmp_path, FakeMesh(), use)


def test_a_concrete_model_becomes_a_constraint(tmp_path: Path) -> None:
    mesh = FakeMesh()

    def use(client: OpenAI) -> None:
        client.chat.completions.create(model=FAMILY, messages=MESSAGES)
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=FAMILY.lower(), messages=MESSAGES)
        assert caught.value.code == "model_not_found"
        assert FAMILY in str(caught.value)

    with_client(tmp_path, mesh, use)
    assert [ask.target for ask in mesh.asks] == [f"knowledge.gpt/**?model={FAMILY}"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("label", "status", "code"),
    [
        ("busy", 429, "busy"),
        ("draining", 503, "draining"),
        ("gone", 404, "name_not_served"),
        ("late", 504, "deadline_exceeded"),
        ("died", 502, "worker_died"),
        ("words", 400, "not_arithmetic"),
        ("secret", 403, "privacy"),
        ("bug", 500, "internal_error"),
        ("picture", 400, "binary_answer"),
    ],
)
def test_errors_before_the_answer_have_their_status(
    tmp_path: Path, label: str, status: int, code: str, stream: bool
) -> None:
    def use(client: OpenAI) -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(
                model=f"knowledge.gpt/{label}", messages=MESSAGES, stream=stream
            )
        assert caught.value.code == code
        assert caught.value.status_code == status
        assert "secret prompt" not in str(caught.value)
        assert (caught.value.response.headers.get("retry-after") is not None) == (
            label in ("busy", "draining")
        )

    with_client(tmp_path, FakeMesh(), use)


@pytest.mark.parametrize("label", ["torn", "unended", "latebug"])
def test_a_torn_stream_is_never_a_false_stop(tmp_path: Path, label: str) -> None:
    def use(client: OpenAI) -> None:
        stream = client.chat.completions.create(
            model=f"knowledge.gpt/{label}", messages=MESSAGES, stream=True
        )
        seen: list[Any] = []
        with pytest.raises(openai.APIError) as caught:
            seen.extend(stream)
        assert caught.value.code == ("internal_error" if label == "latebug" else "stream_lost")
        assert [chunk.choices[0].delta.content for chunk in seen] == ["Once"]
        assert all(chunk.choices[0].finish_reason is None for chunk in seen)

    with_client(tmp_path, FakeMesh(), use)


@pytest.mark.parametrize("label", ["torn", "unended"])
def test_a_torn_answer_is_an_error(tmp_path: Path, label: str) -> None:
    def use(client: OpenAI) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=f"knowledge.gpt/{label}", messages=MESSAGES)
        assert (caught.value.status_code, caught.value.code) == (502, "stream_lost")

    with_client(tmp_path, FakeMesh(), use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_document_is_text(tmp_path: Path, stream: bool) -> None:
    """Its bytes may be cut anywhere, in the midst of a character too."""

    def use(client: OpenAI) -> str:
        answer: Any = client.chat.completions.create(
            model="data.gpt/document", messages=MESSAGES, stream=stream
        )
        if not stream:
            return str(answer.choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    assert with_client(tmp_path, FakeMesh(), use) == "héllo\n"


def test_unsupported_parameters_are_named(tmp_path: Path) -> None:
    def use(client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="auto",
                messages=MESSAGES,
                n=2,
            )
        assert (caught.value.param, caught.value.code) == ("n", "unsupported_parameter")

    with_client(tmp_path, FakeMesh(), use)


THINKER = "knowledge.gpt/thinker"
HM = {"token": "Hm", "logprob": -0.5, "bytes": [72, 109]}
BYTE = {"token": "\ufffd", "logprob": -1.5, "bytes": [255]}
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
    {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]


def test_thoughts_calls_and_probabilities_have_openais_shape(tmp_path: Path) -> None:
    def use(client: OpenAI) -> dict[str, Any]:
        answer = client.chat.completions.create(model=THINKER, messages=MESSAGES, logprobs=True)
        return answer.model_dump(exclude_none=True)

    answer = with_client(tmp_path, FakeMesh(), use)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "Hm, a tool.")
    assert message["tool_calls"] == CALLS
    assert choice["logprobs"]["content"] == [{**HM, "top_logprobs": [HM, BYTE]}]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_a_stream_tells_a_call_in_parts(tmp_path: Path) -> None:
    def use(client: OpenAI) -> list[Any]:
        chunks = client.chat.completions.create(model=THINKER, messages=MESSAGES, stream=True)
        return [chunk.choices[0].model_dump(exclude_none=True) for chunk in chunks]

    choices = with_client(tmp_path, FakeMesh(), use)
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "reasoning_content": "Hm, "}
    assert deltas[1] == {"reasoning_content": "a tool."}
    call = {"index": 0, "id": "call_1", "type": "function"}
    function = {"name": "f", "arguments": ""}
    assert deltas[2] == {"content": "Let me see.", "tool_calls": [{**call, "function": function}]}
    assert deltas[3] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}
    assert choices[-1] == {"index": 0, "delta": {}, "finish_reason": "tool_calls"}


def test_probabilities_of_a_completion(tmp_path: Path) -> None:
    def use(client: OpenAI) -> Any:
        return client.completions.create(model=THINKER, prompt="x", logprobs=2).choices[0].logprobs

    told = with_client(tmp_path, FakeMesh(), use)
    assert (told.tokens, told.token_logprobs, told.text_offset) == (["Hm"], [-0.5], [0])
    assert told.top_logprobs == [{"Hm": -0.5, "\ufffd": -1.5}]
