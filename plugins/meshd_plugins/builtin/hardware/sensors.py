"""How a device is doing now: temperature, throttling, battery, GPU load, power.

Paths are looked for once, when the sampler is made; a sample then reads about ten small files. Sources:
the kernel's thermal, power_supply and hwmon classes; on Jetsons `load` of the nvgpu device (per mille)
and the INA3221 rails (millivolts times milliamperes); on Raspberry Pis the firmware's `get_throttled`
(bits 0-3: now; 16-19: since boot) or, where the kernel lacks it, the `rpi_volt` alarm.
Tested on trees written after published listings; never run on a Jetson or a Raspberry Pi.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshd_plugins.builtin.hardware.tree import Tree

_THROTTLED_NOW: Final = {
    0: "under_voltage",
    1: "frequency_capped",
    2: "throttled",
    3: "soft_temperature_limit",
}
_TEMPERATURE_C: Final = (-40.0, 150.0)  # beyond it a sensor is off (Jetsons report -256)
_TOTAL_RAILS: Final = ("VDD_IN", "POM_5V_IN")
"""Rails that carry the whole board. Where there is none (AGX Orin), the rails are added up."""

_NO_RAILS: Final = ("", "NC", "sum of shunt voltages")


@dataclass(frozen=True, slots=True)
class Rail:
    """One measured supply line."""

    label: str
    millivolts: Path
    milliamperes: Path


@dataclass(frozen=True, slots=True)
class Sample:
    """One look; None and () where the device cannot say."""

    temperature_c: float | None  # the hottest zone
    throttled: tuple[str, ...] | None  # what holds it back now; () nothing
    battery: float | None  # 0..1
    on_battery: bool | None
    gpu: float | None  # 0..1 busy
    power_w: float | None  # of the board


class Sensors:
    """Knows the paths of one device."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._zones = self._paths("sys/class/thermal/thermal_zone*/temp") or self._paths(
            "sys/class/hwmon/hwmon*/temp*_input"
        )
        self._throttled = self._paths("sys/devices/platform/soc*/soc*:firmware/get_throttled")
        self._under_voltage = [
            path.parent / "in0_lcrit_alarm"
            for path in self._paths("sys/class/hwmon/hwmon*/name")
            if tree.text(path) == "rpi_volt"
        ]
        self._supplies = [
            path.parent
            for path in self._paths("sys/class/power_supply/*/type")
            if tree.text(path.parent / "scope") != "Device"
        ]
        self._gpu_per_mille = self._paths("sys/class/devfreq/*/device/load")
        self._gpu_percent = self._paths("sys/class/drm/card*/device/gpu_busy_percent")
        self._rails = self._find_rails()

    def sample(self) -> Sample:
        """Look now. Raises nothing."""
        battery, on_battery = self._battery()
        return Sample(
            temperature_c=self._temperature(),
            throttled=self._throttling(),
            battery=battery,
            on_battery=on_battery,
            gpu=self._gpu(),
            power_w=self._power(),
        )

    def _paths(self, pattern: str) -> list[Path]:
        return [path.relative_to(self._tree.root) for path in self._tree.find(pattern)]

    def _find_rails(self) -> tuple[Rail, ...]:
        rails: list[Rail] = []
        for name in self._paths("sys/class/hwmon/hwmon*/name"):
            if self._tree.text(name) != "ina3221":
                continue
            for number in range(1, 4):
                label = self._tree.text(name.parent / f"in{number}_label")
                if label not in _NO_RAILS:
                    rails.append(
                        Rail(
                            label,
                            name.parent / f"in{number}_input",
                            name.parent / f"curr{number}_input",
                        )
                    )
        total = [rail for rail in rails if rail.label in _TOTAL_RAILS]
        return tuple(total or rails)

    def _temperature(self) -> float | None:
        readings = [self._tree.number(path) for path in self._zones]
        low, high = _TEMPERATURE_C
        degrees = [reading / 1000 for reading in readings if reading is not None]
        return max((degree for degree in degrees if low < degree < high), default=None)

    def _throttling(self) -> tuple[str, ...] | None:
        for path in self._throttled:
            bits = self._tree.flags(path)
            if bits is not None:
                return tuple(flag for bit, flag in _THROTTLED_NOW.items() if bits >> bit & 1)
        for path in self._under_voltage:
            alarm = self._tree.number(path)
            if alarm is not None:
                return ("under_voltage",) if alarm else ()
        return None

    def _battery(self) -> tuple[float | None, bool | None]:
        levels: list[int] = []
        discharging = False
        for supply in self._supplies:
            if self._tree.text(supply / "type") != "Battery":
                continue
            capacity = self._tree.number(supply / "capacity")
            if capacity is not None:
                levels.append(min(max(capacity, 0), 100))
            discharging |= self._tree.text(supply / "status") == "Discharging"
        if not levels:
            return None, None
        return sum(levels) / len(levels) / 100, discharging

    def _gpu(self) -> float | None:
        for paths, full in ((self._gpu_per_mille, 1000), (self._gpu_percent, 100)):
            loads = [self._tree.number(path) for path in paths]
            known = [min(max(load / full, 0.0), 1.0) for load in loads if load is not None]
            if known:
                return max(known)
        return None

    def _power(self) -> float | None:
        total = 0.0
        for rail in self._rails:
            millivolts = self._tree.number(rail.millivolts)
            milliamperes = self._tree.number(rail.milliamperes)
            if millivolts is None or milliamperes is None:
                return None  # a part of the sum would look like a thrifty board
            total += millivolts * milliamperes / 1e6
        return round(total, 3) if self._rails else None
