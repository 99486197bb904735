"""The node core: membership, rumours, anti-entropy and soft state of one node, composed.

Invariants:

* The core is told the time and never goes back in it; the same calls give the same effects, byte for byte.
* `receive` never raises on what a peer sent: a payload that is malformed as a whole or in part is counted and
  changes nothing.
* Only we speak for ourselves: a claim about us that is not ours is answered with a higher incarnation, or a
  higher epoch where no incarnation helps.
* A timer that fires late means that this process stood still, not that the others were silent: all timers
  are moved by what was lost, and our health is the worse for it.

The parts: `membership` (the table and its order of claims), `suspicion` (how long a suspect has), `probes`
(SWIM's detector), `dissemination` (rumours), `repair` (Scuttlebutt), `joining` (first contacts), `soft_lane`
(load). Here they are wired: what is heard of a member goes to the table, what the table says goes to the rest.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from meshd.core.answers import Answers
from meshd.core.claims import Claims
from meshd.core.config import GossipConfig
from meshd.core.context import Context, Peer
from meshd.core.decrees import Decrees
from meshd.core.dissemination import Rumours
from meshd.core.effects import Address, Effect, Lane
from meshd.core.forgetting import Forgetting
from meshd.core.joining import Joining
from meshd.core.membership import LocalNode, Member, MemberState, MemberView, Update
from meshd.core.messages import (
    Ack,
    Claim,
    DecreesHeld,
    Digest,
    Interest,
    Join,
    JoinAnswer,
    JoinLater,
    Message,
    Nack,
    Ping,
    PingRequest,
    Proclaim,
    Pull,
    Record,
    Soft,
    SoftStill,
    Summary,
    View,
)
from meshd.core.offences import Offence
from meshd.core.probes import Prober
from meshd.core.proclaiming import Proclaiming
from meshd.core.repair import Repair
from meshd.core.soft_lane import SoftLane
from meshd.core.wire import decode
from meshd.core.witnesses import Witnesses
from meshd_cms.errors import CodecError
from meshd_cms.soft import SoftItem, SoftState
from meshd_cms.store import Store
from meshd_cms.types import Delta, Epoch, NodeId, Value

_HEARD_MAX = 16  # payloads kept decoded
_SWEEP_S = 1.0  # how often members gone for long are looked for


class NodeCore:
    """One node. Synchronous; one owner; each call returns the effects to carry out, in order.

    Args:
        config: the knobs; see `config.lan` and the other presets.
        me: what this node is made known as.
        store: the records, ours among them; from now on only this core writes to it.
        rng: the only randomness used.
        decrees: what the authorities of the mesh decreed, as far as it is known; only this core adds to it.
    """

    def __init__(
        self,
        config: GossipConfig,
        me: LocalNode,
        store: Store,
        rng: random.Random,
        decrees: Decrees | None = None,
    ) -> None:
        self.config = config
        decrees = Decrees() if decrees is None else decrees
        context = self._context = Context(config, me, store, rng, decrees)
        self._started_s = 0.0
        self._heard: dict[bytes, tuple[Message, ...]] = {}
        self._soft = SoftLane(context)
        self._rumours = Rumours(context)
        self._prober = Prober(
            context,
            self._rumours,
            self._suspect,
            self._stream_answered,
            lambda: self._claims.isolated(),
            self._soft.riding,
        )
        self._forgetting = Forgetting(context, self._soft)
        self._claims = Claims(context, self._rumours, self._prober, self._soft, self._forgetting)
        self._witnesses = Witnesses(context, self._gone, self._prober.probe)
        answers = Answers(context)
        self._repair = Repair(context, self._rumours, answers, self._claims.learn_own_epoch)
        self._proclaiming = Proclaiming(context, self._rumours, answers, self._claims.expel)
        self._joining = Joining(context, self._repair)
        self._claims.newcomer = self._repair.fetch
        self._claims.came_back = self._repair.exchange
        self._claims.alone = self._joining.alone
        self._claims.changed = self._witnesses.changed

    # -- the course of the time -------------------------------------------------------------------------

    def start(self, now_s: float) -> tuple[Effect, ...]:
        """Begin: timers run from now on."""
        context = self._context
        context.now_s = now_s
        self._started_s = now_s
        self._prober.start()
        self._repair.start()
        self._soft.start()
        context.timers.at(now_s + _SWEEP_S, self._sweep)
        return context.take_effects()

    def deadline_s(self) -> float:
        """When `advance` is due; `math.inf` before `start`. May lie in the past: then it is due now."""
        return self._context.timers.deadline_s()

    def advance(self, now_s: float) -> tuple[Effect, ...]:
        """Fire every timer that is due. Take in what has arrived first: see the driver."""
        context = self._context
        self._at(now_s)
        late_s = now_s - context.timers.deadline_s()
        if late_s > self.config.stall_s:
            context.count("stalls")
            context.health.worse()
            context.timers.postpone(late_s)
        while (call := context.timers.pop_due(now_s)) is not None:
            call()
        return context.take_effects()

    # -- our own state ----------------------------------------------------------------------------------

    def set(self, key: str, value: Value, now_s: float) -> tuple[Effect, ...]:
        """Write a key of our own record, and spread it.

        Raises:
            StoreError: the store refused it; nothing was changed.
        """
        self._at(now_s)
        return self._wrote(self._context.store.set(key, value))

    def delete(self, key: str, now_s: float) -> tuple[Effect, ...]:
        """Delete a key of our own record, and spread that."""
        self._at(now_s)
        return self._wrote(self._context.store.delete(key))

    def publish(self, key: str, value: Value, now_s: float) -> tuple[Effect, ...]:
        """A soft reading of our own, such as "load".

        Raises:
            InvalidKey, ValueTooLarge: nothing was published.
        """
        self._at(now_s)
        if not self._context.leaving:
            self._soft.publish(key, value)
        return self._context.take_effects()

    def observe(
        self,
        owner: NodeId,
        key: str,
        epoch: Epoch,
        seq: int,
        value: Value,
        age_s: float,
        now_s: float,
    ) -> tuple[Effect, ...]:
        """A soft reading of another node, learnt outside gossip (in a reply)."""
        self._at(now_s)
        self._soft.observe(SoftItem(owner, epoch, seq, key, value, age_s))
        return self._context.take_effects()

    def interested(self, owners: Sequence[NodeId], now_s: float) -> tuple[Effect, ...]:
        """We route to these owners: in a large mesh, have them tell us their readings for a while."""
        self._at(now_s)
        if not self._context.leaving:
            self._soft.interested(owners)
        return self._context.take_effects()

    def update_address(self, address: Address, now_s: float) -> tuple[Effect, ...]:
        """This node is reached elsewhere now: a new incarnation tells everybody."""
        context = self._context
        self._at(now_s)
        if address != context.me.address and not context.leaving:
            context.me = replace(context.me, address=address)
            self._claims.announce(context.incarnation + 1)
        return context.take_effects()

    def join(self, addresses: Sequence[Address], now_s: float) -> tuple[Effect, ...]:
        """Contact these addresses and keep trying, at a bounded rate, until there is a mesh."""
        self._at(now_s)
        if not self._context.leaving:
            self._joining.contact(addresses)
        return self._context.take_effects()

    def decree(self, raw: bytes, now_s: float) -> tuple[Effect, ...]:
        """A decree that we made, or learnt outside gossip. A bad or a known one changes nothing."""
        self._at(now_s)
        self._proclaiming.take(raw, None)
        return self._context.take_effects()

    def leave(self, now_s: float) -> tuple[Effect, ...]:
        """Say goodbye: final for this epoch. Drive the core for `config.leave_linger_s` more."""
        context = self._context
        self._at(now_s)
        if context.leaving:
            return context.take_effects()
        context.leaving = True
        context.timers.clear()  # nobody is probed, accused or told anything else any more
        self._witnesses.leave()
        for copy in range(self.config.leave_copies):
            context.timers.at(now_s + copy * self.config.leave_step_s, self._say_goodbye)
        return self.advance(now_s)

    # -- what comes in ----------------------------------------------------------------------------------

    def receive(
        self,
        payload: bytes,
        sender: NodeId,
        sender_epoch: int,
        source: Address,
        lane: Lane,
        now_s: float,
    ) -> tuple[Effect, ...]:
        """A payload from an authenticated member of the mesh, whatever it holds."""
        context = self._context
        self._at(now_s)
        try:
            messages = self._decoded(payload)
        except CodecError:
            context.count("dropped_malformed")
            context.offend(sender, Offence.MALFORMED)
            return context.take_effects()
        if sender == context.me.node:
            context.count("dropped_own")
        elif context.leaving:
            context.count("dropped_leaving")
        else:
            member = context.members.get(sender)
            # A stream has no source port of use, and what knows us by stream knows us as a member.
            if member is not None and lane is Lane.STREAM:
                peer = Peer(sender, member.address, lane)
            else:
                peer = Peer(sender, source)
            if context.decrees.is_revoked(sender):
                self._proclaiming.refuse(sender, peer)
                return context.take_effects()
            context.heard_s = context.now_s
            if lane is Lane.DATAGRAM:
                context.datagram_s = context.now_s
            if self._claims.on_sender(peer, sender, sender_epoch, messages):
                self._dispatch(messages, sender, sender_epoch, peer, lane)
        return context.take_effects()

    def old_epoch(
        self, sender: NodeId, sender_epoch: int, source: Address, now_s: float
    ) -> tuple[Effect, ...]:
        """An authentic datagram of an earlier life: tell it of the later one, and do nothing else.

        It may be replayed, so nothing that it says counts. A node that lost its epoch learns it by this.
        """
        context = self._context
        self._at(now_s)
        last = context.members.last_word(sender)
        if context.decrees.is_revoked(sender):
            context.count("dropped_revoked")
        elif last is not None and sender_epoch < last.epoch and not context.leaving:
            context.count("old_epochs_told")
            context.send(Peer(sender, source), [Claim(last, merged=False)])
        return context.take_effects()

    def stream_pinged(self, token: int, ok: bool, now_s: float) -> tuple[Effect, ...]:
        """A `StreamPing` ended."""
        self._at(now_s)
        if not self._context.leaving:
            self._prober.on_stream_ping(token, ok=ok)
        return self._context.take_effects()

    def watch_ended(
        self, node: NodeId, epoch: int, evident: bool, now_s: float
    ) -> tuple[Effect, ...]:
        """A witness stream with this life of a node is no more, whoever dialled it.

        `evident`: it had been up, and ended without a goodbye. Otherwise it never came up, or ended in peace.
        """
        self._at(now_s)
        if not self._context.leaving:
            self._witnesses.ended(node, epoch, evident=evident)
        return self._context.take_effects()

    def knocked(self, token: int, refused: bool, now_s: float) -> tuple[Effect, ...]:
        """A `Knock` ended. `refused`: the host answered that nobody listens there."""
        self._at(now_s)
        if not self._context.leaving:
            self._witnesses.knocked(token, refused=refused)
        return self._context.take_effects()

    def evidence_refused(self, address: Address, now_s: float) -> tuple[Effect, ...]:
        """The operating system says that a host refused a datagram to this address.

        The host is up, and the process is gone, or it is a lie: we look for ourselves.
        """
        context = self._context
        self._at(now_s)
        member = context.members.at_address(address)
        if member is None or not member.is_live:
            context.count("refusal_unknown")
        elif not context.leaving:
            context.count("refusals")
            self._witnesses.refused(member)
        return context.take_effects()

    # -- reading ----------------------------------------------------------------------------------------

    def members(self) -> tuple[MemberView, ...]:
        """Every node that is listed, ourselves among them, by id."""
        own = self._context.own_update()
        views = [_view(member.update, member, self._started_s) for member in self._context.members]
        views.append(replace(_view(own, None, self._started_s), is_self=True))
        return tuple(sorted(views, key=lambda view: view.node))

    def member(self, node: NodeId) -> MemberView | None:
        """One of `members`."""
        if node == self._context.me.node:
            return replace(_view(self._context.own_update(), None, self._started_s), is_self=True)
        member = self._context.members.get(node)
        return None if member is None else _view(member.update, member, self._started_s)

    @property
    def has_peers(self) -> bool:
        """Whether another live member is known."""
        return bool(self._context.members.live())

    @property
    def decrees(self) -> Decrees:
        """What the authorities decreed, to read from."""
        return self._context.decrees

    @property
    def soft(self) -> SoftState:
        """The soft readings, to read from."""
        return self._soft.table

    @property
    def state_hash(self) -> bytes:
        """Equal on two nodes that agree on the live members and hold the same records."""
        return self._context.state_hash()

    def offences(self) -> Mapping[NodeId, Mapping[str, int]]:
        """Who misbehaves: counts since the start by node and kind, most first, of a bounded number."""
        return self._context.offences.report()

    def statistics(self) -> Mapping[str, int]:
        """Counters since the start, and gauges: `members_live`, `local_health`, `timers`, `rumours_queued`."""
        context = self._context
        return {
            **dict(sorted(context.counters.items())),
            "members_live": context.members.live_count(),
            "local_health": context.health.score,
            "timers": len(context.timers),
            "rumours_queued": len(self._rumours),
        }

    # -- inside -----------------------------------------------------------------------------------------

    def _at(self, now_s: float) -> None:
        self._context.now_s = max(self._context.now_s, now_s)

    def _wrote(self, delta: Delta | None) -> tuple[Effect, ...]:
        self._spread(delta)
        return self._context.take_effects()

    def _spread(self, delta: Delta | None) -> None:
        if delta is None:
            return
        self._context.touch()
        self._context.count("own_writes")
        if not self._context.leaving:
            self._rumours.start(Record(delta, rumour=True))

    def _decoded(self, payload: bytes) -> tuple[Message, ...]:
        """The messages of a payload. Raises CodecError.

        A rumour comes about twelve times, most of them byte for byte the same: it is decoded once.
        """
        messages = self._heard.get(payload)
        if messages is None:
            messages = decode(payload)
            if messages and isinstance(messages[0], Record | Claim):
                self._heard[payload] = messages
                if len(self._heard) > _HEARD_MAX:
                    del self._heard[next(iter(self._heard))]
        return messages

    def _dispatch(
        self,
        messages: tuple[Message, ...],
        sender: NodeId,
        sender_epoch: int,
        peer: Peer,
        lane: Lane,
    ) -> None:
        pinged = False
        for message in messages:
            match message:
                case Ping():
                    if pinged:  # one is honest; more would have us send more than we are sent
                        self._context.count("pings_excess")
                        continue
                    pinged = True
                    self._prober.on_ping(message, peer)
                case Ack():
                    self._prober.on_ack(message, sender)
                case PingRequest():
                    self._prober.on_ping_request(message, peer)
                case Nack():
                    self._prober.on_nack(message)
                case Claim():
                    self._claims.on_claim(message, sender, peer)
                case Record():
                    if not self._repair.on_record(message, sender, peer, lane):
                        return
                case Digest():
                    self._repair.on_digest(message, peer)
                case View():
                    self._repair.on_view(message, peer)
                case Pull():
                    self._repair.on_pull(message, peer)
                case Join():
                    if not self._joining.on_join(message, peer):
                        return
                case JoinAnswer():
                    self._joining.on_answer(message, sender)
                case JoinLater():
                    self._joining.on_later(message)
                case Summary():
                    self._repair.on_summary(message, peer)
                    self._proclaiming.on_summary(message.decrees, peer)
                case Proclaim(raw):
                    if not self._proclaiming.take(raw, sender, lane):
                        return
                case DecreesHeld():
                    self._proclaiming.on_held(message, peer)
                case Soft() | SoftStill() | Interest():
                    self._soft.on_message(message, sender_epoch, peer)
                case _:
                    assert_never(message)
        member = self._context.members.get(sender)
        if member is None or member.update.epoch != sender_epoch:
            return
        for message in messages:
            match message:
                case Ping(heartbeat=heartbeat):
                    self._repair.on_heartbeat(heartbeat, member)
                case Ack(subject=None, heartbeat=heartbeat):
                    self._repair.on_heartbeat(heartbeat, member)
                case _:
                    pass

    def _suspect(self, node: NodeId, silent_s: float) -> None:
        """A probe of ours failed."""
        member = self._context.members.get(node)
        if member is not None and member.is_live:
            self._claims.accuse(member, silent_s=silent_s)

    def _gone(self, member: Member) -> None:
        """Its process is gone, as far as we can see."""
        self._claims.accuse(member, evidence=True)

    def _stream_answered(self, node: NodeId) -> None:
        context = self._context
        member = context.members.get(node)
        if member is not None and member.state is MemberState.SUSPECT:
            # Its datagrams and ours may be dropped on the way: what it has to refute, it hears by stream.
            by_stream = Peer(node, member.address, Lane.STREAM)
            context.answer(by_stream, [Claim(member.update, merged=False)])
            self._prober.probe(member)
        if context.are_datagrams_silent():
            # Only streams carry to us. Whoever we suspect would hear of it too late, one a probe.
            for suspect in context.members.live():
                if suspect.state is MemberState.SUSPECT:
                    self._prober.stream_ping(suspect)

    def _say_goodbye(self) -> None:
        context = self._context
        for member in context.members.live():
            peer = Peer(member.node, member.address)
            context.send(peer, [Claim(context.own_update(), merged=False)])

    def _sweep(self) -> None:
        self._forgetting.sweep()
        context = self._context
        if not context.leaving:
            self._spread(context.store.collect_tombstones(self.config.tombstones_kept))
        context.timers.at(context.now_s + _SWEEP_S, self._sweep)


def _view(update: Update, member: Member | None, started_s: float) -> MemberView:
    return MemberView(
        update.node,
        update.name,
        update.address,
        update.state,
        update.epoch,
        update.incarnation,
        started_s if member is None else member.since_s,
        None if member is None else member.round_trip_s,
        None if member is None else member.heard_s,
    )
