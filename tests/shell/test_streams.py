"""Peer streams between peers that keep the rules: calls, outcomes, cancellation, bounds, the one connection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.shell.support_streams import (
    LOAD,
    Peer,
    answer,
    header,
    identities,
    peer,
    settled,
    trio_test,
)

from meshd.core.mux import MuxConfig
from meshd.shell.streams import (
    IncomingCall,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamConfig,
    StreamLost,
    UnsendableError,
)
from meshd_cms.types import Value
from meshd_plugins.api import BadRequest, Failed, Refused


@trio_test
async def test_an_answer_comes_in_parts_with_trailer_and_load(tmp_path: Path) -> None:
    heads: list[IncomingCall] = []

    async def handler(call: IncomingCall) -> Value:
        heads.append(call)
        for word in ("one", "two"):
            await call.send({"text": word, "token_ids": [1, 2]})
        return {"finish_reason": "stop"}

    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b, handler) as bob:
        asked = replace(header(), caller=alice.node, hops=1, trace="trace", idempotency_id="once")
        async with alice.streams.call(bob.node, bob.address, asked, {"input": "x"}) as call:
            assert await call.receive() == {"text": "one", "token_ids": [1, 2]}
            assert await call.receive() == {"text": "two", "token_ids": [1, 2]}
            assert await call.receive() is None
            assert await call.receive() is None
            assert (call.trailer, call.load) == ({"finish_reason": "stop"}, LOAD)
        assert (heads[0].header, heads[0].body, heads[0].peer) == (
            asked,
            {"input": "x"},
            alice.node,
        )
        assert alice.loads == [(bob.node, LOAD)]
        assert await answer(alice, bob) == (
            [{"text": "one", "token_ids": [1, 2]}, {"text": "two", "token_ids": [1, 2]}],
            {"finish_reason": "stop"},
        )
        assert (alice.streams.statistics.dials, bob.streams.statistics.accepted) == (1, 1)


@trio_test
async def test_each_way_to_fail_is_told_as_what_it_is(tmp_path: Path) -> None:
    async def handler(call: IncomingCall) -> Value:
        match call.body:
            case "refuse":
                raise Refused("no slot", code="draining")
            case "bad":
                raise BadRequest("no input")
            case "failed":
                await call.send("part")
                raise Failed("the worker died", code="worker_died")
            case "grouped":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(refuse)
            case "unsendable":
                await call.send({"x": 2**80})
            case "nothing":
                await call.send(None)
            case _:
                raise RuntimeError("secret")
        return None

    async def refuse() -> None:
        raise Refused("from a task")

    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b, handler) as bob:
        with pytest.raises(RemoteRefused, match="no slot") as refused:
            await answer(alice, bob, "refuse")
        assert (refused.value.code, refused.value.load) == ("draining", LOAD)
        with pytest.raises(RemoteFailed, match="no input") as bad:
            await answer(alice, bob, "bad")
        assert (bad.value.code, bad.value.callers_fault) == ("bad_request", True)
        with pytest.raises(RemoteFailed, match="the worker died") as failed:
            await answer(alice, bob, "failed")
        assert (failed.value.code, failed.value.callers_fault) == ("worker_died", False)
        with pytest.raises(RemoteRefused, match="from a task"):
            await answer(alice, bob, "grouped")
        with pytest.raises(RemoteFailed) as unsendable:
            await answer(alice, bob, "unsendable")
        assert unsendable.value.code == "unsendable"
        with pytest.raises(RemoteFailed, match="None is no part"):
            await answer(alice, bob, "nothing")
        with pytest.raises(RemoteFailed) as internal:
            await answer(alice, bob, "crash")
        assert internal.value.code == "internal"
        assert "secret" not in internal.value.message
        assert "call.crashed" in bob.log.events()
        assert len(alice.loads) == 7  # every final frame brings it
        assert alice.streams.statistics.dials == 1


@trio_test
async def test_what_cannot_be_sent_costs_only_its_call(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b) as bob:
        with pytest.raises(UnsendableError, match="at most"):
            await answer(alice, bob, "x" * 2_000_000)
        assert await answer(alice, bob, ["ok"]) == (["ok"], {"count": 1})


@trio_test
async def test_a_caller_that_leaves_cancels_the_handler(tmp_path: Path) -> None:
    stopped = trio.Event()

    async def handler(call: IncomingCall) -> Value:
        try:
            await call.send("first")
            await trio.sleep_forever()
        finally:
            stopped.set()

    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b, handler) as bob:
        async with alice.streams.call(bob.node, bob.address, header(), None) as call:
            assert await call.receive() == "first"
        await stopped.wait()
        await settled(lambda: bob.streams.statistics.calls_failed == 1)


@trio_test
async def test_remaining_time_ends_the_handler(tmp_path: Path) -> None:
    async def handler(call: IncomingCall) -> Value:
        await trio.sleep_forever()

    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b, handler) as bob:
        asked = header(remaining_s=0.02)
        async with alice.streams.call(bob.node, bob.address, asked, None) as call:
            with pytest.raises(RemoteFailed) as late:
                await call.receive()
        assert late.value.code == "deadline_exceeded"


@trio_test
async def test_a_peer_that_dies_fails_every_call_at_once_and_may_come_back(tmp_path: Path) -> None:
    lost: list[str] = []

    async def handler(call: IncomingCall) -> Value:
        await call.send("first")
        await trio.sleep_forever()

    a, b = identities(tmp_path, 2)
    async with peer(a) as alice:
        async with peer(b, handler) as bob:

            async def ask(task_status: trio.TaskStatus[None]) -> None:
                asked = header(remaining_s=1000.0)
                async with alice.streams.call(bob.node, bob.address, asked, None) as call:
                    await call.receive()
                    task_status.started()
                    for _ in range(2):  # and it never looks complete afterwards
                        with pytest.raises(StreamLost) as died:
                            await call.receive()
                        lost.append(died.value.code)

            async with trio.open_nursery() as nursery:
                await nursery.start(ask)
                await nursery.start(ask)
                bob.killed.cancel()
        assert lost == ["stream_lost"] * 4
        async with peer(b, port=bob.address[1], epoch=2) as reborn:
            assert await answer(alice, reborn, ["back"]) == (["back"], {"count": 1})


@trio_test
async def test_a_slow_reader_bounds_the_sender(tmp_path: Path) -> None:
    sent = 0

    async def handler(call: IncomingCall) -> Value:
        nonlocal sent
        for _ in range(100):
            await call.send("x" * 10_000)
            sent += 1
        return None

    config = StreamConfig(mux=MuxConfig(window_bytes=50_000))
    a, b = identities(tmp_path, 2)
    async with peer(a, config=config) as alice, peer(b, handler, config) as bob:
        async with alice.streams.call(bob.node, bob.address, header(), None) as call:
            await settled(lambda: sent > 0)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert sent == 5
            received = 0
            while await call.receive() is not None:
                received += 1
                assert sent - received <= 6
        assert received == 100


@trio_test
async def test_two_hundred_calls_at_once(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    together = 0
    all_there = trio.Event()

    async def handler(call: IncomingCall) -> Value:
        nonlocal together
        together += 1
        if together == 200:
            all_there.set()
        await all_there.wait()
        await call.send(call.body)
        return None

    answers: dict[int, list[Value]] = {}

    async with peer(a) as alice, peer(b, handler) as bob:

        async def ask(number: int) -> None:
            answers[number], _ = await answer(alice, bob, number)

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(ask, number)
        assert answers == {number: [number] for number in range(200)}
        assert alice.streams.statistics.dials == 1


@trio_test
async def test_above_the_bound_calls_are_refused_as_busy_by_either_end(tmp_path: Path) -> None:
    async def handler(call: IncomingCall) -> Value:
        await call.send("first")
        await trio.sleep_forever()

    two, many = (StreamConfig(mux=MuxConfig(calls_max=number)) for number in (2, 100))
    members = identities(tmp_path, 3)
    async with peer(members[0], config=two) as alice, peer(members[1], handler, two) as bob:
        async with peer(members[2], config=many) as carol:
            for source in (alice, carol):
                first = source.streams.call(bob.node, bob.address, header(), None)
                second = source.streams.call(bob.node, bob.address, header(), None)
                async with first as one, second as other:
                    await one.receive()
                    await other.receive()
                    with pytest.raises(RemoteRefused) as busy:
                        await answer(source, bob)
                    assert busy.value.code == "busy"
        assert bob.streams.statistics.calls_refused == 1  # alice asked no more than bob takes


@trio_test
async def test_simultaneous_dials_converge_to_the_connection_of_the_lower_id(
    tmp_path: Path,
) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b) as bob:
        for _ in range(3):

            async def ask(source: Peer, target: Peer) -> None:
                assert await answer(source, target, ["x"]) == (["x"], {"count": 1})

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask, alice, bob)
                    nursery.start_soon(ask, bob, alice)
        both = (alice.streams.statistics, bob.streams.statistics)
        assert [each.dials for each in both] == [1, 1]  # they did dial each other
        await settled(lambda: [each.connections for each in both] == [1, 1])
        assert [each.connections_lost for each in both] == [0, 0]
        assert await answer(bob, alice, ["x"]) == (["x"], {"count": 1})
        assert [each.dials for each in both] == [1, 1]
        survivors = [line for line in bob.log.lines if line[1] == "peer.connected"]
        assert sorted(bool(fields["dialed"]) for _, _, fields in survivors) == [False, True]


@trio_test
async def test_drain_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    proceed = trio.Event()

    async def handler(call: IncomingCall) -> Value:
        await call.send("first")
        await proceed.wait()
        await call.send("last")
        return "done"

    members = identities(tmp_path, 3)
    async with (
        peer(members[0]) as alice,
        peer(members[1], handler) as bob,
        peer(members[2]) as carol,
    ):
        async with (
            trio.open_nursery() as nursery,
            alice.streams.call(bob.node, bob.address, header(), None) as call,
        ):
            assert await call.receive() == "first"
            nursery.start_soon(bob.streams.drain)
            await settled(lambda: bob.streams.draining)
            for source in (alice, carol):  # on the connection there is, and on a new one
                with pytest.raises(RemoteRefused) as refused:
                    await answer(source, bob)
                assert refused.value.code == "draining"
            proceed.set()
            assert await call.receive() == "last"
            assert await call.receive() is None
            assert call.trailer == "done"
        assert bob.streams.statistics.connections == 0
        assert alice.streams.statistics.connections_lost == 0


@trio_test
async def test_gossip_and_ping_share_the_connection(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a, epoch=7) as alice, peer(b, epoch=8) as bob:
        await alice.streams.send_gossip(None, bob.address, b"who are you")  # nobody is known yet
        await settled(lambda: bob.gossip == [(alice.node, 7, b"who are you")])
        await bob.streams.send_gossip(alice.node, alice.address, b"bob")
        await settled(lambda: alice.gossip == [(bob.node, 8, b"bob")])
        assert 0 < await alice.streams.ping(bob.node, bob.address) < 5
        await alice.streams.send_gossip(None, bob.address, b"again")
        await settled(lambda: len(bob.gossip) == 2)
        assert (alice.streams.statistics.dials, bob.streams.statistics.dials) == (1, 0)
        assert alice.streams.connected() == (bob.node,)


@trio_test
async def test_a_raised_epoch_reaches_the_peers(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a, epoch=7) as alice, peer(b) as bob:
        await alice.streams.send_gossip(bob.node, bob.address, b"old")
        await settled(lambda: len(bob.gossip) == 1)
        alice.streams.raise_epoch(9)
        await settled(lambda: alice.streams.statistics.connections == 0)
        await alice.streams.send_gossip(bob.node, bob.address, b"new")
        await settled(lambda: len(bob.gossip) == 2)
        assert [epoch for _, epoch, _ in bob.gossip] == [7, 9]


@trio_test
async def test_an_idle_connection_is_kept_while_the_peer_answers(tmp_path: Path) -> None:
    config = StreamConfig(ping_interval_s=0.02, ping_deadline_s=1.0)
    a, b = identities(tmp_path, 2)
    async with peer(a, config=config) as alice, peer(b) as bob:
        await answer(alice, bob, ["x"])
        before = bob.streams.statistics.bytes_received
        await settled(lambda: bob.streams.statistics.bytes_received > before)
        assert alice.streams.statistics.connections == 1


@trio_test
async def test_who_is_not_there_is_unreachable(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(b) as bob:
        pass
    async with peer(a, config=StreamConfig(dial_deadline_s=0.2)) as alice:
        with pytest.raises(PeerUnreachable) as refused:
            await answer(alice, bob)
        assert refused.value.code == "unreachable"
        async with peer(b, port=bob.address[1]) as reborn:
            assert await answer(alice, reborn, ["x"]) == (["x"], {"count": 1})
    with pytest.raises(PeerUnreachable, match="not running"):
        await answer(alice, bob)
