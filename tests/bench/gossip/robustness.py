"""Whether nodes that live are taken for dead: under loss, load and stalls; and whether a split mesh heals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

import trio
from tests.bench.gossip.cluster import SEED, Cluster, ClusterError
from tests.bench.gossip.events import JOIN, LEAVE, SUSPECT, Count, Views
from tests.bench.gossip.measure import Figures, measure_updates
from tests.bench.gossip.networks import Switched

SETTLE_S = 5.0
UPDATE_DEADLINE_S = 5.0  # what comes later was repaired, not told
STALL_ON_S, STALL_OFF_S = 4.0, 2.0
STALL_TAIL_S = 15.0  # a death that a stall began may come this much later
SPLIT_S = (
    45.0  # at least; then until each half holds the other for dead, and none gossips to the dead
)
SPLIT_DEADLINE_S = 60.0
HEAL_DEADLINE_S = 60.0
JOIN_DEADLINE_S = 60.0


async def measure_loss(cluster: Cluster, share: float, seconds: float, updates: int) -> Figures:
    """So long with this share of all packets lost; some updates meanwhile."""
    await cluster.assemble()
    await trio.sleep(SETTLE_S)
    cluster.network.lose(share)
    began_s = trio.current_time()
    with _watching(cluster) as seen:
        figures = await measure_updates(
            cluster, updates, until_s=began_s + seconds, deadline_s=UPDATE_DEADLINE_S
        )
        await trio.sleep_until(began_s + seconds)
    return {**figures, **seen.figures()}


async def measure_burners(cluster: Cluster, burners: int, seconds: float) -> Figures:
    """So long with as many processes that do nothing but compute."""
    await cluster.assemble()
    await trio.sleep(SETTLE_S)
    with _burning(burners), _watching(cluster) as seen:
        await trio.sleep(seconds)
    return seen.figures()


async def measure_stalls(cluster: Cluster, stalled: int, seconds: float) -> Figures:
    """So long with some nodes stopped for four seconds out of six: as a swapping or throttled board is."""
    await cluster.assemble()
    await trio.sleep(SETTLE_S)
    victims = cluster.rng.sample([number for number in cluster.running if number != SEED], stalled)
    names = {cluster.names[victim] for victim in victims}
    until_s = trio.current_time() + seconds
    with _watching(cluster) as seen:
        while trio.current_time() < until_s:
            for victim in victims:
                cluster.stop(victim)
            await trio.sleep(STALL_ON_S)
            for victim in victims:
                cluster.resume(victim)
            await trio.sleep(STALL_OFF_S)
        await trio.sleep(STALL_TAIL_S)
    about_stalled = sum(event.name in names for event in seen.deaths.events)
    return {**seen.figures(), "deaths_of_stalled": about_stalled}


async def measure_partition(cluster: Cluster, network: Switched) -> Figures:
    """Cut the mesh into two halves, wait, heal it; seconds until everybody knows everybody again."""
    count = len(cluster.names)
    sides = [range(count // 2), range(count // 2, count)]
    views = Views(cluster.names)
    with cluster.listening(views):
        await cluster.start(range(count))
        cluster.join([number for number in range(count) if number != SEED])
        if not await views.wait(JOIN_DEADLINE_S):
            raise ClusterError(f"not everybody joined{cluster.said}")
        await trio.sleep(SETTLE_S)
        views.expect(lambda: views.is_split(sides))
        began_s = trio.current_time()
        network.part(sides)
        split = await views.wait(SPLIT_DEADLINE_S)
        split_s = trio.current_time() - began_s
        await trio.sleep_until(began_s + SPLIT_S)
        views.expect(views.is_whole)
        began_s = trio.current_time()
        network.heal()
        healed = await views.wait(HEAL_DEADLINE_S)
        heal_s = trio.current_time() - began_s
    return {
        "split_seen_s": split_s if split else None,
        "heal_s": heal_s if healed else None,
        "waited_s": HEAL_DEADLINE_S,
    }


class _Watch:
    """What nodes that live were held for."""

    def __init__(self) -> None:
        self.deaths, self.suspicions, self.returns = Count(LEAVE), Count(SUSPECT), Count(JOIN)

    def figures(self) -> Figures:
        return {
            "false_deaths": len(self.deaths.events),
            "falsely_dead": len({event.name for event in self.deaths.events}),
            "suspicions": len(self.suspicions.events),
            "returns": len(self.returns.events),
        }


@contextmanager
def _watching(cluster: Cluster) -> Generator[_Watch]:
    watch = _Watch()
    with cluster.listening(watch.deaths, watch.suspicions, watch.returns):
        yield watch


@contextmanager
def _burning(count: int) -> Generator[None]:
    # A burner ends with the bench, however that ends.
    program = "import os; p = os.getppid()\nwhile os.getppid() == p: pass"
    command = [sys.executable, "-c", program]
    burners = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.send_signal(signal.SIGKILL)
        for burner in burners:
            burner.wait()
