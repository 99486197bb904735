"""Two real cores that know the same others, and talk until nothing is left to say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.unit.support_cms import store
from tests.unit.support_core import claim, messages_in, node_id

from meshd.core.config import SEALING_BYTES, lan
from meshd.core.effects import Address, Effect, Lane, Send
from meshd.core.membership import LocalNode, MemberState, Update
from meshd.core.messages import Claim, Digest, Heartbeat, Message, Ping, Pull, Record, Summary, View
from meshd.core.node import NodeCore
from meshd.core.wire import encode, payload_of
from meshd_cms.store import Store
from meshd_cms.types import Version

REPAIR = (Summary, View, Digest, Pull, Claim, Record)
TELLER = 9_999  # the number of a node that speaks to both, and is nobody else's


@dataclass
class Side:
    """One of the two."""

    core: NodeCore
    store: Store
    address: Address
    now_s: float = 0.0

    @property
    def update(self) -> Update:
        """Its claim about itself."""
        me = self.store.owner
        return Update(me, MemberState.ALIVE, self.store.epoch, 0, "side", self.address, me)

    def tell(self, messages: Sequence[Message]) -> tuple[Effect, ...]:
        payload = payload_of([encode(message) for message in messages])
        sender, source = node_id(TELLER), known(TELLER).address
        return self.core.receive(payload, sender, 10, source, Lane.DATAGRAM, self.now_s)

    def run(self, for_s: float) -> list[Effect]:
        """Let time pass."""
        seen: list[Effect] = []
        until_s = self.now_s + for_s
        while self.core.deadline_s() <= until_s:
            self.now_s = max(self.now_s, self.core.deadline_s())
            seen += self.core.advance(self.now_s)
        self.now_s = until_s
        return seen


@dataclass
class Pair:
    """Both, and the datagrams of repair between them, in bytes as sealed."""

    one: Side
    two: Side
    datagrams: list[int] = field(default_factory=list[int])

    def exchange(self) -> None:
        """The second says that it is another state, so that the first begins an exchange; hear both out."""
        for side in (self.one, self.two):
            assert side.core.state_hash  # its age counts from here
            side.run(lan().hash_settle_s + 0.05)
        other = Ping(1, self.one.store.owner, Heartbeat(bytes(8), Version(0)))
        ping = payload_of([encode(other)])
        self.one.core.receive(
            ping, self.two.store.owner, self.two.store.epoch, self.two.address,
            Lane.DATAGRAM, self.one.now_s,
        )  # fmt: skip
        waiting: list[tuple[Side, Effect]] = []
        for _ in range(8):  # each turn, a pull that was delayed goes out
            for side in (self.one, self.two):
                waiting += [(side, effect) for effect in side.run(0.2)]
            while waiting:
                side, effect = waiting.pop(0)
                waiting += self._carry(side, effect)

    def _carry(self, sender: Side, effect: Effect) -> list[tuple[Side, Effect]]:
        target = self.two if sender is self.one else self.one
        if not isinstance(effect, Send) or effect.node != target.store.owner:
            return []
        if not all(isinstance(one, REPAIR) for one in messages_in([effect])):
            return []  # a probe of theirs is no part of it
        self.datagrams.append(len(effect.payload) + SEALING_BYTES)
        answers = target.core.receive(
            effect.payload, sender.store.owner, sender.store.epoch, sender.address,
            effect.lane, target.now_s,
        )  # fmt: skip
        return [(target, answer) for answer in answers]


def pair(others: int) -> Pair:
    """Two cores that know each other and the same others, and hold no records."""
    sides: list[Side] = []
    # Nobody is probed meanwhile: the others are not there to answer.
    config = replace(lan(), probe_interval_s=1e6, anti_entropy_interval_s=1e6)
    for number in (10_001, 10_002):
        own, at = store(number, epoch=100), (f"10.0.0.{number - 10_000}", 7946)
        core = NodeCore(config, LocalNode(own.owner, "side", at), own, random.Random(number))
        core.start(0.0)
        sides.append(Side(core, own, at))
    one, two = sides
    for side, other in ((one, two), (two, one)):
        claims = [Claim(known(TELLER), merged=False), Claim(other.update, merged=True)]
        claims += [Claim(known(number), merged=True) for number in range(1, others + 1)]
        for start in range(0, len(claims), 10):
            side.tell(claims[start : start + 10])
        side.run(30.0)  # what it pulls is not there, and its rumours find nobody
    return Pair(one, two)


def known(number: int) -> Update:
    """The claim of one of the others about itself."""
    return replace(claim(number), address=(f"10.1.{number // 250}.{number % 250 + 1}", 7946))
