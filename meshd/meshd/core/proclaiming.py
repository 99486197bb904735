"""How decrees travel: told at once as rumours, and what was missed is found by the state hash.

Invariant: a decree is passed on only after its signature was found good, and acted upon once. What a node holds
depends on which decrees it was offered and not on their order (decrees.py), so nodes that compare ids end
up with the same ones.

A bad signature costs its teller: who has sent a few is not listened to for a moment, as far as decrees go. On a
datagram a member can write any sender, so all datagrams share a bound, too, and a flood can have good decrees
passed over. Then peers are to be asked by stream, where nobody speaks for another.

Counted: `decrees_taken`, `decrees_known`, `decrees_rejected` (bad signatures), `decrees_refused` (from who has
sent too many of those), `decrees_void` (good, and overruled), `dropped_revoked` (payloads of nodes that are out),
`revoked_told` (those of them that were told why).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from meshd.core.allowance import Allowance, Allowances
from meshd.core.answers import Answers
from meshd.core.context import Context, Peer
from meshd.core.decrees import DECREE_ID_BYTES, DECREES_MAX
from meshd.core.dissemination import Rumours
from meshd.core.effects import Lane
from meshd.core.events import Decreed, DecreesPassedOver
from meshd.core.messages import DecreesHeld, Message, Proclaim
from meshd.core.offences import Offence
from meshd_cms.types import NodeId

_FIRST: Final = bytes(DECREE_ID_BYTES)
_LAST: Final = b"\xff" * DECREE_ID_BYTES
_IDS_PER_MESSAGE: Final = 128  # a kilobyte of them
_BAD_PER_S: Final = 1.0  # bad signatures of one teller that are looked at
_BAD_BURST: Final = 5.0
_ALL_BAD_PER_S: Final = 8.0  # of all datagrams
_ALL_BAD_BURST: Final = 32.0
_ASK_GAP_S: Final = 5.0  # between two times that peers are to be asked
_TELL_PER_S: Final = 0.5  # times a node that is out is told so


class Proclaiming:
    """Takes decrees in, and passes them on.

    Args:
        context: shared with the other parts.
        rumours: spreads what is news.
        answers: bounds what is answered.
        expel: removes a node that was revoked just now, and everything about it.
    """

    def __init__(
        self,
        context: Context,
        rumours: Rumours,
        answers: Answers,
        expel: Callable[[NodeId], None],
    ) -> None:
        self._context = context
        self._rumours = rumours
        self._answers = answers
        self._expel = expel
        members_max = context.config.members_max
        self._all_bad = Allowance(_ALL_BAD_PER_S, _ALL_BAD_BURST)
        self._bad_datagrams = Allowances(_BAD_PER_S, _BAD_BURST, members_max)
        self._bad_streams = Allowances(_BAD_PER_S, _BAD_BURST, members_max)
        self._asked_s = float("-inf")
        self._tell = Allowances(_TELL_PER_S, 1.0, members_max)

    def take(self, raw: bytes, sender: NodeId | None, lane: Lane = Lane.STREAM) -> bool:
        """A decree of ours (no sender), or one that somebody told us of; whether its signature is good."""
        context, decrees = self._context, self._context.decrees
        if decrees.holds(raw):
            context.count("decrees_known")
            if sender is not None:
                self._rumours.heard(Proclaim(raw, rumour=True), sender)
            return True
        accounts = () if sender is None else self._accounts(sender, lane)
        if any(one.left(context.now_s) < 1.0 for one in accounts):
            context.count("decrees_refused")
            if lane is Lane.DATAGRAM and context.now_s - self._asked_s >= _ASK_GAP_S:
                self._asked_s = context.now_s
                context.notify(DecreesPassedOver())
            return False
        decree = decrees.check(raw)
        if decree is None:
            context.count("decrees_rejected")
            for one in accounts:
                one.take(context.now_s)
            if sender is not None:
                context.offend(sender, Offence.DECREE_REJECTED)
            return False
        if not decrees.add(decree):
            context.count("decrees_void")
            return True
        context.count("decrees_taken")
        context.touch()
        self._rumours.start(Proclaim(raw, rumour=True), sender)
        for node in decrees.revoked():
            self._expel(node)
        context.notify(Decreed(decree))
        return True

    def _accounts(self, sender: NodeId, lane: Lane) -> tuple[Allowance, ...]:
        if lane is Lane.STREAM:
            return (self._bad_streams.of(sender),)
        return (self._all_bad, self._bad_datagrams.of(sender))

    def refuse(self, sender: NodeId, peer: Peer) -> None:
        """A node that is out speaks: nothing it says counts. Now and then it is told why."""
        context = self._context
        context.count("dropped_revoked")
        revocation = context.decrees.revocation(sender)
        if revocation is not None and self._tell.of(sender).take(context.now_s):
            context.count("revoked_told")
            context.send(peer, [Proclaim(revocation.raw, rumour=False)])

    def lists(self, *, answer: bool) -> list[Message]:
        """What we hold, cut to fit datagrams."""
        ids = self._context.decrees.ids()
        lists: list[Message] = []
        low = _FIRST
        for start in range(0, max(1, len(ids)), _IDS_PER_MESSAGE):
            cut = ids[start : start + _IDS_PER_MESSAGE]
            is_last = start + _IDS_PER_MESSAGE >= len(ids)
            high = _LAST if is_last else cut[-1]
            lists.append(DecreesHeld(low, high, cut, answer))
            if not is_last:
                low = (int.from_bytes(high, "big") + 1).to_bytes(DECREE_ID_BYTES, "big")
        return lists

    def on_summary(self, their_hash: bytes, peer: Peer) -> None:
        """A peer compares everything: if it holds other decrees, say which are here."""
        if their_hash != self._context.decrees.hash:
            self._answers.send(peer, self.lists(answer=True))

    def on_held(self, held: DecreesHeld, peer: Peer) -> None:
        """Tell the peer what it lacks; ask for what we lack."""
        decrees = self._context.decrees
        theirs = set(held.ids)
        ours = [one for one in decrees.ids() if held.low <= one <= held.high]
        lacking = [decrees.raw(one) for one in ours if one not in theirs]
        told: list[Message] = [Proclaim(raw, rumour=False) for raw in lacking if raw is not None]
        self._answers.send(peer, told)
        room = len(decrees) < DECREES_MAX
        if held.answer and room and any(one not in decrees for one in held.ids):
            ids = tuple(ours[:_IDS_PER_MESSAGE])
            high = held.high if len(ids) == len(ours) else ids[-1]
            self._answers.send(peer, [DecreesHeld(held.low, high, ids, answer=False)])
