"""A mesh in one process: real node cores and stores, a made-up network, one seed, no clock, no trio.

Everything that happens is an event in one heap, ordered by (time, order of creation); all chance comes from
one `random.Random`. So a seed is a run, byte for byte: `World.fingerprint` hashes every event. After each
event the checkers of `invariants.py` look at the node that was touched; they raise `Violation`.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim.invariants import Checker, Violation
from tests.unit.support_cms import HashSigner, hash_verify

from meshd.core.config import GossipConfig
from meshd.core.effects import Address, Effect, Lane, Notify, Send, StreamPing
from meshd.core.events import (
    Event,
    MemberFailed,
    MemberJoined,
    MemberSuspected,
    RecordChanged,
    SelfEpochRaised,
)
from meshd.core.membership import LocalNode, MemberState
from meshd.core.node import NodeCore
from meshd_cms.store import Store
from meshd_cms.types import Epoch, MeshId, NodeId, StoreConfig, Value

MESH = MeshId(b"a simulated mesh")
PORT = 7946
STREAM_TIMEOUT_S = 5.0
_FIRST_EPOCH = 1_000_000
_EPOCHS_PER_S = 1000  # epochs follow the clock, in milliseconds


@dataclass(slots=True)
class Network:
    """What the network does to a datagram. Streams are slower, but neither lost nor reordered."""

    latency_least_s: float = 0.0002
    latency_most_s: float = 0.0015
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # share of datagrams delayed by up to `reorder_most_s` more
    reorder_most_s: float = 0.1
    cuts: set[tuple[int, int]] = field(
        default_factory=set[tuple[int, int]]
    )  # (from, to); asked only

    def is_cut(self, source: int, target: int) -> bool:
        """Whether nothing passes in that direction."""
        return (source, target) in self.cuts


@dataclass(slots=True)
class Life:
    """One life of a node's process."""

    core: NodeCore
    store: Store
    epoch: Epoch
    wake_s: float = float("inf")  # the earliest wake-up in the heap
    ended: bool = False


@dataclass(slots=True)
class SimNode:
    """One machine."""

    number: int
    name: str
    address: Address
    signer: HashSigner
    life: Life | None = None  # None: the process does not run
    host_up: bool = True  # a host without the process refuses; a host that is down is silent
    stalled_until_s: float = 0.0
    backlog: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    disk: bytes = b""  # the last snapshot
    disturbed: bool = False  # it was crashed, stalled or cut off: its death may be told


class World:
    """The simulation.

    Args:
        seed: decides everything.
        config: of every node.
        scenario: for messages only.
    """

    def __init__(self, seed: int, config: GossipConfig, scenario: str = "") -> None:
        self.seed = seed
        self.config = config
        self.scenario = scenario
        self.rng = random.Random(seed)
        self.network = Network()
        self.now_s = 0.0
        self.nodes: list[SimNode] = []
        self.by_address: dict[Address, SimNode] = {}
        self.by_id: dict[NodeId, SimNode] = {}
        self.events: list[tuple[float, NodeId, Event]] = []
        self.trace_lines: list[str] | None = None
        self.datagrams = 0
        self.datagram_bytes = 0
        self.false_deaths = 0
        self.false_suspicions = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._created = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self.checker = Checker(self)

    # -- building ---------------------------------------------------------------------------------------

    def add(self, count: int = 1, *, seeds: tuple[int, ...] = (0,)) -> None:
        """Start nodes that join by the nodes of these numbers."""
        for _ in range(count):
            number = len(self.nodes)
            address = (f"10.0.{number // 250}.{number % 250 + 1}", PORT)
            signer = HashSigner(hashlib.sha256(b"node %d" % number).digest())
            node = SimNode(number, f"node-{number}", address, signer)
            self.nodes.append(node)
            self.by_address[address] = node
            self.boot(number, seeds=seeds)

    def boot(self, number: int, *, seeds: tuple[int, ...] = (0,), epoch: int | None = None) -> None:
        """Start a process, from the node's disk if there is something on it."""
        node = self.nodes[number]
        assert node.life is None
        node.host_up = True
        chosen = Epoch(
            epoch if epoch is not None else _FIRST_EPOCH + int(self.now_s * _EPOCHS_PER_S)
        )
        if node.disk and epoch is None:
            store = Store.restore(
                node.disk, StoreConfig(), MESH, node.signer, chosen, hash_verify, as_of_s=self.now_s
            )
        else:
            store = Store(StoreConfig(), MESH, node.signer, chosen, hash_verify)
        core_rng = random.Random(self.rng.getrandbits(64))
        me = LocalNode(store.owner, node.name, node.address)
        core = NodeCore(self.config, me, store, core_rng)
        node.life = Life(core, store, store.epoch)
        self.by_id[store.owner] = node
        self.checker.born(node)
        self._do(node, lambda core: core.start(self.now_s))
        self.write(number, "node", {"name": node.name, "epoch": int(store.epoch)})
        addresses = [self.nodes[seed].address for seed in seeds if seed != number]
        self._do(node, lambda core: core.join(addresses, self.now_s))

    # -- what may happen --------------------------------------------------------------------------------

    def write(self, number: int, key: str, value: Value) -> None:
        """The node writes its own record."""
        self._do(self.nodes[number], lambda core: core.set(key, value, self.now_s))

    def delete(self, number: int, key: str) -> None:
        """The node deletes a key of its own record."""
        self._do(self.nodes[number], lambda core: core.delete(key, self.now_s))

    def publish(self, number: int, value: Value) -> None:
        """The node publishes its load."""
        self._do(self.nodes[number], lambda core: core.publish("load", value, self.now_s))

    def leave(self, number: int) -> None:
        """The node says goodbye, and its process ends after the linger."""
        node = self.nodes[number]
        node.disturbed = True
        life = node.life
        assert life is not None
        self._do(node, lambda core: core.leave(self.now_s))

        def end() -> None:
            if node.life is life:
                self.crash(number)

        self.at(self.now_s + self.config.leave_linger_s, end)

    def crash(self, number: int, *, host: bool = False) -> None:
        """The process is killed; with `host`, the whole machine goes silent."""
        node = self.nodes[number]
        assert node.life is not None
        node.life.ended = True
        node.life = None
        node.host_up = not host
        node.disturbed = True
        node.backlog.clear()
        self._note("crash", node)

    def save(self, number: int) -> None:
        """Write the node's snapshot to its disk."""
        node = self.nodes[number]
        assert node.life is not None
        node.disk = node.life.store.snapshot()

    def stall(self, number: int, for_s: float) -> None:
        """The process stands still; what arrives waits in its socket."""
        node = self.nodes[number]
        node.disturbed = True
        node.stalled_until_s = self.now_s + for_s
        self.at(node.stalled_until_s, lambda: self._resume(node))

    def cut(self, sources: list[int], targets: list[int]) -> None:
        """Nothing passes from any source to any target."""
        for source in sources:
            for target in targets:
                if source != target:
                    self.network.cuts.add((source, target))
                    self.nodes[source].disturbed = self.nodes[target].disturbed = True

    def partition(self, one: list[int], other: list[int]) -> None:
        """Nothing passes between the two sides."""
        self.cut(one, other)
        self.cut(other, one)

    def deliver(self, source: int, target: int, payload: bytes) -> None:
        """Hand a payload to a node as if another had sent it."""
        sender = self.nodes[source]
        assert sender.life is not None
        effect = Send(self.nodes[target].address, self.id(target), payload)
        life = sender.life
        self._arrive(sender, life.store.owner, life.epoch, self.nodes[target], effect)

    def heal(self) -> None:
        """The network is good again; stalled nodes go on by themselves."""
        self.network = Network()

    def move(self, number: int, address: Address) -> None:
        """The node is reached elsewhere from now on, and knows it."""
        node = self.nodes[number]
        del self.by_address[node.address]
        node.address = address
        self.by_address[address] = node
        self._do(node, lambda core: core.update_address(address, self.now_s))

    # -- running ----------------------------------------------------------------------------------------

    def at(self, due_s: float, call: Callable[[], None]) -> None:
        """Have something happen at a time."""
        self._created += 1
        heapq.heappush(self._heap, (due_s, self._created, call))

    def run(self, for_s: float) -> None:
        """Let time pass."""
        until_s = self.now_s + for_s
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(self._heap)
            call()
        self.now_s = until_s

    def run_until(self, is_true: Callable[[], bool], within_s: float, what: str) -> float:
        """Let time pass until something holds; returns how long it took.

        Raises:
            Violation: it did not hold within the time.
        """
        began_s = self.now_s
        step_s = 0.005
        while not is_true():
            if self.now_s - began_s >= within_s:
                raise Violation(self.message(f"not within {within_s} s: {what}"))
            self.run(step_s)
        return self.now_s - began_s

    def settle(self, within_s: float = 30.0) -> float:
        """Wait until all that run agree on who lives and on every record; returns how long it took."""
        return self.run_until(self.agreed, within_s, "all agree")

    # -- looking ----------------------------------------------------------------------------------------

    def up(self) -> list[SimNode]:
        """The nodes whose process runs."""
        return [node for node in self.nodes if node.life is not None]

    def core(self, number: int) -> NodeCore:
        """The core of a running node."""
        life = self.nodes[number].life
        assert life is not None
        return life.core

    def store(self, number: int) -> Store:
        """The store of a running node."""
        life = self.nodes[number].life
        assert life is not None
        return life.store

    def id(self, number: int) -> NodeId:
        """The id of a node."""
        return next(node_id for node_id, node in self.by_id.items() if node.number == number)

    def agreed(self) -> bool:
        """Whether all that run see exactly those that run as alive, and hold the same records of them."""
        lives = [node.life for node in self.up() if node.life is not None]
        if len({life.core.state_hash for life in lives}) > 1:
            return False
        wanted = sorted((life.store.owner, life.epoch) for life in lives)
        for life in lives:
            alive = [
                (view.node, view.epoch)
                for view in life.core.members()
                if view.state is MemberState.ALIVE
            ]
            if alive != wanted:
                return False
            for owner in lives:
                if life.store.items(owner.store.owner) != owner.store.items(owner.store.owner):
                    return False
        return True

    def states_of(self, number: int) -> list[MemberState | None]:
        """What every running node believes of this one; None where it is not listed."""
        node_id = self.id(number)
        views = [
            node.life.core.member(node_id)
            for node in self.up()
            if node.life is not None and node.number != number
        ]
        return [None if view is None else view.state for view in views]

    def message(self, what: str) -> str:
        """What went wrong, and how to see it again."""
        replay = f"python -m tests.sim.run --seed {self.seed} --scenario {self.scenario}"
        return f"t={self.now_s:.4f} s: {what}\nseed {self.seed}; replay: {replay}"

    def fingerprint(self) -> str:
        """A hash of every event so far, in order."""
        return self._hash.hexdigest()

    # -- inside -----------------------------------------------------------------------------------------

    def _note(self, what: str, node: SimNode, detail: str = "") -> None:
        line = f"{self.now_s:.9f} {what} {node.number} {detail}"
        self._hash.update(line.encode())
        if self.trace_lines is not None:
            self.trace_lines.append(line)

    def _do(self, node: SimNode, call: Callable[[NodeCore], tuple[Effect, ...]]) -> None:
        """Call a core, unless its process does not run; while it stalls, the call waits."""
        life = node.life
        if life is None:
            return
        if self.now_s < node.stalled_until_s:
            node.backlog.append(lambda: self._do(node, call))
            return
        for effect in call(life.core):
            self._carry_out(node, life, effect)
        self._schedule_wake(node, life)
        self.checker.check(node)

    def _schedule_wake(self, node: SimNode, life: Life) -> None:
        due_s = max(life.core.deadline_s(), self.now_s)
        if due_s < life.wake_s:
            life.wake_s = due_s
            self.at(due_s, lambda: self._wake(node, life, due_s))

    def _wake(self, node: SimNode, life: Life, due_s: float) -> None:
        if life.ended or life.wake_s != due_s:
            return
        if self.now_s < node.stalled_until_s:
            return  # `_resume` wakes it
        life.wake_s = float("inf")
        if life.core.deadline_s() <= self.now_s:
            self._note("wake", node)
            self._do(node, lambda core: core.advance(self.now_s))
        else:
            self._schedule_wake(node, life)

    def _resume(self, node: SimNode) -> None:
        """As a driver does: what has arrived is taken in first, then timers fire."""
        if node.life is None or self.now_s < node.stalled_until_s:
            return
        self._note("resume", node)
        backlog, node.backlog = node.backlog, []
        for call in backlog:
            call()
        if node.life is not None:
            node.life.wake_s = float("inf")
            self._schedule_wake(node, node.life)

    def _carry_out(self, node: SimNode, life: Life, effect: Effect) -> None:
        if isinstance(effect, Send):
            self.checker.sent(effect)
            self._send(node, life, effect)
        elif isinstance(effect, StreamPing):
            self._stream_ping(node, effect)
        elif isinstance(effect, Notify):
            self._notified(node, life, effect.event)

    def _notified(self, node: SimNode, life: Life, event: Event) -> None:
        self.events.append((self.now_s, life.store.owner, event))
        self._note("event", node, repr(event))
        if isinstance(event, SelfEpochRaised):
            life.epoch = event.epoch
        elif isinstance(event, RecordChanged):
            self.checker.record_changed(node, event)
        elif isinstance(event, MemberJoined):
            self.checker.joined(node, event)
        elif isinstance(event, MemberFailed | MemberSuspected):
            about = self.by_id[event.node]
            if about.life is not None and not about.disturbed and not node.disturbed:
                if isinstance(event, MemberFailed):
                    self.false_deaths += 1
                else:
                    self.false_suspicions += 1

    def _delay_s(self) -> float:
        return self.rng.uniform(self.network.latency_least_s, self.network.latency_most_s)

    def _send(self, node: SimNode, life: Life, effect: Send) -> None:
        target = self.by_address.get(effect.to)
        if target is None or self.network.is_cut(node.number, target.number):
            return
        copies = 1
        if effect.lane is Lane.DATAGRAM:
            self.datagrams += 1
            self.datagram_bytes += len(effect.payload)
            if self.rng.random() < self.network.loss:
                return
            copies += self.rng.random() < self.network.duplication
        owner, epoch = life.store.owner, life.epoch
        for _ in range(copies):
            delay_s = self._delay_s() * (1 if effect.lane is Lane.DATAGRAM else 3)
            if effect.lane is Lane.DATAGRAM and self.rng.random() < self.network.reordering:
                delay_s += self.rng.uniform(0, self.network.reorder_most_s)
            self.at(
                self.now_s + delay_s,
                lambda: self._arrive(node, owner, epoch, target, effect),
            )

    def _arrive(
        self, source: SimNode, sender: NodeId, epoch: Epoch, target: SimNode, effect: Send
    ) -> None:
        if target.life is None:
            if target.host_up and effect.lane is Lane.DATAGRAM:
                self._refuse(source, target)
            return
        digest = hashlib.blake2b(effect.payload, digest_size=8).hexdigest()
        self._note("receive", target, f"from {source.number} {effect.lane.value} {digest}")
        address, lane, payload = source.address, effect.lane, effect.payload
        self._do(
            target, lambda core: core.receive(payload, sender, epoch, address, lane, self.now_s)
        )

    def _refuse(self, source: SimNode, target: SimNode) -> None:
        """The host answers with an ICMP refusal."""
        if self.network.is_cut(target.number, source.number):
            return
        self.at(
            self.now_s + self._delay_s(),
            lambda: self._do(
                source, lambda core: core.evidence_refused(target.address, self.now_s)
            ),
        )

    def _stream_ping(self, node: SimNode, effect: StreamPing) -> None:
        target = self.by_address.get(effect.to)
        life = node.life
        cut = target is None or (
            self.network.is_cut(node.number, target.number)
            or self.network.is_cut(target.number, node.number)
        )

        def report(ok: bool) -> None:
            if node.life is life:
                self._do(node, lambda core: core.stream_pinged(effect.token, ok, self.now_s))

        if target is None or cut or not target.host_up:
            self.at(self.now_s + STREAM_TIMEOUT_S, lambda: report(ok=False))
        elif target.life is None:
            self.at(self.now_s + 2 * self._delay_s(), lambda: report(ok=False))
        else:
            answered_s = max(self.now_s, target.stalled_until_s) + 4 * self._delay_s()
            in_time = answered_s <= self.now_s + STREAM_TIMEOUT_S
            due_s = answered_s if in_time else self.now_s + STREAM_TIMEOUT_S
            self.at(due_s, lambda: report(ok=in_time))
