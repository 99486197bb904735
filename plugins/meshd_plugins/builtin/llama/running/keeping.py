"""What all models of a node share, and the states that each of them goes through."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import trio

from meshd_plugins.api import PluginContext
from meshd_plugins.builtin.llama.running.figures import FiguresStore
from meshd_plugins.builtin.llama.running.hardware import Machine
from meshd_plugins.builtin.llama.running.residency import Residency
from meshd_plugins.builtin.llama.running.restarts import Waits


class State(StrEnum):
    """Of one model."""

    STARTING = "starting"
    COLD = "cold"
    LOADING = "loading"
    SERVING = "serving"
    BACKING_OFF = "backing_off"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Tools:
    """What all models of a node share."""

    context: PluginContext
    machine: Machine
    residency: Residency
    figures: FiguresStore
    disk: trio.CapacityLimiter  # one file is hashed at a time: it is the disk that is slow
    waits: Waits
