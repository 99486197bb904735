"""What a file of results holds, percentiles of it, and figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

OURS, KINSHIP, MEMBERLIST, SERF = "meshd", "kinship", "memberlist", "serf"
NAMES = (OURS, KINSHIP, MEMBERLIST, SERF)
"""The implementations, in the order of the tables."""

Row: TypeAlias = dict[str, Any]
"""A line of a file of results, decoded."""

NOTHING = "-"
"""Shown for what was not measured."""


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the least value that `share` of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def shown(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if math.isinf(value):
        return "never"
    if math.isnan(value):
        return NOTHING
    magnitude = abs(value)
    if magnitude >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"
