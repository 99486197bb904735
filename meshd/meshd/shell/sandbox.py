"""What a worker process is given of the daemon's surroundings, and how well it is locked in.

The process applies its own sandbox (`meshd_plugins.workersandbox` says why and which steps); this module
is the daemon's half: a scrubbed environment, and the record of what was achieved. Where the kernel lets
the daemon look (as root, always), it does not take the worker's word for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshd_plugins.api import Value, WorkerSpec
from meshd_plugins.workersandbox import NETWORK_VARIABLE, PARENT_VARIABLE

INHERITED_VARIABLES: Final = ("PATH", "HOME", "LANG")


@dataclass(frozen=True, slots=True)
class Isolation:
    """What holds for one worker process."""

    applied: bool = False  # the worker runs under `workerkit.main`
    steps: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # step -> "yes", how, or "no: why"

    @property
    def missing(self) -> tuple[str, ...]:
        """The steps that the system refused, for `status`."""
        return tuple(
            f"{step}: {how}" for step, how in sorted(self.steps.items()) if how.startswith("no")
        )


def worker_environment(spec: WorkerSpec) -> dict[str, str]:
    """Everything the process sees of our environment. Keys and tokens of the daemon are not in it."""
    inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
    return {
        **inherited,
        **spec.environment,
        PARENT_VARIABLE: str(os.getpid()),
        NETWORK_VARIABLE: "1" if spec.network else "0",
    }


def observe_isolation(pid: int, hello: Mapping[str, Value]) -> Isolation:
    """Join what the worker reports with what /proc shows of it."""
    reported = hello.get("isolation")
    steps = {str(k): str(v) for k, v in reported.items()} if isinstance(reported, Mapping) else {}
    seen = _network_namespace(pid)
    shared = seen is not None and seen == _network_namespace(os.getpid())
    if shared and not steps.get("no_network", "no:").startswith("no:"):
        steps["no_network"] = "no: it shares the network namespace of the daemon"
    return Isolation(applied=bool(steps), steps=steps)


def resident_bytes(pid: int) -> int | None:
    """Resident memory, file mappings included; None when the process is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _network_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return None  # a process that is not dumpable shows this to root only
