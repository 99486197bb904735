"""Witness streams on real sockets: what is told as evidence, and what is not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from tests.shell.support_streams import settled, trio_test

from meshd.core.decrees import Decree, DecreeKind, Decrees
from meshd.core.effects import Address
from meshd.core.sealing import Opener, Sealer
from meshd.shell.gate import Gate
from meshd.shell.witness import WITNESS_BYTE, WitnessStreams, first_byte
from meshd.trust.mesh_clock import MeshClock
from meshd_cms.types import Epoch, MeshId, NodeId

KEY = bytes(32)
MESH = MeshId(b"m" * 16)
ONE, OTHER, THIRD = (NodeId(letter * 16) for letter in (b"1", b"2", b"3"))


@dataclass
class Post:
    """A node that keeps witness streams and listens."""

    node: NodeId
    witness: WitnessStreams
    address: Address
    ended: list[tuple[NodeId, int, bool]]
    accepted: list[trio.SocketStream] = field(default_factory=list[trio.SocketStream])


@asynccontextmanager
async def post(
    node: NodeId, epoch: int = 7, key: bytes = KEY, gate: Gate | None = None
) -> AsyncGenerator[Post]:
    ended: list[tuple[NodeId, int, bool]] = []
    witness = WitnessStreams(
        node,
        Sealer(key, MESH, node, Epoch(epoch)),
        Opener((key,), MESH, node),
        lambda there, life, evident: ended.append((there, life, evident)),
        gate,
    )
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    here = Post(node, witness, ("127.0.0.1", listener.socket.getsockname()[1]), ended)

    async def accept(stream: trio.SocketStream) -> None:
        here.accepted.append(stream)
        if await first_byte(stream) == WITNESS_BYTE:
            await witness.accept(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(witness.run)
        nursery.start_soon(trio.serve_listeners, accept, [listener])
        yield here
        nursery.cancel_scope.cancel()


def are_up(*posts: Post) -> bool:
    return all(one.witness.statistics.up == 1 for one in posts)


@trio_test
async def test_the_end_of_a_process_is_evidence_at_the_other_end_with_its_life() -> None:
    async with post(ONE) as one:
        async with post(OTHER, epoch=9) as other:
            one.witness.watch(OTHER, other.address)
            await settled(lambda: are_up(one, other))
        await settled(lambda: one.ended == [(OTHER, 9, True)])


@trio_test
async def test_who_dialled_is_watched_as_well() -> None:
    async with post(OTHER) as other:
        async with post(ONE, epoch=5) as one:
            one.witness.watch(OTHER, other.address)
            await settled(lambda: are_up(one, other))
        await settled(lambda: other.ended == [(ONE, 5, True)])


@trio_test
async def test_a_goodbye_is_no_evidence_on_either_side() -> None:
    async with post(ONE) as one, post(OTHER) as other:
        one.witness.watch(OTHER, other.address)
        await settled(lambda: are_up(one, other))
        other.witness.unwatch(ONE)
        await settled(lambda: one.ended == [(OTHER, 7, False)])
        await settled(lambda: other.ended == [(ONE, 7, False)])


@trio_test
async def test_one_stream_serves_both_ways() -> None:
    async with post(ONE) as one, post(OTHER) as other:
        one.witness.watch(OTHER, other.address)
        await settled(lambda: are_up(one, other))
        other.witness.watch(ONE, one.address)
        one.witness.watch(OTHER, other.address)
        await trio.testing.wait_all_tasks_blocked()
        assert are_up(one, other)
        assert len(one.accepted) + len(other.accepted) == 1


@pytest.mark.parametrize("meant", [THIRD, ONE])
@trio_test
async def test_somebody_else_at_the_address_is_no_stream_and_no_evidence(meant: NodeId) -> None:
    async with post(ONE) as one, post(OTHER) as other:
        one.witness.watch(meant, other.address)
        await settled(lambda: one.ended == [(meant, 0, False)])
        assert other.ended == []
        assert other.witness.statistics.refused == 1


@trio_test
async def test_another_mesh_gets_no_stream() -> None:
    async with post(ONE, key=b"k" * 32) as one, post(OTHER) as other:
        one.witness.watch(OTHER, other.address)
        await settled(lambda: one.ended == [(OTHER, 0, False)])


@trio_test
async def test_a_hello_that_is_played_again_gets_no_stream() -> None:
    async with post(ONE) as one, post(OTHER) as other:
        recorded = bytearray()

        async def record(stream: trio.SocketStream) -> None:
            async with stream:
                recorded.extend(await stream.receive_some(1_000))

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, record, [listener])
            one.witness.watch(OTHER, ("127.0.0.1", listener.socket.getsockname()[1]))
            await settled(lambda: len(recorded) > 0)
            nursery.cancel_scope.cancel()
        for times in (1, 2):
            stream = await trio.open_tcp_stream(*other.address)
            async with stream:
                await stream.send_all(bytes(recorded))
                answer = await stream.receive_some(1)
                assert answer == (WITNESS_BYTE if times == 1 else b"")


@trio_test
async def test_a_knock_tells_nobody_there_from_somebody_there() -> None:
    async with post(ONE) as one:
        async with post(OTHER) as other:
            address = other.address
            assert not await one.witness.knock(address)
        assert await one.witness.knock(address)


def revoked(node: NodeId) -> Decrees:
    decree = Decree(DecreeKind.REVOCATION, THIRD, 1, 0.0, b"raw", node=node)
    decrees = Decrees(lambda _raw: decree)
    decrees.load([decree.raw])
    return decrees


@trio_test
async def test_who_dials_learns_the_clock_of_who_answers_and_not_the_other_way_round() -> None:
    """A member can seal in the name of any other, and cannot answer at its address."""
    year_s = 365 * 86_400.0
    gates = {
        ONE: Gate(MeshClock(), wall_s=lambda: 1_800_000_000.0),
        OTHER: Gate(MeshClock(), wall_s=lambda: 1_800_000_000.0 + year_s),
    }
    async with post(ONE, gate=gates[ONE]) as one, post(OTHER, gate=gates[OTHER]) as other:
        one.witness.watch(OTHER, other.address)
        await settled(lambda: are_up(one, other))
        assert gates[ONE].own_offset_s() < -year_s + 60.0
        assert gates[OTHER].own_offset_s() == 0.0


@trio_test
async def test_who_is_revoked_gets_no_stream() -> None:
    gate = Gate(MeshClock(), revoked(ONE))
    async with post(ONE) as one, post(OTHER, gate=gate) as other:
        one.witness.watch(OTHER, other.address)
        await settled(lambda: one.ended == [(OTHER, 0, False)])
        assert other.witness.statistics.refused == 1


@trio_test
async def test_who_is_cut_off_is_told_nothing_and_we_take_it_for_no_evidence() -> None:
    async with post(ONE) as one, post(OTHER) as other:
        one.witness.watch(OTHER, other.address)
        await settled(lambda: are_up(one, other))
        other.witness.cut(ONE)
        await settled(lambda: other.ended == [(ONE, 7, False)])
        await settled(lambda: one.ended == [(OTHER, 7, True)])
