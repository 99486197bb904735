"""Threads and memory of machines that are not at hand, from trees written after published listings."""

from pathlib import Path

import pytest

from meshd_plugins.builtin.llama.running.fit import GIB, MIB
from meshd_plugins.builtin.llama.running.hardware import Machine


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def cpus(count: int, **files: list[str]) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{n}/{name.replace('__', '/')}": values[n]
        for name, values in files.items()
        for n in range(count)
    }


SIBLINGS = "topology__thread_siblings_list"
PI5 = cpus(4, **{SIBLINGS: ["0", "1", "2", "3"], "cpufreq__cpuinfo_max_freq": ["2400000"] * 4})
RK3588 = cpus(
    8,
    **{SIBLINGS: [str(n) for n in range(8)], "cpu_capacity": ["530"] * 4 + ["1024"] * 4},
)
HYBRID = {
    **cpus(6, **{SIBLINGS: ["0-1", "0-1", "2-3", "2-3", "4", "5"]}),
    "sys/devices/cpu_core/cpus": "0-3",
}
LAPTOP = cpus(
    6,
    **{
        SIBLINGS: ["0-1", "0-1", "2-3", "2-3", "4", "5"],
        "cpufreq__cpuinfo_max_freq": ["4800000"] * 4 + ["1800000"] * 2,
    },
)
HYPER = cpus(4, **{SIBLINGS: ["0,2", "1,3", "0,2", "1,3"]})


@pytest.mark.parametrize(
    ("files", "count", "threads", "reason"),
    [
        (PI5, 4, 4, "4 physical cores"),
        (RK3588, 8, 4, "4 performance cores of 8"),
        (HYBRID, 6, 2, "2 performance cores of 4"),
        (LAPTOP, 6, 2, "2 performance cores of 4"),
        (HYPER, 4, 2, "2 physical cores"),
        ({}, 1, 1, "1 physical core"),
    ],
)
def test_threads_are_one_a_fast_core(
    tmp_path: Path, files: dict[str, str], count: int, threads: int, reason: str
) -> None:
    chosen = Machine(tree(tmp_path, files), frozenset(range(count))).threads()
    assert (chosen.value, chosen.reason) == (threads, reason)


def test_only_processors_that_may_be_used_count(tmp_path: Path) -> None:
    assert Machine(tree(tmp_path, RK3588), frozenset({0, 1, 2})).threads().value == 3
    assert Machine(tree(tmp_path, RK3588), frozenset({3, 4})).threads().value == 1
    assert Machine(tree(tmp_path, RK3588), frozenset({0})).threads(6).reason == "as configured"


QUOTA_V2 = {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}
QUOTA_V1 = {
    "proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/",
    "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000",
    "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize(
    ("files", "threads", "reason"),
    [
        (QUOTA_V2, 1, "the control group allows 1.5 of 4 cores"),
        (QUOTA_V1, 1, "the control group allows 0.5 of 4 cores"),
        ({**QUOTA_V2, "sys/fs/cgroup/a/cpu.max": "max 100000"}, 4, "4 physical cores"),
        ({**QUOTA_V1, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1"}, 4, "4 physical cores"),
    ],
)
def test_the_quota_of_a_control_group_counts(
    tmp_path: Path, files: dict[str, str], threads: int, reason: str
) -> None:
    chosen = Machine(tree(tmp_path, {**PI5, **files}), frozenset(range(4))).threads()
    assert (chosen.value, chosen.reason) == (threads, reason)


MEMINFO = {"proc/meminfo": "MemTotal: 8388608 kB\nMemFree: 1024 kB\nMemAvailable: 4194304 kB"}


def memory(root: Path, files: dict[str, str]) -> tuple[int, int]:
    found = Machine(tree(root, {**MEMINFO, **files}), frozenset({0})).memory()
    return found.total, found.available


def test_memory_is_the_machines_or_what_the_control_group_leaves(tmp_path: Path) -> None:
    assert memory(tmp_path / "plain", {}) == (8 * GIB, 4 * GIB)
    second = {
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/memory.max": str(2 * GIB),
        "sys/fs/cgroup/a/memory.current": str(GIB),
        "sys/fs/cgroup/a/memory.stat": f"anon 5\nactive_file {256 * MIB}\ninactive_file {256 * MIB}",
        "sys/fs/cgroup/a/b/memory.max": "max",
    }
    assert memory(tmp_path / "second", second) == (2 * GIB, 2 * GIB - 512 * MIB)
    first = {
        "proc/self/cgroup": "7:memory:/x",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
    }
    assert memory(tmp_path / "first", first) == (GIB, 0)


def test_a_tenth_stays_free_and_some_on_small_boards(tmp_path: Path) -> None:
    large = Machine(tree(tmp_path, MEMINFO), frozenset({0})).memory()
    assert large.reserve == int(8 * GIB * 0.1)
    small = {"proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 700000 kB"}
    assert Machine(tree(tmp_path, small), frozenset({0})).memory().reserve == 256 * MIB
