"""What follows from a claim about a node: refutation, suspicion, death, and what others are told.

`membership.Members` decides which claim wins; this module acts on it. It is the only place where our own
incarnation and epoch rise.

What one member alone can do to another by accusing it is bounded:

* a death, or a leave that the member did not tell itself, is a suspicion by who told it; it is believed when
  somebody else accuses that member too. So a liar can make others suspect, and the subject refutes.
* two accusers with evidence, or one where no other could have it, leave the accused `evidence_death_s`.
* an accusation that is refuted costs its accuser credit; who has none left is not listened to for a while.
* claims about the life of another that no clock can have begun, or with an incarnation near the end of the
  numbers, are refused unless they come from that node itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, assert_never

from meshd.core.contests import Contests
from meshd.core.context import Context, Peer
from meshd.core.dissemination import Rumours
from meshd.core.effects import Unwatch
from meshd.core.events import (
    MemberAlive,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberRevoked,
    MemberSuspected,
    MemberUpdated,
    SelfEpochRaised,
)
from meshd.core.forgetting import Forgetting
from meshd.core.membership import (
    Member,
    MemberState,
    Transition,
    Update,
    Verdict,
)
from meshd.core.messages import Claim, Message, Record, View
from meshd.core.offences import Offence
from meshd.core.probes import Prober
from meshd.core.soft_lane import SoftLane
from meshd.core.suspicion import Size, Suspicions
from meshd.core.tellers import EPOCH_TOLD_MAX, INCARNATION_TOLD_MAX, Tellers
from meshd.core.witnesses import WITNESSES_NEEDED
from meshd_cms.types import RUMOUR_BYTES_MAX, Epoch, NodeId, Version

_EPOCH_GAP_S: Final = (
    1.0  # between epochs of ours: each is a write to disk and a record signed anew
)
_EPOCH_SLACK: Final = 2**32
_ASK_GAP_S: Final = 1.0  # between questions to one member where it is
_REFUTE_GAP_S: Final = 1.0  # between answers to an accuser who has no credit left
_TELL_GAP_S: Final = 0.2  # between two tellings to one node of what is believed of it


def _nothing(_: Member) -> None:
    return None


class Claims:
    """Applies claims and carries out their consequences."""

    def __init__(
        self,
        context: Context,
        rumours: Rumours,
        prober: Prober,
        soft: SoftLane,
        forgetting: Forgetting,
    ) -> None:
        self._context = context
        self._rumours = rumours
        self._prober = prober
        self._soft = soft
        self._forgetting = forgetting
        self._suspicions = Suspicions(context.config, context.timers, self._expired)
        self._tellers = Tellers(context)
        self._refuted_s = float("-inf")  # when we last refuted
        self._raised_s = float("-inf")  # when we last took a higher epoch
        self._told_s: dict[NodeId, float] = {}  # when a node was told what is believed of it
        self._contests = Contests(context, self.accuse)
        self.newcomer: Callable[[Member], None] = _nothing  # a life that was not known of
        self.came_back: Callable[[Member], None] = _nothing  # a dead member is alive again
        self.alone: Callable[[], None] = lambda: None  # the last live member went
        self.changed: Callable[[], None] = lambda: None  # who lives, or where

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
            self._tell(last, peer)
            return False
        member = context.members.get(sender)
        if member is not None:
            member.heard_s = context.now_s
            if member.state is MemberState.ALIVE:
                return True
        if last.state is MemberState.LEFT:
            # Late words of one who went, or a leave that it never told: it says which, once it hears of it.
            context.count("dropped_left")
            self._tell(last, peer)
            # Whoever brings it, what is believed of ourselves must not go unanswered.
            for one in messages:
                if isinstance(one, Claim) and one.update.node == context.me.node:
                    self.on_claim(one, sender, peer)
            return False
        # Suspected, dead or buried, and yet it speaks: tell it, so that it can refute.
        self._tell(last, peer)
        return True

    def _tell(self, last: Update, peer: Peer) -> None:
        """Tell a node what is believed of it; now and then, or two that believe ill would never be silent."""
        context = self._context
        told_s = self._told_s.pop(last.node, None)
        if told_s is not None and context.now_s - told_s < _TELL_GAP_S:
            self._told_s[last.node] = told_s
            return
        self._told_s[last.node] = context.now_s
        if len(self._told_s) > context.config.members_max:
            del self._told_s[next(iter(self._told_s))]
        context.answer(peer, [Claim(last, merged=False)])

    # -- claims -----------------------------------------------------------------------------------------

    def on_claim(self, claim: Claim, sender: NodeId, peer: Peer) -> None:
        """A claim, by rumour or out of a peer's table."""
        context, update = self._context, claim.update
        if self._tellers.is_absurd(update, sender):
            if 0 < update.epoch - EPOCH_TOLD_MAX <= _EPOCH_SLACK:
                # The victim of such a lie rose just above it: no offence.
                context.count("claims_absurd")
            else:
                context.offend(sender, Offence.EPOCH_ABSURD)
            return
        if update.node == context.me.node:
            self._on_own(update, sender, peer)
            return
        if context.decrees.is_revoked(update.node) or context.decrees.is_revoked(update.accuser):
            context.count("claims_revoked")
            return
        held = context.members.get(update.node)
        if held is not None and held.update == update:
            context.count("claims_stale")
            if not claim.merged:
                self._rumours.heard(claim, sender)
            return
        if claim.merged:
            self._merge(update, held, sender)
            return
        if update.state is not MemberState.ALIVE and update.node != sender:
            if self._tellers.is_forged(update):
                context.offend(sender, Offence.CLAIMS_FORGED)
                return
            for speaker in (update.accuser, sender):
                if self._tellers.is_spent(speaker, context.now_s):
                    context.count("accusations_ignored")
                    return
        if held is not None and self._tellers.is_hijack(held, update, sender):
            self._ask_where(held, update)
        elif self._tellers.is_credible(held, update, sender):
            self._apply(update, claim, sender)
        else:
            context.count("ends_doubted")
            self._doubt(update, sender, evidence=update.state is MemberState.DEAD)

    def accuse(self, member: Member, *, silent_s: float = 0.0, evidence: bool = False) -> None:
        """We ourselves have a reason to suspect a live member."""
        context = self._context
        context.count("suspicions_raised")
        update = self._accusation(member, evidence=evidence)
        self._apply(update, None, None, silent_s=silent_s)
        # The rumour does not go to whom it is about, or a mesh would knock at the door of one dead.
        context.send(Peer(member.node, member.address), [Claim(update, merged=False)])

    def _accusation(self, member: Member, *, evidence: bool = False) -> Update:
        """That we suspect a member, noted as ours."""
        me, suspect = self._context.me.node, MemberState.SUSPECT
        update = replace(member.update, state=suspect, accuser=me, evidence=evidence)
        self._tellers.note_ours(update)
        return update

    def isolated(self) -> None:
        """Nobody is heard at all: hold everybody suspect here, and tell nobody.

        We are cut off, or deaf. To find the others silent one by one would take minutes in which work is
        routed to them; to accuse them aloud, if it is we who are deaf, would make the whole mesh refute.
        """
        context = self._context
        alive = [one for one in context.members.live() if one.state is MemberState.ALIVE]
        if not alive:
            return
        context.count("isolations")
        silent_s = context.now_s - (context.heard_s or context.now_s)
        for member in alive:
            self._apply(self._accusation(member), None, None, silent_s=silent_s, spread=False)

    def announce(self, incarnation: int) -> None:
        """Tell everybody that we are alive, in this incarnation."""
        context = self._context
        context.incarnation = max(context.incarnation, incarnation)
        context.touch()
        self._rumours.start(Claim(context.own_update(), merged=False))

    def learn_own_epoch(self, seen: Epoch) -> None:
        """Somebody remembers a life of ours as high as this one or higher: rise above it."""
        context = self._context
        if context.now_s - self._raised_s < _EPOCH_GAP_S:
            context.count("epochs_put_off")  # whoever believes it says it again
            return
        if not context.store.learn_epoch(seen):
            return
        self._raised_s = context.now_s
        context.count("epochs_learnt")
        context.incarnation = 0
        context.notify(SelfEpochRaised(context.store.epoch))
        self.announce(0)
        delta = context.store.delta_since(context.me.node, Version(0), RUMOUR_BYTES_MAX)
        if delta is not None:
            self._rumours.start(Record(delta, rumour=True))

    def expel(self, node: NodeId) -> None:
        """A node was revoked: nothing of it stays, and nothing it did is taken back."""
        context = self._context
        member = context.members.get(node)
        if member is None:
            if context.store.line(node) is not None and node != context.me.node:
                self._forgetting.drop_record(node)
            return
        self._suspicions.stop(node)
        context.emit(Unwatch(node))
        update = context.members.bury(node, context.now_s)
        self._forgetting.drop_record(node)
        context.touch()
        context.notify(MemberRevoked(update.node, update.name, update.address))
        self.changed()
        if not context.members.live():
            self.alone()

    # -- inside -----------------------------------------------------------------------------------------

    def _on_own(self, update: Update, sender: NodeId, peer: Peer) -> None:
        context, own = self._context, self._context.own_update()
        if update.epoch > own.epoch:
            self.learn_own_epoch(update.epoch)
        elif update.epoch < own.epoch:
            context.answer(peer, [Claim(own, merged=False)])
        elif update.state is MemberState.LEFT:
            # In this very life, and yet we are here: no incarnation undoes it, a new epoch does.
            self.learn_own_epoch(Epoch(update.epoch + 1))
        elif update.incarnation < own.incarnation:
            if update.state is not MemberState.ALIVE:
                context.answer(peer, [Claim(own, merged=False)])
        elif update.incarnation >= INCARNATION_TOLD_MAX:
            self.learn_own_epoch(Epoch(update.epoch + 1))
        elif update.state is not MemberState.ALIVE or update.incarnation > own.incarnation:
            if update.state is MemberState.ALIVE:
                context.offend(sender, Offence.CLAIMS_FORGED)  # nobody but us goes up there
            self._refute(update, sender, peer)

    def _refute(self, update: Update, sender: NodeId, peer: Peer) -> None:
        """Somebody believes ill of us: take a higher incarnation, and say so."""
        context = self._context
        if self._tellers.is_spent(sender, context.now_s):
            if context.now_s - self._refuted_s < _REFUTE_GAP_S:
                context.count("refutations_put_off")
                return
        else:
            context.health.worse()
        context.count("refutations")
        self._refuted_s = context.now_s
        self._tellers.charge(update.accuser, sender)
        self.announce(update.incarnation + 1)
        context.answer(peer, [Claim(context.own_update(), merged=False)])

    def _ask_where(self, held: Member, update: Update) -> None:
        """Where a member is, it says itself: ask at both addresses, once a second at most."""
        context = self._context
        if held.asked_s is not None and context.now_s - held.asked_s < _ASK_GAP_S:
            context.count("moves_put_off")
            return
        held.asked_s = context.now_s
        context.count("moves_asked")
        for address in (update.address, held.address):
            context.send(Peer(held.node, address), [View(held.node, held.node, (), answer=False)])

    def _merge(self, update: Update, held: Member | None, sender: NodeId) -> None:
        """Out of a peer's table: good news is taken, bad news is only a reason to ask."""
        context = self._context
        if update.state is not MemberState.ALIVE and self._tellers.is_spent(sender, context.now_s):
            context.count("accusations_ignored")
            return
        if held is not None and self._tellers.is_hijack(held, update, sender):
            self._ask_where(held, update)
            return
        if update.state is MemberState.DEAD or not self._tellers.is_credible(held, update, sender):
            update = replace(update, state=MemberState.SUSPECT, accuser=sender)
        if held is not None and held.update.precedence == update.precedence:
            return  # a merge confirms no suspicion
        if update.state is MemberState.SUSPECT:
            self._doubt(update, sender, evidence=False)
        else:
            self._apply(update, None, sender)

    def _doubt(self, update: Update, sender: NodeId, *, evidence: bool) -> None:
        """An end that is not believed yet: suspect the member here, and ask it, with the suspicion first."""
        update = replace(update, state=MemberState.SUSPECT, accuser=sender, evidence=evidence)
        self._apply(update, None, sender, spread=False)
        member = self._context.members.get(update.node)
        if member is not None and member.state is MemberState.SUSPECT:
            self._prober.probe(member)

    def _apply(
        self,
        update: Update,
        claim: Claim | None,
        sender: NodeId | None,
        *,
        silent_s: float = 0.0,
        spread: bool = True,
    ) -> None:
        context = self._context
        contested = context.members.at_address(update.address)
        held = context.members.get(update.node)
        accusers = {} if held is None else dict(held.accusers)
        transition = context.members.accept(update, context.now_s, sender)
        context.count(f"claims_{transition.verdict.value}")
        match transition.verdict:
            case Verdict.ACCEPTED:
                if update.state is MemberState.ALIVE and held is not None:
                    for accuser, accusation in accusers.items():
                        self._tellers.charge(accuser, accusation.teller)
                if spread:
                    self._rumours.start(Claim(update, merged=False), sender)
                self._accepted(transition, silent_s)
                self._contests.over_address(transition, contested)
            case Verdict.CONFIRMED:
                assert held is not None
                size = self._size(held.node)
                confirmations = len(held.accusers) - 1
                self._suspicions.confirm(held.node, size, confirmations, context.now_s)
                self._weigh(held)
                # What can change nothing is not worth a rumour: with N accusers that would be N of them.
                few = confirmations <= context.config.suspicion_confirmations
                if spread and (held.witnesses <= WITNESSES_NEEDED if update.evidence else few):
                    self._rumours.start(Claim(update, merged=False), sender)
            case Verdict.STALE:
                if claim is not None and sender is not None:
                    self._rumours.heard(claim, sender)
            case Verdict.FULL:
                self._forgetting.make_room()
            case Verdict.GHOST | Verdict.UNKNOWN:
                pass
            case _:
                assert_never(transition.verdict)

    def _size(self, suspect: NodeId) -> Size:
        members = self._context.members
        others = sum(
            one.state is MemberState.ALIVE for one in members.live() if one.node != suspect
        )
        return Size(members.live_count(), 1 + others)

    def _weigh(self, member: Member) -> None:
        """Hasten the end of a suspect that enough others saw to be gone."""
        context = self._context
        if member.witnesses >= min(WITNESSES_NEEDED, self._size(member.node).able):
            self._suspicions.hasten(member.node, context.config.evidence_death_s, context.now_s)

    def _accepted(self, transition: Transition, silent_s: float) -> None:
        context, before, member = self._context, transition.before, transition.member
        assert member is not None
        update = member.update
        was_live = before is not None and before.state.is_live
        context.touch()
        self.changed()
        self._suspicions.stop(member.node)
        if before is None or before.epoch != update.epoch:
            self._soft.forget(member.node)
            if member.is_live:
                self.newcomer(member)
        if member.is_live and not was_live:
            self._prober.enlist(member.node)
            context.notify(MemberJoined(update.node, update.name, update.address))
            self._soft.welcome(Peer(member.node, member.address))
            self._contests.over_name(member)
        match update.state:
            case MemberState.ALIVE:
                self._alive(before, member)
            case MemberState.SUSPECT:
                self._suspected(before, member, silent_s)
            case MemberState.DEAD:
                if was_live:  # else it is a life that we never knew
                    context.notify(MemberFailed(update.node, update.name, update.address))
            case MemberState.LEFT:
                context.notify(MemberLeft(update.node, update.name, update.address))
            case _:
                assert_never(update.state)
        if not member.is_live:
            self._soft.forget(member.node)
            context.emit(Unwatch(member.node))
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

    def _suspected(self, before: Update | None, member: Member, silent_s: float) -> None:
        context, update = self._context, member.update
        if before is None or before.state is not MemberState.SUSPECT:
            context.notify(MemberSuspected(update.node, update.name, update.address))
        size, factor = self._size(member.node), context.health.factor
        self._suspicions.start(update, size, factor, context.now_s, silent_s)
        self._suspicions.refit(size, context.now_s)
        self._weigh(member)
        if update.accuser != context.me.node and self._prober.is_witness(update):
            self._prober.probe(member)

    def _expired(self, suspicion: Update) -> None:
        """Nobody refuted it: the member is dead."""
        context = self._context
        context.count("deaths_declared")
        update = replace(suspicion, state=MemberState.DEAD, accuser=context.me.node)
        self._tellers.note_ours(update)
        self._apply(update, None, None)
