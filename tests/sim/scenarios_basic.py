"""What is done to a mesh: first harm, with every invariant watched, then heal and see it converge."""

from __future__ import annotations

from tests.sim.invariants import Violation
from tests.sim.plays import known_to_all, no_deaths, no_false_deaths, scenario, started
from tests.sim.world import World

from meshd.core.membership import MemberState


@scenario
def join(world: World, nodes: int) -> dict[str, float]:
    """All start at once and join by the first."""
    took_s = started(world, nodes)
    world.run(5.0)
    no_false_deaths(world)
    return {"join_s": took_s}


@scenario
def join_under_loss(world: World, nodes: int) -> dict[str, float]:
    """The same, with a quarter of all datagrams lost."""
    world.network.loss = 0.25
    world.add(nodes)
    took_s = world.settle(20.0)
    no_false_deaths(world)
    return {"join_s": took_s}


@scenario
def update(world: World, nodes: int) -> dict[str, float]:
    """One node writes one key; how long until the last node has it."""
    started(world, nodes)
    world.run(2.0)
    slowest_s = 0.0
    for _ in range(5):
        writer = world.rng.randrange(nodes)
        world.write(writer, "cap/x", {"at": world.now_s})
        slowest_s = max(slowest_s, world.settle(5.0))
        world.run(1.0)
    return {"update_s": slowest_s}


@scenario
def updates_under_loss(world: World, nodes: int) -> dict[str, float]:
    """Many writes and deletions while datagrams are lost, doubled and reordered."""
    started(world, nodes)
    world.network.loss, world.network.duplication, world.network.reordering = 0.1, 0.1, 0.2
    for _ in range(60):
        writer, key = world.rng.randrange(nodes), f"cap/{world.rng.randrange(5)}"
        if world.rng.random() < 0.3:
            world.delete(writer, key)
        else:
            world.write(writer, key, {"n": world.rng.randrange(1000)})
        world.run(world.rng.uniform(0, 0.1))
    took_s = world.settle(20.0)
    no_false_deaths(world)
    return {"converged_s": took_s}


@scenario
def process_crash(world: World, nodes: int) -> dict[str, float]:
    """A process is killed; its host refuses what is sent to it."""
    started(world, nodes)
    world.run(world.rng.uniform(2.0, 4.0))
    number = world.rng.randrange(nodes)
    world.crash(number)
    gone = (MemberState.DEAD,)
    took_s = world.run_until(
        known_to_all(world, world.id(number), *gone), 15.0, "the crash is known"
    )
    no_false_deaths(world)
    return {"crash_known_s": took_s}


@scenario
def silent_host(world: World, nodes: int) -> dict[str, float]:
    """A machine loses power; nothing comes back from it."""
    started(world, nodes)
    world.run(world.rng.uniform(2.0, 4.0))
    number = world.rng.randrange(nodes)
    world.crash(number, host=True)
    not_alive = (MemberState.SUSPECT, MemberState.DEAD)
    suspect_s = world.run_until(
        known_to_all(world, world.id(number), *not_alive), 15.0, "it is suspected"
    )
    dead = known_to_all(world, world.id(number), MemberState.DEAD)
    dead_s = suspect_s + world.run_until(dead, 40.0, "it is dead")
    if dead_s < world.config.death_floor_s:
        raise Violation(world.message(f"declared dead after {dead_s:.2f} s"))
    no_false_deaths(world)
    return {"silent_suspect_s": suspect_s, "silent_dead_s": dead_s}


@scenario
def restart(world: World, nodes: int) -> dict[str, float]:
    """A node is killed and comes back from an old snapshot, under a higher epoch."""
    started(world, nodes)
    number = world.rng.randrange(1, nodes)
    world.save(number)
    world.write(number, "cap/late", 1)  # after the snapshot: the restart does not know of it
    world.run(1.0)
    world.crash(number)
    world.run(world.rng.uniform(0.0, 10.0))
    world.boot(number)
    return {"rejoined_s": world.settle(20.0)}


@scenario
def lost_epoch(world: World, nodes: int) -> dict[str, float]:
    """A node comes back with an empty disk and a clock in the past: it learns its epoch from the others."""
    started(world, nodes)
    number = world.rng.randrange(1, nodes)
    world.crash(number)
    world.run(2.0)
    world.boot(number, epoch=5)
    return {"rejoined_s": world.settle(20.0)}


@scenario
def partition(world: World, nodes: int) -> dict[str, float]:
    """The mesh is split until each side has buried the other, both write, then it heals."""
    started(world, nodes)
    numbers = list(range(nodes))
    world.rng.shuffle(numbers)
    half = max(1, nodes // 2)
    world.partition(numbers[:half], numbers[half:])
    for number in numbers[:2]:
        world.run(1.0)
        world.write(number, "cap/split", number)
    world.run(40.0)
    world.heal()
    return {"healed_s": world.settle(20.0)}


@scenario
def partition_without_seed(world: World, nodes: int) -> dict[str, float]:
    """The same, when the only seed is gone for good: the dead are tried, so the sides find each other."""
    started(world, nodes)
    world.leave(0)
    world.run(2.0)
    numbers = list(range(1, nodes))
    world.rng.shuffle(numbers)
    half = max(1, len(numbers) // 2)
    world.partition(numbers[:half], numbers[half:])
    world.run(40.0)
    world.heal()
    return {"healed_s": world.settle(10.0)}


@scenario
def one_way_cut(world: World, nodes: int) -> dict[str, float]:
    """Some nodes cannot reach some others, while the way back is open."""
    started(world, nodes)
    numbers = list(range(nodes))
    world.rng.shuffle(numbers)
    world.cut(numbers[:1], numbers[1 : 1 + max(1, nodes // 2)])
    world.write(numbers[0], "cap/heard", 1)
    world.run(20.0)
    world.heal()
    return {"healed_s": world.settle(20.0)}


@scenario
def stall(world: World, nodes: int) -> dict[str, float]:
    """Some nodes stand still for four seconds, three times: nobody may be declared dead for it."""
    started(world, nodes)
    stalled = world.rng.sample(range(nodes), min(3, nodes - 1))
    for _ in range(3):
        for number in stalled:
            world.stall(number, 4.0)
        world.run(6.0)
    no_deaths(world, "of nodes that stalled for 4 s")
    return {"settled_s": world.settle(20.0)}


@scenario
def loss(world: World, nodes: int) -> dict[str, float]:
    """A quarter of all datagrams is lost for a minute: nobody may be declared dead for it."""
    started(world, nodes)
    world.network.loss = 0.25
    world.run(60.0)
    no_false_deaths(world)
    false = float(world.false_suspicions)
    world.heal()
    world.settle(20.0)
    return {"false_suspicions": false}


@scenario
def leave(world: World, nodes: int) -> dict[str, float]:
    """A node says goodbye; that is no failure, and nobody brings it back; then it comes again."""
    started(world, nodes)
    number = world.rng.randrange(1, nodes)
    world.leave(number)
    left = known_to_all(world, world.id(number), MemberState.LEFT)
    took_s = world.run_until(left, 5.0, "the leave is known")
    world.run(40.0)
    no_deaths(world, "though the only one that went had left")
    if any(state is not None for state in world.states_of(number)):
        raise Violation(world.message("a node that left is still listed"))
    world.boot(number)
    world.settle(10.0)
    return {"leave_known_s": took_s}


@scenario
def moved(world: World, nodes: int) -> dict[str, float]:
    """A node gets another address (DHCP), and a newcomer gets the address it had."""
    started(world, nodes)
    number = world.rng.randrange(1, nodes)
    old = world.nodes[number].address
    world.move(number, ("10.9.9.9", old[1]))
    world.settle(10.0)
    world.add(1)
    world.move(nodes, old)
    return {"settled_s": world.settle(20.0)}


@scenario
def chaos(world: World, nodes: int) -> dict[str, float]:
    """Anything, at any time, for half a minute; then all is well again and everybody agrees."""
    started(world, nodes)
    rng, network = world.rng, world.network
    network.loss, network.duplication, network.reordering = 0.1, 0.05, 0.1
    for _ in range(40):
        world.run(rng.uniform(0.1, 1.2))
        node = rng.choice(world.nodes)
        dice = rng.random()
        if node.life is None:
            if dice < 0.5:
                world.boot(node.number, seeds=tuple(range(nodes)))
        elif dice < 0.45:
            world.write(node.number, f"cap/{rng.randrange(6)}", rng.randrange(1000))
        elif dice < 0.55:
            world.delete(node.number, f"cap/{rng.randrange(6)}")
        elif dice < 0.60:
            world.publish(node.number, {"slots": rng.randrange(8), "rate": rng.random()})
        elif dice < 0.65:
            world.save(node.number)
        elif dice < 0.75:
            world.stall(node.number, rng.uniform(0.2, 8.0))
        elif dice < 0.83 and len(world.up()) > 2:
            world.crash(node.number, host=rng.random() < 0.5)
        elif dice < 0.87 and len(world.up()) > 2:
            world.leave(node.number)
        elif dice < 0.95:
            others = [other.number for other in world.nodes if other is not node]
            some = rng.sample(others, rng.randint(1, len(others)))
            world.cut([node.number], some)
            if rng.random() < 0.5:
                world.cut(some, [node.number])
        else:
            network.cuts.clear()
    world.heal()
    world.run(8.0)  # the last stall ends
    for node in world.nodes:
        if node.life is None:
            world.boot(node.number, seeds=tuple(range(nodes)))
    return {"converged_s": world.settle(40.0)}
