"""How a worker process locks itself in; run first thing in the process, while it has one thread.

What is true afterwards, as far as the system allows: it dies with the daemon, even when the daemon is
killed; it is the first to go when memory runs out; it cannot gain privileges; it has no network; it
holds no capabilities beyond reading files; it dumps no core and no other process of the user can read
its memory. Each step that the system refuses is reported, not hidden: the report is part of the
worker's hello, and the daemon shows it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

PARENT_VARIABLE: Final = "MESHD_WORKER_PARENT"  # pid of the daemon; without it nothing is applied
NETWORK_VARIABLE: Final = "MESHD_WORKER_NETWORK"  # "1": leave the network alone

OPEN_FILES_MAX: Final = 256
OOM_SCORE_ADJUSTMENT: Final = 500  # of 1000: the worker goes before the daemon and most else
EXIT_ORPHANED: Final = 75

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAP_DAC_READ_SEARCH: Final = 2


def apply_sandbox(environment: Mapping[str, str]) -> dict[str, str]:
    """Apply every step; return, for each, "yes" (or how), or "no: " and why. Never raises."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    report = {"parent_death": _die_with_parent(libc, int(environment[PARENT_VARIABLE]))}
    # /proc/self stops being ours once the process is not dumpable: files of /proc come first.
    report["first_to_go"] = _raise_oom_score()
    report["no_network"] = (
        "no: the worker asked for it"
        if environment.get(NETWORK_VARIABLE) == "1"
        else _leave_network(libc)
    )
    report["no_new_privileges"] = _answer(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    report["no_capabilities"] = _drop_capabilities(libc)
    report["limits"] = _limit_resources()
    report["not_dumpable"] = _answer(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    return report


def _answer(result: int) -> str:
    return "yes" if result == 0 else f"no: {os.strerror(ctypes.get_errno())}"


def _die_with_parent(libc: Any, parent: int) -> str:
    answer = _answer(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:  # it died before the request was made
        os._exit(EXIT_ORPHANED)
    return answer


def _raise_oom_score() -> str:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUSTMENT))
    except OSError as error:
        return f"no: {error.strerror}"
    return "yes"


def _leave_network(libc: Any) -> str:
    """Move into an empty network namespace: not even loopback is up there."""
    if libc.unshare(_CLONE_NEWNET) == 0:
        return "network namespace"
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return f"no: {os.strerror(ctypes.get_errno())}"
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError:
        pass  # files are still opened with the real ids; only what the process sees of itself differs
    return "user and network namespace"


def _drop_capabilities(libc: Any) -> str:
    """Keep only the right to read files: a daemon run by root may serve a model of another user's."""
    kept = 1 << _CAP_DAC_READ_SEARCH if os.geteuid() == 0 else 0
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    return _answer(libc.capset(header, data))


def _limit_resources() -> str:
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        bound = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(OPEN_FILES_MAX, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, bound), bound))
    except (OSError, ValueError) as error:
        return f"no: {error}"
    return "yes"
