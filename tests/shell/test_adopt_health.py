"""Adopted servers that die, come back, change, and are measured; and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from tests.shell.support_adopt import Adopted, adopting, ask, keeping, server_config, text_of
from tests.shell.support_adopt_servers import (
    LOADING,
    STREAM_HEAD,
    Asked,
    FakeServer,
    Ollama,
    OllamaModel,
    answering,
    chunked,
    delta,
    llama_server,
    openai_models,
    running,
    sse,
    vllm,
)

from meshd_plugins.api import (
    Privacy,
    Refused,
    Value,
)
from meshd_plugins.builtin.adopt.keeper import State

# -- health and rates --------------------------------------------------------------------------------------


def test_a_dead_server_is_withdrawn_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        server = llama_server()
        async with running(server):
            port = server.port
        async with keeping(server.url, tmp_path) as adopted:
            capabilities = adopted.capabilities
            await adopted.until(lambda: bool(adopted.keeper.complaints()))
            async with running(llama_server(), port):
                await capabilities.until(lambda: len(capabilities.added) == 1)
                capability = adopted.only()
                assert not adopted.keeper.complaints()
            with pytest.raises(Refused) as refused:
                await ask(capability)
            assert refused.value.code == "starting"
            await capabilities.until(lambda: not capabilities.added)
            async with running(llama_server(), port):
                await capabilities.until(lambda: len(capabilities.added) == 1)
                assert text_of(await ask(adopted.only())) == "Hello"

    trio.run(main)


def test_a_server_that_is_loading_is_waited_for(tmp_path: Path) -> None:
    server = llama_server()
    ready = server.routes["GET /v1/models"]
    server.routes["GET /v1/models"] = answering(LOADING, 503)

    async def main() -> None:
        async with running(server), keeping(server.url, tmp_path) as adopted:
            await adopted.until(lambda: adopted.keeper.state is State.STARTING)
            assert not adopted.keeper.complaints()
            server.routes["GET /v1/models"] = ready
            await adopted.capabilities.until(lambda: len(adopted.capabilities.added) == 1)

    trio.run(main)


def test_a_model_that_is_gone_is_withdrawn_at_once(tmp_path: Path) -> None:
    server = Ollama(OllamaModel("a:1b"), OllamaModel("b:1b", "b" * 64))
    server.routes["POST /v1/chat/completions"] = answering(
        {"error": {"message": 'model "a:1b" not found, try pulling it first'}}, 404
    )

    async def main() -> None:
        async with adopting(server, tmp_path, count=2, poll_s=600.0) as adopted:
            a = next(c for c in adopted.capabilities.added if "a:1b" in c.descriptor.summary)
            del server.models[0]
            with pytest.raises(Refused):
                await ask(a)
            assert adopted.capabilities.families == ["knowledge.gpt/general b:1b"]

    trio.run(main)


async def measured(adopted: Adopted) -> dict[str, float]:
    capabilities = adopted.capabilities

    def is_measured() -> bool:
        return any(each.descriptor.rates for each in capabilities.added)

    await capabilities.until(is_measured)
    rates = next(each.descriptor.rates for each in capabilities.added if each.descriptor.rates)
    assert rates is not None
    return {"prefill": rates.prefill_tokens_per_s, "decode": rates.decode_tokens_per_s}


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        (llama_server, {"prefill": 400.0, "decode": 50.0}),
        (lambda: Ollama(OllamaModel("m:1b", warm=True)), {"prefill": 200.0, "decode": 20.0}),
    ],
)
def test_a_model_is_measured_once_at_adoption(
    tmp_path: Path, make: Callable[[], FakeServer], rates: dict[str, float]
) -> None:
    server = make()

    async def main() -> None:
        async with adopting(server, tmp_path, measure=True) as adopted:
            assert await measured(adopted) == rates
            await adopted.looks(3)
            asked = [line for line in server.lines() if line in GENERATING]
            assert len(asked) == 1

    trio.run(main)


GENERATING = ("POST /v1/completions", "POST /api/generate", "POST /v1/chat/completions")


def test_no_cold_model_is_loaded_to_measure_it(tmp_path: Path) -> None:
    server = Ollama(OllamaModel("m:1b", warm=False))

    async def main() -> None:
        async with adopting(server, tmp_path, measure=True) as adopted:
            await adopted.until(lambda: adopted.keeper.looks >= 3)
            assert not [line for line in server.lines() if line in GENERATING]
            server.models[0].warm = True
            assert await measured(adopted) == {"prefill": 200.0, "decode": 20.0}
            await adopted.capabilities.until(
                lambda: adopted.only().descriptor.fields.get("resident") is True
            )

    trio.run(main)


def test_real_traffic_moves_the_rates(tmp_path: Path) -> None:
    server = llama_server()

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            assert adopted.only().descriptor.rates is None
            await ask(adopted.only())
            assert await measured(adopted) == {"prefill": 400.0, "decode": 50.0}
            replaced = len(adopted.capabilities.replaced)
            await ask(adopted.only())
            await adopted.looks(3)
            assert len(adopted.capabilities.replaced) == replaced  # the same: nothing to tell

    trio.run(main)


def test_an_unknown_server_is_left_in_peace_while_it_answers(tmp_path: Path) -> None:
    """This one breaks its answer off when it is asked anything else, as llama-cpp-python's own server does."""
    server = FakeServer()
    listed = openai_models("m")
    asked_else = trio.Event()

    async def models(asked: Asked, stream: trio.SocketStream) -> None:
        asked_else.set()
        await listed(asked, stream)

    async def chat(_asked: Asked, stream: trio.SocketStream) -> None:
        nonlocal asked_else
        asked_else = trio.Event()
        await stream.send_all(STREAM_HEAD)
        for number in range(20):  # for about ten times as long as the pause between looks
            await stream.send_all(chunked(sse(delta(f"{number} "))))
            with trio.move_on_after(0.025):
                await asked_else.wait()
                return
        await stream.send_all(chunked(sse(delta("end", "stop"))) + chunked(sse("[DONE]")))

    server.routes["POST /v1/chat/completions"] = chat
    server.routes["GET /v1/models"] = models

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            await adopted.looks(1)
            assert text_of(await ask(adopted.only())).endswith("19 end")
            await adopted.looks(2)

    trio.run(main)


# -- what is not adopted -----------------------------------------------------------------------------------


def test_models_of_a_meshd_behind_a_proxy_are_left_out(tmp_path: Path) -> None:
    server = vllm("m")
    listed: Value = [
        {"id": "auto", "object": "model", "owned_by": "meshd"},
        {"id": "real", "object": "model", "owned_by": "somebody"},
    ]
    server.routes["GET /v1/models"] = answering({"object": "list", "data": listed})

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            assert adopted.capabilities.families == ["knowledge.gpt/general real"]

    trio.run(main)


def test_another_program_on_a_well_known_port_is_left_alone(tmp_path: Path) -> None:
    server = FakeServer()

    async def main() -> None:
        async with (
            running(server),
            keeping(server.url, tmp_path, is_expected=False) as adopted,
        ):
            await adopted.until(lambda: adopted.keeper.looks >= 1)
            assert adopted.keeper.state is State.ABSENT
            assert not adopted.keeper.complaints()
            assert not adopted.capabilities.added
            assert not adopted.log.events("warning")
            assert server.lines() == ["GET /v1/models", "GET /api/version"]

    trio.run(main)


def test_nothing_on_a_well_known_port_is_no_news(tmp_path: Path) -> None:
    async def main() -> None:
        server = FakeServer()
        async with running(server):
            pass
        async with keeping(server.url, tmp_path, is_expected=False) as adopted:
            await adopted.until(lambda: adopted.keeper.looks >= 3)
            assert adopted.keeper.state is State.ABSENT
            assert not adopted.log.records
            async with running(llama_server(), server.port):
                await adopted.capabilities.until(lambda: len(adopted.capabilities.added) == 1)

    trio.run(main)


def test_another_machine_is_the_cloud_unless_it_is_said() -> None:
    assert server_config("http://192.0.2.1:8080").privacy_class is Privacy.CLOUD
    assert server_config("http://192.0.2.1:8080", privacy="mesh").privacy_class is Privacy.MESH
    assert server_config("http://[::1]:8080").privacy_class is Privacy.MESH


def test_the_rest_is_left_out_where_there_are_many(tmp_path: Path) -> None:
    server = vllm(*(f"m{number}" for number in range(40)))

    async def main() -> None:
        async with adopting(server, tmp_path, count=32) as adopted:
            await adopted.until(lambda: bool(adopted.log.events("warning")))
            assert adopted.log.events("warning") == ["adopt.models_left_out"]
            assert len(adopted.capabilities.added) == 32

    trio.run(main)
