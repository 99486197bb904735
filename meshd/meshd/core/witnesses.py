"""Hard evidence: who watches whom, and what the end of a process looks like from outside.

Invariants: we keep idle streams to at most `witness_streams` live members, chosen by rendezvous hashing, so a
change of the mesh moves few of them, and to as many suspects again; nobody is accused on evidence before we have looked ourselves and
its host has said that nobody listens there; at most `probes_in_flight_max` looks are under way.

A stream that ends without a goodbye, or a datagram that a host refuses, says "the host is up, the process is
gone" within milliseconds, where a probe a second finds it late. Either may also be an accident or a forgery
(both come from the network unsigned). So each is only a reason to look: a *knock* opens a connection to
the node's port. Refused: we accuse, with evidence. Not refused: somebody is there, or nothing is known; the
node is probed in the ordinary way. Two accusers with evidence make it dead (`claims.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from meshd.core.context import Context
from meshd.core.effects import Knock, Unwatch, Watch
from meshd.core.membership import Member, MemberState
from meshd.core.timers import Timer
from meshd_cms.types import NodeId

WITNESSES_NEEDED: Final = 2
"""Accusers with evidence that make a suspect dead soon, where so many could have it."""


class Witnesses:
    """Our witness streams, and the looks that evidence calls for.

    Args:
        context: shared with the other parts.
        gone: called with a member at whose port nobody listens.
        probe: called with a member that may be gone, and where somebody may listen.
    """

    def __init__(
        self, context: Context, gone: Callable[[Member], None], probe: Callable[[Member], None]
    ) -> None:
        self._context = context
        self._gone = gone
        self._probe = probe
        self._watched: dict[NodeId, Watch] = {}
        self._weights: dict[NodeId, bytes] = {}
        self._knocks: dict[int, tuple[NodeId, int, int]] = {}  # token -> node, epoch, incarnation
        self._timer: Timer | None = None

    def changed(self) -> None:
        """The members changed: choose anew, once that has settled."""
        self._choose_in(self._context.config.witness_settle_s)

    def leave(self) -> None:
        """Say goodbye to all who may watch us."""
        for member in self._context.members.live():
            self._context.emit(Unwatch(member.node))
        self._watched.clear()

    # -- what comes in ----------------------------------------------------------------------------------

    def ended(self, node: NodeId, epoch: int, *, evident: bool) -> None:
        """A witness stream with a node ended, whoever dialled it."""
        context = self._context
        if self._watched.pop(node, None) is not None:
            self._choose_in(context.config.witness_retry_s)
        if not evident:
            context.count("witness_streams_failed")
            return
        context.count("witness_streams_broken")
        member = context.members.get(node)
        if member is not None and member.is_live and member.update.epoch == epoch:
            self._knock(member)

    def refused(self, member: Member) -> None:
        """A host refused a datagram to this member."""
        context = self._context
        knocked_s = member.knocked_s
        if knocked_s is None or context.now_s - knocked_s >= context.config.knock_gap_s:
            self._knock(member)

    def knocked(self, token: int, *, refused: bool) -> None:
        """A look at a port ended."""
        context = self._context
        knock = self._knocks.pop(token, None)
        if knock is None:
            context.count("knock_unexpected")
            return
        node, epoch, incarnation = knock
        member = context.members.get(node)
        if member is None or not member.is_live:
            return
        update = member.update
        if not refused:
            self._probe(member)
        elif (update.epoch, update.incarnation) == (epoch, incarnation):
            context.count("knocks_refused")
            self._gone(member)
        else:
            self._knock(member)  # it has spoken since: look again

    # -- inside -----------------------------------------------------------------------------------------

    def _knock(self, member: Member) -> None:
        context = self._context
        if any(node == member.node for node, _, _ in self._knocks.values()):
            return
        if member.witnesses >= WITNESSES_NEEDED:
            return  # it is decided; N more would be N more knocks and rumours
        if len(self._knocks) >= context.config.probes_in_flight_max:
            context.count("knock_overflow")
            return
        token = context.next_sequence()
        member.knocked_s = context.now_s
        update = member.update
        self._knocks[token] = (member.node, update.epoch, update.incarnation)
        context.count("knocks")
        context.emit(Knock(member.node, member.address, token))

    def _choose_in(self, after_s: float) -> None:
        context = self._context
        if context.leaving or context.config.witness_streams == 0:
            return
        due_s = context.now_s + after_s * context.rng.uniform(1.0, 1.5)
        if self._timer is not None:
            if self._timer.due_s <= due_s:
                return
            self._timer.cancel()
        self._timer = context.timers.at(due_s, self._choose)

    def _choose(self) -> None:
        """Watch the heaviest few of the living, and no others."""
        context, self._timer = self._context, None
        alive = [one for one in context.members.live() if one.state is MemberState.ALIVE]
        self._weights = {one.node: self._weight(one.node) for one in alive}
        alive.sort(key=lambda one: self._weights[one.node])
        chosen = {one.node: one for one in alive[: context.config.witness_streams]}
        spare = context.config.witness_streams
        for node in [node for node in self._watched if node not in chosen]:
            member = context.members.get(node)
            if member is not None and member.state is MemberState.SUSPECT and spare > 0:
                spare -= 1  # its end is what we wait for
                continue
            del self._watched[node]
            context.emit(Unwatch(node))
        for node, member in chosen.items():
            watch = Watch(node, member.address)
            if self._watched.get(node) != watch:
                self._watched[node] = watch
                context.count("witness_streams_opened")
                context.emit(watch)

    def _weight(self, node: NodeId) -> bytes:
        """The same for both ends, so that the two who watch each other need one stream."""
        known = self._weights.get(node)
        if known is not None:
            return known
        pair = sorted((self._context.me.node, node))
        return hashlib.blake2b(b"".join(pair), digest_size=8).digest()
