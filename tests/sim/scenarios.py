"""All scenarios, by name. Importing a module of scenarios registers what it holds."""

from __future__ import annotations

from tests.sim import (
    scenarios_basic,
    scenarios_clocks,
    scenarios_decrees,
    scenarios_faults,
    scenarios_liar,
)
from tests.sim.plays import SCENARIOS, Outcome, Play, play

__all__ = [
    "SCENARIOS",
    "Outcome",
    "Play",
    "play",
    "scenarios_basic",
    "scenarios_clocks",
    "scenarios_decrees",
    "scenarios_faults",
    "scenarios_liar",
]
