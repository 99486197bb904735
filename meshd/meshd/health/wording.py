"""How findings are worded: lists that stay short, times in a person's units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SHOWN_MAX: Final = 4


def listed(words: Sequence[str]) -> str:
    """`a, b and c`; of many, the first few and how many more there are."""
    if len(words) > SHOWN_MAX:
        more = len(words) - SHOWN_MAX
        return f"{', '.join(words[:SHOWN_MAX])} and {more} more"
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def lasting(seconds: float) -> str:
    """A length of time, rounded as a person would."""
    seconds = abs(seconds)
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86_400:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86_400:.0f} days"


def times(count: int) -> str:
    """`once`, `twice`, `31 times`."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def counted(count: int, thing: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"
