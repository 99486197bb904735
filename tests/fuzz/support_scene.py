"""What is fuzzed: one node of a mesh whose other nodes are honest, and what those really say to each other.

`traffic` records what real cores of a simulated mesh send; `Scene` is node 0 of that mesh, fed with what it
was sent there, so that it holds a dozen members, their records, rumours and suspicions. The other nodes
go on as `Honest` stand-ins: they answer pings and refute, and never lie.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Final

from tests.fuzz.support_figures import Broken
from tests.sim.world import MESH, World
from tests.unit.support_cms import HashSigner, hash_verify
from tests.unit.support_decrees import hash_verify_decree

from meshd.core.config import GossipConfig, lan
from meshd.core.decrees import Decrees
from meshd.core.effects import Address, Effect, Knock, Lane, Send, StreamPing
from meshd.core.membership import LocalNode, MemberState, Update
from meshd.core.messages import Ack, Claim, Heartbeat, Message, Ping, PingRequest, Record
from meshd.core.node import NodeCore
from meshd.core.wire import decode, encode, payload_of
from meshd_cms.errors import CodecError
from meshd_cms.store import Store
from meshd_cms.types import Delta, Epoch, NodeId, StoreConfig, Value, Version

NODES: Final = 12
VICTIM: Final = 0
LIAR: Final = NODES - 1
"""A member with keys of its own: what is said in its name may be a lie, signed by itself."""
SILENT: Final = NODES - 2
"""A member that does not answer: it is suspected, and after a while dead."""
RECORD_BYTES: Final = 200_000
_SEED: Final = 20
_FURNISHING_S: Final = 2.0  # of recorded traffic that the victim hears
_ROUNDS_MAX: Final = 6  # of answers to answers


Items = tuple[tuple[str, Value], ...]
"""The keys of a record with their values."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A payload as one core handed it to another."""

    payload: bytes
    sender: NodeId
    epoch: int
    source: Address
    lane: Lane
    at_s: float
    target: int


@dataclass(frozen=True, slots=True)
class Identity:
    """A node as the others know it."""

    node: NodeId
    name: str
    address: Address
    epoch: int
    signer: HashSigner
    record: Delta  # whole, as it is at the end of the recording
    items: Items


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a mesh said, and who its nodes were when it was at rest."""

    heard: tuple[Heard, ...]
    nodes: tuple[Identity, ...]
    snapshot: bytes
    written: Mapping[tuple[NodeId, int], tuple[int, Items]]
    """The last version, and the items in it, that an owner wrote in an epoch."""


def _wrap(world: World, number: int, heard: list[Heard]) -> None:
    """Record what a core is given; it goes on as before."""
    core = world.core(number)
    receive = core.receive

    def recording(
        payload: bytes, sender: NodeId, epoch: int, source: Address, lane: Lane, now_s: float
    ) -> tuple[Effect, ...]:
        heard.append(Heard(payload, sender, epoch, source, lane, world.now_s, number))
        return receive(payload, sender, epoch, source, lane, now_s)

    setattr(core, "receive", recording)  # noqa: B010  (a method is replaced on one object)


def _identity(world: World, number: int) -> Identity:
    node, life = world.nodes[number], world.nodes[number].life
    assert life is not None
    store = life.store
    record = store.delta_since(store.owner, Version(0), RECORD_BYTES)
    assert record is not None
    return Identity(
        store.owner,
        node.name,
        node.address,
        int(store.epoch),
        node.signer,
        record,
        store.items(store.owner),
    )


@cache
def traffic() -> Traffic:
    """A mesh that forms, writes, publishes, loses datagrams, loses a node, gets it back and loses another.

    Every kind of message is in it.
    """
    world, heard = World(_SEED, lan(), "the fuzzers' corpus"), list[Heard]()
    for number in range(NODES):
        world.add()
        _wrap(world, number, heard)
    world.settle()
    for number in range(NODES):
        for key in range(number % 4 + 1):
            world.write(number, f"capability/{key}", {"name": f"computation.gpt/{key}", "slots": 2})
        world.publish(number, {"free": number / NODES, "queue": number})
    world.run(1.0)
    world.write(3, "node", None)
    world.delete(2, "capability/0")
    for number in range(NODES):
        world.save(number)
    world.settle()
    nodes = tuple(_identity(world, number) for number in range(NODES))
    snapshot = world.store(VICTIM).snapshot()
    written = _trouble(world, heard)
    return Traffic(tuple(heard), nodes, snapshot, written)


def _written(world: World) -> dict[tuple[NodeId, int], tuple[int, Items]]:
    found: dict[tuple[NodeId, int], tuple[int, Items]] = {}
    for node in world.up():
        store = world.store(node.number)
        line = store.line(store.owner)
        assert line is not None
        found[store.owner, int(line.epoch)] = (int(line.max_version), store.items(store.owner))
    return found


def _trouble(world: World, heard: list[Heard]) -> dict[tuple[NodeId, int], tuple[int, Items]]:
    """The messages that only a mesh in trouble sends: accusations, nacks, repairs, goodbyes."""
    world.network.loss = 0.2
    for number in range(NODES):
        world.write(number, "capability/9", {"text": "x" * 60 * number})
    world.run(2.0)
    written = _written(world)
    world.crash(5, host=True)
    world.run(6.0)
    world.boot(5)
    _wrap(world, 5, heard)
    world.heal()
    world.run(1.0)
    written |= _written(world)
    world.leave(6)
    world.run(2.0)
    return written


def alive(one: Identity, incarnation: int = 0, epoch: int | None = None) -> Claim:
    """What a node says of itself."""
    return Claim(claim_about(one, MemberState.ALIVE, one.node, incarnation, epoch), merged=False)


def claim_about(
    one: Identity,
    state: MemberState,
    accuser: NodeId,
    incarnation: int = 0,
    epoch: int | None = None,
) -> Update:
    """What somebody may say of a node."""
    life = Epoch(one.epoch if epoch is None else epoch)
    return Update(one.node, state, life, incarnation, one.name, one.address, accuser)


@lru_cache(1024)
def read(payload: bytes) -> tuple[Message, ...]:
    """What a node of ours said; that it can be read is part of what is tested."""
    try:
        return decode(payload)
    except CodecError as error:
        raise Broken(f"nobody can read what we send: {error}") from error


class Honest:
    """A member that answers pings and refutes what is said of it; it writes nothing more."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.incarnation = 0
        self.version = identity.record.until

    def answers(self, messages: Sequence[Message], state_hash: bytes) -> list[Message]:
        """What it says to these messages of the victim."""
        said: list[Message] = []
        for message in messages:
            match message:
                case Claim(update) if update.node == self.identity.node:
                    said += self._refutes(update)
                case Ping(sequence) if message.is_for(self.identity.node):
                    said.append(Ack(sequence, None, Heartbeat(state_hash, self.version)))
                case PingRequest(sequence, target):
                    said.append(Ack(sequence, target, Heartbeat(state_hash, Version(0))))
                case _:
                    pass
        return said

    def _refutes(self, update: Update) -> list[Message]:
        me = self.identity
        if update.epoch > me.epoch or update.state is MemberState.LEFT:
            self.identity = me = replace(me, epoch=max(me.epoch, update.epoch) + 1)
            self.incarnation, self.version = 0, Version(0)
        elif update.epoch == me.epoch and update.incarnation >= self.incarnation:
            if update.state is MemberState.ALIVE and update.incarnation == self.incarnation:
                return []
            self.incarnation = update.incarnation + 1
        return [alive(me, self.incarnation, me.epoch)]


@dataclass(slots=True)
class Answered:
    """What one input made the node do."""

    effects: tuple[Effect, ...]
    datagrams: int
    bytes: int  # of datagrams as sealed, and of streams


def answered(effects: tuple[Effect, ...]) -> Answered:
    """Count what goes out, as it would be on the wire."""
    sends = [effect for effect in effects if isinstance(effect, Send)]
    return Answered(
        effects,
        sum(send.lane is Lane.DATAGRAM for send in sends),
        sum(len(send.payload) + SEALED_BYTES for send in sends),
    )


SEALED_BYTES: Final = 57
"""What sealing adds to a datagram."""


class Scene:
    """Node 0, furnished, with its honest peers and a clock of its own."""

    def __init__(self, config: GossipConfig | None = None, seed: int = 1) -> None:
        recorded = traffic()
        self.nodes = recorded.nodes
        self.now_s = 0.0
        mine = self.nodes[VICTIM]
        self.store = Store(StoreConfig(), MESH, mine.signer, Epoch(mine.epoch), hash_verify)
        me = LocalNode(self.store.owner, mine.name, mine.address)
        decrees = Decrees(hash_verify_decree)
        self.core = NodeCore(config or lan(), me, self.store, random.Random(seed), decrees)
        self.honest = {one.node: Honest(one) for one in self.nodes if one.node != mine.node}
        del self.honest[self.nodes[SILENT].node]
        self._pending: deque[Effect] = deque()
        self._furnish(recorded)

    def _furnish(self, recorded: Traffic) -> None:
        self.carry_out(self.core.start(0.0))
        for key, value in recorded.nodes[VICTIM].items:
            self.carry_out(self.core.set(key, value, 0.0))
        for heard in recorded.heard:
            if heard.target == VICTIM and heard.at_s <= _FURNISHING_S:
                self.at(heard.at_s)
                self.carry_out(self._receive(heard))
        for one in self.nodes[1:]:
            self.tell([alive(one)], one)
            self.tell([Record(one.record, rumour=False)], one)
        suspected, by = self.nodes[SILENT], self.nodes[8]
        self.tell([Claim(claim_about(suspected, MemberState.SUSPECT, by.node), False)], by)
        self.carry_out(self.core.set("last", "a rumour that is still to be told", self.now_s))

    def _receive(self, heard: Heard) -> tuple[Effect, ...]:
        return self.core.receive(
            heard.payload, heard.sender, heard.epoch, heard.source, heard.lane, self.now_s
        )

    # -- what comes in ----------------------------------------------------------------------------------

    def inject(
        self, payload: bytes, sender: NodeId, epoch: int, source: Address, lane: Lane
    ) -> tuple[Effect, ...]:
        """Hand in one payload; the effects are returned and not carried out."""
        return self.core.receive(payload, sender, epoch, source, lane, self.now_s)

    def tell(self, messages: Sequence[Message], sender: Identity) -> tuple[Effect, ...]:
        """Say something in the name of a node, and let the honest ones answer."""
        payload = payload_of([encode(message) for message in messages])
        effects = self.inject(payload, sender.node, sender.epoch, sender.address, Lane.DATAGRAM)
        self.carry_out(effects)
        return effects

    # -- the course of the time -------------------------------------------------------------------------

    def at(self, now_s: float) -> list[Effect]:
        """Let time pass up to then; returns the effects of the timers that fired."""
        fired: list[Effect] = []
        while self.core.deadline_s() <= now_s:
            self.now_s = max(self.now_s, self.core.deadline_s())
            effects = self.core.advance(self.now_s)
            fired += effects
            self.carry_out(effects)
        self.now_s = max(self.now_s, now_s)
        return fired

    def carry_out(self, effects: Sequence[Effect]) -> None:
        """Let the honest peers take what is for them, and hand in what they answer, a few rounds long."""
        now = list(effects)
        for _ in range(_ROUNDS_MAX):
            answers: list[Effect] = []
            for effect in now:
                answers += self._answers(effect)
            now = answers
            if not now:
                return

    def _answers(self, effect: Effect) -> tuple[Effect, ...]:
        match effect:
            case Send(node=node, payload=payload) if node is not None and node in self.honest:
                peer = self.honest[node]
                said = peer.answers(read(payload), self.core.state_hash)
                if not said:
                    return ()
                me = peer.identity
                answer = payload_of([encode(one) for one in said])
                return self.inject(answer, me.node, me.epoch, me.address, Lane.DATAGRAM)
            case StreamPing(node=node, token=token):
                return self.core.stream_pinged(token, ok=node in self.honest, now_s=self.now_s)
            case Knock(token=token):
                return self.core.knocked(token, refused=False, now_s=self.now_s)
            case _:
                return ()
