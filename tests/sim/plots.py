"""The figures as pictures. Needs matplotlib, which nothing else here does."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.sim.figures import Curve, quantile
from tests.sim.measures import Samples

_SIZE_INCHES = (6.4, 4.0)
_TALL_INCHES = (7.6, 4.8)
_DPI = 100


class PlotsMissing(RuntimeError):
    """matplotlib is not installed."""


def _pyplot() -> Any:
    try:
        library: Any = importlib.import_module("matplotlib")
    except ImportError as error:
        raise PlotsMissing("plots need matplotlib: run `make plots`, which installs it") from error
    library.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw(folder: Path, found: dict[int, Samples], curves: Sequence[Curve]) -> list[Path]:
    """Write sim-*.png; returns the paths. With nothing found, only say whether it could be done.

    Raises:
        PlotsMissing: nothing was written.
    """
    pyplot = _pyplot()
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    made = [_spread(pyplot, folder, found), _detection(pyplot, folder, found)]
    made.append(_bytes(pyplot, folder, found))
    if curves:
        made.append(_curves(pyplot, folder, curves))
    return made


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _spread(pyplot: Any, folder: Path, found: dict[int, Samples]) -> Path:
    figure, axes = pyplot.subplots(figsize=_SIZE_INCHES)
    for nodes, samples in sorted(found.items()):
        times = sorted(samples.get("update_each_s", []))
        if times:
            shares = [100 * (rank + 1) / len(times) for rank in range(len(times))]
            axes.step([1000 * one for one in times], shares, where="post", label=f"N = {nodes}")
    axes.set_xlabel("time since the write, ms")
    axes.set_ylabel("nodes that have it, %")
    axes.set_title("How an update spreads (simulated, LAN preset)")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(pyplot, figure, folder / "sim-convergence.png")


def _detection(pyplot: Any, folder: Path, found: dict[int, Samples]) -> Path:
    figure, axes = pyplot.subplots(figsize=_TALL_INCHES)
    sizes = sorted(found)
    for name, label in (
        ("crash_s", "process killed: dead for all"),
        ("suspect_s", "silent host: suspected by all"),
        ("dead_s", "silent host: dead for all"),
    ):
        known = [size for size in sizes if found[size].get(name)]
        middle = [quantile(found[size][name], 0.5) for size in known]
        worst = [quantile(found[size][name], 0.99) for size in known]
        line = axes.plot(known, middle, marker="o", label=f"{label} (p50)")[0]
        axes.plot(known, worst, marker="x", linestyle="--", color=line.get_color(), label="p99")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("nodes")
    axes.set_ylabel("time until the last node knows, s")
    axes.set_title("How soon a failure is known (simulated, LAN preset)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return _save(pyplot, figure, folder / "sim-detection.png")


def _bytes(pyplot: Any, folder: Path, found: dict[int, Samples]) -> Path:
    figure, axes = pyplot.subplots(figsize=_SIZE_INCHES)
    sizes = sorted(found)
    for name, label in (("idle_bytes", "membership only"), ("load_bytes", "with the load lane")):
        known = [size for size in sizes if found[size].get(name)]
        middle = [quantile(found[size][name], 0.5) for size in known]
        axes.plot(known, middle, marker="o", label=label)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("nodes")
    axes.set_ylabel("bytes sent per second and node")
    axes.set_title("What an idle mesh sends, headers included (simulated)")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(pyplot, figure, folder / "sim-bytes.png")


def _curves(pyplot: Any, folder: Path, curves: Sequence[Curve]) -> Path:
    figure, panels = pyplot.subplots(1, len(curves), figsize=(9.6, 4.2))
    for axes, curve in zip(panels, curves, strict=True):
        times = [point.detection_s for point in curve.points]
        wrong = [point.false for point in curve.points]
        axes.plot(times, wrong, marker="o")
        for point in curve.points:
            at = (point.detection_s, point.false)
            axes.annotate(f"{point.value:g}", at, textcoords="offset points", xytext=(6, 4))
        axes.set_xlabel(f"{curve.detection}, p50 s")
        axes.set_ylabel(curve.false)
        axes.set_title(f"varied: {curve.knob}", fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    return _save(pyplot, figure, folder / "sim-suspicion.png")
