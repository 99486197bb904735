"""Has pip fetch a package's wheel. Nothing of a package is run: it is never built, and never imported.

pip asks the index that it is configured for: `PIP_INDEX_URL` of the daemon's environment, or pip's own
files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from meshd_plugins.builtin.llama.fetch.errors import FetchBroken, FetchRefused

LINES_MAX: Final = 200
LINE_CHARS_MAX: Final = 400
_SIZE: Final = re.compile(r"^\s*Downloading .*\((\d+(?:\.\d+)?) (kB|MB|GB)\)", re.MULTILINE)
_UNITS: Final = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


class PackageFetch:
    """One package; `run` in one thread, `watch` in another.

    Args:
        requirement: as pip wants it.
        to: a folder, for the wheel and pip's temporary files.
        stall_s: without a byte more, after which it is given up.
        tell: told of bytes so far and, about, of all of them.
    """

    def __init__(
        self, requirement: str, to: Path, stall_s: float, tell: Callable[[int, int | None], None]
    ) -> None:
        self._requirement = requirement
        self._to = to
        self._stall_s = stall_s
        self._tell = tell
        self._stalled = False

    def run(self) -> Path:
        """Return the wheel.

        Raises:
            FetchRefused: no_package, bad_archive.
            FetchBroken: stalled.
        """
        temporary = self._to / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        for left in self._to.glob("*.whl"):  # of another time: cut short, or another version
            left.unlink()
        said = self._to / "said"
        with said.open("w+") as out:
            process = subprocess.Popen(  # noqa: S603  the requirement has passed a pattern
                (sys.executable, "-P", "-m", "pip", *self._arguments()),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(temporary)},
                cwd=self._to,
            )
            try:
                status = self._wait(process, said)
            finally:
                process.kill()
            out.seek(0)
            lines = _last_lines(out)
        wheels = sorted(self._to.glob("*.whl"))
        if status != 0 or len(wheels) != 1:
            raise FetchRefused(_why(self._requirement, lines), "no_package")
        return wheels[0]

    def _arguments(self) -> tuple[str, ...]:
        return (
            "download",
            "--no-deps",
            "--only-binary=:all:",  # anything else would run the package's own code
            "--no-input",
            "--no-cache-dir",
            "--disable-pip-version-check",
            "--progress-bar=off",
            f"--dest={self._to}",
            "--",
            self._requirement,
        )

    def _wait(self, process: subprocess.Popen[bytes], said: Path) -> int:
        """Return its exit status; watch what grows meanwhile."""
        before, alive_at_s = -1, time.monotonic()
        while True:
            try:
                return process.wait(0.25)
            except subprocess.TimeoutExpired:
                pass
            so_far = _size_of(self._to)
            if so_far != before:
                before, alive_at_s = so_far, time.monotonic()
                self._tell(so_far, _announced(said))
            elif time.monotonic() - alive_at_s > self._stall_s:
                raise FetchBroken("pip brings nothing any more", "stalled")


def _size_of(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:
                continue  # pip moves its files about
    return total


def _announced(said: Path) -> int | None:
    with said.open() as file:
        found = _SIZE.search(file.read(64 * 1024))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _last_lines(out: IO[str]) -> list[str]:
    return [line.rstrip()[:LINE_CHARS_MAX] for line in out.readlines()[-LINES_MAX:]]


def _why(requirement: str, lines: list[str]) -> str:
    """What pip said, in one line."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if any("No module named pip" in line for line in lines):
        return "pip is not installed beside meshd, and fetches packages: install it, or the package"
    told = [line for line in errors if line != "Exception:"] or [line for line in lines if line]
    said = told[-1] if told else "it says nothing"
    return f"pip cannot fetch {requirement}: {said}"
