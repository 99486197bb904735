"""The bench's figures as pictures; needs matplotlib, which nothing else here does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.gossip.figures import KINSHIP, MEMBERLIST, OURS, SERF, Row, percentile
from tests.bench.gossip.report import Results

COLOURS = {OURS: "#0b6e4f", KINSHIP: "#d1495b", MEMBERLIST: "#edae49", SERF: "#66799b"}
INCHES = (6.4, 3.6)
DOTS_PER_INCH = 110


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture: a figure by size, a line an implementation."""

    file: str
    title: str
    axis: str
    cell: str
    middle: Callable[[Row], float]
    high: Callable[[Row], float] | None = None  # drawn as the end of a whisker
    logarithmic: bool = True


PLOTS = (
    Plot(
        "gossip-update.png",
        "An update reaches the last node (p50, whisker to p99)",
        "ms",
        "updates",
        lambda row: percentile(row["last_ms"], 0.5),
        lambda row: percentile(row["last_ms"], 0.99),
    ),
    Plot(
        "gossip-crash.png",
        "A crashed process is known to all (p50, whisker to p99)",
        "s",
        "kill",
        lambda row: percentile(row["known_s"], 0.5),
        lambda row: percentile(row["known_s"], 0.99),
    ),
    Plot(
        "gossip-join.png",
        "All nodes join one at once, and hold each other's metadata",
        "s",
        "join",
        lambda row: row["metadata_s"],
    ),
    Plot(
        "gossip-idle.png",
        "Traffic of an idle node",
        "B/s",
        "idle",
        lambda row: row["bytes_per_s"],
        logarithmic=False,
    ),
)


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Write the pictures; which."""
    importlib.import_module("matplotlib").use("Agg")  # a screen is not needed
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / plot.file for plot in PLOTS if results.sizes(plot.cell)]
    for plot in PLOTS:
        if results.sizes(plot.cell):
            _draw(plot, results, folder / plot.file)
    if any(True for _ in results.rows("stop")):
        files.append(folder / "gossip-silence.png")
        _draw_silence(results, files[-1])
    return files


def _axes(title: str, axis: str) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(axis)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    # Without the name of the library, the same figures give the same file.
    figure.savefig(file, metadata={"Software": None})
    _pyplot().close(figure)


def _pyplot() -> Any:
    return importlib.import_module("matplotlib.pyplot")


def _draw(plot: Plot, results: Results, file: Path) -> None:
    figure, axes = _axes(plot.title, plot.axis)
    names = results.implementations()
    for index, name in enumerate(names):
        rows = [row for row in results.rows(plot.cell) if row["implementation"] == name]
        points = [(row["nodes"], plot.middle(row), row) for row in rows]
        if not points:
            continue
        shift = 1 + 0.02 * (index - len(names) / 2)  # so that whiskers do not hide each other
        sizes = [nodes * shift for nodes, _, _ in points]
        middles = [middle for _, middle, _ in points]
        whiskers = None
        if plot.high is not None:
            whiskers = [[0.0] * len(points), [plot.high(row) - m for _, m, row in points]]
        style = {"color": COLOURS[name], "label": name, "capsize": 3}
        axes.errorbar(sizes, middles, yerr=whiskers, marker="o", markersize=4, **style)
    axes.set_xscale("log")
    if plot.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    _label_sizes(axes, results.sizes(plot.cell))
    axes.legend(frameon=False, fontsize=8)
    _save(figure, file)


def _label_sizes(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xlabel("nodes")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()


def _draw_silence(results: Results, file: Path) -> None:
    """Bars: from when on nobody routes to a silent host, and when it is declared dead."""
    figure, axes = _axes("A silent host: no longer routed to, and dead (p50, whole mesh)", "s")
    names, sizes = results.implementations(), results.sizes("stop")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        for place, nodes in enumerate(sizes):
            row = results.row("stop", name, nodes)
            if row is None or not row["known_s"]:
                continue
            dead_s = percentile(row["known_s"], 0.5)
            suspected_s = percentile(row["suspected_s"] or row["known_s"], 0.5)
            at = place + (index - (len(names) - 1) / 2) * width
            label = name if place == 0 else None
            axes.bar(at, dead_s, width * 0.9, color=COLOURS[name], alpha=0.35)
            axes.bar(at, suspected_s, width * 0.9, color=COLOURS[name], label=label)
    axes.margins(y=0.2)  # room for the legend
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("nodes (dark: still routed to; pale: suspected, not yet dead)")
    axes.legend(frameon=False, fontsize=8, ncols=len(names))
    _save(figure, file)
