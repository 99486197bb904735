"""A tunnel at the host of a node: slots, rules and draining are those of every call."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import cast

import pytest
import trio
from tests.shell.support_log import KeptLog
from tests.shell.support_orchestrate import ME, Scripted, open_guard, own_source, run

from meshd.orchestrate.host import CapabilityHost
from meshd.orchestrate.plugin_peers import next_bytes
from meshd.shell.streams import IncomingCall
from meshd_plugins.api import (
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    Operation,
    Privacy,
    Refused,
    Request,
    Value,
)

NAME = "computation.gpt/memory"
DESCRIPTOR = Descriptor(NAME, (Operation.TUNNEL,), "echoes bytes", 1, Privacy.MESH)


async def echo(request: Request) -> AsyncGenerator[Event, None]:
    assert request.incoming is not None
    while (data := await request.incoming()) != b"stop":
        yield Chunk(data=data)
    yield Done()


def new_host(rules: list[dict[str, Value]] | None = None) -> CapabilityHost:
    host = CapabilityHost(
        guard=open_guard(rules=rules or ()),
        queue_max=0,
        changed=lambda _change: None,
        load_changed=lambda: None,
        log=KeptLog(),
    )
    host.add(Scripted(DESCRIPTOR, echo))
    return host


class End:
    """The caller's end of a tunnel to a host."""

    def __init__(self, host: CapabilityHost) -> None:
        self._host = host
        self.send, self._incoming = trio.open_memory_channel[bytes](1)
        self._back, self.receive = trio.open_memory_channel[bytes](1)

    async def run(self) -> Done:
        async def emit(chunk: Chunk) -> None:
            await self._back.send(chunk.data)

        request = Request(
            "r", NAME, Operation.TUNNEL, {}, deadline_s=1e9, incoming=self._incoming.receive
        )
        return await self._host.invoke(NAME, request, emit, own_source(ME))


def test_bytes_go_both_ways_and_the_slot_is_taken_meanwhile() -> None:
    async def body() -> None:
        host = new_host()
        end = End(host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end.run)
            await end.send.send(b"one")
            assert await end.receive.receive() == b"one"
            assert host.busy() == {NAME: (1, 0)}
            with pytest.raises(Refused) as caught:
                await End(host).run()
            assert caught.value.code == "busy"
            await end.send.send(b"stop")
        assert host.busy() == {NAME: (0, 0)}

    run(body)


def test_draining_ends_what_would_not_end_by_itself() -> None:
    async def body() -> None:
        host = new_host()
        end = End(host)
        errors: list[Failed] = []

        async def tunnel() -> None:
            with pytest.raises(Failed) as caught:
                await end.run()
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tunnel)
            await end.send.send(b"one")
            await end.receive.receive()
            host.close_to_peers()
        assert [error.code for error in errors] == ["draining"]
        await host.drain()

    run(body)


def test_rules_are_asked() -> None:
    async def body() -> None:
        host = new_host([{"name": NAME, "effect": "deny"}])
        with pytest.raises(Refused) as caught:
            await End(host).run()
        assert caught.value.code == "access"

    run(body)


class Said:
    """An incoming call whose caller says something."""

    def __init__(self, value: Value) -> None:
        self._value = value

    async def receive(self) -> Value:
        await trio.lowlevel.checkpoint()
        return self._value


@pytest.mark.parametrize("value", [b"", "text", 5, {"d": b"x"}, [b"x"]])
def test_only_bytes_go_into_a_tunnel(value: Value) -> None:
    async def body() -> None:
        with pytest.raises(Failed) as caught:
            await next_bytes(cast("IncomingCall", Said(value)))
        assert caught.value.code == "peer_fault"

    run(body)
