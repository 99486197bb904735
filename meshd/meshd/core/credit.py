"""How much an accuser is still believed.

Invariant: an accuser is forgiven `per_minute_max` refuted accusations a minute, and as many at once; at most
`ACCUSERS_MAX` accusers are remembered, those charged last.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from meshd_cms.types import NodeId

ACCUSERS_MAX: Final = 256


class Credit:
    """A bucket for each accuser that fills with refuted accusations and leaks."""

    def __init__(self, per_minute_max: int) -> None:
        self._most = float(per_minute_max)
        self._leak_per_s = per_minute_max / 60.0
        self._charged: OrderedDict[NodeId, tuple[float, float]] = OrderedDict()  # level, at

    def charge(self, accuser: NodeId, points: float, now_s: float) -> None:
        """An accusation by this node was refuted."""
        level = self._level(accuser, now_s) + points
        self._charged[accuser] = (min(level, self._most + 1.0), now_s)
        self._charged.move_to_end(accuser)
        if len(self._charged) > ACCUSERS_MAX:
            self._charged.popitem(last=False)

    def is_spent(self, accuser: NodeId, now_s: float) -> bool:
        """Whether its accusations are to be ignored for now."""
        return self._level(accuser, now_s) > self._most

    def _level(self, accuser: NodeId, now_s: float) -> float:
        level, at_s = self._charged.get(accuser, (0.0, now_s))
        return max(0.0, level - (now_s - at_s) * self._leak_per_s)
