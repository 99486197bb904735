"""What is measured of one cluster: joining, idling, updates, crashes and silent hosts.

Each function returns the figures of one row, raw samples among them; `report` makes percentiles of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import trio
from tests.bench.gossip.cluster import JOIN_DEADLINE_S, SEED, Cluster, ClusterError
from tests.bench.gossip.events import (
    JOIN,
    LEAVE,
    READY,
    SET,
    SUSPECT,
    UPDATE,
    Count,
    Heard,
    Pairs,
)
from tests.bench.gossip.machine import bytes_sent, usage

Figure: TypeAlias = float | list[float] | None
Figures: TypeAlias = dict[str, Figure]

UPDATE_DEADLINE_S = 20.0
UPDATE_REST_S = (
    0.2,
    0.8,
)  # between updates, at random, so that they meet every phase of the timers
CRASH_DEADLINE_S = 60.0
CRASH_REST_S = (0.3, 1.3)
BETWEEN_VICTIMS_S = 1.0
LOAD_SETTLES_S = 4.0
TOGETHER_NODES_MIN = 20  # in smaller meshes one failure at a time


class Fault(Enum):
    """How a node fails."""

    KILLED = "kill"  # SIGKILL: the host is up and the process is gone
    STOPPED = "stop"  # SIGSTOP: the host is silent


async def measure_join(cluster: Cluster) -> Figures:
    """Start all, then have all join one seed at once.

    `members_s`: everybody lists everybody. `metadata_s`: everybody holds everybody's metadata, too.
    """
    everybody = list(range(len(cluster.names)))
    began_s = trio.current_time()
    await cluster.start(everybody)
    started_s = trio.current_time() - began_s
    await trio.sleep(1.0)  # what starting costs is not part of joining
    members = Pairs(cluster.names, {JOIN})
    metadata = Pairs(cluster.names, {JOIN, UPDATE}, with_text=True)
    sent = bytes_sent(cluster.pid(SEED))
    with cluster.listening(members, metadata):
        began_ns = time.time_ns()
        cluster.join([number for number in everybody if number != SEED])
        joined = await members.wait(JOIN_DEADLINE_S) and await metadata.wait(JOIN_DEADLINE_S)
    if not joined:
        known = f"{len(members.at_ns)} members and {len(metadata.at_ns)} metadata"
        raise ClusterError(f"joined: {known} of {members.expected} pairs{cluster.said}")
    sent = bytes_sent(cluster.pid(SEED)) - sent
    return {
        "start_s": started_s,
        "members_s": members.last_s(began_ns),
        "metadata_s": metadata.last_s(began_ns),
        "bytes_per_node": sent / len(everybody),
    }


async def measure_idle(cluster: Cluster, seconds: float) -> Figures:
    """Processor, memory and traffic of nodes with nothing to do."""
    pids = [cluster.pid(number) for number in cluster.running]
    before, sent, began_s = [usage(pid) for pid in pids], bytes_sent(pids[0]), trio.current_time()
    await trio.sleep(seconds)
    took_s, sent = trio.current_time() - began_s, bytes_sent(pids[0]) - sent
    after = [usage(pid) for pid in pids]
    return {
        "cpu_percent": [
            (b.cpu_s - a.cpu_s) / took_s * 100 for a, b in zip(before, after, strict=True)
        ],
        "resident_mb": [each.resident_mb for each in after],
        "bytes_per_s": sent / took_s / len(pids),
    }


async def measure_idle_with_load(cluster: Cluster, seconds: float) -> Figures:
    """The same while each node publishes a load that seldom changes."""
    for number in cluster.running:
        cluster.send(number, "load on")
    await trio.sleep(LOAD_SETTLES_S)
    figures = await measure_idle(cluster, seconds)
    for number in cluster.running:
        cluster.send(number, "load off")
    return figures


async def measure_updates(
    cluster: Cluster,
    count: int,
    *,
    until_s: float = math.inf,
    deadline_s: float = UPDATE_DEADLINE_S,
) -> Figures:
    """How long until the others see a change of a node's metadata: each of them, and the last.

    At most `count`, none begun after `until_s`; a node that does not see one within `deadline_s` missed it.
    """
    nodes_ms: list[float] = []
    last_ms: list[float] = []
    missed = written_total = 0
    before_s = _cpu_s(cluster)
    for serial in range(count):
        if trio.current_time() >= until_s:
            break
        writer = cluster.rng.choice(cluster.running)
        others = [number for number in cluster.running if number != writer]
        text = f"u{serial}-{cluster.rng.randrange(10**6)}"
        written = Heard([writer], {SET}, text=text)
        seen = Heard(others, {UPDATE}, cluster.names[writer], text)
        with cluster.listening(written, seen):
            cluster.send(writer, f"meta {text}")
            complete = await seen.wait(deadline_s)
            if not await written.wait(UPDATE_DEADLINE_S):
                raise ClusterError(f"node {writer} does not take an update{cluster.said}")
        written_total += 1
        delays_ms = [s * 1e3 for s in seen.since_s(written.at_ns[writer])]
        nodes_ms += delays_ms
        missed += len(seen.missing)
        if complete:
            last_ms.append(delays_ms[-1])
        await trio.sleep(cluster.rng.uniform(*UPDATE_REST_S))
    return {
        "nodes_ms": nodes_ms,
        "last_ms": last_ms,
        "missed": missed,
        "cpu_ms_per_update": (_cpu_s(cluster) - before_s)
        / max(written_total, 1)
        * 1e3,  # of all nodes
    }


def _cpu_s(cluster: Cluster) -> float:
    return sum(usage(cluster.pid(number)).cpu_s for number in cluster.running)


@dataclass(slots=True)
class _Failures:
    """What became of the nodes that failed."""

    first_s: list[float] = field(default_factory=list[float])
    known_s: list[float] = field(default_factory=list[float])  # to all: one a failure
    suspected_s: list[float] = field(default_factory=list[float])  # by all, or dead
    rejoined_s: list[float] = field(default_factory=list[float])
    missed: int = 0
    false_deaths: int = 0


async def measure_failures(cluster: Cluster, fault: Fault, count: int, together: int) -> Figures:
    """How long until all know of a failed node; afterwards it is started again.

    Args:
        cluster: assembled.
        fault: how they fail.
        count: of failures.
        together: so many fail a second apart, then all are waited for; for the slow ones. In a small
            mesh one at a time.
    """
    together = together if len(cluster.names) >= TOGETHER_NODES_MIN else 1
    found = _Failures()
    while count > 0:
        victims = cluster.rng.sample(
            [number for number in cluster.running if number != SEED], min(together, count)
        )
        count -= len(victims)
        await _fail(cluster, fault, victims, found)
        for victim in victims:
            found.rejoined_s.append(await _restart(cluster, victim))
        await trio.sleep(cluster.rng.uniform(*CRASH_REST_S))
    return {
        "first_s": found.first_s,
        "known_s": found.known_s,
        "suspected_s": found.suspected_s if cluster.implementation.tells_suspicions else None,
        "rejoined_s": found.rejoined_s,
        "missed": found.missed,
        "false_deaths": found.false_deaths,
    }


async def _fail(cluster: Cluster, fault: Fault, victims: Sequence[int], found: _Failures) -> None:
    observers = [number for number in cluster.running if number not in victims]
    names = [cluster.names[victim] for victim in victims]
    dead = [Heard(observers, {LEAVE}, name) for name in names]
    doubted = [Heard(observers, {LEAVE, SUSPECT}, name) for name in names]
    deaths = Count(LEAVE)
    began_ns: list[int] = []
    with cluster.listening(deaths, *dead, *doubted):
        for victim in victims:
            if began_ns:
                await trio.sleep(BETWEEN_VICTIMS_S)
            began_ns.append(time.time_ns())
            if fault is Fault.KILLED:
                cluster.kill(victim)
            else:
                cluster.stop(victim)
        for each in dead:
            await each.wait(CRASH_DEADLINE_S)
    for each, doubt, began in zip(dead, doubted, began_ns, strict=True):
        found.missed += len(each.missing)
        if not each.missing:
            found.first_s.append(each.since_s(began)[0])
            found.known_s.append(each.since_s(began)[-1])
            found.suspected_s.append(doubt.since_s(began)[-1])
    found.false_deaths += sum(
        event.name not in names and event.by in observers for event in deaths.events
    )
    if fault is Fault.STOPPED:
        for victim in victims:
            cluster.kill(victim)


async def _restart(cluster: Cluster, number: int) -> float:
    """Start a failed node again; seconds from its listening until all know it and it knows all.

    Some look for it by themselves, so that it may be back before it is told to join.
    """
    others = cluster.running
    ready = Heard([number], {READY})
    back = Heard(others, {JOIN}, cluster.names[number])
    known = [Heard([number], {JOIN}, cluster.names[other]) for other in others]
    with cluster.listening(ready, back, *known):
        await cluster.start([number])
        cluster.join([number])
        complete = await back.wait(JOIN_DEADLINE_S)
        for each in known:
            complete = await each.wait(JOIN_DEADLINE_S) and complete
    if not complete:
        raise ClusterError(f"node {number} does not get in again after a crash{cluster.said}")
    last_ns = max(max(each.at_ns.values()) for each in (back, *known))
    return (last_ns - ready.at_ns[number]) / 1e9


def rounded(figures: Figures) -> Figures:
    """Four significant digits are more than the figures are good for."""
    return {key: _rounded(value) for key, value in figures.items()}


def _rounded(value: Figure) -> Figure:
    match value:
        case float():
            return _digits(value)
        case list():
            return [_digits(each) for each in value]
        case _:
            return value


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
