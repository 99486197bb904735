"""The records of newcomers: how they come to everybody when one joins, and when a hundred join at once.

A newcomer's record is pulled from itself: two datagrams a node and newcomer, where rumours of a whole record
would be a burst each. When many come at once, who they are is spread first (we wait until no more come, within
a bound). Then we pull a few records from their owners and, in rounds, from members chosen by chance what they
have fetched meanwhile. So a record leaves its owner a few times, not once for every member, and what a node
has about doubles with each round. What is left after `_ROUNDS` is pulled from its owners.

Among so many newcomers a rumour or two may have missed us: rounds end with an exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from meshd.core.context import Context, Peer
from meshd.core.membership import Member
from meshd.core.messages import Pull
from meshd.core.tables import lines_per_table
from meshd.core.timers import Timer
from meshd_cms.types import DigestLine, Epoch, NodeId, Version

_DELAYS_MOST: Final = 16  # times pull_delay_s: how long newcomers after newcomers put the pulls off
_DIRECT: Final = 8  # newcomers whose records are asked of themselves, in each round
_ROUNDS: Final = 6


def nothing_of(owner: NodeId) -> DigestLine:
    """The line of an owner of whom nothing is held."""
    return DigestLine(owner, Epoch(1), Version(0), Version(0))


def send_pulls(context: Context, peer: Peer, lines: Sequence[DigestLine]) -> None:
    """Ask a peer for what is beyond these lines."""
    size = lines_per_table(context.config.datagram_payload_bytes_max)
    for start in range(0, len(lines), size):
        context.count("pulls")
        context.send(peer, [Pull(tuple(lines[start : start + size]))])


class Newcomers:
    """Those whose records are to be fetched.

    Args:
        context: shared with the other parts.
        exchange: compares everything with a member.
    """

    def __init__(self, context: Context, exchange: Callable[[Member], None]) -> None:
        self._context = context
        self._exchange = exchange
        self._waiting: dict[NodeId, int] = {}  # with the epoch of the record that is wanted
        self._timer: Timer | None = None
        self._until_s = 0.0  # newcomers after newcomers do not put it off beyond that
        self._rounds = 0

    def add(self, member: Member) -> None:
        """Fetch the record of a newcomer, soon."""
        context, delay_s = self._context, self._context.config.pull_delay_s
        if len(self._waiting) >= context.config.members_max:
            context.count("pull_overflow")
            return
        self._waiting[member.node] = member.update.epoch
        due_s = context.now_s + delay_s * context.rng.uniform(1.0, 2.0)
        if self._timer is None:
            self._until_s = context.now_s + _DELAYS_MOST * delay_s
        else:
            self._timer.cancel()
        self._timer = context.timers.at(min(due_s, self._until_s), self._fetch)

    def _fetch(self) -> None:
        context, self._timer = self._context, None
        missing = self._missing()
        context.rng.shuffle(missing)
        is_last = len(missing) <= _DIRECT or self._rounds >= _ROUNDS
        direct = len(missing) if is_last else _DIRECT
        for member, line in missing[:direct]:
            send_pulls(context, Peer(member.node, member.address), [line])
        if is_last:
            if self._rounds > 0:
                for other in context.members.sample(1):
                    self._exchange(other)
            self._waiting, self._rounds = {}, 0
            return
        self._rounds += 1
        for other in context.members.sample(1):
            rest = [line for _, line in missing[direct:]]
            send_pulls(context, Peer(other.node, other.address), rest)
        self._until_s = context.now_s + context.config.pull_delay_s * context.rng.uniform(3.0, 4.0)
        self._timer = context.timers.at(self._until_s, self._fetch)

    def _missing(self) -> list[tuple[Member, DigestLine]]:
        """Those still there whose records have not come; the others wait for nothing any more."""
        context = self._context
        missing: list[tuple[Member, DigestLine]] = []
        for node, epoch in self._waiting.items():
            member, held = context.members.get(node), context.store.pull_line(node)
            if member is not None and member.is_live and (held is None or held.epoch < epoch):
                missing.append((member, held or nothing_of(node)))
        self._waiting = {member.node: self._waiting[member.node] for member, _ in missing}
        return missing
