"""What the machine offers a model: threads and memory, each figure with the reason for it.

Sources: the kernel's topology (hyper-threads of a core), cpu_capacity (big.LITTLE on ARM), the list of
performance cores (hybrid x86) or cpufreq's highest frequencies, the CPU quota and memory limit of the
control groups, versions 1 and 2, and /proc/meminfo. Tested on trees written after published listings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshd_plugins.builtin.hardware.tree import Tree
from meshd_plugins.builtin.llama.running.fit import MIB

FAST_SHARE: Final = 0.6  # of the highest capacity or frequency, from which a core counts as fast
RESERVE_SHARE: Final = 0.1
RESERVE_BYTES_MIN: Final = 256 * MIB
UNLIMITED: Final = 2**60  # version 1 says "no limit" with a number near 2^63


@dataclass(frozen=True, slots=True)
class Chosen:
    """A figure, and why it is that."""

    value: int
    reason: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the machine, or of the control group where that is less; bytes."""

    total: int
    available: int  # without swapping; files that can be read again count as available

    @property
    def reserve(self) -> int:
        """What is left free for everything else, unless told."""
        return max(RESERVE_BYTES_MIN, int(self.total * RESERVE_SHARE))


class Machine:
    """One machine, looked at through /proc and /sys below a root."""

    def __init__(self, root: Path = Path("/"), allowed: frozenset[int] | None = None) -> None:
        self._tree = Tree(root)
        self._allowed = allowed if allowed is not None else frozenset(os.sched_getaffinity(0))

    def threads(self, wished: int = 0) -> Chosen:
        """How many threads compute: one a core, since a second one on a core only gets in the way."""
        if wished:
            return Chosen(wished, "as configured")
        cores = self._cores()
        fast = self._fast(cores)
        count, reason = len(fast), f"{len(fast)} physical cores"
        if len(fast) < len(cores):
            reason = f"{len(fast)} performance cores of {len(cores)}"
        quota = self._quota()
        if quota is not None and quota < count:
            count = max(1, int(quota))
            reason = f"the control group allows {quota:g} of {len(cores)} cores"
        return Chosen(max(count, 1), reason.replace("1 physical cores", "1 physical core"))

    def memory(self) -> Memory:
        """What there is now."""
        total, available = self._meminfo("MemTotal"), self._meminfo("MemAvailable")
        for limit, used in self._memory_limits():
            total = min(total, limit)
            available = min(available, max(limit - used, 0))
        return Memory(total, available)

    # -- cores -----------------------------------------------------------------------------------------

    def _cores(self) -> dict[str, int]:
        """One processor of each core that may be used, by the list of the core's hyper-threads."""
        cores: dict[str, int] = {}
        for cpu in sorted(self._allowed):
            siblings = self._tree.text(_cpu(cpu) / "topology/thread_siblings_list")
            cores.setdefault(siblings or str(cpu), cpu)
        return cores

    def _fast(self, cores: dict[str, int]) -> list[int]:
        """Those that are not slowed down by waiting for the slow ones."""
        performance = _listed(self._tree.text("sys/devices/cpu_core/cpus"))
        if performance and not performance.isdisjoint(cores.values()):
            return [cpu for cpu in cores.values() if cpu in performance]
        for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
            speeds = {cpu: self._tree.number(_cpu(cpu) / file) or 0 for cpu in cores.values()}
            most = max(speeds.values(), default=0)
            if most:
                return [cpu for cpu, speed in speeds.items() if speed >= FAST_SHARE * most]
        return list(cores.values())

    def _quota(self) -> float | None:
        """Processors that the control groups allow; None without a limit."""
        quotas: list[float] = []
        for folder in self._groups(""):
            words = self._tree.text(folder / "cpu.max").split()
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
                quotas.append(int(words[0]) / max(int(words[1]), 1))
        for folder in self._groups("cpu"):
            quota = self._tree.number(folder / "cpu.cfs_quota_us") or 0
            period = self._tree.number(folder / "cpu.cfs_period_us") or 0
            if quota > 0 and period > 0:
                quotas.append(quota / period)
        return min(quotas, default=None)

    # -- memory ----------------------------------------------------------------------------------------

    def _meminfo(self, key: str) -> int:
        for line in self._tree.text("proc/meminfo").splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
        return 0

    def _memory_limits(self) -> Iterator[tuple[int, int]]:
        """Limit and use of each control group that has one; what can be read again is not used."""
        names = (
            ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
            (
                "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                ("total_active_file", "total_inactive_file"),
            ),
        )
        for controller, limit_name, used_name, file_names in names:
            for folder in self._groups(controller):
                limit = self._tree.number(folder / limit_name)
                if limit is None or limit >= UNLIMITED:
                    continue
                used = self._tree.number(folder / used_name) or 0
                files = 0
                for line in self._tree.text(folder / "memory.stat").splitlines():
                    name, _, value = line.partition(" ")
                    if name in file_names and value.isdecimal():
                        files += int(value)
                yield limit, max(used - files, 0)

    def _groups(self, controller: str) -> Iterator[Path]:
        """The folders of our control group and of those around it; "": of version 2."""
        for line in self._tree.text("proc/self/cgroup").splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if (controllers == "") != (controller == "") or controller not in controllers.split(
                ","
            ):
                continue
            base = Path("sys/fs/cgroup") / controller
            folder = base / path.strip("/")
            yield from (
                folder,
                *(parent for parent in folder.parents if parent.is_relative_to(base)),
            )


def _cpu(number: int) -> Path:
    return Path(f"sys/devices/system/cpu/cpu{number}")


def _listed(text: str) -> frozenset[int]:
    """Read the kernel's lists: "0-3,8"."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
