"""Figures of the peer streams: two processes on loopback, real TLS, an echo handler.

Run it with `python -m tests.bench.bench_streams [SECONDS]`; it prints calls a second and latencies with 1
and with 32 calls in flight, and the throughput of one long answer.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import structlog
import trio

from meshd.shell.streams import CallHeader, IncomingCall, PeerStreams, StreamConfig
from meshd.trust.identity import Identity, admit, init_mesh, load_identity
from meshd_cms.types import NodeId, Value

LOAD: Value = {"busy": 1, "queue": 0, "tokens_per_s": 42.5}
BODY: Value = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 64}
PIECE = "x" * 16_000
PIECES = 2000


async def echo(call: IncomingCall) -> Value:
    """One chunk and an end; or, for `stream`, many large chunks."""
    if call.header.operation == "stream":
        for _ in range(PIECES):
            await call.send(PIECE)
    else:
        await call.send(call.body)
    return {"finish_reason": "stop"}


def streams(identity: Identity) -> PeerStreams:
    return PeerStreams(
        identity,
        StreamConfig(),
        epoch=1,
        handler=echo,
        on_gossip=lambda _node, _epoch, _payload: None,
        load=lambda: LOAD,
        log=structlog.get_logger(),
    )


def serve(state_dir: Path, pipe: Pipe) -> None:
    quiet()

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        pipe.send(listeners[0].socket.getsockname()[1])
        await streams(load_identity(state_dir)).serve(listeners)

    trio.run(main)


def header(operation: str) -> CallHeader:
    name = "computation.gpt/echo"
    return CallHeader("r" * 26, name, name, operation, b"c" * 16, remaining_s=30.0)


async def small_calls(
    pool: PeerStreams, node: NodeId, port: int, *, in_flight: int, seconds: float
) -> None:
    latencies_s: list[float] = []

    async def one_after_another(until_s: float) -> None:
        while trio.current_time() < until_s:
            began_s = time.perf_counter()
            async with pool.call(node, ("127.0.0.1", port), header("run"), BODY) as call:
                while await call.receive() is not None:
                    pass
            latencies_s.append(time.perf_counter() - began_s)

    began_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(one_after_another, trio.current_time() + seconds)
    took_s = time.perf_counter() - began_s
    cuts = statistics.quantiles(latencies_s, n=100)
    print(
        f"{in_flight:3} in flight: {len(latencies_s) / took_s:8.0f} calls/s"
        f"   p50 {cuts[49] * 1e3:7.3f} ms   p99 {cuts[98] * 1e3:7.3f} ms"
    )


async def one_long_answer(pool: PeerStreams, node: NodeId, port: int) -> None:
    began_s = time.perf_counter()
    received = 0
    async with pool.call(node, ("127.0.0.1", port), header("stream"), None) as call:
        while (piece := await call.receive()) is not None:
            received += len(str(piece))
    took_s = time.perf_counter() - began_s
    print(f"one answer of {received / 1e6:.0f} MB: {received / took_s / 1e6:.0f} MB/s")


async def client(identity: Identity, node: NodeId, port: int, seconds: float) -> None:
    pool = streams(identity)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.serve, [])
        await small_calls(pool, node, port, in_flight=1, seconds=0.3)  # warm up
        for in_flight in (1, 32):
            await small_calls(pool, node, port, in_flight=in_flight, seconds=seconds)
        await one_long_answer(pool, node, port)
        nursery.cancel_scope.cancel()


def quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))


def main() -> None:
    quiet()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    with tempfile.TemporaryDirectory() as folder:
        server_dir = Path(folder, "server")
        server = init_mesh(server_dir, "bench")
        identity = admit(server, Path(folder, "client"))
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(server_dir, theirs), daemon=True)
        process.start()
        try:
            port = ours.recv()
            trio.run(partial(client, identity, server.node_id, port, seconds))
        finally:
            process.kill()
            process.join()


if __name__ == "__main__":
    main()
