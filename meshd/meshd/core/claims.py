"""What follows from a claim about a node: refutation, suspicion, death, and what others are told.

`membership.Members` decides which claim wins; this module acts on it. It is the only place where our own
incarnation and epoch rise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from meshd.core.context import Context, Peer
from meshd.core.dissemination import Rumours
from meshd.core.events import (
    AddressContested,
    MemberAlive,
    MemberFailed,
    MemberForgotten,
    MemberJoined,
    MemberLeft,
    MemberSuspected,
    MemberUpdated,
    NameContested,
    RecordChanged,
    SelfEpochRaised,
)
from meshd.core.membership import (
    Member,
    MemberState,
    Transition,
    Update,
    Verdict,
)
from meshd.core.probes import Prober
from meshd.core.soft_lane import SoftLane
from meshd.core.suspicion import Suspicions
from meshd.core.wire import Claim, Join, Message, Ping, Record, View
from meshd_cms.types import RUMOUR_BYTES_MAX, Epoch, NodeId, Version


def _nothing(_: Member) -> None:
    return None


class Claims:
    """Applies claims and carries out their consequences."""

    def __init__(self, context: Context, rumours: Rumours, prober: Prober, soft: SoftLane) -> None:
        self._context = context
        self._rumours = rumours
        self._prober = prober
        self._soft = soft
        self._suspicions = Suspicions(context.config, context.timers, self._expired)
        self._contested_s: dict[NodeId, float] = {}  # when a loser of an address was last accused
        self._orphans: dict[NodeId, float] = {}  # owner -> since when it is not listed
        self.newcomer: Callable[[Member], None] = _nothing  # a life that was not known of
        self.came_back: Callable[[Member], None] = _nothing  # a dead member is alive again
        self.alone: Callable[[], None] = lambda: None  # the last live member went

    # -- who speaks -------------------------------------------------------------------------------------

    def on_sender(
        self, peer: Peer, sender: NodeId, epoch: int, messages: Sequence[Message]
    ) -> bool:
        """What follows from who sent a payload; False when it must not be acted upon."""
        context = self._context
        last = context.members.last_word(sender)
        if last is None or epoch > last.epoch:
            # A stranger, or a new life of somebody: have it say who it is, if it does not just now.
            told = any(
                isinstance(one, Claim) and one.update.node == sender and one.update.epoch == epoch
                for one in messages
            )
            if not told:
                context.count("strangers_asked")
                context.send(peer, [View(sender, sender, (), answer=False)])
            return True
        if epoch < last.epoch:
            # An earlier life: either it is a late datagram, or it lost its epoch and has to rise above.
            context.count("dropped_old_epoch")
            context.send(peer, [Claim(last, merged=False)])
            return False
        member = context.members.get(sender)
        if member is not None and member.state is MemberState.ALIVE:
            member.heard_s = context.now_s
            return True
        if last.state is MemberState.LEFT:
            context.count("dropped_left")
            if any(isinstance(one, Ping | Join) for one in messages):
                context.send(peer, [Claim(last, merged=False)])
            return False
        # Suspected, dead or buried, and yet it speaks: tell it, so that it can refute.
        context.send(peer, [Claim(last, merged=False)])
        return True

    # -- claims -----------------------------------------------------------------------------------------

    def on_claim(self, claim: Claim, sender: NodeId, peer: Peer) -> None:
        """A claim, by rumour or out of a peer's table."""
        context, update = self._context, claim.update
        if update.node == context.me.node:
            self._on_own(update, peer)
            return
        if claim.merged and update.state is MemberState.DEAD:
            # Death is declared by who waited for it; out of a table it is only a reason to ask.
            update = Update(
                update.node,
                MemberState.SUSPECT,
                update.epoch,
                update.incarnation,
                update.name,
                update.address,
                sender,
            )
        held = context.members.get(update.node)
        if claim.merged and held is not None and held.update.precedence == update.precedence:
            return  # a merge confirms no suspicion
        self._apply(update, claim, sender)

    def accuse(self, member: Member) -> None:
        """We ourselves have a reason to suspect a live member."""
        held = member.update
        context = self._context
        context.count("suspicions_raised")
        self._apply(_with(held, MemberState.SUSPECT, context.me.node), None, None)

    def hasten(self, member: Member) -> None:
        """There is hard evidence against a suspect."""
        config = self._context.config
        self._suspicions.hasten(member.node, config.evidence_death_s, self._context.now_s)

    def announce(self, incarnation: int) -> None:
        """Tell everybody that we are alive, in this incarnation."""
        context = self._context
        context.incarnation = max(context.incarnation, incarnation)
        context.touch()
        self._rumours.start(Claim(context.own_update(), merged=False))

    def learn_own_epoch(self, seen: Epoch) -> None:
        """Somebody remembers a life of ours as high as this one or higher: rise above it."""
        context = self._context
        if not context.store.learn_epoch(seen):
            return
        context.count("epochs_learnt")
        context.incarnation = 0
        context.notify(SelfEpochRaised(context.store.epoch))
        self.announce(0)
        delta = context.store.delta_since(context.me.node, Version(0), RUMOUR_BYTES_MAX)
        if delta is not None:
            self._rumours.start(Record(delta, rumour=True))

    def sweep(self) -> None:
        """Forget members that are gone for long, and records of nobody."""
        context, config = self._context, self._context.config
        for member in context.members:
            keep_s = {
                MemberState.ALIVE: None,
                MemberState.SUSPECT: None,
                MemberState.DEAD: config.dead_keep_s,
                MemberState.LEFT: config.left_keep_s,
            }[member.state]
            if keep_s is not None and context.now_s - member.since_s >= keep_s:
                update = context.members.bury(member.node, context.now_s)
                self._drop_record(update.node)
                context.notify(MemberForgotten(update.node, update.name, update.address))
        context.members.expire_graveyard(context.now_s)
        self._forget_orphans()

    # -- inside -----------------------------------------------------------------------------------------

    def _on_own(self, update: Update, peer: Peer) -> None:
        context, own = self._context, self._context.own_update()
        if update.epoch > own.epoch:
            self.learn_own_epoch(update.epoch)
        elif update.epoch < own.epoch:
            context.send(peer, [Claim(own, merged=False)])
        elif update.state is MemberState.LEFT:
            # In this very life, and yet we are here: no incarnation undoes it, a new epoch does.
            self.learn_own_epoch(Epoch(update.epoch + 1))
        elif update.incarnation < own.incarnation:
            if update.state is not MemberState.ALIVE:
                context.send(peer, [Claim(own, merged=False)])
        elif update.state is not MemberState.ALIVE or update.incarnation > own.incarnation:
            context.count("refutations")
            context.health.worse()
            self.announce(update.incarnation + 1)
            context.send(peer, [Claim(context.own_update(), merged=False)])

    def _apply(self, update: Update, claim: Claim | None, sender: NodeId | None) -> None:
        context = self._context
        contested = context.members.at_address(update.address)
        transition = context.members.accept(update, context.now_s)
        context.count(f"claims_{transition.verdict.value}")
        match transition.verdict:
            case Verdict.ACCEPTED:
                self._accepted(transition, sender)
                self._contest(transition, contested)
            case Verdict.CONFIRMED:
                member = transition.member
                assert member is not None
                self._suspicions.confirm(
                    member.node,
                    context.members.live_count(),
                    len(member.accusers) - 1,
                    context.now_s,
                )
                self._rumours.start(Claim(update, merged=False), sender)
            case Verdict.STALE:
                if claim is not None and sender is not None and not claim.merged:
                    self._rumours.heard(claim, sender)
            case Verdict.GHOST | Verdict.UNKNOWN | Verdict.FULL:
                pass
            case _:
                assert_never(transition.verdict)

    def _accepted(self, transition: Transition, sender: NodeId | None) -> None:
        context, before, member = self._context, transition.before, transition.member
        assert member is not None
        update = member.update
        was_live = before is not None and before.state.is_live
        context.touch()
        self._rumours.start(Claim(update, merged=False), sender)
        self._suspicions.stop(member.node)
        if before is None or before.epoch != update.epoch:
            self._soft.forget(member.node)
            if member.is_live:
                self.newcomer(member)
        if member.is_live and not was_live:
            self._prober.enlist(member.node)
            context.notify(MemberJoined(update.node, update.name, update.address))
            self._soft.welcome(Peer(member.node, member.address))
            self._contest_name(member)
        match update.state:
            case MemberState.ALIVE:
                self._alive(before, member)
            case MemberState.SUSPECT:
                self._suspected(before, member)
            case MemberState.DEAD:
                context.notify(MemberFailed(update.node, update.name, update.address))
            case MemberState.LEFT:
                context.notify(MemberLeft(update.node, update.name, update.address))
            case _:
                assert_never(update.state)
        if not member.is_live:
            self._soft.forget(member.node)
            if was_live and not context.members.live():
                self.alone()

    def _alive(self, before: Update | None, member: Member) -> None:
        context, update = self._context, member.update
        if before is None:
            return
        if before.state is MemberState.SUSPECT:
            context.count("suspicions_refuted")
            context.notify(MemberAlive(update.node, update.name, update.address))
        elif before.state is MemberState.DEAD:
            self.came_back(member)
        if before.state.is_live and (before.epoch, before.name, before.address) != (
            update.epoch,
            update.name,
            update.address,
        ):
            context.notify(MemberUpdated(update.node, update.name, update.address))

    def _suspected(self, before: Update | None, member: Member) -> None:
        context, update = self._context, member.update
        if before is None or before.state is not MemberState.SUSPECT:
            context.notify(MemberSuspected(update.node, update.name, update.address))
        nodes = context.members.live_count()
        self._suspicions.start(update, nodes, context.health.factor, context.now_s)
        if update.accuser != context.me.node and self._prober.is_witness(update):
            self._prober.probe(member)

    def _expired(self, suspicion: Update) -> None:
        """Nobody refuted it: the member is dead."""
        self._context.count("deaths_declared")
        self._apply(_with(suspicion, MemberState.DEAD, self._context.me.node), None, None)

    def _contest(self, transition: Transition, other: Member | None) -> None:
        """Two live members with one address: the later life keeps it, the other has to show itself."""
        context, member = self._context, transition.member
        if member is None or other is None or other.node == member.node:
            return
        if not member.is_live or not other.is_live or member.address != other.address:
            return
        holder = context.members.at_address(member.address)
        assert holder is not None
        loser = other if holder.node == member.node else member
        accused_s = self._contested_s.get(loser.node)
        if accused_s is not None and context.now_s - accused_s < context.config.contest_gap_s:
            return  # it has shown itself since: two that are both there, for a person to tell apart
        self._contested_s.pop(loser.node, None)
        self._contested_s[loser.node] = context.now_s
        if len(self._contested_s) > context.config.members_max:
            del self._contested_s[next(iter(self._contested_s))]
        context.count("addresses_contested")
        context.notify(AddressContested(member.address, holder.node, loser.node))
        if loser.state is MemberState.ALIVE:
            self.accuse(loser)

    def _forget_orphans(self) -> None:
        """Drop records whose owners were not listed for long: from a snapshot, or ahead of their claims."""
        context = self._context
        orphans = {
            owner: self._orphans.get(owner, context.now_s)
            for owner in context.store.owners()
            if owner != context.me.node and owner not in context.members
        }
        for owner, since_s in orphans.items():
            if context.now_s - since_s >= context.config.left_keep_s:
                self._drop_record(owner)
        self._orphans = orphans

    def _contest_name(self, member: Member) -> None:
        update = member.update
        same = [one.node for one in self._context.members.live() if one.update.name == update.name]
        if update.name == self._context.me.name:
            same.append(self._context.me.node)
        for other in same:
            if other != member.node:
                self._context.notify(NameContested(update.name, member.node, other))

    def _drop_record(self, owner: NodeId) -> None:
        store = self._context.store
        keys = tuple(key for key, _ in store.items(owner))
        if store.line(owner) is not None:
            store.forget(owner)
            self._context.notify(RecordChanged(owner, keys, reset=True))
        self._soft.forget(owner)
        self._context.touch()


def _with(held: Update, state: MemberState, accuser: NodeId) -> Update:
    return Update(held.node, state, held.epoch, held.incarnation, held.name, held.address, accuser)
