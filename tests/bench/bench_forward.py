"""What forwarding costs: `python -m tests.bench.bench_forward [--seconds 5] [--json FILE]`.

Two daemons in processes of their own on loopback, real keys and real streams; the peer has the echo
capability, the entry has none. A client in this process speaks to the HTTP edge. The same request goes
to the peer's own edge ("direct") and to the entry ("forwarded"); the difference is what the mesh adds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import trio
from tests.support_daemons import HOST, Daemon, Mesh

ECHO = "computation.gpt/echo"


def request_bytes(*, stream: bool, chunks: int = 1) -> bytes:
    body = json.dumps(
        {
            "model": ECHO,
            "messages": [{"role": "user", "content": "hello mesh"}],
            "stream": stream,
            "chunks": chunks,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client:
    """One keep-alive connection, as lean as a client can be: its own time is in every figure."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(await trio.open_tcp_stream(HOST, port))

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            data = await self._stream.receive_some(65_536)
            if not data:
                raise AssertionError(f"closed after {self._buffer!r}")
            self._buffer += data
        taken, _, self._buffer = self._buffer.partition(mark)
        return taken

    async def ask(self, request: bytes) -> float:
        """Seconds until the whole answer is here."""
        began_s = time.perf_counter()
        await self._stream.send_all(request)
        head = await self._until(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise AssertionError(head + self._buffer)
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        while len(self._buffer) < length:
            self._buffer += await self._stream.receive_some(65_536)
        self._buffer = self._buffer[length:]
        return time.perf_counter() - began_s

    async def first_piece(self, request: bytes) -> float:
        """Seconds until the first piece of a streamed answer; the rest is read too."""
        began_s = time.perf_counter()
        await self._stream.send_all(request)
        await self._until(b'"content":"')
        first_s = time.perf_counter() - began_s
        await self._until(b"data: [DONE]\n\n")
        await self._until(b"0\r\n\r\n")
        return first_s

    async def aclose(self) -> None:
        await self._stream.aclose()


async def latencies(port: int, count: int, *, stream: bool) -> list[float]:
    client = await Client.connect(port)
    request = request_bytes(stream=stream)
    measure = client.first_piece if stream else client.ask
    for _ in range(50):
        await measure(request)
    taken = [await measure(request) for _ in range(count)]
    await client.aclose()
    return sorted(taken)


async def throughput(port: int, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second, and the latencies."""
    taken: list[float] = []
    request = request_bytes(stream=False)

    async def one(until_s: float) -> None:
        client = await Client.connect(port)
        while time.perf_counter() < until_s:
            taken.append(await client.ask(request))
        await client.aclose()

    began_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(one, began_s + seconds)
    return len(taken) / (time.perf_counter() - began_s), sorted(taken)


def ms(values: list[float], share: float) -> float:
    return round(values[min(len(values) - 1, int(share * len(values)))] * 1e3, 3)


async def measure(entry: Daemon, peer: Daemon, seconds: float, count: int) -> dict[str, object]:
    rows: dict[str, object] = {}
    rounds: dict[str, list[list[float]]] = {}
    for _ in range(3):  # in turn, so that a machine whose speed drifts is fair to both
        for label, port in (("direct", peer.http_port), ("forwarded", entry.http_port)):
            for stream in (False, True):
                kind = "first piece" if stream else "whole answer"
                taken = await latencies(port, count, stream=stream)
                rounds.setdefault(f"{label}, {kind}", []).append(taken)
    for name, runs in rounds.items():
        rows[f"{name}, 1 client, p50 ms"] = statistics.median(ms(run, 0.5) for run in runs)
        rows[f"{name}, 1 client, p99 ms"] = statistics.median(ms(run, 0.99) for run in runs)
    for kind in ("whole answer", "first piece"):
        added = [
            ms(forwarded, 0.5) - ms(direct, 0.5)
            for direct, forwarded in zip(
                rounds[f"direct, {kind}"], rounds[f"forwarded, {kind}"], strict=True
            )
        ]
        rows[f"added, {kind}, 1 client, p50 ms"] = round(statistics.median(added), 3)
    for label, port in (("direct", peer.http_port), ("forwarded", entry.http_port)):
        cpu_s = entry.cpu_s(), peer.cpu_s()
        rate, taken = await throughput(port, 32, seconds)
        rows[f"{label}, 32 clients, requests/s"] = round(rate)
        rows[f"{label}, 32 clients, p50 ms"] = ms(taken, 0.5)
        rows[f"{label}, 32 clients, p99 ms"] = ms(taken, 0.99)
        spent = entry.cpu_s() - cpu_s[0], peer.cpu_s() - cpu_s[1]
        rows[f"{label}, CPU a request, entry / peer, ms"] = " / ".join(
            f"{1e3 * each / len(taken):.2f}" for each in spent
        )
    return rows


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each throughput run")
    parser.add_argument("--count", type=int, default=500, help="requests of each latency run")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Mesh(Path(folder)) as mesh:
        entry = mesh.start("entry")
        peer = mesh.start(
            "peer", plugins=["echo", "hardware"], tables="[plugins.echo]\nslots = 64\n"
        )
        mesh.wait_for_capability(entry, ECHO)
        rows = trio.run(measure, entry, peer, options.seconds, options.count)
        rows["entry, resident MiB after the load"] = round(entry.resident_bytes() / 2**20, 1)
        rows["peer, resident MiB after the load"] = round(peer.resident_bytes() / 2**20, 1)
    print(
        f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
