"""What is believed from whom: the bounds on what one member can do to another by talking about it.

See decision 0019. Nothing here changes what is held of anybody; `claims.py` asks, and acts.
"""

from __future__ import annotations

from typing import Final

from meshd.core.context import Context
from meshd.core.credit import Credit
from meshd.core.membership import Member, MemberState, Update
from meshd.core.offences import Offence
from meshd_cms.types import Epoch, NodeId

EPOCH_TOLD_MAX: Final = 2**47
"""Unix milliseconds of the year 6429: the latest life of another that a member is believed to have seen."""

INCARNATION_TOLD_MAX: Final = 2**31
"""An incarnation that no node reaches by refuting: above it, a node takes a new epoch instead."""


class Tellers:
    """Judges claims by who tells them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._credit = Credit(context.config.accusations_max)
        self._ours: dict[tuple[NodeId, Epoch], None] = {}  # lives that we accused ourselves

    def is_spent(self, teller: NodeId, now_s: float) -> bool:
        """Whether its accusations are to be ignored for now."""
        return self._credit.is_spent(teller, now_s)

    def charge(self, accuser: NodeId, teller: NodeId) -> None:
        """Somebody accused a node that is there.

        Who tells it pays, for a name is free to write: the whole of it in its own name, and half when it
        passed on what another is said to have said.
        """
        context = self._context
        if teller == context.me.node:
            return
        self._credit.charge(teller, 1.0 if teller == accuser else 0.5, context.now_s)
        if self._credit.is_spent(teller, context.now_s):
            context.offend(teller, Offence.ACCUSATIONS_REFUTED)

    def is_absurd(self, update: Update, sender: NodeId) -> bool:
        """Whether it tells of another what only that node itself could know to be true."""
        if update.node == sender:
            return False
        if update.node == self._context.me.node:
            return (
                update.epoch > EPOCH_TOLD_MAX
            )  # too high an incarnation is no loss: a new epoch begins at 0
        line = self._context.store.line(update.node)
        was_lived = (
            line is not None and update.epoch <= line.epoch
        )  # it signed a record in that life
        too_late = update.epoch > EPOCH_TOLD_MAX and not was_lived
        return too_late or update.incarnation > INCARNATION_TOLD_MAX

    def note_ours(self, update: Update) -> None:
        """We accuse this life ourselves."""
        self._ours[update.node, update.epoch] = None
        if len(self._ours) > self._context.config.members_max:
            del self._ours[next(iter(self._ours))]

    def is_forged(self, update: Update) -> bool:
        """Whether it is an accusation in our name that we never made."""
        ours = update.accuser == self._context.me.node
        return ours and (update.node, update.epoch) not in self._ours

    def is_credible(self, held: Member | None, update: Update, sender: NodeId) -> bool:
        """Whether the end of a member, dead or left, is believed from this mouth."""
        if update.state.is_live or update.node == sender:
            return True
        if held is None or not held.is_live or update.precedence <= held.update.precedence:
            return True  # nobody's life here hangs on it
        if held.state is MemberState.ALIVE:
            return False
        return any(accuser not in (sender, update.accuser) for accuser in held.accusers)

    @staticmethod
    def is_hijack(held: Member, update: Update, sender: NodeId) -> bool:
        """Whether somebody else tells that a member that lives here is reached elsewhere now."""
        return (
            held.is_live
            and update.state.is_live
            and update.node != sender
            and update.address != held.address
            and update.precedence > held.update.precedence
        )
