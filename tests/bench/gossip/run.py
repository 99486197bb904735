"""The gossip bench: ours beside its peers, all cells in one run.

    PEER_PYTHON=DIR/bin/python python -m tests.bench.gossip.run \\
        --nodes 10,30,60,100 --peers meshd,kinship,memberlist,serf --out results.jsonl

For each size and each implementation, a process a node in a private network namespace:

* alone: all join at once, idle, updates; ours also idle with the load lane, crashes and silent hosts;
* the peers side by side, because they wait more than they work: crashes and silent hosts;

then, all side by side at one size: loss, burners, stalls; then a partition that heals. Needs root. An
implementation that is missing is named with what provides it, and left out. A row of figures is written to
`--out` as soon as it is there; `tests.bench.gossip.report` makes tables and plots of them.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import trio
from tests.bench.gossip.cluster import Cluster, ClusterError, running
from tests.bench.gossip.figures import OURS, SERF, percentile
from tests.bench.gossip.implementations import Implementation, MissingError, implementation
from tests.bench.gossip.machine import allow_many_files, description, load_average
from tests.bench.gossip.measure import (
    Fault,
    Figures,
    measure_failures,
    measure_idle,
    measure_idle_with_load,
    measure_join,
    measure_updates,
    rounded,
)
from tests.bench.gossip.memory import measure_memory
from tests.bench.gossip.networks import Loopback, Network, Switched, lossy, sweep
from tests.bench.gossip.options import Options, options_of
from tests.bench.gossip.robustness import (
    measure_burners,
    measure_loss,
    measure_partition,
    measure_stalls,
)
from tests.integration.support_namespaces import NoNamespacesError, why_unavailable
from tests.integration.support_switch import Switch

SETTLE_S = 5.0
PARTITION_NODES = 6
LOSSES = (0.10, 0.25)
LOSS_UPDATES = 15
Cell: TypeAlias = Callable[[Cluster], Awaitable[None]]
_MeasureError = (ClusterError, NoNamespacesError)


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the run."""

    title: str
    estimate_s: float
    work: Callable[[], Awaitable[None]]


class Bench:
    """One run.

    Args:
        options: what to measure.
        implementations: those that are there.
        scratch: a folder for the nodes' files.
    """

    def __init__(
        self, options: Options, implementations: Sequence[Implementation], scratch: Path
    ) -> None:
        self._options = options
        self._implementations = implementations
        self._scratch = scratch
        self._began_s = time.monotonic()
        self.failures = 0

    async def run(self) -> None:
        """Measure everything; Ctrl-C and SIGTERM end all nodes and networks first."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._interruption, signals, nursery.cancel_scope)
                await self._run_steps()
                nursery.cancel_scope.cancel()

    async def _interruption(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for _ in signals:
            self._say("ended by hand; what was measured is in the file")
            self.failures += 1
            scope.cancel()

    async def _run_steps(self) -> None:
        """One after another; a step that fails costs its own figures only."""
        steps = self.steps()
        self._began_s = time.monotonic()
        total_s = sum(step.estimate_s for step in steps)
        self._say(f"{len(steps)} steps, about {minutes(total_s)} min on a quiet machine")
        for number, step in enumerate(steps, start=1):
            self._say(
                f"step {number} of {len(steps)}: {step.title} (about {step.estimate_s:.0f} s)"
            )
            await step.work()
        self._say(f"done; `python -m tests.bench.gossip.report {self._options.out}` shows it")

    def steps(self) -> list[Step]:
        """The plan, with estimates for a quiet machine with two cores."""
        options = self._options
        steps: list[Step] = []
        peers = [each for each in self._implementations if not each.is_quick]
        for nodes in options.nodes if "main" in options.cells else ():
            for each in self._implementations:
                title = f"{each.name}, N={nodes}"
                work = partial(self._alone, each, nodes)
                steps.append(Step(title, self._alone_s(each, nodes), work))
            if peers:
                title = f"failures of {listed(peers)}, N={nodes}"
                work = partial(self._side_by_side, peers, nodes, self._slow_failures)
                steps.append(Step(title, self._slow_failures_s(peers, nodes), work))
        nodes = options.robust_nodes
        start_s = sum(start_estimate_s(each, nodes) for each in self._implementations) + SETTLE_S
        everybody = f"{listed(self._implementations)}, N={nodes}"
        if "loss" in options.cells:
            for share in LOSSES:
                work = partial(self._side_by_side, self._implementations, nodes, self._loss(share))
                estimate_s = start_s + max(options.window_s, LOSS_UPDATES * 2.5)
                steps.append(Step(f"loss {share:.0%}, {everybody}", estimate_s, work))
        if "burners" in options.cells:
            for (
                each
            ) in self._implementations:  # one at a time: the processors are what is fought for
                work = partial(self._side_by_side, [each], nodes, self._burners)
                estimate_s = start_estimate_s(each, nodes) + SETTLE_S + options.window_s + 2.0
                steps.append(Step(f"burners, {each.name}, N={nodes}", estimate_s, work))
        if "stalls" in options.cells:
            work = partial(self._side_by_side, self._implementations, nodes, self._stalls)
            steps.append(Step(f"stalls, {everybody}", start_s + 75.0, work))
        if "partition" in options.cells:
            work = partial(self._partitions, self._implementations, PARTITION_NODES)
            steps.append(Step(f"partition, N={PARTITION_NODES}", 125.0, work))
            ours = [each for each in self._implementations if each.name == OURS]
            if ours:
                steps.append(
                    Step(
                        f"partition, {OURS}, N={nodes}",
                        75.0,
                        partial(self._partitions, ours, nodes),
                    )
                )
        return steps

    def _alone_s(self, each: Implementation, nodes: int) -> float:
        options = self._options
        estimate_s = start_estimate_s(each, nodes) + 3.0 + SETTLE_S + options.idle_s
        if each.has_load_lane:
            estimate_s += options.idle_s + 4.0
        if not each.is_quick:
            return estimate_s + options.slow_updates * (2.0 if each.name == SERF else 1.1)
        stops = options.stops / (options.together if nodes >= 20 else 1)
        return estimate_s + options.updates * 0.6 + options.kills * 2.8 + stops * 13.0

    def _slow_failures_s(self, peers: Sequence[Implementation], nodes: int) -> float:
        options = self._options
        waves = (options.slow_kills + options.slow_stops) / (options.together if nodes >= 20 else 1)
        starts_s = sum(start_estimate_s(each, nodes) for each in peers)
        return starts_s + 3.0 + SETTLE_S + waves * (16.0 if nodes >= 20 else 9.0)

    # -- cells --------------------------------------------------------------------------------------------

    async def _alone(self, each: Implementation, nodes: int) -> None:
        await self._guarded(each, nodes, Loopback(), self._quiet_cells)

    async def _quiet_cells(self, cluster: Cluster) -> None:
        options, each = self._options, cluster.implementation
        self._write(cluster, "join", await measure_join(cluster))
        await trio.sleep(SETTLE_S)
        self._write(cluster, "idle", await measure_idle(cluster, options.idle_s))
        if each.has_load_lane:
            figures = await measure_idle_with_load(cluster, options.idle_s)
            self._write(cluster, "idle_with_load", figures)
        count = options.updates if each.is_quick else options.slow_updates
        self._write(cluster, "updates", await measure_updates(cluster, count))
        if each.is_quick:
            figures = await measure_failures(cluster, Fault.KILLED, options.kills, 1)
            self._write(cluster, Fault.KILLED.value, figures)
            figures = await measure_failures(
                cluster, Fault.STOPPED, options.stops, options.together
            )
            self._write(cluster, Fault.STOPPED.value, figures)

    async def _slow_failures(self, cluster: Cluster) -> None:
        options = self._options
        await cluster.assemble()
        await trio.sleep(SETTLE_S)
        for fault, count in (
            (Fault.KILLED, options.slow_kills),
            (Fault.STOPPED, options.slow_stops),
        ):
            figures = await measure_failures(cluster, fault, count, options.together)
            self._write(cluster, fault.value, figures)

    def _loss(self, share: float) -> Cell:
        async def cell(cluster: Cluster) -> None:
            figures = await measure_loss(cluster, share, self._options.window_s, LOSS_UPDATES)
            self._write(cluster, f"loss{share * 100:.0f}", figures)

        return cell

    async def _burners(self, cluster: Cluster) -> None:
        options = self._options
        figures = await measure_burners(cluster, options.burners, options.window_s)
        self._write(cluster, "burners", figures)

    async def _stalls(self, cluster: Cluster) -> None:
        options = self._options
        figures = await measure_stalls(cluster, options.stalled, options.window_s)
        self._write(cluster, "stalls", figures)

    async def _partitions(self, implementations: Sequence[Implementation], nodes: int) -> None:
        async with trio.open_nursery() as nursery:
            for each in implementations:
                network = Switched(nodes)
                cell = partial(self._partition, network)
                work = partial(self._guarded, each, nodes, network, cell, keep_seed=True)
                nursery.start_soon(work)

    async def _partition(self, network: Switched, cluster: Cluster) -> None:
        self._write(cluster, "partition", await measure_partition(cluster, network))

    # -- running them -------------------------------------------------------------------------------------

    async def _side_by_side(
        self,
        implementations: Sequence[Implementation],
        nodes: int,
        cell: Cell,
    ) -> None:
        async with trio.open_nursery() as nursery:
            for each in implementations:
                nursery.start_soon(self._guarded, each, nodes, lossy(nodes), cell)

    async def _guarded(
        self,
        each: Implementation,
        nodes: int,
        network: Network,
        cell: Cell,
        *,
        keep_seed: bool = False,
    ) -> None:
        """Run a cell on a fresh cluster; a failure is told and written, and costs no other cell."""
        try:
            made = running(
                each, network, nodes, self._scratch, seed=self._options.seed, keep_seed=keep_seed
            )
            async with made as cluster:
                await cell(cluster)
        except* _MeasureError as group:
            for error in leaves(group):
                self.failures += 1
                self._say(f"  {each.name}, N={nodes}: FAILED: {error}")
                row = {"cell": "failed", "implementation": each.name, "nodes": nodes}
                write_row(self._options.out, {**row, "error": str(error)})

    def _write(self, cluster: Cluster, cell: str, figures: Figures) -> None:
        name, nodes = cluster.implementation.name, len(cluster.names)
        head = {"cell": cell, "implementation": name, "nodes": nodes}
        write_row(self._options.out, {**head, "load_average": load_average(), **rounded(figures)})
        self._say(f"  {name}, N={nodes}: {cell}: {digest(figures)}")

    def _say(self, text: str) -> None:
        print(f"[{minutes(time.monotonic() - self._began_s)}] {text}", flush=True)


def start_estimate_s(each: Implementation, nodes: int) -> float:
    """Seconds until so many nodes are up and know each other, on two cores."""
    return 3.0 + nodes * {"meshd": 0.24, "kinship": 0.11}.get(each.name, 0.01)


def listed(implementations: Sequence[Implementation]) -> str:
    """Their names."""
    return " ".join(each.name for each in implementations)


def minutes(seconds: float) -> str:
    """`M:SS`."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"


def digest(figures: Figures) -> str:
    """A row in a few words, for whoever waits."""
    words: list[str] = []
    for key, value in rounded(figures).items():
        if isinstance(value, list):
            middle, most = percentile(value, 0.5), max(value, default=math.nan)
            words.append(f"{key} {middle:g} (max {most:g}, of {len(value)})")
        else:
            words.append(f"{key} {value}")
    return ", ".join(words)


def write_row(out: Path, row: dict[str, object]) -> None:
    """Append a line of JSON."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def leaves(group: BaseExceptionGroup[Exception]) -> Iterator[Exception]:
    """The exceptions in a group of groups."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def available(names: Sequence[str], scratch: Path) -> list[Implementation]:
    """Those that can be run here; the others are named with what provides them."""
    found: list[Implementation] = []
    for name in names:
        try:
            found.append(implementation(name, scratch))
        except MissingError as error:
            print(f"{name} is left out; it needs: {error}", flush=True)
    return found


def main() -> int:
    """Run it; 1 when a cell failed, 2 when nothing can be run."""
    options = options_of()
    reason = why_unavailable(Switch)
    if reason is not None:
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    allow_many_files()
    sweep()
    with tempfile.TemporaryDirectory(prefix="gossip-bench-") as folder:
        implementations = available(options.names, Path(folder))
        versions = {each.name: each.version() for each in implementations}
        head: dict[str, object] = {"cell": "machine", **description(), "versions": versions}
        write_row(
            options.out, {**head, "began": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())}
        )
        if OURS in versions:
            write_row(options.out, {"cell": "memory", "stages": rounded_stages()})
        bench = Bench(options, implementations, Path(folder))
        trio.run(bench.run)
    return 1 if bench.failures else 0


def rounded_stages() -> list[tuple[str, float]]:
    """What the memory of one of our nodes is made of."""
    return [(title, round(resident, 1)) for title, resident in measure_memory()]


if __name__ == "__main__":
    sys.exit(main())
