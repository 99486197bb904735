"""SWIM's failure detector: who is asked when, through whom, and what silence means.

Invariants: every second probe goes to our successor in the ring of the living, ordered by id, so every node
is probed by a known one at least every two intervals, whatever chance does; the others go once round a
shuffled list, so a given prober reaches a given member within 2(2N - 1) intervals, and newcomers enter at a
random place; a probe ends exactly once, as answered or as failed; a probe that fails while its subject took
a new incarnation accuses nobody.

A probe: a ping; after the timeout, in parallel, `indirect_probes` helpers are asked and a stream ping is
made; at its deadline, no answer by any of the three ways is a failure. A helper that gets no ack
either says nack: a missing nack is our own fault as likely as the subject's (Lifeguard, local health).
A ping to a suspect carries the suspicion first, so that it can refute at once (Lifeguard, buddy system).
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshd.core.context import Context, Peer
from meshd.core.dissemination import Rumours
from meshd.core.effects import StreamPing
from meshd.core.membership import Member, MemberState, Update
from meshd.core.messages import Ack, Claim, Message, Nack, Ping, PingRequest
from meshd.core.timers import Timer
from meshd_cms.types import NodeId

_NACK_SHARE = 0.8  # of the probe timeout: a nack has to be back before the prober's deadline


@dataclass(slots=True)
class _Probe:
    node: NodeId
    update: Update  # what was held of it when the probe began
    started_s: float
    timer: Timer
    helpers: int = 0
    nacks: int = 0


@dataclass(slots=True)
class _Relay:
    """A probe made for somebody else."""

    requester: Peer
    sequence: int  # the requester's
    target: NodeId
    timer: Timer


class Prober:
    """All probes of this node.

    Args:
        context: shared with the other parts.
        rumours: fills the room in pings and acks.
        failed: called with a member that did not answer a whole probe, and for how long, in seconds.
        answered: called with a node that answered a stream ping.
        isolated: called instead of `failed` when nobody at all has been heard for long.
        extras: messages that ride in every ping and ack (our load).
    """

    def __init__(
        self,
        context: Context,
        rumours: Rumours,
        failed: Callable[[NodeId, float], None],
        answered: Callable[[NodeId], None],
        isolated: Callable[[], None],
        extras: Callable[[Peer], Sequence[Message]],
    ) -> None:
        self._context = context
        self._rumours = rumours
        self._failed = failed
        self._stream_answered = answered
        self._isolated = isolated
        self._extras = extras
        self._ring: list[NodeId] = []
        self._next = 0
        self._circle: list[Member] = []  # the alive, by id
        self._circle_of: list[Member] | None = None  # what it was made of
        self._round_timer: Timer | None = None
        self._successor_is_next = context.rng.random() < 0.5
        self._probes: dict[int, _Probe] = {}
        self._relays: dict[int, _Relay] = {}
        self._stream_pings: dict[int, NodeId] = {}

    def start(self) -> None:
        """Begin, at a random point of the period so that nodes started together do not probe together."""
        context, config = self._context, self._context.config
        first_s = context.now_s + context.rng.uniform(0, config.probe_interval_s)
        dead_s = context.now_s + context.rng.uniform(0, config.dead_probe_interval_s)
        self._round_timer = context.timers.at(first_s, self._round)
        context.timers.at(dead_s, self._try_dead)

    def enlist(self, node: NodeId) -> None:
        """A new live member: it enters the round at a random place."""
        if node not in self._ring:
            place = self._context.rng.randint(0, len(self._ring))
            self._ring.insert(place, node)
            if place < self._next:
                self._next += 1

    def probe(self, member: Member) -> None:
        """Probe a member now, unless a probe of it is under way."""
        context = self._context
        if any(probe.node == member.node for probe in self._probes.values()):
            return
        if len(self._probes) >= context.config.probes_in_flight_max:
            context.count("probe_overflow")
            return
        sequence = context.next_sequence()
        due_s = context.now_s + context.config.probe_timeout_s * context.health.factor
        timer = context.timers.at(due_s, lambda: self._ask_others(sequence))
        self._probes[sequence] = _Probe(member.node, member.update, context.now_s, timer)
        context.count("probes")
        self._ping(sequence, member)

    def is_witness(self, update: Update) -> bool:
        """Whether we are among the few who, by rendezvous hashing, check a suspicion at once."""
        context = self._context

        def weight(node: NodeId) -> bytes:
            text = b"%b %b %d %d" % (update.node, node, update.epoch, update.incarnation)
            return hashlib.blake2b(text, digest_size=8).digest()

        ours = weight(context.me.node)
        alive = (m for m in context.members.live() if m.state is MemberState.ALIVE)
        others = (member.node for member in alive if member.node != update.node)
        heavier = sum(weight(node) > ours for node in others)
        return heavier < context.config.witnesses

    def stream_ping(self, member: Member) -> None:
        """Ask over the stream, unless that is under way."""
        if member.node in self._stream_pings.values():
            return
        if len(self._stream_pings) >= self._context.config.probes_in_flight_max:
            self._context.count("probe_overflow")
            return
        token = self._context.next_sequence()
        self._stream_pings[token] = member.node
        self._context.count("stream_pings")
        self._context.emit(StreamPing(member.node, member.address, token))

    # -- what comes in ----------------------------------------------------------------------------------

    def on_ping(self, ping: Ping, peer: Peer) -> None:
        """Answer, if it is for us; an address may have had another holder."""
        context = self._context
        if not ping.is_for(context.me.node):
            context.count("ping_for_another")
            return
        ack = Ack(ping.sequence, None, context.heartbeat().answering(ping.heartbeat))
        self._rumours.send(peer, [ack, *self._extras(peer)])

    def on_ack(self, ack: Ack, sender: NodeId) -> None:
        """A probe of ours is answered, or one that we make for another."""
        context = self._context
        subject = sender if ack.subject is None else ack.subject
        relay = self._relays.get(ack.sequence)
        if relay is not None and relay.target == sender == subject:
            del self._relays[ack.sequence]
            relay.timer.cancel()
            context.send(relay.requester, [Ack(relay.sequence, subject, ack.heartbeat)])
            return
        probe = self._probes.get(ack.sequence)
        if probe is None or probe.node != subject:
            context.count("ack_unexpected")
            return
        member = context.members.get(probe.node)
        if member is not None and sender == probe.node:
            sample_s = context.now_s - probe.started_s
            before_s = member.round_trip_s
            # The gain of TCP's smoothed round trip (RFC 6298): an eighth.
            member.round_trip_s = (
                sample_s if before_s is None else before_s + (sample_s - before_s) / 8
            )
        self._answered(ack.sequence)

    def on_ping_request(self, request: PingRequest, peer: Peer) -> None:
        """Probe for another; say nack when the ack is late, relay it all the same."""
        context = self._context
        if len(self._relays) >= context.config.relayed_probes_max:
            context.count("relay_overflow")
            return
        sequence = context.next_sequence()
        due_s = context.now_s + context.config.probe_timeout_s * _NACK_SHARE
        timer = context.timers.at(due_s, lambda: self._nack(sequence))
        self._relays[sequence] = _Relay(peer, request.sequence, request.target, timer)
        context.count("probes_relayed")
        target = Peer(request.target, request.address)
        context.send(target, [Ping(sequence, request.target, context.heartbeat())])

    def on_nack(self, nack: Nack) -> None:
        """A helper heard us, and heard nothing of the subject."""
        probe = self._probes.get(nack.sequence)
        if probe is not None and probe.nacks < probe.helpers:
            probe.nacks += 1

    def on_stream_ping(self, token: int, *, ok: bool) -> None:
        """The stream ping ended: an answer is as good as an ack."""
        node = self._stream_pings.pop(token, None)
        if node is None:
            self._context.count("stream_ping_unexpected")
            return
        if ok:
            self._context.heard_s = self._context.now_s
            for sequence in [key for key, probe in self._probes.items() if probe.node == node]:
                self._context.count("stream_rescues")
                self._answered(sequence)
            self._stream_answered(node)

    # -- the course of a probe --------------------------------------------------------------------------

    def _round(self) -> None:
        context = self._context
        self._successor_is_next = not self._successor_is_next
        member = self._successor() if self._successor_is_next else None
        member = member or self._next_member()
        if member is not None:
            self.probe(member)
        # The ill wait longer, unless this probe is answered: see `_answered`.
        interval_s = context.config.probe_interval_s * context.health.factor
        self._round_timer = context.timers.at(context.now_s + interval_s, self._round)

    def _successor(self) -> Member | None:
        """Who follows us in the ring of ids; the suspected are others' work already."""
        context = self._context
        live = context.members.live()
        if (
            live is not self._circle_of
        ):  # the table makes a new list when somebody comes, goes or is suspected
            self._circle_of = live
            alive = (one for one in live if one.state is MemberState.ALIVE)
            self._circle = sorted(alive, key=lambda one: one.node)
        if not self._circle:
            return None
        place = bisect.bisect(self._circle, context.me.node, key=lambda one: one.node)
        return self._circle[place % len(self._circle)]

    def _next_member(self) -> Member | None:
        for _ in range(len(self._ring) + 1):
            if self._next >= len(self._ring):
                self._ring = [member.node for member in self._context.members.live()]
                self._context.rng.shuffle(self._ring)
                self._next = 0
                if not self._ring:
                    return None
            member = self._context.members.get(self._ring[self._next])
            self._next += 1
            if member is not None and member.is_live:
                return member
        return None

    def _try_dead(self) -> None:
        """Ping one dead member now and then: after a partition heals, that is the way back."""
        context = self._context
        dead = context.members.dead()
        if dead:
            context.count("dead_probes")
            self._ping(context.next_sequence(), context.rng.choice(dead))
        context.timers.at(context.now_s + context.config.dead_probe_interval_s, self._try_dead)

    def _ping(self, sequence: int, member: Member) -> None:
        messages: list[Message] = []
        if member.state is not MemberState.ALIVE:
            messages.append(Claim(member.update, merged=False))
        messages.append(Ping(sequence, member.node, self._context.heartbeat()))
        peer = Peer(member.node, member.address)
        if member.state is MemberState.DEAD:
            # It may have been away while we changed: it has to know who asks.
            # And another may hold its address by now, so it is for anyone.
            anyone = Peer(None, member.address)
            self._context.send(anyone, [*messages, Claim(self._context.own_update(), merged=False)])
        else:
            self._rumours.send(peer, [*messages, *self._extras(peer)])

    def _ask_others(self, sequence: int) -> None:
        context, probe = self._context, self._probes[sequence]
        member = context.members.get(probe.node)
        if member is None or not member.is_live:
            del self._probes[sequence]
            return
        if self._is_isolated():
            self._isolated()
        helpers = context.members.sample(context.config.indirect_probes, member.node)
        probe.helpers = len(helpers)
        for helper in helpers:
            request = PingRequest(sequence, member.node, member.address)
            context.send(Peer(helper.node, helper.address), [request])
        self.stream_ping(member)
        end_s = probe.started_s + context.config.probe_deadline_s * context.health.factor
        probe.timer = context.timers.at(max(end_s, context.now_s), lambda: self._end(sequence))

    def _end(self, sequence: int) -> None:
        context, probe = self._context, self._probes.pop(sequence)
        context.health.worse(probe.helpers - probe.nacks)
        context.count("probes_failed")
        member = context.members.get(probe.node)
        if member is None or not member.is_live:
            return
        if self._is_isolated():
            self._isolated()
            return
        now = member.update
        if (now.epoch, now.incarnation) == (probe.update.epoch, probe.update.incarnation):
            self._failed(probe.node, context.now_s - probe.started_s)

    def _is_isolated(self) -> bool:
        heard_s = self._context.heard_s
        isolation_s = self._context.config.isolation_s
        return heard_s is not None and self._context.now_s - heard_s >= isolation_s

    def _answered(self, sequence: int) -> None:
        context, probe = self._context, self._probes.pop(sequence)
        probe.timer.cancel()
        context.health.better()
        # Who is answered need not wait as the ill do, or it would be ill for a minute after a cut.
        next_s = max(context.now_s, probe.started_s + context.config.probe_interval_s)
        if self._round_timer is not None and self._round_timer.due_s > next_s:
            self._round_timer.cancel()
            self._round_timer = context.timers.at(next_s, self._round)

    def _nack(self, sequence: int) -> None:
        context, relay = self._context, self._relays[sequence]
        context.send(relay.requester, [Nack(relay.sequence)])
        due_s = context.now_s + context.config.probe_deadline_s
        relay.timer = context.timers.at(due_s, lambda: self._forget_relay(sequence))

    def _forget_relay(self, sequence: int) -> None:
        del self._relays[sequence]
