"""Photos among the nodes and at the edge: they pass, and together they hold no more than they may."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.shell.support_fake_mesh import FakeMesh, serving
from tests.shell.support_streams import (
    BarePeer,
    answer,
    bare_server,
    header,
    hello,
    identities,
    on_stopped_clock,
    peer,
    trio_test,
)
from tests.unit.support_media import image_part, jpeg, text_part

from meshd.config import HttpSection
from meshd.config.sections import LimitsSection
from meshd.core.bodies import Bodies
from meshd.core.mux import MuxConfig
from meshd.edge.server import EdgeSockets
from meshd.shell.stream_connection import SEND_BYTES
from meshd.shell.streams import IncomingCall, RemoteRefused, StreamConfig, StreamLost
from meshd_cms.types import Value

PHOTO = jpeg(5_000_000)
PLACES = StreamConfig(
    mux=MuxConfig(frame_bytes_max=LimitsSection().request_bytes_max),
    outgoing_bytes_max=2 * LimitsSection().request_bytes_max,
    bodies_bytes_max=6_000_000,
)


def question(target: str, *parts: Value) -> bytes:
    messages = [{"role": "user", "content": list(parts)}]
    return json.dumps({"model": target, "messages": messages}).encode()


async def post(sockets: EdgeSockets, body: bytes) -> tuple[int, Mapping[str, Value]]:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    async with await trio.open_tcp_stream("127.0.0.1", sockets.port) as stream:
        await stream.send_all(head + body)
        data = b""
        async for part in stream:
            data += part
    first, _, rest = data.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(rest)


@trio_test
async def test_a_photo_passes_the_edge_and_large_bodies_are_bounded_together(
    tmp_path: Path,
) -> None:
    photo = question("knowledge.gpt/general", text_part("What is it?"), image_part(PHOTO, "jpeg"))
    assert len(photo) < HttpSection().request_bytes_max
    mesh, bodies = FakeMesh(), Bodies(10_000_000)
    async with serving(mesh, tmp_path, bodies=bodies) as sockets:
        status, _ = await post(sockets, photo)
        assert (status, bodies.held_bytes) == (200, 0)
        [ask] = mesh.asks
        assert ask.body["messages"] == json.loads(photo)["messages"]
        silent = photo.replace(b"general", b"silent")
        async with trio.open_nursery() as nursery:
            mesh.started = trio.Event()
            nursery.start_soon(post, sockets, silent)
            await mesh.started.wait()
            assert bodies.held_bytes > 6_000_000
            status, said = await post(sockets, photo)
            error = said["error"]
            assert isinstance(error, Mapping)
            assert (status, error["code"], len(mesh.asks)) == (429, "busy", 2)
            small = question("knowledge.gpt/general", text_part("Hi"))
            assert (await post(sockets, small))[0] == 200
            nursery.cancel_scope.cancel()
        with trio.fail_after(10):
            while bodies.held_bytes:
                await trio.lowlevel.checkpoint()
        assert (await post(sockets, photo))[0] == 200


@trio_test
async def test_a_photo_passes_between_peers_and_large_calls_are_bounded_together(
    tmp_path: Path,
) -> None:
    leave = trio.Event()
    serving_it = trio.Event()

    async def handler(call: IncomingCall) -> Value:
        if call.body == PHOTO:
            serving_it.set()
            await leave.wait()
        return {"bytes": len(call.body) if isinstance(call.body, bytes) else 0}

    a, b, c = identities(tmp_path, 3)
    async with (
        peer(a, config=PLACES) as alice,
        peer(c, config=PLACES) as carol,
        peer(b, handler, PLACES) as bob,
        trio.open_nursery() as nursery,
    ):
        results: list[Value] = []

        async def photo() -> None:
            results.append((await answer(alice, bob, PHOTO))[1])

        nursery.start_soon(photo)
        await serving_it.wait()
        assert bob.streams.bodies.held_bytes > 4_900_000
        for other in (alice, carol):  # whoever asks
            with pytest.raises(RemoteRefused, match="too many large requests") as refused:
                await answer(other, bob, PHOTO)
            assert refused.value.code == "busy"
        assert (await answer(carol, bob, b"small"))[1] == {"bytes": 5}
        leave.set()
        while not results:
            await trio.lowlevel.checkpoint()
        assert results == [{"bytes": len(PHOTO)}]
        assert bob.streams.bodies.held_bytes == 0
        assert (await answer(carol, bob, PHOTO))[1] == {"bytes": len(PHOTO)}


@pytest.mark.parametrize("reads_to_the_end", [True, False])
def test_a_slow_line_is_not_a_dead_peer(tmp_path: Path, reads_to_the_end: bool) -> None:
    """A long request holds up the PING that asks whether the other end lives."""
    a, b = identities(tmp_path, 2)
    body = bytes(8_000_000)
    half = (
        len(body) // 2
    )  # what is written and not read yet, the system holds: less than the other half
    read = 0

    async def test(clock: trio.testing.MockClock) -> None:
        async def slow(bare: BarePeer) -> None:
            nonlocal read
            bare.stream.transport_stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            await bare.say(replace(hello(b), frame_bytes_max=PLACES.mux.frame_bytes_max))
            while read < half:
                until = read + 2 * SEND_BYTES
                while read < until:
                    data = await bare.stream.receive_some()
                    assert data, "it was given up"
                    read += len(data)
                await trio.testing.wait_all_tasks_blocked(0.005)
                clock.jump(PLACES.ping_deadline_s - 1)
            while reads_to_the_end:
                read += len(await bare.stream.receive_some())
                if read > len(body):
                    leave.set()
                    await trio.sleep_forever()
            clock.jump(PLACES.ping_interval_s + 1)
            for _ in range(10):
                await trio.testing.wait_all_tasks_blocked(0.005)
                clock.jump(PLACES.ping_deadline_s + 1)

        leave = trio.Event()
        async with peer(a, config=PLACES) as alice, bare_server(b, slow) as address:
            call = alice.streams.call(b.node_id, address, header(remaining_s=9e3), body)
            if reads_to_the_end:
                async with call:
                    await leave.wait()
                assert alice.streams.statistics.connections_lost == 0
            else:
                with pytest.raises(StreamLost, match="silent"):
                    async with call as waiting:
                        await waiting.receive()

    on_stopped_clock(test)
