"""What our own figures ought to be, on this class of machine: two cores, encryption on, the LAN preset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.gossip.figures import Row, percentile


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure of ours ought to be, by size."""

    title: str
    cell: str
    figure: Callable[[Row], float]
    at_most: dict[int, float]
    at_least: float | None = None


def rank(key: str, share: float) -> Callable[[Row], float]:
    """A percentile of the samples under a key."""
    return lambda row: percentile(row[key], share)


def value(key: str) -> Callable[[Row], float]:
    """The figure under a key."""
    return lambda row: float(row[key])


def everywhere(limit: float) -> dict[int, float]:
    """The same at each size that has targets."""
    return dict.fromkeys((10, 30, 100), limit)


TARGETS = (
    Target("all join at once, s", "join", value("metadata_s"), {10: 0.5, 30: 1, 100: 1.5}),
    Target("update, last node p50, ms", "updates", rank("last_ms", 0.5), {10: 10, 30: 20, 100: 70}),
    Target(
        "update, last node p99, ms", "updates", rank("last_ms", 0.99), {10: 40, 30: 60, 100: 120}
    ),
    Target("crash known to all p50, s", "kill", rank("known_s", 0.5), {10: 0.5, 30: 0.5, 100: 1}),
    Target("crash known to all p99, s", "kill", rank("known_s", 0.99), {10: 1, 30: 1, 100: 1.5}),
    Target(
        "silent host suspected by all p50, s",
        "stop",
        rank("suspected_s", 0.5),
        {10: 3, 30: 3.5, 100: 4},
    ),
    Target(
        "silent host suspected by all p99, s",
        "stop",
        rank("suspected_s", 0.99),
        {10: 4, 30: 5, 100: 6},
    ),
    Target(
        "silent host declared dead p50, s", "stop", rank("known_s", 0.5), {10: 8, 30: 9, 100: 10}
    ),
    Target("… never before 6 s", "stop", lambda row: min(row["first_s"]), everywhere(60), 6.0),
    Target("idle B/s a node", "idle", value("bytes_per_s"), {10: 200, 30: 250, 100: 400}),
    Target(
        "idle B/s a node, with load",
        "idle_with_load",
        value("bytes_per_s"),
        {10: 500, 30: 900, 100: 3_000},
    ),
    Target("idle CPU of a node, %", "idle", rank("cpu_percent", 0.5), everywhere(0.5)),
    Target(
        "idle CPU of a node, with load, %",
        "idle_with_load",
        rank("cpu_percent", 0.5),
        everywhere(0.5),
    ),
    Target("RSS of a node, MB", "idle_with_load", rank("resident_mb", 0.5), everywhere(45)),
    Target(
        "heal after a partition, s",
        "partition",
        lambda row: float("inf") if row["heal_s"] is None else row["heal_s"],
        {6: 3, 10: 3, 30: 3, 100: 6},
    ),
)
