"""`python -m tests.sim.run`: replay one seed, soak many, or measure.

python -m tests.sim.run --seed 7 --scenario chaos          one run
python -m tests.sim.run --seed 7 --scenario chaos --trace  the same, every event printed
python -m tests.sim.run --seeds 100                        every scenario with seeds 0..99, on all cores
python -m tests.sim.run --seeds 100 --soak                 the same, with a summary of each scenario
python -m tests.sim.run --figures                          the table, N = 10, 30, 100
python -m tests.sim.run --figures --nodes-list 1000        the same for other sizes
python -m tests.sim.run --curve                            detection against false suspicions
python -m tests.sim.run --plots docs/figures               table, curve and pictures
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.sim.figures import curve_table, curves, measured, quantile, table
from tests.sim.invariants import Violation
from tests.sim.parallel import spread
from tests.sim.plots import PlotsMissing, draw
from tests.sim.scenarios import SCENARIOS, play

FIGURE_NODES = "10,30,100"
PLOT_NODES = "10,30,100,1000"
CURVE_NODES = 30
FIGURE_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one scenario."""

    name: str
    seed: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Done:
    """What became of it."""

    figures: dict[str, float]
    fingerprint: str
    failure: str | None
    took_s: float


def _run(job: Job) -> Done:
    began_s = time.monotonic()
    try:
        outcome = play(job.name, job.seed, job.nodes)
    except Violation as violation:
        return Done({}, "", str(violation), time.monotonic() - began_s)
    return Done(outcome.figures, outcome.world.fingerprint(), None, time.monotonic() - began_s)


def _replay(job: Job, *, trace: bool) -> int:
    try:
        outcome = play(job.name, job.seed, job.nodes, trace=trace)
    except Violation as violation:
        print(f"FAILED {job.name}: {violation}", file=sys.stderr)
        return 1
    if trace:
        print("\n".join(outcome.world.trace_lines or []))
    figures = " ".join(f"{key}={value:.3f}" for key, value in outcome.figures.items())
    print(f"{job.name} seed {job.seed}: {figures} {outcome.world.fingerprint()}")
    return 0


def _many(jobs: list[Job], workers: int | None, *, soak: bool) -> int:
    failures: list[tuple[Job, str]] = []
    by_name: dict[str, list[Done]] = defaultdict(list)
    for job, done in spread(_run, jobs, workers):
        by_name[job.name].append(done)
        if done.failure is not None:
            failures.append((job, done.failure))
            print(f"FAILED {job.name}: {done.failure}", file=sys.stderr)
    if soak:
        for name in sorted(by_name):
            runs = by_name[name]
            failed = sum(done.failure is not None for done in runs)
            figures = " ".join(
                f"{key} {quantile([d.figures[key] for d in runs if key in d.figures], 0.5):.3g}"
                f"/{max(d.figures[key] for d in runs if key in d.figures):.3g}"
                for key in next((done.figures for done in runs if done.figures), {})
            )
            took_s = sum(done.took_s for done in runs)
            print(f"{name}: {len(runs)} runs, {failed} failed, {took_s:.0f} s; p50/max: {figures}")
    print(f"{len(jobs)} runs, {len(failures)} failed")
    return 1 if failures else 0


def _measure(options: argparse.Namespace) -> int:
    seeds, workers = options.seeds or FIGURE_SEEDS, options.workers
    sizes = options.nodes_list or (PLOT_NODES if options.plots else FIGURE_NODES)
    try:
        if options.plots:
            draw(Path(options.plots), {}, ())  # before hours are spent
        found = (
            measured([int(size) for size in sizes.split(",")], seeds, workers)
            if options.figures or options.plots
            else {}
        )
        if found:
            print(table(found))
        lines = curves(CURVE_NODES, seeds, workers) if options.curve or options.plots else ()
        for curve in lines:
            print("\n" + curve_table(curve))
        if options.plots:
            for path in draw(Path(options.plots), found, lines):
                print(path)
    except (Violation, PlotsMissing) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="the first, or only, seed")
    parser.add_argument("--seeds", type=int, help="how many; default: 1, for figures 5")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), help="default: all of them")
    parser.add_argument("--nodes", type=int, default=6, help="size of the mesh")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--soak", action="store_true", help="a summary of each scenario")
    parser.add_argument("--figures", action="store_true", help="print the table of figures")
    parser.add_argument("--nodes-list", help="sizes for the figures, as 10,30,100")
    parser.add_argument("--curve", action="store_true", help="print the curve of suspicion")
    parser.add_argument("--plots", metavar="FOLDER", help="write pictures there")
    parser.add_argument("--workers", type=int, help="processes; default: all cores")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; 1 when something was violated."""
    options = _parser().parse_args(arguments)
    if options.figures or options.curve or options.plots:
        return _measure(options)
    names = [options.scenario] if options.scenario else sorted(SCENARIOS)
    many = options.seeds or 1
    seeds = range(options.seed, options.seed + many)
    jobs = [Job(name, seed, options.nodes) for seed in seeds for name in names]
    if many == 1:
        return max(_replay(job, trace=options.trace) for job in jobs)
    return _many(jobs, options.workers, soak=options.soak)


if __name__ == "__main__":
    sys.exit(main())
