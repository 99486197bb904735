"""The hardware plugin on device trees written after published listings (see the README beside them)."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from meshd_plugins.api import PluginConfigError, Value
from meshd_plugins.builtin import hardware
from meshd_plugins.builtin.hardware import Hardware
from meshd_plugins.testing import fake_context

TREES = Path(__file__).parent / "data" / "devicetrees"
MEMORY_BYTES = 8_000_000_000


class FixedMeter:
    def architecture(self) -> str:
        return "aarch64"

    def cores(self) -> int:
        return 6

    def memory_bytes(self) -> int:
        return MEMORY_BYTES

    def memory_free_bytes(self) -> int:
        return 5_000_000_000

    def cpu(self) -> float:
        return 0.25


def plant(name: str, root: Path) -> Hardware:
    """Lay a tree out under a folder."""
    for path, content in tomllib.loads((TREES / f"{name}.toml").read_text()).items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return Hardware(root, FixedMeter())


ALWAYS_FACTS = {"architecture": "aarch64", "cores": 6, "memory_bytes": MEMORY_BYTES}
ALWAYS_LOAD = {"cpu": 0.25, "memory_free_bytes": 5_000_000_000}
AMPERE = {"accelerator": "NVIDIA Ampere (ga10b)", "accelerator_shared_memory": True, "accelerator_memory_bytes": MEMORY_BYTES}  # fmt: skip

CASES: list[tuple[str, dict[str, Value], dict[str, Value]]] = [
    (
        "jetson_orin_nano",
        {"board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "power_class": "low", **AMPERE},
        {"temperature_c": 51.312, "gpu": 0.637, "power_w": 7.46},
    ),
    (
        "jetson_agx_orin",
        {"board": "Jetson AGX Orin Developer Kit", "power_class": "medium", **AMPERE},
        {"temperature_c": 44.0, "gpu": 0.0, "power_w": 10.65},
    ),
    (
        "raspberry_pi_5",
        {"board": "Raspberry Pi 5 Model B Rev 1.0", "power_class": "low"},
        {"temperature_c": 52.35, "throttled": False},
    ),
    (
        "raspberry_pi_4_throttled",
        {"board": "Raspberry Pi 4 Model B Rev 1.4", "power_class": "low"},
        {"temperature_c": 82.3, "throttled": True, "throttled_by": ["under_voltage", "throttled"]},
    ),
    (
        "x86_server",
        {"board": "Supermicro SYS-5019D", "power_class": "high"},
        {"temperature_c": 41.0},
    ),
    (
        "x86_workstation_nvidia",
        {"board": "LENOVO 30BES0LR00", "power_class": "high", "accelerator": "NVIDIA RTX A4000", "accelerator_shared_memory": False},
        {"temperature_c": 36.0},
    ),
    (
        "laptop_on_battery",
        {"board": "Framework Laptop 13 (AMD Ryzen 7040Series)", "power_class": "battery", "accelerator": "AMD GPU", "accelerator_shared_memory": False, "accelerator_memory_bytes": 536870912},
        {"temperature_c": 47.0, "battery": 0.63, "on_battery": True, "gpu": 0.12},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "facts", "load"), CASES, ids=[case[0] for case in CASES])
def test_a_tree_is_read(
    name: str, facts: Mapping[str, Value], load: Mapping[str, Value], tmp_path: Path
) -> None:
    device = plant(name, tmp_path)
    assert device.facts() == {**ALWAYS_FACTS, **facts}
    assert device.load() == {**ALWAYS_LOAD, **load}


def test_every_tree_is_in_the_cases() -> None:
    assert {path.stem for path in TREES.glob("*.toml")} == {case[0] for case in CASES}


def test_a_sample_is_taken_anew_each_time(tmp_path: Path) -> None:
    device = plant("raspberry_pi_4_throttled", tmp_path)
    (tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled").write_text("50000\n")
    assert device.load()["throttled"] is False  # it was, since boot, but is not now


def test_a_sensor_that_goes_away_or_says_nonsense_is_left_out(tmp_path: Path) -> None:
    device = plant("jetson_orin_nano", tmp_path)
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").unlink()
    (tmp_path / "sys/class/devfreq/17000000.gpu/device/load").write_text("busy\n")
    assert set(device.load()) == {*ALWAYS_LOAD, "temperature_c"}


def test_an_empty_root_has_no_more_than_psutil_says(tmp_path: Path) -> None:
    device = Hardware(tmp_path, FixedMeter())
    assert device.facts() == {**ALWAYS_FACTS, "power_class": "high"}
    assert device.load() == ALWAYS_LOAD


def test_the_hooks_read_this_machine(tmp_path: Path) -> None:
    context = fake_context("hardware", tmp_path)
    hardware.meshd_register(context)
    facts, load = hardware.meshd_facts(context), hardware.meshd_load(context)
    assert isinstance(facts["memory_bytes"], int)
    assert isinstance(load["memory_free_bytes"], int)
    assert 0 < load["memory_free_bytes"] <= facts["memory_bytes"]
    assert isinstance(load["cpu"], float)
    assert 0 <= load["cpu"] <= 1


@pytest.mark.parametrize(
    ("table", "names"),
    [({"rot": "/"}, "rot"), ({"root": "/nowhere/at/all"}, "root"), ({"root": 3}, "root")],
)
def test_a_wrong_table_is_named(table: Mapping[str, Value], names: str, tmp_path: Path) -> None:
    with pytest.raises(PluginConfigError, match=rf"plugins\.hardware\.{names}"):
        hardware.meshd_register(fake_context("hardware", tmp_path, table))
