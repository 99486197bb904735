"""Clocks that drift, leap or go back, and machines that sleep."""

from __future__ import annotations

from tests.sim.plays import known_to_all, no_deaths, no_false_deaths, scenario, started
from tests.sim.world import World

from meshd.core.membership import MemberState

_DRIFT = 0.05  # far worse than any crystal (0.0001), as a virtual machine's clock may be


@scenario
def clock_drift(world: World, nodes: int) -> dict[str, float]:
    """Every clock goes at a rate of its own, up to a twentieth off, and some datagrams are lost."""
    for _ in range(nodes):
        node = world.machine()
        world.drift(node.number, world.rng.uniform(1 - _DRIFT, 1 + _DRIFT))
        world.boot(node.number)
    world.settle(10.0)
    world.network.loss = 0.05
    for _ in range(30):
        world.write(world.rng.randrange(nodes), "cap/x", world.rng.randrange(1000))
        world.run(world.rng.uniform(0.5, 1.5))
    world.heal()
    took_s = world.settle(10.0)
    no_deaths(world, "though only clocks drifted")
    return {"settled_s": took_s}


@scenario
def clock_jump(world: World, nodes: int) -> dict[str, float]:
    """Monotonic clocks leap ahead by up to a minute; and a wall clock is set back before a restart."""
    started(world, nodes)
    for _ in range(15):
        world.run(world.rng.uniform(0.2, 2.0))
        world.leap(world.rng.randrange(nodes), world.rng.choice((0.6, 1.0, 5.0, 20.0, 60.0)))
    world.run(10.0)
    no_deaths(world, "though clocks leapt and nothing else happened")
    number = world.rng.randrange(nodes)
    node = world.nodes[number]
    before = world.store(number).epoch
    world.crash(number)
    node.wall_off_s = -3600.0
    world.run(world.rng.uniform(0.1, 3.0))
    world.boot(number, seeds=range(nodes))
    took_s = world.settle(20.0)
    assert world.store(number).epoch > before, "it has to rise above its former life"
    return {"rejoined_s": took_s}


@scenario
def sleeper(world: World, nodes: int) -> dict[str, float]:
    """A machine sleeps for a minute, with or without its clock; when it wakes it accuses nobody."""
    started(world, nodes)
    number = world.rng.randrange(nodes)
    sleeping = world.id(number)
    world.run(world.rng.uniform(0.0, 3.0))
    world.sleep(number, 60.0, clock_stops=world.rng.random() < 0.5)
    if nodes > 1:
        gone = known_to_all(world, sleeping, MemberState.DEAD)
        world.run_until(gone, 45.0, "the sleeper is dead for all", 0.05)
    awake_s = world.now_s
    world.run_until(
        lambda: world.nodes[number].stalled_until_s <= world.now_s, 61.0, "it wakes", 0.05
    )
    took_s = world.settle(15.0)
    assert world.now_s > awake_s
    world.run(10.0)
    no_deaths(world, "of nodes that were awake", sleeping)
    return {"rejoined_s": took_s}


@scenario
def delay_spikes(world: World, nodes: int) -> dict[str, float]:
    """Now and then all that a node sends and receives is late by most of a second."""
    started(world, nodes)
    for _ in range(20):
        number = world.rng.randrange(nodes)
        world.network.lag_s[number] = world.rng.uniform(0.1, 0.4)
        world.run(world.rng.uniform(0.5, 3.0))
        world.network.lag_s.clear()
        world.run(world.rng.uniform(0.0, 1.0))
    no_false_deaths(world)
    false = float(world.false_suspicions)
    world.settle(15.0)
    return {"false_suspicions": false}
