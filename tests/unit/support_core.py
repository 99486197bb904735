"""Node cores for unit tests: one core, made-up peers that are only ids, and readers of what it sends."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.unit.support_cms import store

from meshd.core.config import GossipConfig, lan
from meshd.core.effects import Address, Effect, Lane, Notify, Send
from meshd.core.events import Event
from meshd.core.membership import LocalNode, MemberState, Update
from meshd.core.messages import Claim, Message
from meshd.core.node import NodeCore
from meshd.core.wire import decode, encode, payload_of
from meshd_cms.store import Store
from meshd_cms.types import Epoch, NodeId

ME_ADDRESS: Address = ("10.0.0.1", 7946)


def node_id(number: int) -> NodeId:
    return NodeId(hashlib.sha256(b"peer %d" % number).digest()[:16])


def address(number: int) -> Address:
    return (f"10.0.1.{number}", 7946)


def claim(
    number: int,
    state: MemberState = MemberState.ALIVE,
    incarnation: int = 0,
    epoch: int = 10,
    accuser: int | None = None,
) -> Update:
    accused_by = node_id(number if accuser is None else accuser)
    return Update(
        node_id(number),
        state,
        Epoch(epoch),
        incarnation,
        f"peer-{number}",
        address(number),
        accused_by,
    )


@dataclass
class Bench:
    """One started core, epoch 100, at second 0; `peer` 1 speaks unless told otherwise."""

    core: NodeCore
    store: Store
    now_s: float = 0.0

    def tell(
        self,
        messages: Sequence[Message],
        peer: int = 1,
        epoch: int = 10,
        lane: Lane = Lane.DATAGRAM,
    ) -> tuple[Effect, ...]:
        payload = payload_of([encode(message) for message in messages])
        return self.core.receive(payload, node_id(peer), epoch, address(peer), lane, self.now_s)

    def meet(self, *numbers: int) -> None:
        for number in numbers:
            self.tell([Claim(claim(number), merged=False)], peer=number)

    def bury(self, number: int, incarnation: int = 0) -> tuple[Effect, ...]:
        """Two others, 61 and 62, tell that it is dead; they need not be members."""
        self.meet(61, 62)
        for accuser in (61, 62):
            told = claim(number, MemberState.SUSPECT, incarnation, accuser=accuser)
            self.tell([Claim(told, merged=False)], peer=accuser)
        dead = claim(number, MemberState.DEAD, incarnation, accuser=61)
        return self.tell([Claim(dead, merged=False)], peer=61)

    def run(self, for_s: float) -> list[tuple[float, Effect]]:
        """Let time pass with nobody answering."""
        seen: list[tuple[float, Effect]] = []
        until_s = self.now_s + for_s
        while self.core.deadline_s() <= until_s:
            self.now_s = max(self.now_s, self.core.deadline_s())
            seen += [(self.now_s, effect) for effect in self.core.advance(self.now_s)]
        self.now_s = until_s
        return seen

    def state(self, number: int) -> MemberState | None:
        view = self.core.member(node_id(number))
        return None if view is None else view.state


def bench(config: GossipConfig | None = None) -> Bench:
    own = store(0, epoch=100)
    me = LocalNode(own.owner, "me", ME_ADDRESS)
    core = NodeCore(config or lan(), me, own, random.Random(1))
    core.start(0.0)
    return Bench(core, own)


def messages_in(effects: Sequence[Effect], to: Address | None = None) -> list[Message]:
    return [
        message
        for effect in effects
        if isinstance(effect, Send) and to in (None, effect.to)
        for message in decode(effect.payload)
    ]


def events_in(effects: Sequence[Effect]) -> list[Event]:
    return [effect.event for effect in effects if isinstance(effect, Notify)]


def by_stream(effects: Sequence[Effect]) -> list[Effect]:
    return [one for one in effects if isinstance(one, Send) and one.lane is Lane.STREAM]
