"""What security costs: `python -m tests.bench.bench_security [--nodes 10] [--seconds 30] [--count 10] [--only PART]`.

Four parts, on loopback. `share`: of a node's processor time, idle and with everybody writing its record. `forward`:
of a forwarded request's, and of its time. `start`: from starting a process to its first answer, and from the token of
`meshd invite` to a member that everybody sees. `primitives`: what one operation costs.

Shares are samples of real daemons (see `sampled`): security is every sample in TLS, in sealing and opening datagrams,
in signing and checking, in certificates and decrees, in access rules and passports, in the audit, and in the door of the
HTTP edge.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio
from tests.bench.bench_forward import ECHO, Client, ms, request_bytes, throughput
from tests.bench.gossip.meshd_mesh import add_node, make_mesh
from tests.bench.sampled import INTERVAL_S, PARTS, REST
from tests.bench.security_primitives import rows as primitives
from tests.support_daemons import HOST, Mesh, free_port

SAMPLED = [sys.executable, "-m", "tests.bench.sampled"]
DAEMON = [sys.executable, "-m", "meshd"]
SETTLE_S = 5.0
WRITES_INTERVAL_S = 1.0
COMMAND_DEADLINE_S = 60.0
SHARE_MAX = 0.10
SHOWN_FROM = 0.005
"""Functions with a smaller share are not listed."""
JOIN_MAX_S = 2.0
START_MAX_S = 1.0
ANSWERED_DEADLINE_S = 5.0

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Shares:
    """What some processes did with their processor time."""

    parts: Counter[str]  # samples
    functions: Counter[str]
    cpu_s: float  # used in all, by the kernel's count

    def share(self, *parts: str) -> float:
        """Of these parts in all samples."""
        return sum(self.parts[part] for part in parts) / max(1, self.parts.total())

    @property
    def security(self) -> float:
        return self.share(*PARTS)

    def rows(self, label: str) -> Iterator[Row]:
        """The share, its parts, and how sure it is."""
        total = max(1, self.parts.total())
        error = 2 * (self.security * (1 - self.security) / total) ** 0.5
        verdict = "" if self.security <= SHARE_MAX else ", MISSED"
        yield (
            f"{label}: security, % of CPU (at most {100 * SHARE_MAX:.0f})",
            f"{100 * self.security:.1f} ± {100 * error:.1f}{verdict}",
        )
        for part in sorted(PARTS, key=lambda part: -self.parts[part]):
            yield f"    {part}", f"{100 * self.share(part):.1f}"
            for function, count in self.functions.most_common():
                if function.startswith(f"{part}: ") and count >= SHOWN_FROM * total:
                    name = function.removeprefix(f"{part}: ")
                    yield f"        {name}", f"{100 * count / total:.1f}"
        yield "    samples", f"{total} of {INTERVAL_S * 1e3:.0f} ms; {self.cpu_s:.1f} s used"


class Window:
    """Counts what processes that run under `sampled` do between entering and leaving."""

    def __init__(self, folder: Path, pids: Sequence[int]) -> None:
        self._folder = folder
        self._pids = pids
        self._began = 0.0
        self.shares = Shares(Counter(), Counter(), 0.0)

    def __enter__(self) -> Self:
        for pid in self._pids:
            os.kill(pid, signal.SIGUSR1)
        self._began = sum(map(cpu_s, self._pids))
        return self

    def __exit__(self, *_: object) -> None:
        used_s = sum(map(cpu_s, self._pids)) - self._began
        parts: Counter[str] = Counter()
        functions: Counter[str] = Counter()
        for pid in self._pids:
            path = self._folder / f"{pid}.json"
            path.unlink(missing_ok=True)
            os.kill(pid, signal.SIGUSR2)
            until_s = time.monotonic() + ANSWERED_DEADLINE_S
            while not path.exists():
                if time.monotonic() > until_s:
                    raise AssertionError(f"process {pid} wrote no samples")
                time.sleep(0.01)
            told = json.loads(path.read_text())
            parts.update(told["parts"])
            functions.update(told["functions"])
        assert set(parts) <= {*PARTS, REST}
        self.shares = Shares(parts, functions, used_s)


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- the share of a node's processor time ------------------------------------------------------------------


def idle_share(folder: Path, nodes: int, seconds: float) -> Shares:
    """Daemons that only keep in touch."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    with Mesh(folder, command=[*SAMPLED, str(samples), "meshd"]) as mesh:
        daemons = [mesh.start(f"n{number}") for number in range(nodes)]
        for daemon in daemons:
            mesh.wait_for_members(daemon, nodes)
        time.sleep(SETTLE_S)
        with Window(samples, [daemon.process.pid for daemon in daemons]) as window:
            time.sleep(seconds)
    return window.shares


@contextmanager
def gossiping(folder: Path, nodes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The gossip half of daemons, told what to write; see `tests.bench.gossip.meshd_node`."""
    make_mesh(folder)
    environment = {**os.environ, "MESHD_BENCH_MESH": str(folder), "MESHD_LOAD": "1"}
    ports = [free_port() for _ in range(nodes)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, port in enumerate(ports):
            add_node(folder, f"n{number}")
            command = [*SAMPLED, str(folder), "tests.bench.gossip.meshd_node", f"n{number}"]
            with (folder / f"events-{number}").open("wb") as events:
                running.append(
                    subprocess.Popen(
                        [*command, HOST, str(port), "lan"],
                        stdin=subprocess.PIPE,
                        stdout=events,
                        env=environment,
                    )
                )
        for each in running:
            say(each, f"join {HOST}:{ports[0]}")
        for number in range(nodes):
            wait_for_joins(folder / f"events-{number}", nodes - 1)
        yield running
    finally:
        for each in running:
            each.terminate()
        for each in running:
            each.wait(COMMAND_DEADLINE_S)


def wait_for_joins(events: Path, count: int) -> None:
    """Until a node has told of so many others."""
    until_s = time.monotonic() + COMMAND_DEADLINE_S
    while events.read_bytes().count(b" JOIN ") < count:
        if time.monotonic() > until_s:
            raise AssertionError(f"{events.name}: {events.read_bytes()[-500:]!r}")
        time.sleep(0.05)


def say(node: subprocess.Popen[bytes], line: str) -> None:
    assert node.stdin is not None
    node.stdin.write(f"{line}\n".encode())
    node.stdin.flush()


def loaded_share(folder: Path, nodes: int, seconds: float) -> Shares:
    """Every node writes its record once a second and publishes a load."""
    with gossiping(folder, nodes) as running:
        time.sleep(SETTLE_S)
        with Window(folder, [each.pid for each in running]) as window:
            until_s, count = time.monotonic() + seconds, 0
            while time.monotonic() < until_s:
                say(running[count % nodes], f"meta v{count}")
                count += 1
                time.sleep(WRITES_INTERVAL_S / nodes)
        if dead := [each.pid for each in running if each.poll() is not None]:
            raise AssertionError(f"ended: {dead}")
    return window.shares


# -- the share of a forwarded request ----------------------------------------------------------------------


def forward_rows(folder: Path, seconds: float) -> Iterator[Row]:
    """One client and 32, an entry without capabilities and a peer with the echo."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    with Mesh(folder, command=[*SAMPLED, str(samples), "meshd"]) as mesh:
        entry = mesh.start("entry")
        peer = mesh.start("peer", plugins=["echo"], tables="[plugins.echo]\nslots = 64\n")
        mesh.wait_for_capability(entry, ECHO)
        pids = [entry.process.pid, peer.process.pid]
        trio.run(throughput, entry.http_port, 4, 1.0)
        with Window(samples, pids) as window:
            one = trio.run(one_client, entry.http_port, seconds)
        yield from window.shares.rows("forwarding, 1 client, both nodes")
        request_ms = 1e3 * window.shares.cpu_s / len(one)
        spent_ms, p50_ms = window.shares.security * request_ms, ms(one, 0.5)
        yield "    of a request's time, %", f"{100 * spent_ms / p50_ms:.1f}"
        yield (
            "    security / whole CPU / p50 of a request, ms",
            f"{spent_ms:.3f} / {request_ms:.2f} / {p50_ms:.2f}",
        )
        with Window(samples, pids) as window:
            rate, _ = trio.run(throughput, entry.http_port, 32, seconds)
        yield from window.shares.rows("forwarding, 32 clients, both nodes")
        yield "    requests a second", f"{rate:.0f}"


async def one_client(port: int, seconds: float) -> list[float]:
    """How long each request took of a client that asks one after the other."""
    client, request, taken = await Client.connect(port), request_bytes(stream=False), []
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        taken.append(await client.ask(request))
    await client.aclose()
    return sorted(taken)


# -- starting and joining ----------------------------------------------------------------------------------


def start_rows(folder: Path, count: int) -> Iterator[Row]:
    """One daemon that was there; `count` devices join it, one after the other."""
    starts: list[float] = []
    joins: list[float] = []
    members: list[float] = []
    with Mesh(folder, command=DAEMON) as mesh:
        first = mesh.start("first")
        for number in range(count):
            name = f"joiner-{number}"
            invited = meshd("--socket", str(first.socket), "invite", "--json")
            token = json.loads(invited)["token"]
            state = folder / name / "state"
            began_s = time.monotonic()
            meshd("join", token, "--name", name, "--state-dir", str(state))
            joins.append(time.monotonic() - began_s)
            started_s = time.monotonic()
            daemon = mesh.start(name)
            starts.append(time.monotonic() - started_s)
            mesh.wait(
                f"{name} to be seen",
                first,
                lambda name=name: is_alive(first.get("/mesh/v1/peers"), name),
            )
            members.append(time.monotonic() - began_s)
            daemon.process.terminate()
            daemon.process.wait(COMMAND_DEADLINE_S)
        identity = first.folder / "state"
        parts = json.loads(
            subprocess.run(
                [sys.executable, "-c", PARTS_OF_START, str(identity)],
                capture_output=True,
                check=True,
            ).stdout
        )
    yield row_of("start to first answer, s", starts, START_MAX_S)
    yield "    of it loading cryptography and the trust modules, ms", f"{parts['import_ms']:.0f}"
    yield "    of it reading and checking the identity, ms", f"{parts['identity_ms']:.0f}"
    yield row_of("`meshd join TOKEN`, s", joins, JOIN_MAX_S)
    yield row_of(
        "token to member that the inviter sees (join, start, gossip), s", members, JOIN_MAX_S
    )


PARTS_OF_START = """
import json, sys, time
from pathlib import Path
from typing import Self
import click, msgpack, structlog, trio
import meshd_cms, meshd.config
began = time.perf_counter()
import ssl
import meshd.core.sealing
from meshd.trust.identity import load_identity
import meshd.trust.decree_proofs, meshd.trust.tls
loaded = time.perf_counter()
load_identity(Path(sys.argv[1]))
print(json.dumps({"import_ms": 1e3 * (loaded - began), "identity_ms": 1e3 * (time.perf_counter() - loaded)}))
"""


def is_alive(answer: dict[str, list[dict[str, object]]], name: str) -> bool:
    return any(row["name"] == name and row["state"] == "alive" for row in answer["peers"])


def meshd(*arguments: str) -> str:
    done = subprocess.run(
        [*DAEMON, *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE_S,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"meshd {arguments[:2]}: {done.stderr}")
    return done.stdout


def row_of(what: str, seconds: Sequence[float], most_s: float) -> Row:
    """p50 and p95 of some times beside their target."""
    ordered = sorted(seconds)
    p50, p95 = statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    verdict = "" if p50 <= most_s else ", MISSED"
    return (
        f"{what}, p50 / p95 of {len(ordered)} (below {most_s:g})",
        f"{p50:.2f} / {p95:.2f}{verdict}",
    )


# -- all of it ---------------------------------------------------------------------------------------------


def share_rows(folder: Path, nodes: int, seconds: float) -> Iterator[Row]:
    yield from idle_share(folder / "idle", nodes, seconds).rows(f"idle, N={nodes}")
    yield from loaded_share(folder / "loaded", nodes, seconds).rows(
        f"every node writes once in {WRITES_INTERVAL_S:g} s, N={nodes}"
    )


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each window of samples")
    parser.add_argument("--count", type=int, default=10, help="of starts and joins")
    parser.add_argument("--only", choices=("share", "forward", "start", "primitives"))
    options = parser.parse_args()
    parts: dict[str, Callable[[Path], Iterator[Row]]] = {
        "share": lambda folder: share_rows(folder, options.nodes, options.seconds),
        "forward": lambda folder: forward_rows(folder, options.seconds),
        "start": lambda folder: start_rows(folder, options.count),
        "primitives": primitives,
    }
    print(
        f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for name, run in parts.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                for label, value in run(Path(folder) / name):
                    print(f"{label:<78}  {value}", flush=True)


if __name__ == "__main__":
    main()
