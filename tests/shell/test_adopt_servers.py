"""Servers that run already are found, announced, asked, watched and given up."""

from __future__ import annotations

from array import array
from contextlib import aclosing
from pathlib import Path

import pytest
import trio
from tests.shell.support_adopt import (
    CHAT,
    COMPLETE,
    MESSAGES,
    adopting,
    ask,
    done_of,
    keeping,
    text_of,
)
from tests.shell.support_adopt_servers import (
    LOADING,
    Asked,
    FakeServer,
    Ollama,
    OllamaModel,
    answering,
    delta,
    generating,
    llama_server,
    openai_models,
    running,
    streaming,
    usage,
    vllm,
)

from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Chunk,
    Event,
    Failed,
    Operation,
    Privacy,
    Refused,
    Value,
)
from meshd_plugins.builtin.adopt.keeper import State
from meshd_plugins.testing import check_capability, make_request
from meshd_plugins.vectors import Rows, to_floats

# -- what is announced -------------------------------------------------------------------------------------


def test_llama_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with adopting(llama_server(), tmp_path) as adopted:
            descriptor = adopted.only().descriptor
            assert descriptor.name == "knowledge.gpt/general"
            assert descriptor.operations == (Operation.CHAT, Operation.COMPLETE)
            assert descriptor.slots == 4
            assert descriptor.privacy is Privacy.MESH
            assert descriptor.model is not None
            assert descriptor.model.family == "Small-135M-Q4_K_M"
            assert descriptor.model.parameters == 134_515_008
            assert descriptor.model.quantisation == "Q4_K_M"
            assert descriptor.model.context_tokens == 8192
            assert len(descriptor.model.chat_template_digest) == 64
            assert descriptor.fields["context"] == 2048
            assert descriptor.fields["x_engine"] == "llama-server"
            assert (
                descriptor.summary == "Small-135M-Q4_K_M (135M parameters, Q4_K_M) on llama-server"
            )

    trio.run(main)


def test_vllm(tmp_path: Path) -> None:
    async def main() -> None:
        async with adopting(vllm("org/model-7b"), tmp_path) as adopted:
            descriptor = adopted.only().descriptor
            assert descriptor.fields["x_engine"] == "vllm"
            assert descriptor.fields["context"] == 8192
            assert descriptor.slots == 16
            checked = await check_capability(adopted.only(), CHAT)
            assert checked.text == "Hello"
            assert checked.done.usage.completion_tokens == 2

    trio.run(main)


def test_ollama(tmp_path: Path) -> None:
    server = Ollama(
        OllamaModel("llama3.2:latest", warm=True),
        OllamaModel("nomic-embed-text:latest", "b" * 64, "nomic-bert", ("embedding",)),
    )

    async def main() -> None:
        async with adopting(server, tmp_path, count=2) as adopted:
            assert adopted.capabilities.families == [
                "computation.gpt/embed nomic-embed-text:latest",
                "knowledge.gpt/general llama3.2:latest",
            ]
            chat = next(
                c.descriptor for c in adopted.capabilities.added if "knowledge" in c.descriptor.name
            )
            assert chat.model is not None
            assert (chat.model.parameters, chat.model.quantisation) == (3_212_749_888, "Q4_K_M")
            assert chat.model.context_tokens == 131_072
            assert (chat.fields["resident"], chat.fields["context"]) == (True, 16384)
            embed = next(
                c.descriptor for c in adopted.capabilities.added if "embed" in c.descriptor.name
            )
            assert embed.operations == (Operation.EMBED,)
            assert (embed.fields["resident"], embed.fields["context"]) == (False, 4096)

    trio.run(main)


def test_an_ollama_without_models_is_adopted_and_waited_for(tmp_path: Path) -> None:
    server = Ollama()

    async def main() -> None:
        async with running(server), keeping(server.url, tmp_path) as adopted:
            capabilities = adopted.capabilities
            server_models = server.models
            await adopted.until(lambda: adopted.keeper.state is State.SERVING)
            assert not capabilities.added
            server_models.append(OllamaModel("new:1b"))  # ollama pull
            await capabilities.until(
                lambda: capabilities.families == ["knowledge.gpt/general new:1b"]
            )
            server_models.append(OllamaModel("newer:1b", "c" * 64))
            await capabilities.until(lambda: len(capabilities.added) == 2)
            del server_models[0]  # ollama rm
            await capabilities.until(
                lambda: capabilities.families == ["knowledge.gpt/general newer:1b"]
            )
            shown = [line for line in server.lines() if line == "POST /api/show"]
            assert len(shown) == 2  # a model is described once, not at every look

    trio.run(main)


def test_names_and_models_are_chosen(tmp_path: Path) -> None:
    server = vllm("coder-7b", "coder-1b", "other-7b", "e5-large")

    async def main() -> None:
        async with adopting(
            server,
            tmp_path,
            count=3,
            models=["coder-*", "e5*"],
            names={"coder-7b": ["knowledge.gpt/code", "knowledge.gpt/general"]},
            slots=3,
            privacy="lan",
            context=1000,
        ) as adopted:
            assert adopted.capabilities.families == [
                "computation.gpt/embed e5-large",
                "knowledge.gpt/code coder-7b",
                "knowledge.gpt/general coder-1b",
                "knowledge.gpt/general coder-7b",
            ]
            for capability in adopted.capabilities.added:
                assert capability.descriptor.slots == 3
                assert capability.descriptor.privacy is Privacy.LAN
                assert capability.descriptor.fields["context"] == 1000

    trio.run(main)


# -- asking ------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_and_comes_back(tmp_path: Path) -> None:
    server = llama_server()

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            checked = await check_capability(adopted.only(), CHAT)
            assert checked.text == "Hello"
            assert checked.done.finish_reason == "length"
            assert checked.done.usage.prompt_tokens == 67
            assert checked.done.usage.completion_tokens == 20
            assert checked.done.detail["decode_tokens_per_s"] == 50.0
            asked = server.last("POST /v1/chat/completions")
            assert asked.body == {
                "model": "/models/Small-135M-Q4_K_M.gguf",
                "messages": MESSAGES,
                "max_tokens": 20,
                "temperature": 0.5,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            assert asked.headers["x-meshd-hop"] == "1"
            assert "authorization" not in asked.headers

    trio.run(main)


def test_completions_of_ollama_go_over_its_own_api(tmp_path: Path) -> None:
    server = Ollama(OllamaModel("m:1b"))

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            events = await ask(adopted.only(), COMPLETE)
            assert text_of(events) == "1 2 3"
            assert done_of(events).usage.completion_tokens == 24
            asked = server.last("POST /api/generate").body
            assert asked["raw"] is True
            assert asked["options"] == {"num_predict": 20, "top_k": 3}
            with pytest.raises(Refused) as refused:
                await ask(
                    adopted.only(),
                    make_request(Operation.COMPLETE, {"prompt": "a", "logit_bias": {"1": 2}}),
                )
            assert refused.value.code == "unsupported"

    trio.run(main)


def vectors_of(events: list[Event], count: int) -> list[list[float]]:
    rows = Rows(count)
    for event in events:
        if isinstance(event, Chunk):
            rows.add(event.position, event.data, event.content_type)
    return [list(to_floats(row)) for row in rows.finish(done_of(events).detail)]


def test_vectors(tmp_path: Path) -> None:
    server = vllm("bge-m3")
    server.routes["POST /v1/embeddings"] = answering(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": 1, "embedding": [0.0, 3.0, 4.0]},
                {"object": "embedding", "index": 0, "embedding": [1.0, 0.0, 0.0]},
            ],
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        }
    )
    request = make_request(Operation.EMBED, {"input": ["a", "b"]})

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            events = await ask(adopted.only(), request)
            assert vectors_of(events, 2) == [[1, 0, 0], [0, 3, 4]]
            assert done_of(events).usage.prompt_tokens == 7
            cut = make_request(Operation.EMBED, {"input": ["a", "b"], "dimensions": 2})
            assert vectors_of(await ask(adopted.only(), cut), 2) == [[1, 0], [0, 1]]
            too_long = make_request(Operation.EMBED, {"input": ["a", "b"], "dimensions": 4})
            with pytest.raises(BadRequest, match="3 dimensions"):
                await ask(adopted.only(), too_long)
            server.routes["POST /v1/embeddings"] = answering({"data": [{"embedding": [1.0]}]})
            with pytest.raises(Failed, match="another number"):
                await ask(adopted.only(), request)

    trio.run(main)


def test_vectors_of_ollama(tmp_path: Path) -> None:
    server = Ollama(OllamaModel("all-minilm:latest", family="bert", capabilities=("embedding",)))
    server.routes["POST /api/embed"] = answering(
        {"model": "all-minilm", "embeddings": [[0.5, 0.25]], "prompt_eval_count": 8}
    )

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            request = make_request(Operation.EMBED, {"input": ["a"]})
            checked = await check_capability(adopted.only(), request)
            assert checked.data == array("f", [0.5, 0.25]).tobytes()
            assert checked.done.usage.prompt_tokens == 8
            assert server.last("POST /api/embed").body["truncate"] is False

    trio.run(main)


def test_a_key_is_read_from_its_file(tmp_path: Path) -> None:
    server = vllm("m")
    listed = server.routes["GET /v1/models"]
    key = tmp_path / "key"
    key.write_text("sk-wrong\n")

    async def guarded(asked: Asked, stream: trio.SocketStream) -> None:
        if asked.headers.get("authorization") == "Bearer sk-right":
            await listed(asked, stream)
        else:
            await answering({"error": "Unauthorized"}, 401)(asked, stream)

    server.routes["GET /v1/models"] = guarded

    async def main() -> None:
        async with (
            running(server),
            keeping(server.url, tmp_path, api_key_file=str(key)) as adopted,
        ):
            await adopted.until(lambda: adopted.keeper.state is State.REFUSED)
            [complaint] = adopted.keeper.complaints()
            assert "wants a key" in complaint.message
            assert complaint.is_error
            assert "sk-wrong" not in complaint.message

    trio.run(main)
    key.write_text("sk-right\n")

    async def again() -> None:
        async with adopting(server, tmp_path, api_key_file=str(key)) as adopted:
            assert adopted.only().descriptor.model is not None

    trio.run(again)


# -- honest ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "value", "kind", "code"),
    [
        (400, {"error": {"message": "temperature must be >= 0"}}, BadRequest, "bad_request"),
        (
            400,
            {"error": {"message": "too long", "type": "exceed_context_size_error"}},
            Refused,
            "too_large",
        ),
        (
            400,
            {"message": "This model's maximum context length is 10 tokens."},
            Refused,
            "too_large",
        ),
        (400, {"error": {"message": "m does not support tools"}}, Refused, "unsupported"),
        (401, {"error": "Unauthorized"}, Refused, "not_here"),
        (404, {"error": {"message": 'model "m" not found'}}, Refused, "not_here"),
        (404, {"detail": "Not Found"}, Refused, "unsupported"),
        (413, {}, Refused, "too_large"),
        (422, {"detail": "no"}, BadRequest, "bad_request"),
        (429, {"error": {"message": "slow down"}}, Refused, "busy"),
        (500, {"error": "oops"}, Failed, "failed"),
        (501, {}, Refused, "unsupported"),
        (503, {"error": "server busy, please try again"}, Refused, "busy"),
        (503, LOADING, Refused, "starting"),
    ],
)
def test_what_a_status_means(
    tmp_path: Path, status: int, value: Value, kind: type[CapabilityError], code: str
) -> None:
    server = vllm("m")
    server.routes["POST /v1/chat/completions"] = answering(value, status)

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            with pytest.raises(kind) as raised:
                await ask(adopted.only())
            assert raised.value.code == code
            assert str(status) in raised.value.message

    trio.run(main)


def first(*events: Value | str, ending: bytes = b"0\r\n\r\n") -> FakeServer:
    server = vllm("m")
    server.routes["POST /v1/chat/completions"] = streaming(*events, ending=ending)
    return server


@pytest.mark.parametrize(
    ("server", "code"),
    [
        (first(delta("Hel")), "stream_lost"),  # a clean end that says nothing of how
        (first(delta("Hel"), "[DONE]"), "stream_lost"),
        (first(delta("Hel"), ending=b""), "stream_lost"),  # the server died
        (first(delta("Hel"), delta(None, "abort"), "[DONE]"), "failed"),
        (first(delta("Hel"), {"error": {"message": "out of memory"}}), "failed"),
        (first(delta("Hel"), "{not json"), "stream_lost"),
        (first(delta("Hel"), [1, 2]), "stream_lost"),
    ],
)
def test_a_torso_is_never_an_answer(tmp_path: Path, server: FakeServer, code: str) -> None:
    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            with pytest.raises(Failed) as failed:
                await ask(adopted.only())
            assert failed.value.code == code

    trio.run(main)


@pytest.mark.parametrize("ending", [b"0\r\n\r\n", b""])
def test_an_answer_without_usage_is_whole_and_says_so(tmp_path: Path, ending: bytes) -> None:
    async def main() -> None:
        server = first(delta("Hel"), delta("lo", "stop"), ending=ending)
        async with adopting(server, tmp_path) as adopted:
            done = done_of(await ask(adopted.only()))
            assert done.finish_reason == "stop"
            assert done.usage.completion_tokens == 0
            assert done.detail["usage"] == "not told by the server"

    trio.run(main)


def test_an_ollama_that_stops_in_the_middle(tmp_path: Path) -> None:
    server = Ollama(OllamaModel("m:1b"))
    server.routes["POST /api/generate"] = generating("1 2", done=False)

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            with pytest.raises(Failed) as failed:
                await ask(adopted.only(), COMPLETE)
            assert failed.value.code == "stream_lost"

    trio.run(main)


def test_a_cancelled_request_closes_its_connection(tmp_path: Path) -> None:
    server = vllm("m")
    begun = streaming(delta("Hel"), ending=b"")

    async def endless(asked: Asked, stream: trio.SocketStream) -> None:
        await begun(asked, stream)
        await server.until_hung_up(asked, stream)

    server.routes["POST /v1/chat/completions"] = endless

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            async with aclosing(adopted.only().invoke(CHAT)) as events:
                assert isinstance(await anext(events), Chunk)
            with trio.fail_after(5):
                await server.hung_up.wait()

    trio.run(main)


def test_answers_of_another_choice_and_usage_in_between_do_no_harm(tmp_path: Path) -> None:
    other = delta("X")
    other["choices"] = []
    server = first(usage(1, 1), other, delta("Hello"), delta(None, "stop"), usage(5, 3), "[DONE]")
    server.routes["GET /v1/models"] = openai_models("m")

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            events = await ask(adopted.only())
            assert text_of(events) == "Hello"
            assert done_of(events).usage.prompt_tokens == 5

    trio.run(main)
