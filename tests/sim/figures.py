"""The table of figures and the curve, measured over many worlds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.sim.invariants import Violation
from tests.sim.measures import LARGE, MEASURES, Samples, take
from tests.sim.parallel import spread

from meshd.core.config import GossipConfig, lan

FIGURES = (
    ("join", "join_s", "all joined at once, s"),
    ("update", "update_s", "update, last node, s"),
    ("missed", "missed_s", "missed rumour repaired, s"),
    ("crash", "crash_s", "process crash known to all, s"),
    ("silent", "suspect_s", "silent host suspected by all, s"),
    ("silent", "dead_s", "silent host dead for all, s"),
    ("heal", "heal_s", "healed after a partition, s"),
    ("idle", "idle_bytes", "idle bytes/s/node"),
    ("idle", "load_bytes", "the same with the load lane"),
    ("crash", "crash_bytes", "bytes/node a crash costs"),
    ("loss10", "loss10_suspicions", "10 % loss: accusations/node/hour"),
    ("loss25", "loss25_suspicions", "25 % loss: accusations/node/hour"),
    ("loss10", "loss10_deaths", "10 % loss: deaths told"),
    ("loss25", "loss25_deaths", "25 % loss: deaths told"),
)
"""Measure, figure, label."""

NOT_WHEN_LARGE = ("join",)

PROBE_SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement of one world."""

    measure: str
    nodes: int
    seed: int
    config: GossipConfig | None = None
    key: str = ""


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _do(job: Job) -> Samples | str:
    try:
        return take(job.measure, job.seed, job.nodes, job.config)
    except Violation as violation:
        return str(violation)


def gather(jobs: Sequence[Job], workers: int | None = None) -> dict[tuple[str, int], Samples]:
    """Samples by (key, nodes), in an order that does not depend on how fast each world was.

    Raises:
        Violation: of the first world that broke a rule.
    """
    found = dict(spread(_do, sorted(jobs, key=lambda job: -job.nodes), workers))
    together: dict[tuple[str, int], Samples] = defaultdict(lambda: defaultdict(list))
    for job in jobs:
        result = found[job]
        if isinstance(result, str):
            raise Violation(result)
        for figure, values in result.items():
            together[job.key, job.nodes][figure] += values
    return together


def measured(sizes: Sequence[int], seeds: int, workers: int | None = None) -> dict[int, Samples]:
    """Every figure, by size of the mesh."""
    jobs = [
        Job(measure, nodes, seed)
        for measure in dict.fromkeys(measure for measure, _, _ in FIGURES)
        for nodes in sizes
        if nodes < LARGE or measure not in NOT_WHEN_LARGE
        for seed in range(1 if nodes >= LARGE else seeds)
    ]
    assert all(job.measure in MEASURES for job in jobs)
    return {nodes: samples for (_, nodes), samples in gather(jobs, workers).items()}


def table(found: dict[int, Samples]) -> str:
    """As Markdown; p50 / p99 of the samples."""
    sizes = sorted(found)
    lines = ["| p50 / p99 | " + " | ".join(f"N={size}" for size in sizes) + " |"]
    lines.append("|--" * (len(sizes) + 1) + "|")
    for _, figure, label in FIGURES:
        cells: list[str] = []
        for size in sizes:
            values = found[size].get(figure)
            if not values:
                cells.append("-")
            else:
                digits = 3 if figure.endswith("_s") else 0
                pair = (quantile(values, 0.5), quantile(values, 0.99))
                cells.append(" / ".join(f"{value:.{digits}f}" for value in pair))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of a knob, and what it costs and brings."""

    value: float
    detection_s: float  # p50
    detection_p99_s: float
    false: float


@dataclass(frozen=True, slots=True)
class Curve:
    """What a knob trades: how soon a silent host is noticed against how often others are accused."""

    knob: str
    detection: str
    false: str
    points: tuple[Point, ...]


def _scaled(scale: float) -> GossipConfig:
    base = lan()
    return replace(
        base,
        probe_interval_s=base.probe_interval_s * scale,
        probe_timeout_s=base.probe_timeout_s * scale,
        probe_deadline_s=base.probe_deadline_s * scale,
        death_floor_s=base.death_floor_s * scale,
    )


def _multiplied(multiplier: float) -> GossipConfig:
    return replace(lan(), suspicion_multiplier=multiplier, death_floor_s=0.0)


def curves(nodes: int, seeds: int, workers: int | None = None) -> tuple[Curve, Curve]:
    """Probing faster against accusing wrongly; waiting less against burying the living."""
    probing = {scale: _scaled(scale) for scale in PROBE_SCALES}
    waiting = {multiplier: _multiplied(multiplier) for multiplier in MULTIPLIERS}
    jobs = [
        Job(measure, nodes, seed, config, f"{kind} {value}")
        for kind, settings, measures in (
            ("probing", probing, ("silent", "loss25")),
            ("waiting", waiting, ("silent", "stalls")),
        )
        for value, config in settings.items()
        for measure in measures
        for seed in range(seeds)
    ]
    found = gather(jobs, workers)

    def points(kind: str, values: Sequence[float], seen: str, wrong: str) -> tuple[Point, ...]:
        made: list[Point] = []
        for value in values:
            samples = found[f"{kind} {value}", nodes]
            wrongs = samples[wrong]
            times = samples[seen]
            mean = sum(wrongs) / len(wrongs)
            made.append(Point(value, quantile(times, 0.5), quantile(times, 0.99), mean))
        return tuple(made)

    return (
        Curve(
            "all probe times, multiplied by",
            "silent host suspected by all",
            "accusations per node and hour at 25 % loss",
            points("probing", PROBE_SCALES, "suspect_s", "loss25_suspicions"),
        ),
        Curve(
            "suspicion_multiplier (no death floor)",
            "silent host dead for all",
            "share of 4 s stalls taken for a death",
            points("waiting", MULTIPLIERS, "dead_s", "stalled_dead_share"),
        ),
    )


def curve_table(curve: Curve) -> str:
    """As Markdown."""
    lines = [f"| {curve.knob} | {curve.detection}, p50 / p99 s | {curve.false} |", "|--|--|--|"]
    lines += [
        f"| {point.value:g} | {point.detection_s:.2f} / {point.detection_p99_s:.2f} | {point.false:.3g} |"
        for point in curve.points
    ]
    return "\n".join(lines)
