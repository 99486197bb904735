"""Nodes are shut out by decree: at once where packets go, later where they did not, and for good."""

from __future__ import annotations

from tests.sim.invariants import Violation
from tests.sim.plays import no_deaths, scenario, started
from tests.sim.world import World
from tests.unit.support_decrees import generation, revocation

from meshd_cms.types import NodeId


def _decree(world: World, number: int, raw: bytes) -> None:
    world.call(world.nodes[number], lambda core, now_s: core.decree(raw, now_s))


def _out_everywhere(world: World, victim: NodeId) -> bool:
    return all(
        life.core.decrees.is_revoked(victim)
        and life.core.member(victim) is None
        and life.store.line(victim) is None
        for node in world.up()
        if node.id != victim and (life := node.life) is not None
    )


@scenario
def revoked(world: World, nodes: int) -> dict[str, float]:
    """One is shut out and goes on talking: all drop it at once, nobody takes it back, and nobody else suffers."""
    started(world, max(3, nodes))
    issuer, victim, restarted = world.rng.sample(range(len(world.nodes)), 3)
    gone = world.nodes[victim]
    gone.disturbed = True
    _decree(world, issuer, revocation(world.nodes[issuer].signer, gone.id))
    out_s = world.run_until(lambda: _out_everywhere(world, gone.id), 1.0, "all dropped it")
    world.write(victim, "cap/stolen", "data")
    world.crash(restarted)
    world.run(2.0)
    world.boot(restarted, seeds=(victim,))  # the one it knows is the one that is out
    world.run(10.0)
    if not _out_everywhere(world, gone.id):
        raise Violation(world.message("a revoked node came back"))
    world.crash(victim)
    no_deaths(world, "though nobody died", gone.id, world.id(restarted))
    for number in {issuer, restarted} - {victim}:
        world.call(
            world.nodes[number],
            lambda core, now_s: core.join([node.address for node in world.nodes], now_s),
        )
    return {"out_s": out_s, "settled_s": world.settle(40.0)}


@scenario
def revoked_in_a_split(world: World, nodes: int) -> dict[str, float]:
    """Decrees are made on both sides of a split, packets are lost; once it heals, all hold all of them."""
    started(world, max(4, nodes))
    numbers = list(range(len(world.nodes)))
    world.rng.shuffle(numbers)
    half = len(numbers) // 2
    one, other = numbers[:half], numbers[half:]
    world.partition(one, other)
    first, second = world.nodes[one[0]], world.nodes[other[0]]
    victim = world.nodes[one[-1]] if len(one) > 1 else world.nodes[other[-1]]
    victim.disturbed = True
    world.run(3.0)
    _decree(world, second.number, revocation(second.signer, victim.id))
    _decree(world, first.number, generation(first.signer, 1))
    for number in range(150):  # of nodes long gone: more than one datagram lists
        gone = NodeId(number.to_bytes(16, "big"))
        _decree(world, first.number, revocation(first.signer, gone))
        world.run(0.01)
    world.run(20.0)
    world.network.loss = 0.1
    world.heal()

    def all_hold_all() -> bool:
        held = {life.core.decrees.ids() for node in world.up() if (life := node.life) is not None}
        return len(held) == 1 and len(next(iter(held))) == 152

    healed_s = world.run_until(all_hold_all, 60.0, "all hold all decrees", 0.05)
    if not _out_everywhere(world, victim.id):
        raise Violation(world.message("a revoked node is still held"))
    world.crash(victim.number)
    world.network.loss = 0.0
    return {"healed_s": healed_s, "settled_s": world.settle(60.0)}
