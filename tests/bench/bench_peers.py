"""Forwarding beside other gateways, in one run on one machine.

    python -m tests.bench.mock_upstream --port 9000     # the gateways' only model server
    python -m tests.bench.bench_peers --upstream 9000 --gateway NAME=PORT/MODEL[/KEY] [--pid NAME=PID] ...

The same client asks, in turn and in three rounds: the mock model server itself; every gateway named, each
running already and set up by hand to forward MODEL to that server; the edge of a daemon of ours that has
the echo capability; and the edge of another daemon of ours, which forwards to it. Figures are medians of
the rounds; "added" is against what is asked directly: the mock server for a gateway, the daemon with the
echo for ours, compared within each round. Without --upstream a mock server is started, without --gateway
only it and ours are measured.

What is not the same, so that nobody reads more into the figures than there is:

- A gateway speaks plain HTTP to a server that does nothing at all. Ours goes through mutual TLS to another
  whole daemon, which admits the request, runs a capability and says what it did. At 32 clients both of our
  daemons and the client share the cores; beside a gateway the mock server takes next to nothing.
- "Added" flatters ours: it takes off what the far daemon needs when asked directly, its HTTP edge included,
  which a forwarded request does not pass there. "Over mock" is the other bound: it charges ours with all
  that the far daemon does, and is the time to compare when only the answer counts.
- A gateway runs with whatever its operator configured and whatever it was built on, such as a faster
  event loop or HTTP parser; one worker process is like ours.
- Answers differ in size: ours carries a report of what was done where.
- The first piece is the text itself, not the first chunk; each upstream sends it in one piece.
- Resident memory and CPU time a request (at 32 clients) are those of the one process named; what it offers
  besides differs. On a machine that others use too, CPU time is steadier than requests/s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from tests.bench.bench_forward import ECHO, Client, ms
from tests.bench.mock_upstream import MODEL, TEXT
from tests.support_daemons import HOST, Mesh

ROUNDS = 3
CLIENTS = 32
WARM_UP = 50
MOCK = "mock, direct"
OURS_DIRECT = "ours, direct"
OURS = "ours, forwarded"


@dataclass(frozen=True, slots=True)
class Target:
    """Something to ask."""

    name: str
    port: int
    model: str
    key: str = ""
    pid: int | None = None
    direct: str | None = None  # the target whose time is taken off for "added"

    def request(self, *, stream: bool) -> bytes:
        """The same question to each but for model and key."""
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": TEXT}],
                "stream": stream,
            }
        ).encode()
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class AnyClient(Client):
    """The client of bench_forward, for servers that space their JSON differently."""

    async def first_piece(self, request: bytes) -> float:
        """Seconds until the text of a streamed answer; the rest is read too."""
        began_s = time.perf_counter()
        await self._stream.send_all(request)
        head = await self._until(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise AssertionError(head + self._buffer)
        await self._until(TEXT.encode())
        first_s = time.perf_counter() - began_s
        await self._until(b"data: [DONE]\n\n")
        await self._until(b"0\r\n\r\n")
        return first_s


@dataclass(frozen=True, slots=True)
class Figures:
    """One round of one target."""

    whole_ms: float
    first_ms: float
    requests_per_s: float
    cpu_ms: float | None  # of the target's process, a request


async def p50_ms(target: Target, count: int, *, stream: bool) -> float:
    """The median of one client's requests, one after another."""
    client = await AnyClient.connect(target.port)
    measure = client.first_piece if stream else client.ask
    request = target.request(stream=stream)
    for _ in range(WARM_UP):
        await measure(request)
    taken = sorted([await measure(request) for _ in range(count)])
    await client.aclose()
    return ms(taken, 0.5)


async def rate(target: Target, seconds: float) -> tuple[float, float | None]:
    """Whole answers a second to all clients together, and CPU ms that each took of the process."""
    answered = 0
    cpu_s = None if target.pid is None else cpu_s_of(target.pid)
    request = target.request(stream=False)

    async def one(until_s: float) -> None:
        nonlocal answered
        client = await AnyClient.connect(target.port)
        while time.perf_counter() < until_s:
            await client.ask(request)
            answered += 1
        await client.aclose()

    began_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            nursery.start_soon(one, began_s + seconds)
    per_s = answered / (time.perf_counter() - began_s)
    if target.pid is None or cpu_s is None:
        return per_s, None
    return per_s, (cpu_s_of(target.pid) - cpu_s) / answered * 1e3


async def measure(
    targets: Sequence[Target], seconds: float, count: int
) -> dict[str, list[Figures]]:
    """All rounds; in turn, so that a machine whose speed drifts is fair to each."""
    rounds: dict[str, list[Figures]] = {target.name: [] for target in targets}
    for _ in range(ROUNDS):
        alone = {
            target.name: (
                await p50_ms(target, count, stream=False),
                await p50_ms(target, count, stream=True),
            )
            for target in targets
        }
        for target in targets:
            rounds[target.name].append(Figures(*alone[target.name], *await rate(target, seconds)))
    return rounds


def rows_of(
    targets: Sequence[Target], rounds: dict[str, list[Figures]]
) -> list[dict[str, str | float | None]]:
    """One row a target; "added" is the median of the differences within each round."""
    rows: list[dict[str, str | float | None]] = []
    for target in targets:
        mine = rounds[target.name]
        row: dict[str, str | float | None] = {
            "target": target.name,
            "p50 ms": round(statistics.median(each.whole_ms for each in mine), 2),
            "added ms": None,
            "over mock ms": None if target.name == MOCK else over_mock_ms(mine, rounds[MOCK]),
            "first piece ms": round(statistics.median(each.first_ms for each in mine), 2),
            "first piece added ms": None,
            "requests/s": round(statistics.median(each.requests_per_s for each in mine)),
            "requests/s, least to most": " - ".join(
                f"{pick(each.requests_per_s for each in mine):.0f}" for pick in (min, max)
            ),
            "CPU ms a request": None,
            "resident MiB": None if target.pid is None else resident_mib(target.pid),
        }
        cpu_ms = [each.cpu_ms for each in mine if each.cpu_ms is not None]
        if cpu_ms:
            row["CPU ms a request"] = round(statistics.median(cpu_ms), 2)
        if target.direct is not None:
            pairs = list(zip(mine, rounds[target.direct], strict=True))
            row["added ms"] = round(statistics.median(a.whole_ms - b.whole_ms for a, b in pairs), 2)
            row["first piece added ms"] = round(
                statistics.median(a.first_ms - b.first_ms for a, b in pairs), 2
            )
        rows.append(row)
    return rows


def over_mock_ms(mine: Sequence[Figures], mock: Sequence[Figures]) -> float:
    """What a whole answer takes beyond one of the mock server; the median over the rounds."""
    pairs = zip(mine, mock, strict=True)
    return round(statistics.median(a.whole_ms - b.whole_ms for a, b in pairs), 2)


def resident_mib(pid: int) -> float:
    """RSS, from /proc."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def cpu_s_of(pid: int) -> float:
    """User and system time so far, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def mock_server() -> Generator[int, None, None]:
    """A mock model server of our own; gives its port, ends it afterwards."""
    command = [sys.executable, "-m", "tests.bench.mock_upstream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def gateway(text: str) -> Target:
    """`NAME=PORT/MODEL[/KEY]`; raises ValueError. A model's name has no slash here."""
    name, _, rest = text.partition("=")
    port, model, *key = rest.split("/")
    if not name or not model or len(key) > 1:
        raise ValueError(text)
    return Target(name, int(port), model, "".join(key), direct=MOCK)


def pid_of(text: str) -> tuple[str, int]:
    """`NAME=PID`; raises ValueError."""
    name, _, pid = text.partition("=")
    return name, int(pid)


def run(
    gateways: Sequence[Target], upstream: int, seconds: float, count: int
) -> list[dict[str, str | float | None]]:
    """Start our two daemons, measure everything, end them."""
    with tempfile.TemporaryDirectory() as folder, Mesh(Path(folder)) as mesh:
        entry = mesh.start("entry")
        peer = mesh.start(
            "peer", plugins=["echo", "hardware"], tables="[plugins.echo]\nslots = 64\n"
        )
        mesh.wait_for_capability(entry, ECHO)
        targets = [
            Target(MOCK, upstream, MODEL),
            *gateways,
            Target(OURS_DIRECT, peer.http_port, ECHO, pid=peer.process.pid),
            Target(OURS, entry.http_port, ECHO, pid=entry.process.pid, direct=OURS_DIRECT),
        ]
        return rows_of(targets, trio.run(measure, targets, seconds, count))


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--upstream", type=int, metavar="PORT", help="of a mock server that runs")
    parser.add_argument(
        "--gateway", type=gateway, action="append", default=[], metavar="NAME=PORT/MODEL[/KEY]"
    )
    parser.add_argument("--pid", type=pid_of, action="append", default=[], metavar="NAME=PID")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each throughput run")
    parser.add_argument("--count", type=int, default=500, help="requests of each latency run")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.gateway and options.upstream is None:
        parser.error("--gateway needs --upstream, the mock server that it forwards to")
    pids = dict(options.pid)
    gateways = [
        Target(each.name, each.port, each.model, each.key, pids.get(each.name), each.direct)
        for each in options.gateway
    ]
    if options.upstream is None:
        with mock_server() as port:
            rows = run(gateways, port, options.seconds, options.count)
    else:
        rows = run(gateways, options.upstream, options.seconds, options.count)
    print(
        f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        f"p50 at 1 client, requests/s at {CLIENTS}, medians of {ROUNDS} rounds"
    )
    titles = list(rows[0])
    table = [titles, *[["" if row[t] is None else str(row[t]) for t in titles] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
