"""Chunks from the caller to the callee: bytes both ways within one call, over real TLS."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.shell.support_streams import header, identities, peer, trio_test

from meshd.core.mux import MuxConfig
from meshd.shell.streams import IncomingCall, RemoteFailed, StreamConfig, StreamLost
from meshd_cms.types import Value
from meshd_plugins.api import Failed, Operation

TUNNEL = header(Operation.TUNNEL, remaining_s=1e9)


async def echo_back(call: IncomingCall) -> Value:
    """Sends back what comes, until it is told to stop."""
    while (value := await call.receive()) != b"stop":
        await call.send(value)
    return {"finish_reason": "stop"}


@trio_test
async def test_what_the_caller_sends_comes_in_order_and_is_answered(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with (
        peer(a) as alice,
        peer(b, echo_back) as bob,
        alice.streams.call(bob.node, bob.address, TUNNEL, {}) as call,
    ):
        for number in range(50):
            assert await call.send(number.to_bytes(2, "big") * 1000)
            assert await call.receive() == number.to_bytes(2, "big") * 1000
        assert await call.send(b"stop")
        assert await call.receive() is None
        assert not await call.send(b"too late")
        assert call.sent_bytes > 50 * 2000


@trio_test
async def test_much_more_than_a_window_passes_both_ways_at_once(tmp_path: Path) -> None:
    config = StreamConfig(mux=MuxConfig(window_bytes=20_000))
    a, b = identities(tmp_path, 2)
    pieces = [bytes([number % 256]) * 7000 for number in range(100)]
    seen: list[Value] = []
    async with (
        peer(a, config=config) as alice,
        peer(b, echo_back, config) as bob,
        alice.streams.call(bob.node, bob.address, TUNNEL, {}) as call,
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            for piece in pieces:
                assert await call.send(piece)

        nursery.start_soon(send)
        while len(seen) < len(pieces):
            seen.append(await call.receive())
        assert seen == pieces


@trio_test
async def test_a_callee_that_does_not_read_holds_the_caller_up(tmp_path: Path) -> None:
    config = StreamConfig(mux=MuxConfig(window_bytes=10_000))
    goes_on = trio.Event()
    read: list[Value] = []

    async def handler(call: IncomingCall) -> Value:
        await goes_on.wait()
        read.extend([await call.receive() for _ in range(10)])
        return None

    a, b = identities(tmp_path, 2)
    async with (
        peer(a, config=config) as alice,
        peer(b, handler, config) as bob,
        alice.streams.call(bob.node, bob.address, TUNNEL, {}) as call,
        trio.open_nursery() as nursery,
    ):
        sent = 0

        async def send() -> None:
            nonlocal sent
            for number in range(10):
                assert await call.send(bytes([number]) * 5000)
                sent += 1

        nursery.start_soon(send)
        await alice.streams.ping(bob.node, bob.address)
        assert sent == 0, "nothing is sent that was not asked for"
        goes_on.set()
        assert await call.receive() is None
        assert read == [bytes([number]) * 5000 for number in range(10)]


@trio_test
async def test_whoever_waits_to_send_learns_of_the_end(tmp_path: Path) -> None:
    goes_on = trio.Event()

    async def handler(_call: IncomingCall) -> Value:
        await goes_on.wait()
        raise Failed("the process died", code="worker_died")

    a, b = identities(tmp_path, 2)
    async with (
        peer(a) as alice,
        peer(b, handler) as bob,
        alice.streams.call(bob.node, bob.address, TUNNEL, {}) as call,
        trio.open_nursery() as nursery,
    ):
        sent = trio.Event()
        outcomes: list[bool] = []

        async def send() -> None:
            outcomes.append(await call.send(b"x"))
            sent.set()

        nursery.start_soon(send)
        await alice.streams.ping(bob.node, bob.address)
        goes_on.set()
        with pytest.raises(RemoteFailed) as caught:
            await call.receive()
        assert caught.value.code == "worker_died"
        await sent.wait()
        assert outcomes == [False]


@trio_test
async def test_a_peer_that_is_gone_ends_both_directions(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with (
        peer(a) as alice,
        peer(b, echo_back) as bob,
        alice.streams.call(bob.node, bob.address, TUNNEL, {}) as call,
    ):
        assert await call.send(b"once")
        assert await call.receive() == b"once"
        bob.killed.cancel()
        with pytest.raises(StreamLost):
            await call.receive()
        assert not await call.send(b"again")


@trio_test
async def test_a_caller_that_leaves_cancels_a_handler_that_waits_for_it(tmp_path: Path) -> None:
    left = trio.Event()

    async def handler(call: IncomingCall) -> Value:
        try:
            await call.receive()
        finally:
            left.set()
        return None

    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b, handler) as bob:
        async with alice.streams.call(bob.node, bob.address, TUNNEL, {}):
            await alice.streams.ping(bob.node, bob.address)
        await left.wait()
