"""What this device is (`hw`) and how loaded it is (`load`); registers no capability.

Processor and memory come from psutil, all else from files under a root (see `board` and `sensors`,
which also say what was never run on a real board).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import psutil

from meshd_plugins.api import PluginConfigError, PluginContext, Value
from meshd_plugins.builtin.hardware.board import read_board
from meshd_plugins.builtin.hardware.sensors import Sensors
from meshd_plugins.builtin.hardware.tree import Tree
from meshd_plugins.hookspecs import hookimpl

__all__ = ["Hardware", "Meter", "meshd_facts", "meshd_load", "meshd_register"]

MODEL_CHARACTERS_MAX: Final = 80
"""The record's entry must stay small."""


class Meter(Protocol):
    """What psutil is asked for."""

    def architecture(self) -> str:
        """As `uname -m` says it."""
        ...

    def cores(self) -> int:
        """Processors that may be used."""
        ...

    def memory_bytes(self) -> int:
        """All there is."""
        ...

    def memory_free_bytes(self) -> int:
        """What could be had without swapping."""
        ...

    def cpu(self) -> float:
        """Busy part (0..1) since the last call; 0.0 at the first. Does not block."""
        ...


class PsutilMeter:
    """The machine that this process runs on."""

    def __init__(self) -> None:
        psutil.cpu_percent(interval=None)  # the first call only sets the mark

    def architecture(self) -> str:
        """As `uname -m` says it."""
        return platform.machine()

    def cores(self) -> int:
        """Processors of the device."""
        return int(psutil.cpu_count() or 1)

    def memory_bytes(self) -> int:
        """All there is."""
        return int(psutil.virtual_memory().total)

    def memory_free_bytes(self) -> int:
        """What could be had without swapping."""
        return int(psutil.virtual_memory().available)

    def cpu(self) -> float:
        """Busy part since the last call."""
        return float(psutil.cpu_percent(interval=None)) / 100


class Hardware:
    """One device: its facts, and its load when asked."""

    def __init__(self, root: Path, meter: Meter) -> None:
        self._meter = meter
        self._tree = Tree(root)
        self._sensors = Sensors(self._tree)

    def facts(self) -> dict[str, Value]:
        """For the `hw` key; keys that are not known are left out."""
        memory_bytes = self._meter.memory_bytes()
        board = read_board(self._tree, memory_bytes)
        facts: dict[str, Value] = {
            "architecture": self._meter.architecture(),
            "cores": self._meter.cores(),
            "memory_bytes": memory_bytes,
            "power_class": str(board.power_class),
        }
        if board.model:
            facts["board"] = board.model[:MODEL_CHARACTERS_MAX]
        if board.accelerator:
            facts["accelerator"] = board.accelerator.name[:MODEL_CHARACTERS_MAX]
            facts["accelerator_shared_memory"] = board.accelerator.shared_memory
            if board.accelerator.memory_bytes:
                facts["accelerator_memory_bytes"] = board.accelerator.memory_bytes
        return facts

    def load(self) -> dict[str, Value]:
        """For the soft state `load`; keys that the device cannot tell are left out."""
        sample = self._sensors.sample()
        load: dict[str, Value] = {
            "cpu": round(self._meter.cpu(), 3),
            "memory_free_bytes": self._meter.memory_free_bytes(),
        }
        if sample.throttled is not None:
            load["throttled"] = bool(sample.throttled)
            if sample.throttled:
                load["throttled_by"] = list(sample.throttled)
        figures = {
            "temperature_c": sample.temperature_c,
            "battery": sample.battery,
            "on_battery": sample.on_battery,
            "gpu": sample.gpu,
            "power_w": sample.power_w,
        }
        load.update({key: value for key, value in figures.items() if value is not None})
        return load


_devices: dict[Path, Hardware] = {}  # by the plugin's state folder: one a running node


def _device(context: PluginContext) -> Hardware:
    device = _devices.get(context.state_dir)
    if device is None:
        root = context.config.get("root", "/")
        assert isinstance(root, str), "checked by meshd_register"
        device = _devices[context.state_dir] = Hardware(Path(root), PsutilMeter())
    return device


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Check the table: `root` is where /proc and /sys are looked for, "/" unless told."""
    unknown = sorted(set(context.config) - {"root"})
    if unknown:
        raise PluginConfigError(f"plugins.hardware.{unknown[0]} is no setting; known: root")
    root = context.config.get("root", "/")
    if not isinstance(root, str) or not Path(root).is_dir():
        raise PluginConfigError(f"plugins.hardware.root is {root!r}; it must be a folder")


@hookimpl
def meshd_facts(context: PluginContext) -> Mapping[str, Value]:
    """What this device is."""
    return _device(context).facts()


@hookimpl
def meshd_load(context: PluginContext) -> Mapping[str, Value]:
    """How loaded it is now."""
    return _device(context).load()
