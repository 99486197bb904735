"""What is measured: each function takes a world to itself and returns samples by figure.

Times are of the last node: when all knew. Bytes are datagrams and stream messages with sealing and headers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tests.sim.plays import known_to_all
from tests.sim.preformed import preform
from tests.sim.world import World

from meshd.core.config import GossipConfig, lan
from meshd.core.effects import Lane, Send
from meshd.core.events import MemberFailed, RecordChanged
from meshd.core.membership import MemberState
from meshd.core.messages import Record
from meshd.core.wire import decode
from meshd_cms.types import NodeId

Samples: TypeAlias = dict[str, list[float]]
Measure: TypeAlias = Callable[[World, int], Samples]

LARGE = 300
"""From here on a world is asked for fewer samples."""

IDLE_S = 20.0
LOSS_S = 60.0
LARGE_S = 10.0  # instead of either, in large meshes
STALL_S = 4.0
NOT_ALIVE = (MemberState.SUSPECT, MemberState.DEAD)

MEASURES: dict[str, Measure] = {}


def measure(function: Measure) -> Measure:
    """Register under the function's name."""
    MEASURES[function.__name__] = function
    return function


def take(name: str, seed: int, nodes: int, config: GossipConfig | None = None) -> Samples:
    """Measure once, in a new world.

    Raises:
        Violation: with the seed.
    """
    world = World(seed, config or lan(), f"(measure {name}, N={nodes})")
    return MEASURES[name](world, nodes)


def _repeats(nodes: int, times: int) -> range:
    return range(1 + times // 5 if nodes >= LARGE else times)


def _victim(world: World) -> int:
    world.run(world.rng.uniform(2.0, 4.0))
    return world.rng.randrange(len(world.nodes))


def _back(world: World, number: int) -> None:
    """The node restarts, and all is well again."""
    world.boot(number, seeds=[(number + 1) % len(world.nodes)])
    world.settle(30.0)


def _write(world: World) -> tuple[NodeId, Callable[[], bool]]:
    """One node writes; returns who, and whether all have it."""
    writer = world.rng.randrange(len(world.nodes))
    owner = world.id(writer)
    world.write(writer, "cap/x", {"at": world.now_s})
    line = world.store(writer).line(owner)
    pending = [node.number for node in world.nodes]

    def everywhere() -> bool:
        while pending and world.store(pending[-1]).line(owner) == line:
            pending.pop()
        return not pending

    return owner, everywhere


@measure
def join(world: World, nodes: int) -> Samples:
    """All start at once and join by the first."""
    world.add(nodes)
    return {"join_s": [world.settle(30.0)]}


@measure
def update(world: World, nodes: int) -> Samples:
    """One key is written: the last node, and each node by itself."""
    preform(world, nodes)
    last: list[float] = []
    each: list[float] = []
    for _ in _repeats(nodes, 10):
        world.run(world.rng.uniform(1.0, 3.0))
        began_s, before = world.now_s, len(world.events)
        owner, everywhere = _write(world)
        world.run_until(everywhere, 10.0, "the update is known")
        times = [
            at_s - began_s
            for at_s, _, event in world.events[before:]
            if isinstance(event, RecordChanged) and event.owner == owner
        ]
        each += times
        last.append(max(times))
    return {"update_s": last, "update_each_s": each}


@measure
def missed(world: World, nodes: int) -> Samples:
    """One node is sent no rumour of an update, by anybody, ever: repair has to find it."""
    preform(world, nodes)
    found: list[float] = []
    for _ in _repeats(nodes, 10):
        world.run(world.rng.uniform(1.0, 3.0))
        owner, everywhere = _write(world)
        loser = world.rng.choice([node for node in world.nodes if node.id != owner])

        def is_the_rumour(effect: Send, owner: NodeId = owner, loser: int = loser.number) -> bool:
            if effect.to != world.nodes[loser].address or effect.lane is not Lane.DATAGRAM:
                return False
            return b"cap/x" in effect.payload and any(
                isinstance(one, Record) and one.rumour and one.delta.owner == owner
                for one in decode(effect.payload)
            )

        world.loses = lambda effect, target, chosen=is_the_rumour: chosen(effect)
        found.append(world.run_until(everywhere, 60.0, "the missed rumour is repaired"))
        world.loses = None
    return {"missed_s": found}


@measure
def crash(world: World, nodes: int) -> Samples:
    """A process is killed."""
    preform(world, nodes)
    samples: Samples = {"crash_s": [], "crash_bytes": []}
    for _ in _repeats(nodes, 5):
        number = _victim(world)
        before = world.wire_bytes
        world.crash(number)
        gone = known_to_all(world, world.id(number), MemberState.DEAD)
        samples["crash_s"].append(world.run_until(gone, 30.0, "the crash is known"))
        samples["crash_bytes"].append((world.wire_bytes - before) / nodes)
        _back(world, number)
    return samples


@measure
def silent(world: World, nodes: int) -> Samples:
    """A machine loses power."""
    preform(world, nodes)
    samples: Samples = {"suspect_s": [], "dead_s": []}
    for _ in _repeats(nodes, 5):
        number = _victim(world)
        began_s = world.now_s
        world.crash(number, host=True)
        node_id = world.id(number)
        suspected = known_to_all(world, node_id, *NOT_ALIVE)
        samples["suspect_s"].append(world.run_until(suspected, 60.0, "it is suspected"))
        dead = known_to_all(world, node_id, MemberState.DEAD)
        world.run_until(dead, 90.0, "it is dead")
        samples["dead_s"].append(world.now_s - began_s)
        _back(world, number)
    return samples


@measure
def heal(world: World, nodes: int) -> Samples:
    """Two halves cannot reach each other for twenty seconds."""
    preform(world, nodes)
    world.run(2.0)
    numbers = list(range(nodes))
    world.rng.shuffle(numbers)
    world.partition(numbers[: nodes // 2], numbers[nodes // 2 :])
    world.run(20.0)
    world.heal()
    return {"heal_s": [world.settle(60.0)]}


@measure
def idle(world: World, nodes: int) -> Samples:
    """Nothing happens; then every node also publishes its unchanged load every second."""
    preform(world, nodes)
    for_s = LARGE_S if nodes >= LARGE else IDLE_S
    world.run(2.0)
    before = world.wire_bytes
    world.run(for_s)
    quiet = (world.wire_bytes - before) / for_s / nodes
    load = {"slots": 2, "queue": 0, "rate": 21.5, "free_bytes": 1_500_000_000}

    def publish() -> None:
        for number in range(nodes):
            world.publish(number, load)
        world.at(world.now_s + 1.0, publish)

    publish()
    world.run(2.0)
    before = world.wire_bytes
    world.run(for_s)
    return {"idle_bytes": [quiet], "load_bytes": [(world.wire_bytes - before) / for_s / nodes]}


def _losing(share: float) -> Measure:
    def lossy(world: World, nodes: int) -> Samples:
        preform(world, nodes)
        world.run(2.0)
        world.network.loss = share
        for_s = LARGE_S if nodes >= LARGE else LOSS_S
        world.run(for_s)
        raised = sum(
            world.core(node.number).statistics().get("suspicions_raised", 0) for node in world.up()
        )
        deaths = sum(isinstance(event, MemberFailed) for _, _, event in world.events)
        hours = nodes * for_s / 3600
        name = f"loss{share * 100:.0f}"
        return {f"{name}_suspicions": [raised / hours], f"{name}_deaths": [float(deaths)]}

    return lossy


MEASURES["loss10"] = _losing(0.10)
MEASURES["loss25"] = _losing(0.25)


@measure
def stalls(world: World, nodes: int) -> Samples:
    """Nodes stand still for four seconds, one after the other: how many are declared dead by anybody."""
    preform(world, nodes)
    world.run(2.0)
    dead: list[float] = []
    for _ in range(10):
        number = world.rng.randrange(nodes)
        before = len(world.events)
        world.stall(number, STALL_S)
        world.run(STALL_S + 4.0)
        told = any(
            isinstance(event, MemberFailed) and event.node == world.id(number)
            for _, _, event in world.events[before:]
        )
        dead.append(float(told))
    return {"stalled_dead_share": dead}
