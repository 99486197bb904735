"""Which system calls a worker process may make: a seccomp filter, built and installed here.

What is true once `install_filter` returned None, for this thread and every one that it starts, until
the process ends: no other process can be looked into, signalled or limited; nothing can be mounted,
loaded into the kernel or profiled; no new namespace and no io_uring comes about, nor (unless the order
allows it) a socket or another process. A call that is denied fails with EPERM, as if the system had
said so: libraries know how to go on. `clone3` fails with ENOSYS, since a filter cannot read its
arguments: the C library then uses `clone`.

The filter is a list of what is denied, not of what is allowed: what GPU drivers and C libraries call
differs with every release, and what a compromised worker would want does not. It is written by hand, a
hundred lines of classic BPF, and not with libseccomp: the library has to be found by running programs
(44 ms of a start) and is not on every system. A test compares the numbers with libseccomp's.

Source: seccomp(2); Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

# Name -> number on x86_64, on aarch64; None: not there.
NUMBERS: Final[Mapping[str, tuple[int | None, int | None]]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bind": (49, 200),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fork": (57, None),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "listen": (50, 201),
    "lookup_dcookie": (212, 18),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "vfork": (58, None),
    "vhangup": (153, 58),
}
_WITH_ARGUMENTS: Final = frozenset(
    {"clone", "clone3", "ioctl", "kill", "prctl", "prlimit64", "rt_sigqueueinfo"}
    | {"rt_tgsigqueueinfo", "socket", "socketpair", "tgkill"}
)
_PROCESSES: Final = frozenset({"execve", "execveat", "fork", "vfork"})
_SOCKETS: Final = frozenset({"bind", "connect", "listen"})

# Of linux/filter.h and linux/audit.h; ours are little-endian machines.
_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_AT_LEAST: Final = 0x35
_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_X32_BIT: Final = 0x40000000
_ARCHITECTURES: Final[Mapping[str, tuple[int, int]]] = {  # machine -> column above, AUDIT_ARCH
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
}

_CLONE_THREAD: Final = 0x00010000
_CLONE_NAMESPACES: Final = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID and NET
_PRCTL_UNDOING: Final = (1, 4)  # PR_SET_PDEATHSIG, PR_SET_DUMPABLE
_IOCTL_TYPING: Final = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into somebody's terminal
# Of the IP families, and netlink: how the C library finds out which addresses are of use.
_FAMILIES: Final = (2, 10, 16)
_LOOPBACK_FAMILIES: Final = (2,)
_STREAM_PAIRS: Final = (1, 0o2000001, 0o4001, 0o2004001)  # SOCK_STREAM, with and without its flags

_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2

Instruction: TypeAlias = "tuple[int, int, int, int]"  # code, jump if true, jump if false, value


@dataclass(frozen=True, slots=True)
class FilterRules:
    """What one process may do."""

    pid: int  # its own
    network: bool = False  # sockets of the IP families
    loopback: bool = False  # sockets of IPv4: for who has a network namespace of its own
    processes: bool = False  # fork and exec


def build_filter(rules: FilterRules, machine: str) -> tuple[Instruction, ...]:
    """Return the program for one kind of machine. Raises LookupError when it is not known."""
    column, architecture = _ARCHITECTURES[machine]
    numbers = {name: row[column] for name, row in NUMBERS.items()}
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        _fails(errno.EPERM),  # a 32-bit call has other numbers
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32_BIT), _fails(errno.EPERM)]
    allowed = set(_WITH_ARGUMENTS)
    if rules.processes:
        allowed |= _PROCESSES
    if rules.network or rules.loopback:
        allowed |= _SOCKETS
    for name, number in numbers.items():
        if name not in allowed and number is not None:
            program += [(_EQUAL, 0, 1, number), _fails(errno.EPERM)]
    for name, body in _bodies(rules):
        number = numbers[name]
        assert number is not None, "those that are looked into are on every machine"
        program += [(_EQUAL, 0, len(body), number), *body]
    return (*program, _ALLOWED)


def install_filter(libc: Any, rules: FilterRules, machine: str = "") -> str | None:
    """Put this thread, the only one, under the filter; return why that failed, or None.

    Needs no_new_privs. State on failure: as before.

    Args:
        libc: the C library.
        rules: what is allowed.
        machine: as uname(2) calls it; "": this one.
    """
    machine = machine or os.uname().machine
    if machine not in _ARCHITECTURES:
        return f"no list of system calls for {machine}"
    program = build_filter(rules, machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    pointer = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0) != 0:
        return os.strerror(ctypes.get_errno())
    return None


_ALLOWED: Final[Instruction] = (_RETURN, 0, 0, _ALLOW)


def _fails(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | number)


def _argument(index: int) -> Instruction:
    """Load the lower half of an argument: all that the kernel reads of an int."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _only(index: int, values: Sequence[int]) -> list[Instruction]:
    checks = [line for value in values for line in ((_EQUAL, 0, 1, value), _ALLOWED)]
    return [_argument(index), *checks, _fails(errno.EPERM)]


def _all_but(index: int, values: Sequence[int]) -> list[Instruction]:
    checks = [line for value in values for line in ((_EQUAL, 0, 1, value), _fails(errno.EPERM))]
    return [_argument(index), *checks, _ALLOWED]


def _bodies(rules: FilterRules) -> Iterator[tuple[str, list[Instruction]]]:
    """What is done about each call whose arguments matter; every body ends in an answer."""
    denied = _fails(errno.EPERM)
    if rules.processes:
        yield "clone", [_argument(0), (_ANY_BIT, 0, 1, _CLONE_NAMESPACES), denied, _ALLOWED]
    else:
        yield "clone", [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _ALLOWED, denied]
        # A process with children signals and limits those too; for it Landlock draws the line.
        for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
            yield name, _only(0, (rules.pid,))
        yield "prlimit64", _only(0, (0, rules.pid))
    yield "clone3", [_fails(errno.ENOSYS)]
    yield "prctl", _all_but(0, _PRCTL_UNDOING)
    yield "ioctl", _all_but(1, _IOCTL_TYPING)
    yield "socket", _only(0, _families(rules))
    # A pair of streams cannot be connected to anybody else.
    yield "socketpair", _only(1, _STREAM_PAIRS)


def _families(rules: FilterRules) -> tuple[int, ...]:
    if rules.network:
        return _FAMILIES
    return _LOOPBACK_FAMILIES if rules.loopback else ()
