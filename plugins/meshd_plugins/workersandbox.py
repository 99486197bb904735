"""How a worker process locks itself in; run first thing in the process, while it has one thread.

What is true afterwards, as far as the system allows: it dies with the daemon, even when the daemon is
killed; it is the first to go when memory runs out, and cannot allocate more than it was given; it
cannot gain privileges, holds no capabilities beyond reading files, starts no process, and touches no
other one; it has no network (where that was granted: one of its own, with nothing on it but loopback);
it opens nothing but its own program, system libraries, what its order names and, where it was granted,
the devices of a GPU: no keys, no home folder, no temporary folder; it
dumps no core and no other process of the user can read its memory.

Each step that the system refuses is reported, not hidden: the report is part of the worker's hello, and
the daemon shows it. Several steps deny the same thing by other means, since no kernel offers all of
them (decision 0024).
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from meshd_plugins.landlock import CHANGE, DEVICE, LOOK, Access, Rule, restrict_files, without
from meshd_plugins.seccomp import FilterRules, install_filter

ORDER_VARIABLE: Final = "MESHD_WORKER_SANDBOX"  # without it nothing is applied

OPEN_FILES_MAX: Final = 256
OOM_SCORE_ADJUSTMENT: Final = 500  # of 1000: the worker goes before the daemon and most else
MEMORY_SHARE_MAX: Final = 0.9  # of the machine's, for a worker without a limit of its own
EXIT_ORPHANED: Final = 75
ASKED_FOR: Final = "no: the worker asked for it"

SYSTEM_PATHS: Final = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sys",
    "/nix/store",
    "/gnu/store",
)
SYSTEM_FILES: Final = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/timezone",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/filesystems",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/version",
    "/proc/sys/vm",
    "/proc/sys/kernel",
)
NETWORK_FILES: Final = (
    "/etc/ca-certificates",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/pki",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/run/systemd/resolve",
)
PSEUDO_DEVICES: Final = ("/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero")
GPU_DEVICES: Final = (
    "/dev/dri",
    "/dev/dxg",
    "/dev/kfd",
    "/dev/nvgpu*",
    "/dev/nvhost*",
    "/dev/nvidia*",
    "/dev/nvmap",
    "/dev/nvsciipc",
)
GPU_FILES: Final = (
    "/etc/OpenCL",
    "/etc/nv_tegra_release",
    "/etc/vulkan",
    "/opt/rocm",
    "/proc/devices",
    "/proc/device-tree",
    "/proc/driver",
    "/proc/modules",
)

LOOPBACK_STEP: Final = "loopback"  # of the report: "private", SHARED_LOOPBACK, or "no: " and why
SHARED_LOOPBACK: Final = "shared"

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAP_DAC_READ_SEARCH: Final = 2
_MS_PRIVATE_RECURSIVE: Final = (1 << 18) | (1 << 14)
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1
_IFF_RUNNING: Final = 0x40
_MS_LOCKED_DOWN: Final = 1 | 2 | 4 | 8  # read-only, no set-user-id, no devices, no execution


@dataclass(frozen=True, slots=True)
class Order:
    """What the daemon has decided about one worker; travels in the environment, as JSON."""

    parent: int  # pid of the daemon
    network: bool = False
    processes: bool = False  # it may start others
    gpu: bool = False
    read: tuple[str, ...] = ()  # paths beyond its program and the system's libraries
    write: tuple[str, ...] = ()
    files: tuple[int, ...] = ()  # descriptors it was given; it may open them anew by /proc/self/fd
    hidden: tuple[
        str, ...
    ] = ()  # folders with keys, never readable but for what `read` names in them
    memory_bytes_max: int | None = None
    loopback: bool = False  # IPv4 sockets, in a network namespace of its own
    shared_loopback: bool = False  # failing that, in the machine's

    def to_text(self) -> str:
        """For the environment."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Order:
        """Read it back. Raises ValueError, TypeError: the daemon is of another release."""
        raw: dict[str, Any] = json.loads(text)
        lists = {"read", "write", "files", "hidden"}
        fields: dict[str, Any] = {k: tuple(raw[k]) if k in lists else raw[k] for k in raw}
        return cls(**fields)


def apply_sandbox(order: Order) -> dict[str, str]:
    """Apply every step; return, for each, "yes" (or how), or "no: " and why. Never raises."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    report = {"parent_death": _die_with_parent(libc, order.parent)}
    # /proc/self stops being ours once the process is not dumpable: files of /proc come first.
    report["first_to_go"] = _raise_oom_score()
    namespace = ASKED_FOR if order.network else _leave_network(libc)
    loopback = _loopback(order, namespace)
    report["no_new_privileges"] = _answer(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    report["keys_out_of_reach"] = hide_keys(libc, order, network=bool(loopback))
    report["no_capabilities"] = _drop_capabilities(libc)
    report["limits"] = _limit_resources()
    report["memory"] = _limit_memory(order.memory_bytes_max)
    report["not_dumpable"] = _answer(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    rules = FilterRules(
        os.getpid(), network=order.network, loopback=bool(loopback), processes=order.processes
    )
    refused = install_filter(libc, rules)
    report["system_calls"] = f"no: {refused}" if refused else "yes"
    report["no_network"] = _no_network(order, namespace, filtered=refused is None)
    if order.loopback:
        report[LOOPBACK_STEP] = loopback or f"no: {namespace.removeprefix('no: ')}"
    if loopback == SHARED_LOOPBACK:
        report["no_network"] = f"no: the loopback of the machine ({namespace.removeprefix('no: ')})"
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


# -- the network ---------------------------------------------------------------------------------------


def _leave_network(libc: Any) -> str:
    """Move into an empty network namespace: not even loopback is up there."""
    if libc.unshare(_CLONE_NEWNET) == 0:
        return "network namespace"
    if not _enter_user_namespace(libc, _CLONE_NEWNET):
        return f"no: {os.strerror(ctypes.get_errno())}"
    return "user and network namespace"


def _loopback(order: Order, namespace: str) -> str:
    """Switch loopback on in the namespace that was entered; how it may be used, "" for not at all."""
    if not order.loopback:
        return ""
    if not namespace.startswith("no: ") and _switch_on_loopback():
        return "private"
    return SHARED_LOOPBACK if order.shared_loopback and namespace.startswith("no: ") else ""


def _switch_on_loopback() -> bool:
    """In an empty namespace it is there, and down."""
    request = struct.pack("16sH14x", b"lo", _IFF_UP | _IFF_RUNNING)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            fcntl.ioctl(asking, _SIOCSIFFLAGS, request)
    except OSError:
        return False
    return True


def _enter_user_namespace(libc: Any, also: int) -> bool:
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | also) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError:
        pass  # files are still opened with the real ids; only what the process sees of itself differs
    return True


def _no_network(order: Order, namespace: str, *, filtered: bool) -> str:
    """Two walls: a namespace holds for what is open already, the filter for Unix sockets as well."""
    if order.network:
        return ASKED_FOR
    if not filtered:
        return namespace
    refused = namespace.startswith("no: ")
    return (
        f"system calls ({namespace[4:]} for a namespace)"
        if refused
        else f"{namespace}, system calls"
    )


# -- files ---------------------------------------------------------------------------------------------


def hide_keys(libc: Any, order: Order, *, network: bool = False) -> str:
    """Make all files unreadable but those of the order; failing that, cover the folders with keys."""
    refused = restrict_files(libc, file_rules(order), network=order.network or network)
    if refused is None:
        return "Landlock"
    covered = _cover(libc, order.hidden)
    if covered is None:
        return "mount namespace"
    return f"no: {refused}; no mount namespace: {covered}"


def file_rules(order: Order) -> Iterator[Rule]:
    """All that may be opened, hidden folders left out."""
    hidden = [Path(path).resolve() for path in order.hidden]
    run = Access.EXECUTE if order.processes else Access(0)
    program = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent}
    program |= {Path(path) for path in sys.path if path}
    folders = {path.resolve() for path in program} | {Path(path) for path in SYSTEM_PATHS}
    for folder in sorted(folders - {Path("/")}):
        yield from (Rule(str(path), LOOK | run) for path in without(folder, hidden))
    named = (*SYSTEM_FILES, *(NETWORK_FILES if order.network else ()))
    named = (*named, *(GPU_FILES if order.gpu else ()))
    yield from (Rule(path, LOOK) for path in named)
    yield from (Rule(path, DEVICE) for path in PSEUDO_DEVICES)
    if order.gpu:
        yield from (Rule(path, DEVICE) for name in GPU_DEVICES for path in sorted(glob.glob(name)))  # noqa: PTH207
    yield from (Rule(f"/proc/self/fd/{number}", LOOK) for number in order.files)
    for path, access in (
        *((p, LOOK) for p in order.read),
        *((p, LOOK | CHANGE) for p in order.write),
    ):
        # A path within a hidden folder was named on purpose; one around it was not.
        outside = [place for place in hidden if place not in Path(path).resolve().parents]
        yield from (Rule(str(part), access) for part in without(Path(path).resolve(), outside))


def _cover(libc: Any, hidden: tuple[str, ...]) -> str | None:
    """Mount something empty over each folder, in a mount namespace of our own; return why not."""
    folders = [folder for folder in hidden if Path(folder).is_dir()]
    if libc.unshare(_CLONE_NEWNS) != 0 and not _enter_user_namespace(libc, _CLONE_NEWNS):
        return os.strerror(ctypes.get_errno())
    if libc.mount(b"none", b"/", None, _MS_PRIVATE_RECURSIVE, None) != 0:
        return os.strerror(ctypes.get_errno())
    for folder in folders:
        if libc.mount(b"none", os.fsencode(folder), b"tmpfs", _MS_LOCKED_DOWN, b"size=0k") != 0:
            return os.strerror(ctypes.get_errno())
    return None


# -- privileges and limits -----------------------------------------------------------------------------


def _drop_capabilities(libc: Any) -> str:
    """Keep only the right to read files: a daemon run by root may serve a model of another user's."""
    kept = 1 << _CAP_DAC_READ_SEARCH if os.geteuid() == 0 else 0
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    return _answer(libc.capset(header, data))


def _limit_resources() -> str:
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
        _lower(resource.RLIMIT_NOFILE, OPEN_FILES_MAX)
    except (OSError, ValueError) as error:
        return f"no: {error}"
    return "yes"


def _limit_memory(asked: int | None) -> str:
    """Bound what it may allocate for itself; a model's file, which is mapped and shared, is not in it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = asked or int(whole * MEMORY_SHARE_MAX)
    try:
        _lower(resource.RLIMIT_DATA, limit)
    except (OSError, ValueError) as error:
        return f"no: {error}"
    return f"{limit >> 20} MiB"


def _lower(limit: int, most: int) -> None:
    soft, hard = resource.getrlimit(limit)
    bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(
        limit, (bound if soft == resource.RLIM_INFINITY else min(soft, bound), bound)
    )
