"""Turns the log of a pip run into a line that a person can watch.

    pip -v install ... 2>&1 | tee build.log | python deploy/progress.py WHAT

On a terminal one line is rewritten; elsewhere a line is printed for every tenth part. Only the standard
library: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from typing import TextIO

STEP = re.compile(r"^\s*\[\s*(\d+)/(\d+)\]")  # ninja
PERCENT = re.compile(r"^\s*\[\s*(\d+)%\]")  # make
PACKAGE = re.compile(
    r"^\s*(Collecting|Downloading|Building wheel for|Installing collected packages)\b[ :]*(\S*)"
)
WIDTH = 78


def percent_of(line: str) -> int | None:
    """How far a build is, 0 to 100, where this line of ninja or make says so."""
    if found := STEP.match(line):
        done, total = int(found[1]), int(found[2])
        return min(100, 100 * done // total) if total else None
    if found := PERCENT.match(line):
        return min(100, int(found[1]))
    return None


def watch(what: str, lines: Iterable[str], out: TextIO) -> None:
    """Read to the end, showing how far it is."""
    terminal = out.isatty()
    began = time.monotonic()
    shown = -10
    for line in lines:
        percent = percent_of(line)
        if terminal:
            if percent is not None:
                text = f"{what}: {percent:3d} %"
            elif found := PACKAGE.match(line):
                text = f"{what}: {found[1].lower()} {found[2].rpartition('/')[2]}"
            else:
                continue
            elapsed = int(time.monotonic() - began)
            out.write(f"\r{text[: WIDTH - 12]}, {elapsed // 60}:{elapsed % 60:02d}\x1b[K")
            out.flush()
        elif percent is not None and percent // 10 > shown // 10:
            shown = percent
            out.write(f"{what}: {percent} %\n")
            out.flush()
    if terminal:
        out.write("\r\x1b[K")
    out.flush()


if __name__ == "__main__":
    watch(sys.argv[1], sys.stdin, sys.stdout)
