"""`python -m tests.sim.run`: replay one seed, soak many, or print the table of figures.

python -m tests.sim.run --seed 7 --scenario chaos          one run
python -m tests.sim.run --seed 7 --scenario chaos --trace  the same, every event printed
python -m tests.sim.run --seeds 100                        every scenario with seeds 0..99
python -m tests.sim.run --figures                          the table, N = 3, 10, 30
"""

from __future__ import annotations

import argparse
import sys

from tests.sim.invariants import Violation
from tests.sim.scenarios import SCENARIOS, play

FIGURES = (
    ("join", "join_s", "all joined, s"),
    ("update", "update_s", "update, last node, s"),
    ("process_crash", "crash_known_s", "process crash known to all, s"),
    ("silent_host", "silent_suspect_s", "silent host suspected by all, s"),
    ("silent_host", "silent_dead_s", "silent host dead for all, s"),
    ("partition", "healed_s", "partition healed, s"),
)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _figures(seeds: int) -> None:
    print("| figure (p50 / p99) | " + " | ".join(f"N={n}" for n in (3, 10, 30)) + " |")
    print("|--|--|--|--|")
    for name, figure, label in FIGURES:
        cells: list[str] = []
        for nodes in (3, 10, 30):
            found = [play(name, seed, nodes).figures[figure] for seed in range(seeds)]
            cells.append(f"{_quantile(found, 0.5):.3f} / {_quantile(found, 0.99):.3f}")
        print(f"| {label} | " + " | ".join(cells) + " |")


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; 1 when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first, or only, seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), help="default: all of them")
    parser.add_argument("--nodes", type=int, default=6, help="size of the mesh")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--figures", action="store_true", help="print the table of figures")
    options = parser.parse_args(arguments)
    if options.figures:
        _figures(max(5, options.seeds))
        return 0
    names = [options.scenario] if options.scenario else sorted(SCENARIOS)
    failures = 0
    for name in names:
        for seed in range(options.seed, options.seed + options.seeds):
            try:
                outcome = play(name, seed, options.nodes, trace=options.trace)
            except Violation as violation:
                failures += 1
                print(f"FAILED {name}: {violation}", file=sys.stderr)
                continue
            if options.trace:
                print("\n".join(outcome.world.trace_lines or []))
            if options.seeds == 1:
                figures = " ".join(f"{key}={value:.3f}" for key, value in outcome.figures.items())
                print(f"{name} seed {seed}: {figures} {outcome.world.fingerprint()}")
    if options.seeds > 1:
        print(f"{len(names) * options.seeds} runs, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
