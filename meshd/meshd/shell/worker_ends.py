"""How a worker process begins and ends, beside what the supervisor has to remember of it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from meshd_plugins.api import BadRequest, CapabilityError, Failed, Refused, Value
from meshd_plugins.workerkit import FrameError

PIPE_BYTES: Final = 1024 * 1024


def wide_pipe() -> tuple[int, int]:
    """A pipe that holds 1 MiB where the system allows it: half as many waits for every doubling."""
    read_fd, write_fd = os.pipe()
    with suppress(OSError):  # beyond what this user may have in pipes
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read_fd, write_fd


def open_pid(process: subprocess.Popen[bytes]) -> int:
    """A descriptor that tells of its end. Raises OSError; then the process is gone."""
    try:
        return os.pidfd_open(process.pid)
    except OSError:  # a kernel before 5.3: without it we would not learn of its death
        process.kill()
        process.wait()
        raise


def error_from(message: Mapping[str, Value]) -> CapabilityError:
    """What a worker says went wrong. Raises FrameError: it says it of no known kind."""
    text, code = str(message.get("message")), str(message.get("code"))
    match message.get("kind"):
        case "bad_request":
            return BadRequest(text, code=code)
        case "refused":
            return Refused(text, code=code)
        case "failed":
            return Failed(text, code=code)
        case kind:
            raise FrameError(f"unknown kind of error {str(kind)[:20]!r}")


def oom_kills() -> int:
    """Processes that the kernel has ended for want of memory since the boot; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def describe_exit(status: int, oom_kills_since: int) -> str:
    """How a process ended, for people; `oom_kills_since` it began."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if -status != signal.SIGKILL:
        return f"killed by {name}"
    if oom_kills_since > 0:
        return f"killed by {name}: the system was out of memory, and the kernel has ended a process for it"
    return f"killed by {name}: if nobody did that, the system was out of memory"
