"""A member that lies: it holds the mesh's keys and says what is not so. Nobody may die of it."""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.invariants import Violation
from tests.sim.plays import no_deaths, scenario, started
from tests.sim.world import World

from meshd.core.membership import MemberState, Update
from meshd.core.messages import Claim, Heartbeat, Join, Message, Ping
from meshd.core.wire import encode, payload_of
from meshd_cms.types import Epoch, NodeId, Version

_LIES_S = 30.0
_LIES_PER_S = 20.0


class _Liar:
    """What one node can make up about the others."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.id = world.id(number)
        self.sent = 0

    def lie(self) -> None:
        """Tell one lie to one node, or to all."""
        world, rng = self.world, self.world.rng
        others = [node.number for node in world.up() if node.number != self.number]
        victim = rng.choice(others)
        told = others if rng.random() < 0.3 else [rng.choice(others)]
        kinds: list[Callable[[int], list[Message]]] = [
            self._accuses,
            self._accuses,
            self._buries,
            self._accuses_in_the_name_of_others,
            self._tells_of_a_goodbye,
            self._tells_of_an_absurd_life,
            self._boasts,
            self._joins,
        ]
        messages = rng.choice(kinds)(victim)
        payload = payload_of([encode(message) for message in messages])
        if rng.random() < 0.05:
            payload = rng.randbytes(rng.randint(1, 100))
        for target in told:
            self.sent += 1
            world.deliver(self.number, target, payload)

    def _about(self, victim: int, state: MemberState, accuser: NodeId, **other: int) -> Claim:
        view = self.world.core(self.number).member(self.world.id(victim))
        node = self.world.nodes[victim]
        epoch = Epoch(other.get("epoch", 1 if view is None else view.epoch))
        incarnation = other.get("incarnation", 0 if view is None else view.incarnation)
        update = Update(
            node.id, state, epoch, incarnation, node.name, node.address, accuser, evidence=True
        )
        return Claim(update, merged=self.world.rng.random() < 0.2)

    def _accuses(self, victim: int) -> list[Message]:
        return [self._about(victim, MemberState.SUSPECT, self.id)]

    def _buries(self, victim: int) -> list[Message]:
        return [self._about(victim, MemberState.DEAD, self.id)]

    def _accuses_in_the_name_of_others(self, victim: int) -> list[Message]:
        others = [node for node in self.world.up() if node.number not in (victim, self.number)]
        accusers = self.world.rng.sample(others, min(3, len(others)))
        state = self.world.rng.choice((MemberState.SUSPECT, MemberState.DEAD))
        return [self._about(victim, state, accuser.id) for accuser in accusers]

    def _tells_of_a_goodbye(self, victim: int) -> list[Message]:
        return [self._about(victim, MemberState.LEFT, self.world.id(victim))]

    def _tells_of_an_absurd_life(self, victim: int) -> list[Message]:
        state = self.world.rng.choice((MemberState.ALIVE, MemberState.SUSPECT))
        if self.world.rng.random() < 0.5:
            return [self._about(victim, state, self.id, epoch=2**62)]
        return [self._about(victim, state, self.id, incarnation=2**40)]

    def _boasts(self, victim: int) -> list[Message]:
        heartbeat = Heartbeat(self.world.rng.randbytes(8), Version(self.world.rng.randrange(2**40)))
        return [Ping(self.world.rng.randrange(2**20), self.world.id(victim), heartbeat)]

    def _joins(self, victim: int) -> list[Message]:
        return [Join(self.world.rng.randrange(1, 2**20))]


@scenario
def liar(world: World, nodes: int) -> dict[str, float]:
    """Half a minute of lies: nobody who runs is declared dead, the liar is named, then all agree."""
    started(world, max(3, nodes))
    world.checker.malformed_allowed = True
    one = _Liar(world, world.rng.randrange(len(world.nodes)))
    until_s = world.now_s + _LIES_S
    while world.now_s < until_s:
        world.run(world.rng.expovariate(_LIES_PER_S))
        one.lie()
    no_deaths(world, "though somebody only lied", one.id)
    honest = [node for node in world.up() if node.number != one.number]
    named = 0
    for node in honest:
        assert node.life is not None
        offenders = node.life.core.offences()
        named += one.id in offenders
        worst = max(offenders, key=lambda who: sum(offenders[who].values()), default=None)
        if worst not in (None, one.id):
            raise Violation(world.message(f"node {node.number} names another: {offenders}"))
    if 2 * named < len(honest):
        raise Violation(world.message(f"only {named} of {len(honest)} name the liar"))
    return {"lies": float(one.sent), "named": named / len(honest), "settled_s": world.settle(40.0)}
