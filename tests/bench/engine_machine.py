"""What the machine did while something was measured: other work, stolen time, memory of a process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_IDLE, _IOWAIT, _STEAL = 3, 4, 7  # columns of the first line of /proc/stat


@dataclass(frozen=True, slots=True)
class Weather:
    """How far a figure can be trusted, and what it cost."""

    wall_s: float
    load_1: float  # load average of one minute, at the end
    steal_percent: float  # of all cores' time: what the host gave to other guests
    others_percent: (
        float  # of all cores' time: processes that belong neither to the subject nor to the client
    )
    subject_cpu_s: float
    client_cpu_s: float

    def to_wire(self) -> dict[str, float]:
        """For a line of JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


class Meter:
    """Started when it is made; `read` tells what happened since."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = tuple(pids)
        self._before = _machine_ticks()
        self._subject_before_s = processor_s(self._pids)
        self._client_before_s = time.process_time()
        self._began_s = time.perf_counter()

    def read(self, ended_s: float = 0.0) -> Weather:
        """Since the start. `ended_s`: processor time of a subject that has ended meanwhile."""
        wall_s = time.perf_counter() - self._began_s
        spent = [
            after - before for after, before in zip(_machine_ticks(), self._before, strict=True)
        ]
        total = max(1, sum(spent))
        busy = total - spent[_IDLE] - spent[_IOWAIT] - spent[_STEAL]
        subject_s = processor_s(self._pids) - self._subject_before_s + ended_s
        client_s = time.process_time() - self._client_before_s
        others = busy - (subject_s + client_s) * TICKS_PER_S
        return Weather(
            wall_s=wall_s,
            load_1=os.getloadavg()[0],
            steal_percent=100 * spent[_STEAL] / total,
            others_percent=max(0.0, 100 * others / total),
            subject_cpu_s=subject_s,
            client_cpu_s=client_s,
        )


def _machine_ticks() -> list[int]:
    """User, nice, system, idle, iowait, irq, softirq, steal (guest time is within user's)."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0]
    return [int(field) for field in first.split()[1:9]]


def processor_s(pids: Sequence[int]) -> float:
    """User and system time of live processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def family(pid: int) -> tuple[int, ...]:
    """A process and all that it started, oldest first."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of some processes together.

    `shared_fairly` (PSS) counts a page mapped by n processes as 1/n: of the model file, which every
    subject maps, that is less than the whole while another one lives. So it is read with one subject alive.
    """

    resident: int
    shared_fairly: int
    anonymous: int  # not the mapped model file, not libraries: what the process itself needs

    @classmethod
    def of(cls, pids: Sequence[int]) -> Memory:
        """Read it. Needs the rights to (root, or the same user and a dumpable process)."""
        sums = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0)
        for pid in pids:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, rest = line.partition(":")
                if name in sums:
                    sums[name] += int(rest.split()[0]) * 1024
        return cls(sums["Rss"], sums["Pss"], sums["Anonymous"])
