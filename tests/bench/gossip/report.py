"""Tables and plots of what `tests.bench.gossip.run` measured.

    python -m tests.bench.gossip.report results.jsonl [--plots docs/figures]

Prints markdown: the implementations side by side, ours beside its targets, robustness, what a node costs.
p50 and p99 are nearest ranks of all samples; with fewer than a hundred samples p99 is the greatest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.gossip.figures import NAMES, NOTHING, OURS, Row, percentile, shown
from tests.bench.gossip.targets import TARGETS, Target


class Results:
    """Rows of one run; of rows for the same cell, implementation and size the last counts.

    Args:
        file: by `run`.
    """

    def __init__(self, file: Path) -> None:
        self.machine: Row = {}
        self.memory: list[tuple[str, float]] = []
        self.failed: list[Row] = []
        self._rows: dict[tuple[str, str, int], Row] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            row: Row = json.loads(line)
            match row["cell"]:
                case "machine":
                    self.machine = row
                case "memory":
                    self.memory = row["stages"]
                case "failed":
                    self.failed.append(row)
                case cell:
                    self._rows[cell, row["implementation"], row["nodes"]] = row

    def row(self, cell: str, implementation: str, nodes: int) -> Row | None:
        """One row, None if it was not measured."""
        return self._rows.get((cell, implementation, nodes))

    def rows(self, cell: str) -> Iterator[Row]:
        """All of a cell, by size, then in the order of the implementations."""
        found = [row for (of, _, _), row in self._rows.items() if of == cell]
        yield from sorted(found, key=lambda row: (row["nodes"], NAMES.index(row["implementation"])))

    def sizes(self, cell: str = "join") -> list[int]:
        """Sizes that a cell was measured at."""
        return sorted({nodes for of, _, nodes in self._rows if of == cell})

    def implementations(self) -> list[str]:
        """Those that were measured, ours first."""
        return [name for name in NAMES if any(name == of for _, of, _ in self._rows)]


def pair(row: Row | None, key: str, *shares: float) -> str:
    """`p50 / p99` of samples; a dash where there are none."""
    samples = None if row is None else row.get(key)
    if not samples:
        return NOTHING
    return " / ".join(shown(percentile(samples, share)) for share in shares)


def single(row: Row | None, key: str) -> str:
    """One figure, or a dash."""
    value = None if row is None else row.get(key)
    return NOTHING if value is None else shown(value)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    rows = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([rows[0], f"|{'---|' * len(head)}", *rows[1:]])


def side_by_side(results: Results) -> str:
    """The implementations at each size."""
    head = [
        "N",
        "",
        "all joined s",
        "update, last node p50 / p99 ms",
        "update, a node p50 / p99 ms",
        "SIGKILL known to all p50 / p99 s",
        "SIGSTOP suspected by all p50 / p99 s",
        "SIGSTOP dead for all p50 / p99 s",
        "idle CPU %",
        "RSS MB",
        "idle B/s a node",
        "with load B/s",
    ]
    lines: list[list[str]] = []
    for join in results.rows("join"):
        name, nodes = join["implementation"], join["nodes"]
        idle, loaded = (results.row(cell, name, nodes) for cell in ("idle", "idle_with_load"))
        updates, kill, stop = (
            results.row(cell, name, nodes) for cell in ("updates", "kill", "stop")
        )
        lines.append(
            [
                str(nodes),
                f"**{name}**" if name == OURS else name,
                single(join, "metadata_s"),
                pair(updates, "last_ms", 0.5, 0.99),
                pair(updates, "nodes_ms", 0.5, 0.99),
                pair(kill, "known_s", 0.5, 0.99),
                pair(stop, "suspected_s", 0.5, 0.99),
                pair(stop, "known_s", 0.5, 0.99),
                pair(idle, "cpu_percent", 0.5),
                pair(idle, "resident_mb", 0.5),
                single(idle, "bytes_per_s"),
                single(loaded, "bytes_per_s"),
            ]
        )
    return table(head, lines)


def beside_targets(results: Results, name: str = OURS) -> str:
    """Figure, target, and whether it is met; a size without a target shows the figure only."""
    sizes = sorted({*results.sizes(), *results.sizes("partition")})
    lines: list[list[str]] = []
    for target in TARGETS:
        line = [target.title]
        for nodes in sizes:
            row = results.row(target.cell, name, nodes)
            line.append(NOTHING if row is None else verdict(target, target.figure(row), nodes))
        lines.append(line)
    return table(["", *(f"N={nodes}" for nodes in sizes)], lines)


def verdict(target: Target, figure: float, nodes: int) -> str:
    """A cell of the table of targets."""
    if target.at_least is not None:
        met = figure >= target.at_least
        return f"{shown(figure)} (≥ {shown(target.at_least)}{'' if met else ', **missed**'})"
    limit = target.at_most.get(nodes)
    if limit is None:
        return shown(figure)
    return f"{shown(figure)} (≤ {shown(limit)}{'' if figure <= limit else ', **missed**'})"


ROBUSTNESS = (
    ("loss10", "10 % loss"),
    ("loss25", "25 % loss"),
    ("burners", "burners"),
    ("stalls", "stalls"),
)


def robustness(results: Results) -> str:
    """False deaths: how many times a node said it of one that lived, and of how many nodes."""
    names = results.implementations()
    lines: list[list[str]] = []
    for cell, title in ROBUSTNESS:
        for nodes in results.sizes(cell):
            rows = [results.row(cell, name, nodes) for name in names]
            lines.append([f"{title}, N={nodes}", *(false_deaths(row) for row in rows)])
            if cell.startswith("loss"):
                lines.append(
                    [
                        "… update, last node p50 / p99 ms (nodes missed)",
                        *(
                            f"{pair(row, 'last_ms', 0.5, 0.99)} ({single(row, 'missed')})"
                            for row in rows
                        ),
                    ]
                )
    for nodes in results.sizes("partition"):
        rows = [results.row("partition", name, nodes) for name in names]
        lines.append([f"partition healed, N={nodes}, s", *(healed(row) for row in rows)])
    return table(["false deaths", *names], lines)


def false_deaths(row: Row | None) -> str:
    """`58 of 4 nodes`, or 0; with what came close."""
    if row is None:
        return NOTHING
    count = row["false_deaths"]
    text = f"{count} of {row['falsely_dead']} nodes" if count else "0"
    if row["suspicions"]:
        text += f" ({row['suspicions']} suspicions)"
    if row["returns"] > count:  # a library that tells changes together never said that it was gone
        text += f" ({row['returns']} returns)"
    return text


def healed(row: Row | None) -> str:
    """Seconds, or that it did not."""
    if row is None:
        return NOTHING
    heal_s = row["heal_s"]
    return f"not in {shown(row['waited_s'])}" if heal_s is None else shown(heal_s)


def memory(results: Results) -> str:
    """What the resident memory of one of ours is made of."""
    lines: list[list[str]] = []
    before = 0.0
    for title, resident in results.memory:
        lines.append([title, shown(resident), f"+{shown(resident - before)}"])
        before = resident
    return table(["imported", "RSS MB", ""], lines)


def about(results: Results) -> str:
    """Where and when."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['began']}, {machine['cores']} cores ({machine['processor']}), "
        f"{machine['memory_gb']} GB, Linux {machine['kernel']}, Python {machine['python']}, "
        f"load average {machine['load_average']} before; {versions}."
    )


def report(results: Results) -> str:
    """Everything, as markdown."""
    parts = [
        about(results),
        "### Side by side",
        side_by_side(results),
        "### Ours beside its targets",
        beside_targets(results),
        "### Robustness",
        robustness(results),
        "### Memory of a node",
        memory(results),
    ]
    failed = [
        f"Failed: {r['implementation']}, N={r['nodes']}: {r['error']}" for r in results.failed
    ]
    return "\n\n".join(parts + failed)


def main() -> None:
    """Print the tables; write the plots where asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plots", type=Path, help="folder; needs matplotlib")
    options = parser.parse_args()
    results = Results(options.results)
    print(report(results))
    if options.plots is not None:
        from tests.bench.gossip.plots import write_plots

        for file in write_plots(results, options.plots):
            print(f"\nwrote {file} ({file.stat().st_size // 1024} KB)")


if __name__ == "__main__":
    main()
