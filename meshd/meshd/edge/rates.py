"""Token buckets: so many in so long, as many at once. Pure, and bounded whoever comes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

BUCKETS_MAX: Final = 1024


class Buckets:
    """A bucket for each name; the one that was used longest ago makes room for a new one.

    Whoever is forgotten so starts with a full bucket: a bound on memory, and a limit only on those who come
    often.
    """

    def __init__(self, buckets_max: int = BUCKETS_MAX) -> None:
        self._buckets_max = buckets_max
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, at

    def __len__(self) -> int:
        """How many buckets are held."""
        return len(self._buckets)

    def take(self, name: str, count: int, period_s: float, now_s: float) -> float:
        """Take one of `count` that come back within `period_s`.

        Returns 0.0 when there was one, or else the seconds until there is; nothing is taken then.
        """
        left, at_s = self._buckets.pop(name, (float(count), now_s))
        left = min(float(count), left + max(0.0, now_s - at_s) * count / period_s)
        wait_s = 0.0 if left >= 1.0 else (1.0 - left) * period_s / count
        self._buckets[name] = (left if wait_s else left - 1.0, now_s)
        if len(self._buckets) > self._buckets_max:
            self._buckets.popitem(last=False)
        return wait_s
