"""The gossip bench measures: its node program runs the shipped code, and its tables say what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from tests.bench.gossip.cluster import Cluster, running
from tests.bench.gossip.events import JOIN, LEAVE, SUSPECT, UPDATE, Heard, parse
from tests.bench.gossip.figures import percentile
from tests.bench.gossip.implementations import Ours
from tests.bench.gossip.measure import (
    Fault,
    Figures,
    measure_failures,
    measure_idle,
    measure_join,
    measure_updates,
)
from tests.bench.gossip.networks import Loopback, why_unavailable
from tests.bench.gossip.report import Results, beside_targets, report, robustness

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def _allowed() -> None:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)


def with_nodes(count: int, folder: Path, work: Callable[[Cluster], Awaitable[None]]) -> None:
    """Run `work` on a cluster of ours, of which nothing has started yet."""

    async def main() -> None:
        async with running(Ours(), Loopback(), count, folder) as cluster:
            await work(cluster)

    trio.run(main)


def samples(figures: Figures, key: str) -> int:
    """How many there are."""
    held = figures[key]
    assert isinstance(held, list)
    return len(held)


@pytest.mark.namespaces
@pytest.mark.usefixtures("_allowed")
def test_nodes_join_update_and_hear_of_a_crash(tmp_path: Path) -> None:
    async def work(cluster: Cluster) -> None:
        join = await measure_join(cluster)
        assert {"members_s", "metadata_s"} <= join.keys()
        idle = await measure_idle(cluster, 0.1)
        assert samples(idle, "resident_mb") == 3
        updates = await measure_updates(cluster, 2)
        assert updates["missed"] == 0
        assert (samples(updates, "last_ms"), samples(updates, "nodes_ms")) == (2, 4)
        killed = await measure_failures(cluster, Fault.KILLED, 1, 1)
        assert (killed["missed"], killed["false_deaths"]) == (0, 0)
        assert samples(killed, "known_s") == samples(killed, "rejoined_s") == 1
        assert sorted(cluster.running) == [0, 1, 2]

    with_nodes(3, tmp_path, work)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.namespaces
@pytest.mark.usefixtures("_allowed")
def test_a_frozen_node_is_suspected_and_one_that_leaves_is_gone(tmp_path: Path) -> None:
    async def work(cluster: Cluster) -> None:
        await cluster.assemble()
        suspected = Heard([0, 1], {SUSPECT}, "n2")
        recovered = Heard([0, 1], {"RECOVER", JOIN}, "n2")
        left = Heard([0, 2], {LEAVE}, "n1")
        with cluster.listening(suspected, recovered, left):
            cluster.stop(2)
            assert await suspected.wait(DEADLINE_S)
            cluster.resume(2)
            assert await recovered.wait(DEADLINE_S)
            cluster.send(1, "leave")
            assert await left.wait(DEADLINE_S)

    with_nodes(3, tmp_path, work)


@pytest.mark.namespaces
@pytest.mark.usefixtures("_allowed")
def test_a_message_and_a_load_are_told(tmp_path: Path) -> None:
    async def work(cluster: Cluster) -> None:
        await cluster.assemble()
        told = Heard([1], {"USER"}, "n0", "hello there")
        loads = Heard([1], {"LOAD"}, "n0")
        with cluster.listening(told, loads):
            cluster.send(0, "load on")
            cluster.send(0, "bcast hello there")
            assert await told.wait(DEADLINE_S)
            while loads.missing:
                cluster.send(1, "loads")
                await loads.wait(0.2)

    with_nodes(2, tmp_path, work)


def test_the_node_program_says_what_it_needs(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("MESHD_BENCH_MESH", None)
    command = [sys.executable, "-m", "tests.bench.gossip.meshd_node", "n0", "127.0.0.1", "0", "lan"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False
    )
    assert done.returncode == 1
    assert "tests.bench.gossip.meshd_mesh" in done.stderr


def test_lines_that_are_no_events_are_passed_over() -> None:
    event = parse(b"1700000000000000000 UPDATE n3 a text of words\n", 2)
    assert event is not None
    assert (event.by, event.kind, event.name, event.text) == (2, UPDATE, "n3", "a text of words")
    assert parse(b"Traceback (most recent call last):", 0) is None
    assert parse(b"", 0) is None


def test_a_percentile_is_a_sample() -> None:
    samples = [float(value) for value in range(1, 101)]
    assert percentile(samples, 0.5) == 50.0
    assert percentile(samples, 0.99) == 99.0
    assert percentile([3.0, 1.0], 0.99) == 3.0


def test_the_report_says_what_was_measured_and_what_was_missed(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    machine = {"cores": 2, "processor": "p", "memory_gb": 1, "kernel": "k", "python": "3"}
    head = {"implementation": "meshd", "nodes": 10}
    rows = [
        {"cell": "machine", "began": "now", "load_average": 0, "versions": {"meshd": "v"}}
        | machine,
        {"cell": "memory", "stages": [["the interpreter", 9.0], ["trio", 25.0]]},
        head | {"cell": "join", "metadata_s": 0.1},
        head | {"cell": "updates", "last_ms": [8.0, 9.0, 70.0], "nodes_ms": [1.0], "missed": 0},
        head | {"cell": "stop", "suspected_s": [1.0], "known_s": [5.5], "first_s": [5.25]},
        head
        | {"cell": "stalls", "false_deaths": 2, "falsely_dead": 1, "suspicions": 7, "returns": 0},
        head | {"cell": "partition", "heal_s": None, "waited_s": 60.0},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = Results(file)
    targets = beside_targets(results)
    assert "| update, last node p50, ms | 9 (≤ 10) |" in targets
    assert "| update, last node p99, ms | 70 (≤ 40, **missed**) |" in targets
    assert "5.25 (≥ 6, **missed**)" in targets
    assert "| heal after a partition, s | never (≤ 3, **missed**) |" in targets
    assert "2 of 1 nodes (7 suspicions)" in robustness(results)
    assert "| 10 | **meshd** | 0.10 | 9 / 70 |" in report(results)
