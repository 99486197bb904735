"""Faults of networks and machines: lossy, slow, cut off, restarted together, coming and going."""

from __future__ import annotations

from dataclasses import replace

from tests.sim.invariants import Violation
from tests.sim.plays import (
    configured,
    known_to_all,
    no_deaths,
    no_false_deaths,
    scenario,
    started,
)
from tests.sim.world import World

from meshd.core.config import GossipConfig, lan, local, wan
from meshd.core.events import MemberFailed
from meshd.core.membership import MemberState
from meshd_cms.types import NodeId


@scenario
def mass_restart(world: World, nodes: int) -> dict[str, float]:
    """Most nodes are killed at once and come back with a good, an old or no snapshot, or with no epoch."""
    started(world, nodes)
    rng = world.rng
    for number in range(nodes):
        world.write(number, "cap/early", number)
    world.run(1.0)
    old = {number for number in range(nodes) if rng.random() < 0.5}
    for number in old:
        world.save(number)
    for number in range(nodes):
        world.write(number, "cap/late", number)
    world.run(1.0)
    for number in set(range(nodes)) - old:
        if rng.random() < 0.7:
            world.save(number)
    killed = sorted(rng.sample(range(nodes), rng.randint(max(1, nodes - 2), nodes)))
    for number in killed:
        world.crash(number, host=rng.random() < 0.3)
    world.run(rng.choice((0.0, 0.5, 20.0)))
    for number in killed:
        seeds = rng.sample(range(nodes), min(3, nodes))
        world.boot(number, seeds=(0, *seeds), epoch=5 if rng.random() < 0.2 else None)
        world.run(rng.uniform(0.0, 0.3))
    return {"settled_s": world.settle(30.0)}


@scenario
def churn(world: World, nodes: int) -> dict[str, float]:
    """For half a minute nodes come, leave, crash, go silent and restart, as a Poisson process."""
    started(world, nodes)
    rng = world.rng
    until_s = world.now_s + 30.0
    while world.now_s < until_s:
        world.run(rng.expovariate(2.0))
        up = [node.number for node in world.up()]
        down = [node.number for node in world.nodes if node.life is None]
        seeds = rng.sample(up, min(3, len(up)))
        dice = rng.random()
        number = rng.choice(up)
        if dice < 0.25 and len(world.nodes) < 3 * nodes:
            world.add(1, seeds=tuple(seeds))
        elif dice < 0.45 and down:
            world.boot(rng.choice(down), seeds=seeds)
        elif dice < 0.55 and len(up) > 2:
            world.leave(number)
        elif dice < 0.75 and len(up) > 2:
            world.crash(number, host=rng.random() < 0.5)
        elif dice < 0.8:
            world.save(number)
        else:
            world.write(number, f"cap/{rng.randrange(4)}", rng.randrange(1000))
    no_false_deaths(world)
    return {"settled_s": world.settle(40.0)}


@scenario
def lossy_node(world: World, nodes: int) -> dict[str, float]:
    """One node is half deaf or half mute, then wholly so: nobody else may be declared dead by others."""
    started(world, nodes)
    rng, network = world.rng, world.network
    number = rng.randrange(nodes)
    lossy = world.id(number)
    for share in (0.5, 1.0):
        way = network.loss_in if rng.random() < 0.5 else network.loss_out
        way[number] = share
        world.run(30.0)
        way.clear()
        if share < 1.0:
            no_deaths(world, "though half of one node's datagrams arrived")
    _only_it_dies(world, lossy)
    world.heal()
    took_s = world.settle(30.0)
    return {"healed_s": took_s}


def _only_it_dies(world: World, *harmed: NodeId) -> None:
    """What the harmed believe of others, and others of them, may be wrong; the rest know better."""
    for at_s, teller, event in world.events:
        if isinstance(event, MemberFailed) and not {teller, event.node} & set(harmed):
            raise Violation(world.message(f"a death was told at {at_s:.3f}: {event}"))


@scenario
def walled(world: World, nodes: int) -> dict[str, float]:
    """A firewall drops one node's datagrams, and it is slow at times: its streams alone keep it a member."""
    started(world, nodes)
    number = world.rng.randrange(nodes)
    world.network.walled.add(number)
    for _ in range(3):
        world.run(world.rng.uniform(5.0, 15.0))
        world.stall(number, 3.0)
        world.run(15.0)
        no_deaths(world, "of or by a node whose streams carry")
    alive = known_to_all(world, world.id(number), MemberState.ALIVE)
    found_s = world.run_until(alive, 10.0, "all hold it alive")
    world.network.walled.clear()
    return {"found_s": found_s, "settled_s": world.settle(20.0)}


@configured(wan)
def slow_network(world: World, nodes: int) -> dict[str, float]:
    """The WAN preset, with round trips of up to a second and some loss."""
    network = world.network
    network.latency_least_s, network.latency_most_s, network.loss = 0.05, 0.5, 0.02
    world.add(nodes)
    join_s = world.settle(60.0)
    world.run(60.0)
    no_false_deaths(world)
    writer = world.rng.randrange(nodes)
    world.write(writer, "cap/x", 1)
    update_s = world.settle(20.0)
    number = world.rng.randrange(nodes)
    world.crash(number)
    gone = known_to_all(world, world.id(number), MemberState.DEAD)
    crash_s = world.run_until(gone, 60.0, "the crash is known")
    no_false_deaths(world)
    return {"join_s": join_s, "update_s": update_s, "crash_known_s": crash_s}


@configured(local)
def alone(world: World, nodes: int) -> dict[str, float]:
    """The local preset: a node cut off alone declares all others dead, and they it, in a bounded time."""
    started(world, nodes)
    world.run(world.rng.uniform(1.0, 3.0))
    number = world.rng.randrange(nodes)
    others = [one for one in range(nodes) if one != number]
    world.partition([number], others)
    core = world.core(number)

    def all_dead() -> bool:
        return all(view.is_self or view.state is MemberState.DEAD for view in core.members())

    gone = known_to_all(world, world.id(number), MemberState.DEAD)
    missed_s = world.run_until(gone, 10.0 + nodes, "they hold it dead", 0.01)
    alone_s = missed_s + world.run_until(
        all_dead, 20.0 + 2 * nodes, "it holds all others dead", 0.01
    )
    _only_it_dies(world, world.id(number))
    world.heal()
    return {"missed_s": missed_s, "alone_s": alone_s, "healed_s": world.settle(15.0)}


@scenario
def evidence_under_loss(world: World, nodes: int) -> dict[str, float]:
    """A process is killed while a quarter of all packets is lost: streams and refusals still tell of it."""
    started(world, nodes)
    world.network.loss = 0.25
    world.run(world.rng.uniform(5.0, 8.0))
    number = world.rng.randrange(nodes)
    world.crash(number)
    gone = known_to_all(world, world.id(number), MemberState.DEAD)
    took_s = world.run_until(gone, 10.0, "the crash is known")
    world.run(10.0)
    no_deaths(world, "of nodes that ran", world.id(number))
    return {"crash_known_s": took_s}


def _short_memory() -> GossipConfig:
    return replace(lan(), dead_keep_s=30.0, left_keep_s=20.0)


@configured(_short_memory)
def key_lost(world: World, nodes: int) -> dict[str, float]:
    """A node loses its key and comes back as somebody else at the same address; the old id expires."""
    started(world, nodes)
    number = world.rng.randrange(nodes)
    host = world.rng.random() < 0.5
    world.crash(number, host=host)
    world.run(world.rng.choice((0.0, 0.1, 3.0)))
    former = world.new_key(number)
    world.boot(number, seeds=[one for one in range(nodes) if one != number])
    gone = known_to_all(world, former, MemberState.DEAD)
    took_s = world.run_until(gone, 30.0, "the old id is dead for all", 0.01)
    world.settle(10.0)
    world.run(world.config.dead_keep_s + world.config.left_keep_s + 5.0)
    no_deaths(world, "of others", former)
    for node in world.up():
        assert node.life is not None
        if node.life.core.member(former) is not None or former in node.life.store.owners():
            raise Violation(world.message(f"node {node.number} still remembers the old id"))
    return {"old_dead_s": took_s}
