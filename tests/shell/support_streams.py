"""Peers on loopback with real TLS and real sockets, and a peer of bare TLS that can say anything."""

from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec

import trio
import trio.testing
from tests.shell.support_log import KeptLog

from meshd.core.effects import Address
from meshd.core.frame_codec import decode, encode
from meshd.core.frames import CallHeader, Frame, Hello
from meshd.shell.gate import Gate
from meshd.shell.streams import Handler, IncomingCall, PeerStreams, StreamConfig
from meshd.trust.identity import Identity, admit, init_mesh
from meshd_cms.types import Epoch, NodeId, Value

P = ParamSpec("P")

LOAD: Value = {"busy": 1, "queue": 0}
TEST_DEADLINE_S = 20.0


def trio_test(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run the test under trio; one that hangs fails."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def main() -> None:
            with trio.fail_after(TEST_DEADLINE_S):
                await test(*args, **kwargs)

        trio.run(main)

    return run


def on_stopped_clock(test: Callable[[trio.testing.MockClock], Awaitable[None]]) -> None:
    """Run it under trio with a clock that only the test moves: no deadline passes because a machine is slow.

    One that hangs, by the real clock, fails.
    """
    clock = trio.testing.MockClock()

    async def main() -> None:
        with trio.CancelScope() as scope:
            end = trio.lowlevel.current_trio_token().run_sync_soon
            timer = threading.Timer(TEST_DEADLINE_S, end, (scope.cancel,))
            timer.start()
            try:
                await test(clock)
            finally:
                timer.cancel()
        assert not scope.cancelled_caught, f"not done in {TEST_DEADLINE_S} s"

    trio.run(main, clock=clock)


def identities(folder: Path, count: int, name: str = "home") -> list[Identity]:
    """Nodes of one mesh, ascending by node id."""
    folder.mkdir(exist_ok=True)
    members = [init_mesh(folder / "0", name)]
    members += [admit(members[0], folder / str(number)) for number in range(1, count)]
    return sorted(members, key=lambda identity: identity.node_id)


def header(operation: str = "run", *, remaining_s: float = 10.0) -> CallHeader:
    return CallHeader("request", "computation.gpt/echo", "echo", operation, remaining_s=remaining_s)


async def echo(call: IncomingCall) -> Value:
    """Sends the body back, item by item."""
    assert isinstance(call.body, list)
    for item in call.body:
        await call.send(item)
    return {"count": len(call.body)}


@dataclass
class Peer:
    """A node's streams, and what they told the rest of it."""

    identity: Identity
    streams: PeerStreams
    address: Address
    killed: trio.CancelScope
    log: KeptLog
    gossip: list[tuple[NodeId, int, bytes]] = field(default_factory=list)
    loads: list[tuple[NodeId, Value]] = field(default_factory=list)

    @property
    def node(self) -> NodeId:
        return self.identity.node_id


@asynccontextmanager
async def peer(
    identity: Identity,
    handler: Handler = echo,
    config: StreamConfig | None = None,
    *,
    epoch: int = 1,
    port: int = 0,
    gate: Gate | None = None,
) -> AsyncIterator[Peer]:
    """A running peer; leaving kills it."""
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    address = ("127.0.0.1", int(listeners[0].socket.getsockname()[1]))
    gossip: list[tuple[NodeId, int, bytes]] = []
    loads: list[tuple[NodeId, Value]] = []
    log = KeptLog()
    streams = PeerStreams(
        identity,
        config if config is not None else StreamConfig(),
        epoch=epoch,
        handler=handler,
        on_gossip=lambda node, epoch, payload: gossip.append((node, epoch, payload)),
        load=lambda: LOAD,
        on_load=lambda node, load: loads.append((node, load)),
        log=log,
        gate=gate,
    )
    killed = trio.CancelScope()

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        with killed:
            await streams.serve(listeners, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        yield Peer(identity, streams, address, killed, log, gossip, loads)
        killed.cancel()


async def answer(source: Peer, target: Peer, body: Value = None) -> tuple[list[Value], Value]:
    """Call `target` and take the whole answer and its trailer."""
    chunks: list[Value] = []
    async with source.streams.call(target.node, target.address, header(), body) as call:
        while (chunk := await call.receive()) is not None:
            chunks.append(chunk)
        return chunks, call.trailer


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until what is under way on loopback has made it true; the test's deadline bounds it."""
    while not condition():
        await trio.testing.wait_all_tasks_blocked(0.005)


class BarePeer:
    """TLS with a true certificate, and then whatever a test wants to say."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self._data = bytearray()

    async def say(self, *frames: Frame) -> None:
        await self.stream.send_all(b"".join(encode(frame) for frame in frames))

    async def hear(self) -> Frame | None:
        """The next frame; None when the other end has closed."""
        while len(self._data) < 4 or len(self._data) < 4 + int.from_bytes(self._data[:4], "big"):
            received = await self.stream.receive_some()
            if not received:
                return None
            self._data += received
        end = 4 + int.from_bytes(self._data[:4], "big")
        frame = decode(bytes(self._data[4:end]))
        del self._data[:end]
        return frame

    async def hear_until_closed(self) -> list[Frame]:
        """All further frames, however the other end closes."""
        frames: list[Frame] = []
        try:
            while (frame := await self.hear()) is not None:
                frames.append(frame)
        except trio.BrokenResourceError:
            pass
        return frames


def hello(identity: Identity, *, version: int = 1) -> Hello:
    return Hello(identity.mesh_id, identity.node_id, Epoch(1), version=version)


@asynccontextmanager
async def bare_client(identity: Identity, address: Address) -> AsyncIterator[BarePeer]:
    """Dial a peer."""
    stream = await trio.open_tcp_stream(*address)
    secured = trio.SSLStream(stream, identity.client_context, https_compatible=True)
    await secured.do_handshake()
    try:
        yield BarePeer(secured)
    finally:
        await trio.aclose_forcefully(secured)


@asynccontextmanager
async def bare_server(
    identity: Identity, behave: Callable[[BarePeer], Awaitable[None]]
) -> AsyncIterator[Address]:
    """Accept peers and have `behave` talk to each."""

    async def accepted(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(
            stream, identity.server_context, server_side=True, https_compatible=True
        )
        try:
            await secured.do_handshake()
            await behave(BarePeer(secured))
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(secured)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            functools.partial(trio.serve_tcp, accepted, 0, host="127.0.0.1")
        )
        yield ("127.0.0.1", listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()
