"""A mesh in one process: real node cores and stores, a made-up network, one seed, no clock, no trio.

Everything that happens is an event in one heap, ordered by (time, order of creation); all chance comes from
one `random.Random`. So a seed is a run, byte for byte: `World.fingerprint` hashes every event. After each
event the checkers of `invariants.py` look at the node that was touched; they raise `Violation`.

Each machine has a clock of its own: cores are told what it shows, and never see the true time.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Iterable
from typing import assert_never

from tests.sim.agreement import Agreement
from tests.sim.delivery import Delivery
from tests.sim.invariants import Checker, Violation
from tests.sim.machine import BACKLOG_MAX, Life, SimNode, WatchedStore
from tests.sim.network import Clock, Network
from tests.sim.streams import Streams
from tests.unit.support_cms import HashSigner, hash_verify
from tests.unit.support_decrees import hash_verify_decree

from meshd.core.config import GossipConfig
from meshd.core.decrees import Decrees
from meshd.core.effects import (
    Address,
    Effect,
    Knock,
    Lane,
    Notify,
    Send,
    StreamPing,
    Unwatch,
    Watch,
)
from meshd.core.events import (
    Decreed,
    Event,
    MemberAlive,
    MemberFailed,
    MemberForgotten,
    MemberJoined,
    MemberLeft,
    MemberRevoked,
    MemberSuspected,
    MemberUpdated,
    SelfEpochRaised,
)
from meshd.core.membership import LocalNode, MemberState
from meshd.core.node import NodeCore
from meshd_cms.store import Store
from meshd_cms.types import Epoch, MeshId, NodeId, StoreConfig, Value, node_id_of

MESH = MeshId(b"a simulated mesh")
PORT = 7946
_FIRST_EPOCH = 1_000_000
_EPOCHS_PER_S = 1000  # epochs follow the wall clock, in milliseconds
_ROUNDING_S = 1e-6  # a clock read back after a conversion may be off by this

CoreCall = Callable[[NodeCore, float], tuple[Effect, ...]]


class World:
    """The simulation.

    Args:
        seed: decides everything.
        config: of every node.
        scenario: for messages only.
        core: what a node runs; tests of the checkers put a broken one here.
    """

    def __init__(
        self,
        seed: int,
        config: GossipConfig,
        scenario: str = "",
        core: Callable[..., NodeCore] = NodeCore,
    ) -> None:
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
        self.loses: Callable[[Send, SimNode], bool] | None = None  # chosen datagrams, to be lost
        self.datagrams = 0
        self.wire_bytes = 0  # datagrams and stream messages, sealed, with headers
        self.false_deaths = 0
        self.false_suspicions = 0
        self.steps = 0
        self.streams = Streams(self)
        self._delivery = Delivery(self)
        self._core = core
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._created = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self.checker = Checker(self)

    # -- building ---------------------------------------------------------------------------------------

    def add(self, count: int = 1, *, seeds: tuple[int, ...] = (0,)) -> None:
        """Start nodes that join by the nodes of these numbers."""
        for _ in range(count):
            self.boot(self.machine().number, seeds=seeds)

    def machine(self) -> SimNode:
        """One more machine, on which nothing runs yet."""
        number = len(self.nodes)
        address = (f"10.{number // 62500}.{number // 250 % 250}.{number % 250 + 1}", PORT)
        signer = HashSigner(hashlib.sha256(b"node %d" % number).digest())
        clock = Clock(self.rng.uniform(0.0, 100_000.0))
        node_id = node_id_of(signer.public_key)
        node = SimNode(number, f"node-{number}", address, node_id, signer, clock)
        self.nodes.append(node)
        self.by_address[address] = node
        self.by_id[node_id] = node
        return node

    def boot(
        self,
        number: int,
        *,
        seeds: Iterable[int] = (0,),
        epoch: int | None = None,
    ) -> None:
        """Start a process, from the node's disk if there is something on it.

        With `epoch`, the disk and the clock are lost: it starts with that epoch and nothing else.
        """
        node = self.nodes[number]
        life = self.start(node, epoch)
        name: Value = {"name": node.name, "epoch": int(life.store.epoch)}
        self.call(node, lambda core, now_s: core.start(now_s))
        self.write(number, "node", name)
        addresses = [self.nodes[seed].address for seed in seeds if seed != number]
        self.call(node, lambda core, now_s: core.join(addresses, now_s))

    def start(self, node: SimNode, epoch: int | None = None) -> Life:
        """A new life: the store and the core are made, and not started."""
        assert node.life is None
        node.host_up, node.is_asleep, node.stalled_until_s = True, False, 0.0
        wall = _FIRST_EPOCH + int((self.now_s + node.wall_off_s) * _EPOCHS_PER_S)
        chosen = Epoch(max(1, wall) if epoch is None else epoch)
        if node.disk and epoch is None:
            store = Store.restore(
                node.disk,
                StoreConfig(),
                MESH,
                node.signer,
                chosen,
                hash_verify,
                as_of_s=node.clock.at(self.now_s),
            )
        else:
            store = Store(StoreConfig(), MESH, node.signer, chosen, hash_verify)
        watched = WatchedStore.over(store)
        me = LocalNode(node.id, node.name, node.address)
        decrees = Decrees(hash_verify_decree)
        decrees.load(node.decrees)
        rng = random.Random(self.rng.getrandbits(64))
        core = self._core(self.config, me, watched, rng, decrees)
        life = node.life = Life(core, watched, watched.epoch)
        self.checker.born(node)
        return life

    def new_key(self, number: int) -> NodeId:
        """The node's key is lost, and its disk with it: it comes back as somebody else. Returns who it was."""
        node = self.nodes[number]
        assert node.life is None
        former = node.id
        node.signer = HashSigner(hashlib.sha256(node.signer.public_key).digest())
        node.id, node.disk = node_id_of(node.signer.public_key), b""
        self.by_id[node.id] = node
        return former

    # -- what may happen --------------------------------------------------------------------------------

    def write(self, number: int, key: str, value: Value) -> None:
        """The node writes its own record."""
        self.call(self.nodes[number], lambda core, now_s: core.set(key, value, now_s))

    def delete(self, number: int, key: str) -> None:
        """The node deletes a key of its own record."""
        self.call(self.nodes[number], lambda core, now_s: core.delete(key, now_s))

    def publish(self, number: int, value: Value) -> None:
        """The node publishes its load."""
        self.call(self.nodes[number], lambda core, now_s: core.publish("load", value, now_s))

    def leave(self, number: int) -> None:
        """The node says goodbye, and its process ends after the linger."""
        node = self.nodes[number]
        node.disturbed = True
        life = node.life
        assert life is not None
        self.call(node, lambda core, now_s: core.leave(now_s))

        def end() -> None:
            if node.life is life:
                self._end(node, goodbye=True)

        self.at(self.now_s + self.config.leave_linger_s, end)

    def crash(self, number: int, *, host: bool = False) -> None:
        """The process is killed; with `host`, the whole machine goes silent."""
        node = self.nodes[number]
        node.host_up = not host
        self._end(node, goodbye=False)

    def save(self, number: int) -> None:
        """Write the node's snapshot to its disk."""
        node = self.nodes[number]
        assert node.life is not None
        node.disk = node.life.store.snapshot()

    def stall(self, number: int, for_s: float) -> None:
        """The process stands still; what arrives waits in its socket."""
        node = self.nodes[number]
        node.disturbed = True
        node.stalled_until_s = max(node.stalled_until_s, self.now_s + for_s)
        self.at(node.stalled_until_s, lambda: self._resume(node))

    def sleep(self, number: int, for_s: float, *, clock_stops: bool) -> None:
        """The machine sleeps: it neither computes nor hears. With `clock_stops`, it sees no time pass."""
        node, life = self.nodes[number], self.nodes[number].life
        self.stall(number, for_s)
        node.is_asleep = True

        def wake_up() -> None:
            if node.life is not life:
                return
            if clock_stops:
                node.clock.leap(self.now_s, -for_s)
            node.is_asleep, node.stalled_until_s = False, self.now_s
            self._resume(node)

        self.at(self.now_s + for_s, wake_up)

    def leap(self, number: int, by_s: float) -> None:
        """The node's monotonic clock jumps ahead, as if the process had stood still and missed nothing."""
        assert by_s >= 0.0
        node = self.nodes[number]
        node.disturbed = True
        node.clock.leap(self.now_s, by_s)
        self.rearm(node)

    def drift(self, number: int, rate: float) -> None:
        """The node's clock goes at this rate from now on."""
        node = self.nodes[number]
        node.clock.drift(self.now_s, rate)
        self.rearm(node)

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

    def deliver(self, source: int, target: int, payload: bytes, lane: Lane = Lane.DATAGRAM) -> None:
        """Hand a payload to a node as if another had sent it."""
        life = self.nodes[source].life
        assert life is not None
        effect = Send(self.nodes[target].address, self.id(target), payload, lane)
        sender = life.store.owner
        self._delivery.arrive(self.nodes[source], sender, life.epoch, self.nodes[target], effect)

    def heal(self) -> None:
        """The network is good again; stalled nodes go on by themselves."""
        self.network = Network()

    def move(self, number: int, address: Address) -> None:
        """The node is reached elsewhere from now on, and knows it."""
        node = self.nodes[number]
        del self.by_address[node.address]
        node.address = address
        self.by_address[address] = node
        self.call(node, lambda core, now_s: core.update_address(address, now_s))

    # -- running ----------------------------------------------------------------------------------------

    def at(self, due_s: float, call: Callable[[], None]) -> None:
        """Have something happen at a time."""
        self._created += 1
        heapq.heappush(self._heap, (due_s, self._created, call))

    def run(self, for_s: float) -> None:
        """Let time pass."""
        until_s = self.now_s + for_s
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(heap)
            self.steps += 1
            call()
        self.now_s = until_s

    def run_until(
        self, is_true: Callable[[], bool], within_s: float, what: str, step_s: float = 0.001
    ) -> float:
        """Let time pass until something holds; returns how long it took.

        Raises:
            Violation: it did not hold within the time.
        """
        began_s = self.now_s
        while not is_true():
            if self.now_s - began_s >= within_s:
                raise Violation(self.message(f"not within {within_s} s: {what}"))
            self.run(step_s)
        return self.now_s - began_s

    def settle(self, within_s: float = 30.0) -> float:
        """Wait until all that run agree on who lives and on every record; returns how long it took."""
        return self.run_until(Agreement(self).is_reached, within_s, "all agree", 0.005)

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
        return self.nodes[number].id

    def agreed(self) -> bool:
        """Whether all that run see exactly those that run as alive, and hold the same records of them."""
        return Agreement(self).is_reached()

    def states_of(self, number: int) -> list[MemberState | None]:
        """What every other running node believes of this one; None where it is not listed."""
        return [state for _, state in self.states_of_id(self.id(number))]

    def states_of_id(self, node_id: NodeId) -> list[tuple[SimNode, MemberState | None]]:
        """What every running node believes of this id, but for the node itself."""
        found: list[tuple[SimNode, MemberState | None]] = []
        for node in self.nodes:
            if node.life is not None and node.id != node_id:
                view = node.life.core.member(node_id)
                found.append((node, None if view is None else view.state))
        return found

    def check_all(self) -> None:
        """Look at everything that every node holds."""
        for node in self.nodes:
            self.checker.check_whole(node)

    def message(self, what: str) -> str:
        """What went wrong, and how to see it again."""
        replay = f"python -m tests.sim.run --seed {self.seed} --scenario {self.scenario}"
        return f"t={self.now_s:.4f} s: {what}\nseed {self.seed}; replay: {replay}"

    def fingerprint(self) -> str:
        """A hash of every event so far, in order."""
        return self._hash.hexdigest()

    def note(self, what: str, node: SimNode, detail: str = "") -> None:
        """Something happened: it goes into the fingerprint and the trace."""
        line = f"{self.now_s:.9f} {what} {node.number} {detail}"
        self._hash.update(line.encode())
        if self.trace_lines is not None:
            self.trace_lines.append(line)

    # -- inside -----------------------------------------------------------------------------------------

    def call(self, node: SimNode, call: CoreCall, life: Life | None = None) -> None:
        """Call a core, unless its process (or that life of it) does not run; it waits while it stalls."""
        running = node.life
        if running is None or (life is not None and life is not running):
            return
        if self.now_s < node.stalled_until_s:
            if len(node.backlog) < BACKLOG_MAX:
                node.backlog.append(lambda: self.call(node, call, running))
            return
        self._execute(node, running, call(running.core, node.clock.at(self.now_s)))

    def _execute(self, node: SimNode, life: Life, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self.checker.sent(effect)
                    self._delivery.send(node, life, effect)
                case Notify(event):
                    self._notified(node, life, event)
                case StreamPing():
                    self.streams.ping(node, life, effect)
                case Watch():
                    self.streams.watch(node, life, effect)
                case Unwatch():
                    self.streams.unwatch(life, effect)
                case Knock():
                    self.streams.knock(node, life, effect)
                case _:
                    assert_never(effect)
        self._schedule_wake(node, life)
        self.checker.check(node)

    def _end(self, node: SimNode, *, goodbye: bool) -> None:
        life = node.life
        assert life is not None
        life.ended, node.life = True, None
        node.disturbed, node.is_asleep = True, False
        node.backlog.clear()
        self.note("end", node)
        self.streams.ended(node, life, goodbye=goodbye)

    def rearm(self, node: SimNode) -> None:
        """The node's timers or its clock changed by another hand: see anew when it is to be woken."""
        if node.life is not None:
            node.life.wake_s = float("inf")
            self._schedule_wake(node, node.life)

    def _schedule_wake(self, node: SimNode, life: Life) -> None:
        deadline_s = life.core.deadline_s()
        if deadline_s == float("inf"):
            return
        due_s = max(node.clock.when(deadline_s), self.now_s)
        if due_s < life.wake_s:
            life.wake_s = due_s
            self.at(due_s, lambda: self._wake(node, life, due_s))

    def _wake(self, node: SimNode, life: Life, due_s: float) -> None:
        if life.ended or life.wake_s != due_s:
            return
        if self.now_s < node.stalled_until_s:
            return  # `_resume` wakes it
        life.wake_s = float("inf")
        shown_s, deadline_s = node.clock.at(self.now_s), life.core.deadline_s()
        if deadline_s <= shown_s + _ROUNDING_S:
            self.note("wake", node)
            self._execute(node, life, life.core.advance(max(shown_s, deadline_s)))
        else:
            self._schedule_wake(node, life)

    def _resume(self, node: SimNode) -> None:
        """As a driver does: what has arrived is taken in first, then timers fire."""
        if node.life is None or self.now_s < node.stalled_until_s:
            return
        self.note("resume", node)
        backlog, node.backlog = node.backlog, []
        for call in backlog:
            call()
        self.rearm(node)

    def _notified(self, node: SimNode, life: Life, event: Event) -> None:
        self.events.append((self.now_s, life.store.owner, event))
        self.note("event", node, repr(event))
        match event:
            case SelfEpochRaised(epoch):
                life.epoch = epoch
            case Decreed(decree):
                node.decrees.append(decree.raw)
            case MemberFailed() | MemberSuspected():
                life.told_of[event.node] = None
                about = self.by_id[event.node]
                harmed = about.life is None or about.disturbed or about.id != event.node
                if not harmed and not node.disturbed:
                    if isinstance(event, MemberFailed):
                        self.false_deaths += 1
                    else:
                        self.false_suspicions += 1
            case (
                MemberJoined()
                | MemberUpdated()
                | MemberAlive()
                | MemberLeft()
                | MemberForgotten()
                | MemberRevoked()
            ):
                life.told_of[event.node] = None
            case _:
                pass
