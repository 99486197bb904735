"""When the rates of late are announced instead of those that were measured at the start. Pure.

A device that is too hot, on battery or busy with something else computes more slowly than when it was
measured; its model's worker knows. What is announced follows when the difference is large and lasts: each
change of the record travels through the whole mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshd_plugins.api import Value

CHANGE: Final = 0.25  # of what is announced, beyond which a rate counts as another one
LASTING_S: Final = 30.0
RATE_MAX: Final = 1e7


class RecentRates:
    """Rates of one model: prefill and decode, tokens a second; 0.0 where nothing is known."""

    def __init__(self, announced: tuple[float, float]) -> None:
        self._announced = announced
        self._since_s: float | None = None  # since when they differ

    def seen(self, now: tuple[float, float], now_s: float) -> bool:
        """Take in a sample; True: it is to be announced, and counts as announced."""
        pairs = zip(now, self._announced, strict=True)
        if not any(rate > 0 and abs(rate - said) > CHANGE * said for rate, said in pairs):
            self._since_s = None
            return False
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s < LASTING_S:
            return False
        self._announced, self._since_s = now, None
        return True


def rates_in(table: Mapping[str, Value]) -> tuple[float, float]:
    """Prefill and decode, from a worker's hello or status; 0.0 for what makes no sense."""
    prefill, decode = (
        float(rate)
        if isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate <= RATE_MAX
        else 0.0
        for rate in (table.get("prefill_tokens_per_s"), table.get("decode_tokens_per_s"))
    )
    return prefill, decode
