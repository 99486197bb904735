"""What a worker process is given of the daemon's surroundings, and how well it is locked in.

The process applies its own sandbox (`meshd_plugins.workersandbox` says why and which steps); this module
is the daemon's half: a scrubbed environment, the order that says what the worker may do, and the record
of what was achieved. Where the kernel lets the daemon look, it does not take the worker's word for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshd_plugins.api import Value, WorkerSpec
from meshd_plugins.workersandbox import ASKED_FOR, LOOPBACK_STEP, ORDER_VARIABLE, Order

INHERITED_VARIABLES: Final = ("PATH", "HOME", "LANG")
STEPS_THAT_MATTER: Final = (
    "keys_out_of_reach",
    "no_network",
    "no_new_privileges",
    "no_capabilities",
    "system_calls",
)
"""Without one of these a worker that was taken over could do harm outside itself: `doctor` warns."""

STATUS_BYTES_MAX: Final = 16 * 1024
UNSAID: Final = "no: it does not say"
_FILTERED: Final = "2"  # the line Seccomp of /proc/PID/status


@dataclass(frozen=True, slots=True)
class Isolation:
    """What holds for one worker process."""

    applied: bool = False  # the worker runs under `workerkit.main`
    steps: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # step -> "yes", how, or "no: why"

    @property
    def missing(self) -> tuple[str, ...]:
        """The steps that do not hold and why, for `status`: refused by the system, or not asked for."""
        return tuple(
            f"{step}: {how.removeprefix('no: ')}"
            for step, how in sorted(self.steps.items())
            if how.startswith("no: ")
        )

    @property
    def exposed(self) -> tuple[str, ...]:
        """What `doctor` warns of: the system refused a step that matters, or nothing was applied."""
        if not self.applied:
            return ("it does not lock itself in",)
        return tuple(
            f"{step}: {self.steps.get(step, UNSAID).removeprefix('no: ')}"
            for step in STEPS_THAT_MATTER
            if self._refused(step)
        )

    def _refused(self, step: str) -> bool:
        how = self.steps.get(step, UNSAID)
        return how.startswith("no: ") and how != ASKED_FOR


def worker_environment(spec: WorkerSpec, hidden: Sequence[Path] = ()) -> dict[str, str]:
    """Everything the process sees of our environment. Keys and tokens of the daemon are not in it.

    Args:
        spec: what its plugin asks for.
        hidden: folders that hold keys.
    """
    inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
    order = Order(
        parent=os.getpid(),
        network=spec.network,
        loopback=spec.private_loopback,
        shared_loopback=spec.shared_loopback,
        processes=spec.processes,
        gpu=spec.gpu,
        read=tuple(str(path) for path in spec.read_paths),
        write=tuple(str(path) for path in spec.write_paths),
        files=spec.files,
        hidden=tuple(str(path) for path in hidden),
        memory_bytes_max=spec.memory_bytes_max,
    )
    return {**inherited, **spec.environment, ORDER_VARIABLE: order.to_text()}


class ProcessView:
    """What /proc shows of a worker.

    Opened while the process is new: once it is not dumpable, a /proc that hides other processes (as
    `ProtectProc=` of a unit makes it) hides it from the daemon too, and what is open stays readable.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._memory = _opened(f"/proc/{pid}/statm")
        self._status = _opened(f"/proc/{pid}/status")

    def resident_bytes(self) -> int | None:
        """Resident memory, file mappings included; None when the process is gone."""
        try:
            return int(_content(self._memory).split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):
            return None

    def status(self) -> dict[str, str]:
        """The lines of `status`; empty when it cannot be read."""
        try:
            lines = _content(self._status).splitlines()
        except OSError:
            return {}
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in (self._memory, self._status):
            if descriptor is not None:
                os.close(descriptor)
        self._memory = self._status = None


def observe_isolation(view: ProcessView, hello: Mapping[str, Value]) -> Isolation:
    """Join what the worker reports with what /proc shows of it; what contradicts it wins."""
    reported = hello.get("isolation")
    steps = {str(k): str(v) for k, v in reported.items()} if isinstance(reported, Mapping) else {}
    if not steps:
        return Isolation()
    seen = view.status()
    filtered = seen.get("Seccomp", _FILTERED) == _FILTERED
    if not filtered:
        steps["system_calls"] = "no: the kernel applies no filter to it"
    if seen.get("NoNewPrivs", "1") != "1":
        steps["no_new_privileges"] = "no: the kernel lets it gain privileges"
    may_have_sockets = not filtered or steps.get(LOOPBACK_STEP) == "private"
    if may_have_sockets and _shares_network(view.pid):
        steps["no_network"] = "no: it shares the network namespace of the daemon"
    return Isolation(applied=True, steps=steps)


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _content(descriptor: int | None) -> str:
    if descriptor is None:
        raise OSError("it could not be opened")
    return os.pread(descriptor, STATUS_BYTES_MAX, 0).decode("ascii", "replace")


def _shares_network(pid: int) -> bool:
    seen = _network_namespace(pid)
    return seen is not None and seen == _network_namespace(os.getpid())


def _network_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return None  # a process that is not dumpable shows this to root only
