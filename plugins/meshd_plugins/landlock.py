"""Which files a worker process may open: a Landlock domain, for any user, without privileges.

What is true once `restrict_files` returned None, for this thread, every one that it starts and what
they execute: only what lies under the paths of the rules can be opened, and only in that way; what was
open before stays open. No process outside can be traced (and so nothing of its /proc but what all may
see); from version 4 of the interface on no TCP port is reached, from version 6 on nobody outside is
signalled and no abstract Unix socket is reached.

Source: landlock(7); Documentation/userspace-api/landlock.rst. In the kernel since 5.13, where it was
built in and switched on.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any, Final

_CREATE_RULESET: Final = 444  # the same number on every machine
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_BENEATH: Final = 1  # LANDLOCK_RULE_PATH_BENEATH
_TCP: Final = 0b11  # bind, connect
_SCOPES: Final = 0b11  # abstract Unix sockets, signals
_ATTRIBUTES_BYTES: Final = ((6, 24), (4, 16), (1, 8))  # of the ruleset, by version of the interface


class Access(IntFlag):
    """What may be done with files; the bits of linux/landlock.h."""

    EXECUTE = 1 << 0
    WRITE = 1 << 1
    READ = 1 << 2
    LIST = 1 << 3
    REMOVE = 0b11 << 4
    MAKE = 0b1111111 << 6
    REFER = 1 << 13  # version 2
    TRUNCATE = 1 << 14  # version 3
    IOCTL = 1 << 15  # version 5: of devices


LOOK: Final = Access.READ | Access.LIST
CHANGE: Final = Access.WRITE | Access.REMOVE | Access.MAKE | Access.REFER | Access.TRUNCATE
DEVICE: Final = LOOK | Access.WRITE | Access.IOCTL
_OF_FILES: Final = Access.EXECUTE | Access.WRITE | Access.READ | Access.TRUNCATE | Access.IOCTL


@dataclass(frozen=True, slots=True)
class Rule:
    """A path, and what is allowed with it and beneath it. One that is not there is passed over."""

    path: str
    access: Access


def version(libc: Any) -> int:
    """Version of the interface, 0 where there is none."""
    answer = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    return max(0, int(answer))


def restrict_files(libc: Any, rules: Iterable[Rule], *, network: bool) -> str | None:
    """Enter the domain; return why that failed, or None. Needs no_new_privs.

    Args:
        libc: the C library.
        rules: everything that may still be opened.
        network: leave TCP alone.
    """
    known = version(libc)
    if known == 0:
        return f"no Landlock: {os.strerror(ctypes.get_errno())}"
    handled = _handled(known)
    attributes = struct.pack("=QQQ", handled, 0 if network else _TCP, _SCOPES)
    size = next(size for least, size in _ATTRIBUTES_BYTES if known >= least)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return f"no Landlock: {os.strerror(ctypes.get_errno())}"
    try:
        for rule in rules:
            _add(libc, ruleset, rule, handled)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            return f"no Landlock: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(ruleset)
    return None


def _handled(known: int) -> Access:
    """All that this version can deny."""
    handled = Access.EXECUTE | Access.WRITE | LOOK | Access.REMOVE | Access.MAKE
    for least, access in ((2, Access.REFER), (3, Access.TRUNCATE), (5, Access.IOCTL)):
        if known >= least:
            handled |= access
    return handled


def _add(libc: Any, ruleset: int, rule: Rule, handled: Access) -> None:
    """Allow one path; whatever goes wrong leaves less allowed."""
    try:
        place = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        access = rule.access & handled
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= _OF_FILES
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", access, place), 0)
    finally:
        os.close(place)


def without(path: Path, hidden: Sequence[Path]) -> Iterator[Path]:
    """Yield `path`, or, where something hidden lies in it, what lies beside that.

    Rules only allow, and reach all the way down: a folder with an exception is the list of what else
    is in it. What is put there later is then not allowed, and the folder itself cannot be listed.
    """
    if any(path == place or place in path.parents for place in hidden):
        return
    if not any(path in place.parents for place in hidden):
        yield path
        return
    try:
        inside = sorted(path.iterdir())
    except OSError:
        return
    for child in inside:
        yield from without(child, hidden)
