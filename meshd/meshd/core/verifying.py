"""How much checking of signatures others can cause: a check takes 0.1 to 0.2 ms, and a datagram can ask for ten.

Invariant: what fails is paid for, in checks, by who brought it; who owes is not listened to. So however many bad
records arrive, checking them takes at most `_ALL_PER_S` checks a second, beyond a burst of a few records.

* A stream proves who speaks, so each peer has an account for its streams.
* A datagram does not: a member can write the id of another on what it seals. So all datagrams share a bound, and
  within it each member has an account, and all who are no members have one together. Who lies in the name of one
  member has that one's datagrams passed over for a while: its records still come by others, and by streams.
* Good records are paid for by their owner, at a rate that no honest owner needs: readings that change every
  second are no records (soft state).

Counted: `record_unverified` (of who owes), `record_excess` (of an owner that writes too much; it comes later).
"""

from __future__ import annotations

from typing import Final

from meshd.core.allowance import Allowance, Allowances
from meshd.core.context import Context
from meshd.core.effects import Lane
from meshd_cms.types import NODE_ID_BYTES, Delta, NodeId

_EACH_PER_S: Final = 100.0  # failed checks
_EACH_BURST: Final = 600.0  # a little more than the largest record
_ALL_PER_S: Final = 400.0
_ALL_BURST: Final = 1_200.0
_WRITES_PER_S: Final = 64.0  # good entries of one owner
_WRITES_BURST: Final = 1_024.0
_STRANGERS: Final = NodeId(bytes(NODE_ID_BYTES))


class Verifying:
    """Who may have records checked."""

    def __init__(self, context: Context) -> None:
        nodes_max = context.config.members_max
        self._context = context
        self._all = Allowance(_ALL_PER_S, _ALL_BURST)
        self._by_datagram = Allowances(_EACH_PER_S, _EACH_BURST, nodes_max)
        self._by_stream = Allowances(_EACH_PER_S, _EACH_BURST, nodes_max)
        self._writes = Allowances(_WRITES_PER_S, _WRITES_BURST, nodes_max)

    def may_check(self, delta: Delta, sender: NodeId, lane: Lane) -> bool:
        """Whether to look at a delta at all."""
        context = self._context
        for account in self._accounts(sender, lane):
            if account.left(context.now_s) < 1.0:
                context.count("record_unverified")
                return False
        if self._writes.of(delta.owner).left(context.now_s) < 1.0:
            context.count("record_excess")
            return False
        return True

    def failed(self, delta: Delta, sender: NodeId, lane: Lane) -> None:
        """It was checked in vain: its owner did not sign it, or it is not what its head says."""
        for account in self._accounts(sender, lane):
            account.owe(self._context.now_s, _checks_of(delta))

    def waits(self, sender: NodeId, lane: Lane) -> None:
        """Its head was good, and there is a gap before it."""
        for account in self._accounts(sender, lane):
            account.owe(self._context.now_s, 1)

    def applied(self, delta: Delta) -> None:
        """It was news, and good."""
        self._writes.of(delta.owner).owe(self._context.now_s, _checks_of(delta))

    def _accounts(self, sender: NodeId, lane: Lane) -> tuple[Allowance, ...]:
        if lane is Lane.STREAM:
            return (self._by_stream.of(sender),)
        who = sender if sender in self._context.members else _STRANGERS
        return (self._all, self._by_datagram.of(who))


def _checks_of(delta: Delta) -> int:
    return 1 + len(delta.entries)
