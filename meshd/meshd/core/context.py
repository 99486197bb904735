"""What the parts of one node core share: the time, who we are, the timers, the table and what comes out.

A part (rumours, probes, repair, joining, soft lane) is a class over this context. It changes its own state
and the context's tables, and emits effects in order; `node.py` hands them out at the end of the call.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from meshd.core.config import GossipConfig
from meshd.core.decrees import Decrees
from meshd.core.effects import Address, Effect, Lane, Notify, Send
from meshd.core.events import Event
from meshd.core.membership import LocalNode, Members, MemberState, StateHash, Update
from meshd.core.messages import Heartbeat, Message
from meshd.core.offences import Offence, Offences
from meshd.core.suspicion import LocalHealth
from meshd.core.timers import Timers
from meshd.core.wire import encode, payload_of, payloads_of
from meshd_cms.store import Store
from meshd_cms.types import NodeId, Version


@dataclass(frozen=True, slots=True)
class Peer:
    """Where an answer goes."""

    node: NodeId | None  # None: unknown, a first contact
    address: Address
    lane: Lane = Lane.DATAGRAM  # by which it was heard; see `Context.answer`


class Context:
    """Mutable; owned by one `NodeCore`."""

    def __init__(
        self,
        config: GossipConfig,
        me: LocalNode,
        store: Store,
        rng: random.Random,
        decrees: Decrees,
    ) -> None:
        assert me.node == store.owner, "the store is another node's"
        self.config = config
        self.me = me
        self.store = store
        self.rng = rng
        self.decrees = decrees
        self.now_s = 0.0
        self.heard_s: float | None = None  # when a member of this mesh last spoke to us
        self.datagram_s: float | None = None  # when one last did so by datagram
        self.incarnation = 0
        self.leaving = False
        self.timers = Timers()
        self.members = Members(config, me.node, rng)
        self.health = LocalHealth(config.local_health_max)
        self.counters: Counter[str] = Counter()
        self.offences = Offences()
        self._effects: list[Effect] = []
        self._state_hash = StateHash()
        self._hash = bytes(8)
        self._hash_is_stale = True
        self._hash_since_s = 0.0
        self._touched_s = 0.0
        self._sequence = 0

    def own_update(self) -> Update:
        """Our own claim about ourselves, now."""
        state = MemberState.LEFT if self.leaving else MemberState.ALIVE
        me = self.me
        return Update(
            me.node, state, self.store.epoch, self.incarnation, me.name, me.address, me.node
        )

    def next_sequence(self) -> int:
        """A number not used by us before."""
        self._sequence += 1
        return self._sequence

    def count(self, name: str) -> None:
        """One more of what `statistics` reports under this name."""
        self.counters[name] += 1

    def offend(self, node: NodeId, kind: Offence) -> None:
        """A node did what no honest one does: count it, by kind and by name."""
        self.count(f"offence_{kind.value}")
        self.offences.note(node, kind)

    def are_datagrams_silent(self) -> bool:
        """Whether no member has spoken by datagram for as long as makes a node isolated."""
        last_s = self.datagram_s
        return last_s is None or self.now_s - last_s >= self.config.isolation_s

    # -- what comes out ---------------------------------------------------------------------------------

    def emit(self, effect: Effect) -> None:
        """Hand out an effect."""
        self._effects.append(effect)

    def notify(self, event: Event) -> None:
        """Tell the rest of the daemon."""
        self._effects.append(Notify(event))

    def send(self, peer: Peer, messages: Sequence[Message]) -> None:
        """Send messages, in order, in as many datagrams as they need."""
        bytes_max = self.config.datagram_payload_bytes_max
        for payload in payloads_of([encode(message) for message in messages], bytes_max):
            self.send_payload(peer, payload)

    def answer(self, peer: Peer, messages: Sequence[Message]) -> None:
        """Send messages the way the peer was heard: to who speaks by stream, datagrams may not get."""
        if peer.lane is Lane.STREAM and peer.node is not None:
            payload = payload_of([encode(message) for message in messages])
            self.count("streams_sent")
            self.emit(Send(peer.address, peer.node, payload, Lane.STREAM))
        else:
            self.send(peer, messages)

    def send_payload(self, peer: Peer, payload: bytes) -> None:
        """Send one datagram."""
        assert len(payload) <= self.config.datagram_payload_bytes_max
        self.count("datagrams_sent")
        self._effects.append(Send(peer.address, peer.node, payload))

    def take_effects(self) -> tuple[Effect, ...]:
        """Everything emitted since the last call."""
        effects = tuple(self._effects)
        self._effects.clear()
        return effects

    # -- the state hash ---------------------------------------------------------------------------------

    def touch(self) -> None:
        """The members or the records changed."""
        self._hash_is_stale = True
        self._touched_s = self.now_s

    def state_hash(self) -> bytes:
        """See `membership.StateHash`; computed when it is asked for."""
        if self._hash_is_stale:
            lives = [(self.me.node, self.store.epoch, self.incarnation)]
            for member in self.members.live():
                update = member.update
                lives.append((update.node, update.epoch, update.incarnation))
            now = _xor(self._state_hash.of(lives, self.store.line), self.decrees.hash)
            if now != self._hash:
                self._hash, self._hash_since_s = now, self._touched_s
            self._hash_is_stale = False
        return self._hash

    def hash_age_s(self) -> float:
        """How long the state hash has been what it is."""
        self.state_hash()
        return self.now_s - self._hash_since_s

    def heartbeat(self) -> Heartbeat:
        """What every ping and ack of ours says."""
        line = self.store.line(self.me.node)
        return Heartbeat(self.state_hash(), Version(0) if line is None else line.max_version)


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
