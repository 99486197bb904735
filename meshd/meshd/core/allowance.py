"""How much may be done for others: a bucket that refills, and one bucket for each node.

Invariant: within any time t, at most `burst + t * per_s` is taken.
"""

from __future__ import annotations

from collections import OrderedDict

from meshd_cms.types import NodeId


class Allowance:
    """One bucket; full at first.

    Args:
        per_s: what it gains a second.
        burst: what it holds at most.
    """

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._counted_s = 0.0

    def left(self, now_s: float) -> float:
        """What may be taken now."""
        gained = max(0.0, now_s - self._counted_s) * self._per_s
        self._left = min(self._burst, self._left + gained)
        self._counted_s = max(self._counted_s, now_s)
        return self._left

    def take(self, now_s: float, amount: float = 1.0) -> bool:
        """Take so much, if it is there; otherwise nothing."""
        if self.left(now_s) < amount:
            return False
        self._left -= amount
        return True

    def owe(self, now_s: float, amount: float) -> None:
        """Take so much though it may not be there: nothing is left until the debt is paid."""
        self.left(now_s)
        self._left -= amount


class Allowances:
    """A bucket for each node; the one not asked for longest is forgotten above `nodes_max`."""

    def __init__(self, per_s: float, burst: float, nodes_max: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._nodes_max = nodes_max
        self._by_node: OrderedDict[NodeId, Allowance] = OrderedDict()

    def of(self, node: NodeId) -> Allowance:
        """The bucket of a node."""
        found = self._by_node.get(node)
        if found is None:
            found = self._by_node[node] = Allowance(self._per_s, self._burst)
            if len(self._by_node) > self._nodes_max:
                self._by_node.popitem(last=False)
        self._by_node.move_to_end(node)
        return found
