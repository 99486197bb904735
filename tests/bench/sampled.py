"""Runs a module as `python -m` does, and samples what its processor time goes to: `... -m tests.bench.sampled FOLDER MODULE ARGUMENT...`.

A timer of the processor time that this process uses (ITIMER_PROF: user and system, none while it waits)
interrupts it every 4 ms; the handler notes which part of the program the interrupted stack is in. SIGUSR1 begins
a new count, SIGUSR2 writes the count to FOLDER/PID.json.

What a sample counts for is decided from the innermost frame outwards: the first that belongs to a part of PARTS
says which. The sending and receiving of bytes by the socket layer would be there without any encryption: such a
frame ends the search. A C function has no frame, so its time is its Python caller's: the interpreter handles the
signal as soon as it returns there. While the main thread waits, the time is that of another thread.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

INTERVAL_S: Final = 0.004
"""Of processor time. Kernels round it up to their tick."""
REST: Final = "rest"
PLUMBING: Final = ("/trio/_socket.py", "/trio/_highlevel_socket.py", "/trio/_core/_io_epoll.py")
PARTS: Final = {
    "TLS records and handshakes": ("/trio/_ssl.py", "/ssl.py", "/meshd/trust/tls.py"),
    "sealed datagrams": ("/meshd/core/sealing.py",),
    "signatures of records": (
        "/meshd/trust/keys.py",
        "/meshd/core/verifying.py",
        "/meshd_cms/entries.py:entry_message",
        "/meshd_cms/entries.py:head_message",
        "/meshd_cms/entries.py:sign_entry",
        "/meshd_cms/entries.py:sign_head",
        "/meshd_cms/entries.py:entry_is_signed",
        "/meshd_cms/entries.py:head_is_signed",
    ),
    "callers and access": (
        "/meshd/orchestrate/access.py",
        "/meshd/orchestrate/access_guard.py",
        "/meshd/orchestrate/callers.py",
        "/meshd/orchestrate/distance.py",
    ),
    "audit": (
        "/meshd/orchestrate/audit.py",
        "/meshd/orchestrate/audit_chain.py",
        "/meshd/orchestrate/audit_files.py",
    ),
    "door of the HTTP edge": (
        "/meshd/edge/gate.py",
        "/meshd/edge/rates.py",
        "/meshd/edge/sources.py",
        "/meshd/edge/front.py:_admit",
    ),
    "certificates, decrees, keys": (
        "/meshd/trust/",
        "/meshd/core/decrees.py",
        "/meshd/core/proclaiming.py",
        "/meshd/shell/warden.py",
        "/meshd/shell/trust_",
        "/meshd/shell/joining_",
        "/meshd/orchestrate/trust_",
        "/cryptography/",
    ),
}
_parts_of: dict[CodeType, str | None] = {}  # None: it says nothing of what its callers are


def part_of(code: CodeType) -> str | None:
    """The part that a function belongs to, if it is one of PARTS, or REST if it is plumbing."""
    if code not in _parts_of:
        _parts_of[code] = _found(code.co_filename, code.co_name)
    return _parts_of[code]


def _found(file: str, function: str) -> str | None:
    if file.endswith(PLUMBING):
        return REST
    for part, places in PARTS.items():
        for place in places:
            path, _, wanted = place.partition(":")
            if path in file and function == (wanted or function):
                return part
    return None


def part_of_stack(frame: FrameType | None) -> tuple[str, str]:
    """The part of the innermost frame that has one, and that frame's function."""
    while frame is not None:
        part = part_of(frame.f_code)
        if part is not None:
            return part, frame.f_code.co_qualname
        frame = frame.f_back
    return REST, ""


def _part_of_threads() -> tuple[str, str]:
    """The part that one of the threads beside the main one is in, and the function."""
    main = threading.main_thread().ident
    stacks = (frame for ident, frame in sys._current_frames().items() if ident != main)
    found = map(part_of_stack, stacks)
    return next((each for each in found if each[0] != REST), (REST, ""))


class Sampler:
    """Counts samples by part.

    Args:
        folder: where counts are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: Counter[str] = Counter()
        self._functions: Counter[str] = Counter()

    def start(self) -> None:
        """From here on."""
        signal.signal(signal.SIGPROF, self._sampled)
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._write)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def _sampled(self, _number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        waits = frame is not None and frame.f_code.co_filename.endswith("/_io_epoll.py")
        part, function = _part_of_threads() if waits else part_of_stack(frame)
        self._counts[part] += 1
        if part != REST:
            self._functions[f"{part}: {function}"] += 1

    def _begin(self, _number: int, _frame: FrameType | None) -> None:
        self._counts.clear()
        self._functions.clear()

    def _write(self, _number: int, _frame: FrameType | None) -> None:
        path = self._folder / f"{os.getpid()}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"parts": self._counts, "functions": self._functions}))
        new.rename(path)


def main() -> None:
    """Sample and run."""
    _, folder, module, *arguments = sys.argv
    Sampler(Path(folder)).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
