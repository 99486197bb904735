"""Fuzz targets of the gossip core: what they feed, and what must hold whatever they feed.

A target is made anew for every block of inputs. `case` makes an input, `feed` hands it in and raises
`Broken` (or lets whatever the code raised through) when something is wrong, `finish` looks once more at the
end of a block. An input is bytes and nothing else, so that a run, a replay and a coverage-guided fuzzer feed
the same way.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import ip_address
from time import thread_time
from typing import ClassVar, Final

from tests.fuzz.support_figures import Broken, Figures
from tests.fuzz.support_grammar import Grammar
from tests.fuzz.support_mutation import mutant
from tests.fuzz.support_scene import (
    LIAR,
    NODES,
    SEALED_BYTES,
    SILENT,
    VICTIM,
    Identity,
    Scene,
    alive,
    answered,
    read,
    traffic,
)
from tests.fuzz.support_sizes import sizes

from meshd.core.config import GossipConfig
from meshd.core.effects import Address, Effect, Knock, Lane, Send, StreamPing, Watch
from meshd.core.messages import Ack, Claim, Heartbeat, Join, JoinAnswer, Message, Ping
from meshd.core.wire import decode, encode, payload_of
from meshd_cms.errors import CodecError
from meshd_cms.types import NodeId, StoreConfig, Version

STEP_S: Final = 0.002  # between inputs: 500 a second
LOOK_EVERY: Final = 500  # inputs between two looks at everything
KINDS_MAX: Final = 3  # of message kinds in a label of the figures
COUNTER_MAX: Final = 2**53  # what a node may be brought to say of itself stays below

_PAYLOADS: Final = 0.45  # share of mutants among the inputs; of the rest, most are of the grammar


class Target(ABC):
    """One thing that is fuzzed."""

    name: ClassVar[str]

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.figures = Figures()

    @abstractmethod
    def case(self) -> bytes:
        """The next input."""

    @abstractmethod
    def feed(self, data: bytes) -> None:
        """Hand one input in."""

    def finish(self) -> None:  # noqa: B027  (most targets have nothing left to look at)
        """The last look, at the end of a block."""


def bounds(config: GossipConfig) -> dict[str, int]:
    """The named bound of every table that a peer can make grow, by what `sizes` calls it."""
    store = StoreConfig()
    return {
        "Members._table": config.members_max,
        "Members._by_address": config.members_max,
        "Members._graveyard": config.graveyard_max,
        "Member.accusers": config.members_max,
        "Rumours._rumours": config.rumours_max,
        "Prober._relays": config.relayed_probes_max,
        "Prober._probes": config.probes_in_flight_max,
        "Prober._stream_pings": config.probes_in_flight_max,
        "Repair._wanted": config.pulls_max,
        "Joining._seeds": config.seeds_max,
        "Store._records": store.owners_max,
        "Store._parked": store.parked_max,
        "Store._graveyard": store.graveyard_max,
        "Timers._heap": 2 * (config.members_max + config.relayed_probes_max + 256),
    }


def check_sizes(found: dict[str, int], config: GossipConfig) -> None:
    """Every table is within its bound; one without a name here, within that of the members."""
    limits = bounds(config)
    for where, length in found.items():
        most = limits.get(where, 2 * config.members_max)
        if length > most:
            raise Broken(f"{where} holds {length}, at most {most} are allowed")


class CoreTarget(Target):
    """`NodeCore.receive` of a node with a dozen members. An input: who sends, then the payload."""

    from_members: ClassVar[bool]

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.scene = Scene(seed=rng.getrandbits(32))
        recorded = traffic()
        self._corpus = [heard.payload for heard in recorded.heard]
        self._written = recorded.written
        self._grammar = Grammar(recorded)
        self._fed = 0
        self._claimed = {view.node for view in self.scene.core.members()}
        self._own_items = self.scene.store.items(self.scene.store.owner)
        self._own = self._own_order()
        self._lines: dict[NodeId, tuple[int, int]] = {}
        self._look()

    # -- inputs -----------------------------------------------------------------------------------------

    def case(self) -> bytes:
        rng, way = self.rng, self.rng.random()
        who = rng.randrange(256)
        if way < _PAYLOADS:
            payload = mutant(self._corpus, rng)
        elif way < 0.95:
            payload = self._grammar.payload(rng)
        else:
            payload = rng.choice(self._corpus)
        return bytes((who,)) + payload

    def _who(self, head: int) -> tuple[Identity, int, Address, Lane]:
        """Sender, its epoch, its source address and the lane, out of the first byte of an input."""
        number, variant = head % 16, head // 16
        if self.from_members:
            one = self.scene.nodes[(LIAR, number % NODES)[number < NODES]]
            node, epoch, source = one.node, one.epoch, one.address
            peer = self.scene.honest.get(node)
            epoch = epoch if peer is None else peer.identity.epoch
        else:
            one = self.scene.nodes[LIAR]
            node = NodeId(hashlib.sha256(b"stranger %d" % number).digest()[:16])
            epoch, source = 1_000 + number, (f"192.0.2.{number + 1}", 40_000)
        if variant == 1:
            epoch = max(1, epoch - 1)
        elif variant == 2:
            epoch += 1
        elif variant == 3:
            source = ("198.51.100.7", 5353)
        lane = Lane.STREAM if variant == 4 else Lane.DATAGRAM
        return _as(one, node), epoch, source, lane

    # -- one input --------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        if not data:
            return
        sender, epoch, source, lane = self._who(data[0])
        payload, scene = data[1:], self.scene
        kind = self._kind(payload)
        before = None if kind else self._state()
        began_s = thread_time()
        effects = scene.inject(payload, sender.node, epoch, source, lane)
        took_s = thread_time() - began_s
        self._check(kind, effects, before)
        out = answered(effects)
        size = len(payload) + SEALED_BYTES
        self.figures.note(kind or "malformed", data, took_s, out.bytes / size, out.datagrams)
        self.figures.outcomes["decoded" if kind else "malformed"] += 1
        self.figures.received_bytes += size
        self.figures.answered_bytes += out.bytes
        scene.carry_out(effects)
        self._fed += 1
        fired = scene.at(scene.now_s + STEP_S)
        self.figures.answered_bytes += answered(tuple(fired)).bytes
        if self._fed % LOOK_EVERY == 0:
            self._look()

    def _kind(self, payload: bytes) -> str:
        """What is in a payload, by its kinds; empty when it is malformed."""
        try:
            messages = decode(payload)
        except CodecError:
            return ""
        self._claimed |= {one.update.node for one in messages if isinstance(one, Claim)}
        kinds = sorted({type(one).__name__ for one in messages})
        return "+".join(kinds[:KINDS_MAX]) or "empty"

    def _state(self) -> tuple[dict[str, int], bytes, object]:
        core = self.scene.core
        members = core.members() if self._fed % 8 == 0 else ()
        counted = core.statistics().items()
        kept = {name: count for name, count in counted if not name.startswith("offence")}
        return kept, core.state_hash, members

    def _check(
        self,
        kind: str,
        effects: tuple[Effect, ...],
        before: tuple[dict[str, int], bytes, object] | None,
    ) -> None:
        core = self.scene.core
        if before is not None:
            before[0]["dropped_malformed"] = before[0].get("dropped_malformed", 0) + 1
            if before != self._state() or effects:
                raise Broken(f"a malformed payload did more than be counted: {effects}")
        check_effects(effects, core.config)
        own = self._own_order()
        if own < self._own:
            raise Broken(f"our own claim went back from {self._own} to {own}")
        if max(own) > COUNTER_MAX:
            raise Broken(f"we were made to speak under {own}")
        self._own = own

    def _own_order(self) -> tuple[int, int]:
        view = self.scene.core.member(self.scene.store.owner)
        assert view is not None
        return int(view.epoch), view.incarnation

    # -- everything -------------------------------------------------------------------------------------

    def _look(self) -> None:
        scene, core, store = self.scene, self.scene.core, self.scene.store
        found = sizes(core)
        check_sizes(found, core.config)
        self.figures.hold(found)
        if store.items(store.owner) != self._own_items:
            raise Broken("somebody else wrote our own record")
        listed = {view.node for view in core.members()}
        if not listed <= self._claimed:
            raise Broken(f"members that nobody told of: {listed - self._claimed}")
        for number, one in enumerate(scene.nodes):
            if number not in (VICTIM, LIAR):
                self._check_record(one)

    def _check_record(self, one: Identity) -> None:
        line = self.scene.store.line(one.node)
        now = (0, 0) if line is None else (int(line.epoch), int(line.max_version))
        last, items = self._written.get((one.node, now[0]), (0, ()))
        if now[1] > last:
            raise Broken(f"{now} is held of {one.name}, which wrote no more than {last}")
        if now[1] == last and self.scene.store.items(one.node) != items:
            raise Broken(f"{one.name} did not write what is held of it")
        if now == (0, 0):  # it was gone for so long that it was forgotten
            self._lines.pop(one.node, None)
        elif now < self._lines.get(one.node, (0, 0)):
            raise Broken(f"the record of {one.name} went back to {now}")
        else:
            self._lines[one.node] = now

    def finish(self) -> None:
        """The node still works: its timers fire, it answers pings and joins, and it takes newcomers in."""
        self._look()
        self.scene.at(self.scene.now_s + 60.0)
        self._look()
        check_alive(self.scene)


def check_effects(effects: tuple[Effect, ...], config: GossipConfig) -> None:
    """What is sent can be read by others and is within its bounds."""
    for effect in effects:
        if isinstance(effect, Send | StreamPing | Watch | Knock):
            check_address(effect.to)
        if not isinstance(effect, Send):
            continue
        most = (
            config.datagram_payload_bytes_max
            if effect.lane is Lane.DATAGRAM
            else config.stream_payload_bytes_max
        )
        if len(effect.payload) > most:
            raise Broken(f"a {effect.lane.value} payload of {len(effect.payload)} bytes")
        read(effect.payload)


@lru_cache
def check_address(address: Address) -> None:
    """It is an IP literal and a port: anything else is looked up as a name, or breaks the socket."""
    host, port = address
    try:
        ip_address(host)
    except ValueError as error:
        raise Broken(f"{address!r} is no address") from error
    if not 0 < port < 65_536:
        raise Broken(f"{address!r} has a port that is none")


def said(effects: Iterable[Effect]) -> list[Message]:
    """All messages in what is sent."""
    return [
        message
        for effect in effects
        if isinstance(effect, Send)
        for message in read(effect.payload)
    ]


def check_alive(scene: Scene) -> None:
    """It acks a ping, answers a join and lists who joined."""
    core, me = scene.core, scene.store.owner
    newcomer = _as(scene.nodes[SILENT], NodeId(b"a true newcomer."))
    joining: list[Message] = [alive(newcomer), Join(77)]
    if not any(isinstance(one, JoinAnswer) for one in said(scene.tell(joining, newcomer))):
        raise Broken("a join is not answered")
    ping = Ping(78, me, Heartbeat(core.state_hash, Version(0)))
    if not any(isinstance(one, Ack) for one in said(scene.tell([ping], newcomer))):
        raise Broken("a ping is not answered")
    if core.member(newcomer.node) is None:
        raise Broken("a newcomer is not listed")


def _as(one: Identity, node: NodeId) -> Identity:
    return Identity(node, one.name, one.address, one.epoch, one.signer, one.record, one.items)


class FromStrangers(CoreTarget):
    """Whoever holds the mesh's key, and is no member."""

    name = "stranger"
    from_members = False


class FromMembers(CoreTarget):
    """A member, or somebody who writes a member's id on what it sends."""

    name = "member"
    from_members = True


class WireTarget(Target):
    """The codec of payloads alone: what is read can be written, and reads the same."""

    name = "wire"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        recorded = traffic()
        self._corpus = [heard.payload for heard in recorded.heard]
        self._grammar = Grammar(recorded)

    def case(self) -> bytes:
        if self.rng.random() < 0.7:
            return mutant(self._corpus, self.rng)
        return self._grammar.payload(self.rng)

    def feed(self, data: bytes) -> None:
        began_s = thread_time()
        try:
            messages = decode(data)
        except CodecError:
            self.figures.note("malformed", data, thread_time() - began_s)
            self.figures.outcomes["malformed"] += 1
            return
        self.figures.note("read", data, thread_time() - began_s)
        self.figures.outcomes["read"] += 1
        again = decode(payload_of([encode(message) for message in messages]))
        if repr(again) != repr(messages):  # NaN equals nothing
            raise Broken(f"{messages} came back as {again}")
