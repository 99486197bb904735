"""What the operating system says: about the machine, and about the processes that are measured."""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

MB = 2**20
_INTERFACE_HEADINGS = 2
_TRANSMIT_BYTES = 8  # column of /proc/net/dev


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process, so far."""

    cpu_s: float
    resident_mb: float


def usage(pid: int) -> Usage:
    """Processor time of all its threads, to the nanosecond, and resident memory."""
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text().split()[0])
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Usage(nanoseconds / 1e9, pages * os.sysconf("SC_PAGE_SIZE") / MB)


def bytes_sent(pid: int) -> int:
    """By all interfaces of the network namespace that this process is in, with Ethernet headers."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[_INTERFACE_HEADINGS:]
    return sum(int(line.partition(":")[2].split()[_TRANSMIT_BYTES]) for line in lines)


def load_average() -> float:
    """Of the last minute: figures of a busy machine are no figures."""
    return round(os.getloadavg()[0], 2)


def description() -> dict[str, str | int | float]:
    """The machine, for the record."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cores": os.cpu_count() or 0,
        "processor": model,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": load_average(),
    }


def allow_many_files() -> None:
    """Each node takes three descriptors here: raise our own limit as far as it goes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
