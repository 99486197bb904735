"""What a device is: its board, its accelerator, its class of power.

Sources: /proc/device-tree (model, compatible), nvgpu under /sys/class/devfreq (Jetson), amdgpu under
/sys/class/drm, /proc/driver/nvidia (discrete NVIDIA), DMI (x86). Tested on trees written after
published listings of Jetson Orin Nano, Jetson AGX Orin, Raspberry Pi 4 and 5, an x86 server and a
laptop; never run on a Jetson or a Raspberry Pi.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from meshd_plugins.builtin.hardware.tree import Tree


class PowerClass(StrEnum):
    """How much a device may draw, coarsely; what it runs on comes first."""

    BATTERY = "battery"  # has one: it may run out
    LOW = "low"  # boards up to about 25 W
    MEDIUM = "medium"  # boards up to about 60 W
    HIGH = "high"  # mains, and more than that


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What beside the processor computes."""

    name: str
    memory_bytes: int  # 0 when not known
    shared_memory: bool  # it is the same memory as the processor's


@dataclass(frozen=True, slots=True)
class Board:
    """What does not change while the device runs."""

    model: str  # "NVIDIA Jetson Orin Nano Developer Kit", "" when nothing says
    accelerator: Accelerator | None
    power_class: PowerClass


def read_board(tree: Tree, memory_bytes: int) -> Board:
    """Look at a device. Raises nothing."""
    model = _model(tree)
    return Board(model, _accelerator(tree, memory_bytes), _power_class(tree, model))


def is_jetson(tree: Tree) -> bool:
    """Whether the device tree says Tegra."""
    return "nvidia,tegra" in tree.text("proc/device-tree/compatible")


def _model(tree: Tree) -> str:
    model = tree.text("proc/device-tree/model")
    if model:
        return model
    words = [tree.text(f"sys/class/dmi/id/{part}") for part in ("sys_vendor", "product_name")]
    return " ".join(word for word in words if word)


def _accelerator(tree: Tree, memory_bytes: int) -> Accelerator | None:
    if is_jetson(tree):
        gpu = jetson_gpu_name(tree)
        if gpu:
            return Accelerator(gpu, memory_bytes, shared_memory=True)
    for path in tree.find("proc/driver/nvidia/gpus/*/information"):
        for line in tree.text(path.relative_to(tree.root)).splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return Accelerator(value.strip(), 0, shared_memory=False)
    for path in tree.find("sys/class/drm/card*/device/mem_info_vram_total"):
        device = path.parent.relative_to(tree.root)
        name = tree.text(device / "product_name") or "AMD GPU"
        return Accelerator(name, tree.number(device / path.name) or 0, shared_memory=False)
    return None


_TEGRA_GPUS = {
    "ga10b": "NVIDIA Ampere (ga10b)",
    "gv11b": "NVIDIA Volta (gv11b)",
    "gp10b": "NVIDIA Pascal (gp10b)",
    "gm20b": "NVIDIA Maxwell (gm20b)",
}


def jetson_gpu_name(tree: Tree) -> str:
    """Name of the integrated GPU by what it is compatible with; "" without one."""
    for device in tree.find("sys/class/devfreq/*/device"):
        compatible = tree.text(device.relative_to(tree.root) / "of_node/compatible")
        for chip, name in _TEGRA_GPUS.items():
            if chip in compatible or device.parent.name.endswith(chip):
                return name
    return ""


def _power_class(tree: Tree, model: str) -> PowerClass:
    if any(tree.text(path.relative_to(tree.root)) == "Battery" for path in _supply_types(tree)):
        return PowerClass.BATTERY
    if "Raspberry Pi" in model or "Nano" in model:
        return PowerClass.LOW
    return PowerClass.MEDIUM if tree.text("proc/device-tree/model") else PowerClass.HIGH


def _supply_types(tree: Tree) -> list[Path]:
    """Type files of supplies of the device itself (a mouse's battery has scope "Device")."""
    return [
        path
        for path in tree.find("sys/class/power_supply/*/type")
        if tree.text(path.parent.relative_to(tree.root) / "scope") != "Device"
    ]
