"""Counters and gauges of a node as metric families, for `GET /metrics`.

Names are `meshd_<area>_<thing>_<unit>[_total]`. Labels come from closed sets (states, drop reasons, names of
the core's own counters): nothing that a peer says becomes a label, so a peer cannot make series.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from meshd_plugins.api import Value

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")
GOSSIP_GAUGES: Final = frozenset({"members_live", "local_health", "timers", "rumours_queued"})
_GAUGES: Final = frozenset({"connections"})


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its help, its kind, and a value for each combination of labels."""

    name: str
    help: str
    is_counter: bool
    samples: Sequence[tuple[Mapping[str, str], float]]


def families(status: Mapping[str, Value]) -> tuple[Family, ...]:
    """The metrics of a node, from what `reporting.status_value` says of it."""
    return tuple(family for family in _families(status) if family.samples)


def _families(status: Mapping[str, Value]) -> Iterator[Family]:
    counters = _table(status.get("counters"))
    gossip, datagrams = _counts(counters.get("gossip")), _counts(counters.get("datagrams"))
    yield _one("meshd_process_up_seconds", "Seconds since the start.", status.get("uptime_s"))
    yield Family(
        "meshd_members",
        "Members of the mesh by state, this node included.",
        is_counter=False,
        samples=_labelled("state", _counts(status.get("members"))),
    )
    yield Family(
        "meshd_health_findings",
        "What is wrong, by severity, as far as it is known without asking around.",
        is_counter=False,
        samples=_labelled("severity", _counts(status.get("health"))),
    )
    ages = _counts(status.get("load_ages_s")).values()
    yield Family(
        "meshd_loads_known",
        "Live peers whose load is known.",
        is_counter=False,
        samples=[({}, float(len(ages)))],
    )
    yield _one("meshd_loads_age_max_seconds", "Age of the oldest of them.", max(ages, default=None))
    yield Family(
        "meshd_gossip_events_total",
        "What the node core did or met, by its own names.",
        is_counter=True,
        samples=_labelled("event", {k: v for k, v in gossip.items() if k not in GOSSIP_GAUGES}),
    )
    for name in sorted(GOSSIP_GAUGES & gossip.keys()):
        yield _one(f"meshd_gossip_{name}", f"{name.replace('_', ' ').capitalize()}.", gossip[name])
    yield from _datagrams(datagrams, _counts(counters.get("dropped")))
    yield Family(
        "meshd_offences_total",
        "Misbehaviour of peers by kind; `meshd status` has the peers.",
        is_counter=True,
        samples=_labelled("kind", _summed(_table(status.get("offences")))),
    )
    prefixes = _table(counters.get("prefixes"))
    yield Family(
        "meshd_prefixes_fetches_total",
        "KV states of prefixes that were fetched from peers, or why one was computed instead.",
        is_counter=True,
        samples=_labelled("outcome", _counts(prefixes.get("fetches"))),
    )
    yield from _area("prefixes", _counts(prefixes))
    for area in ("streams", "routing", "storage", "discovery", "plugins", "audit"):
        yield from _area(area, _counts(counters.get(area)))


def _datagrams(counts: Mapping[str, float], dropped: Mapping[str, float]) -> Iterator[Family]:
    ways = ("sent", "received")
    yield Family(
        "meshd_datagrams_total",
        "Datagrams by direction.",
        is_counter=True,
        samples=[({"direction": way}, counts.get(f"datagrams_{way}", 0.0)) for way in ways],
    )
    yield Family(
        "meshd_datagrams_bytes_total",
        "Bytes of datagrams by direction, sealing included.",
        is_counter=True,
        samples=[({"direction": way}, counts.get(f"bytes_{way}", 0.0)) for way in ways],
    )
    rest = {
        name: count
        for name, count in counts.items()
        if not name.startswith(("datagrams_", "bytes_"))
    }
    yield Family(
        "meshd_datagrams_troubles_total",
        "What went wrong between the node core and its sockets, by kind.",
        is_counter=True,
        samples=_labelled("kind", rest),
    )
    reasons = {k: count for k, count in dropped.items() if not k.startswith("opened")}
    yield Family(
        "meshd_datagrams_dropped_total",
        "Datagrams that were not opened, by reason.",
        is_counter=True,
        samples=_labelled("reason", reasons),
    )


def _area(area: str, counts: Mapping[str, float]) -> Iterator[Family]:
    for key, count in sorted(counts.items()):
        name = key
        if not _NAME.fullmatch(name):
            continue
        words = name.replace("_", " ")
        is_counter = name not in _GAUGES and not name.startswith("plugins_")
        name = name.removeprefix("plugins_")
        if name.startswith("bytes_"):  # units last
            name = f"{name.removeprefix('bytes_')}_bytes"
        full = f"meshd_{area}_{name}"
        yield Family(
            f"{full}_total" if is_counter else full,
            f"{area.capitalize()}: {words}.",
            is_counter,
            [({}, count)],
        )


def _one(name: str, help_text: str, value: Value) -> Family:
    return Family(name, help_text, is_counter=False, samples=_figure(value))


def _figure(value: Value) -> list[tuple[Mapping[str, str], float]]:
    return [({}, float(value))] if isinstance(value, int | float) else []


def _labelled(label: str, counts: Mapping[str, float]) -> list[tuple[Mapping[str, str], float]]:
    return [({label: name}, count) for name, count in sorted(counts.items())]


def _summed(by_node: Mapping[str, Value]) -> Mapping[str, float]:
    total: dict[str, float] = {}
    for kinds in by_node.values():
        for kind, count in _counts(kinds).items():
            total[kind] = total.get(kind, 0.0) + count
    return total


def _counts(value: Value) -> dict[str, float]:
    """The figures of a mapping, by name; what is no figure is left out."""
    return {
        name: float(cast("float", figure))
        for name, figure in _table(value).items()
        if _is_figure(figure)
    }


def _is_figure(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(value: Value) -> Mapping[str, Value]:
    return value if isinstance(value, Mapping) else {}
