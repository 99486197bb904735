"""Reading sysfs, procfs and the device tree below a root, so that recorded trees can be read too.

Nothing here raises for a missing or unreadable file: a board lacks most of what another has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FILE_BYTES_MAX: Final = 4096
"""Most that is read of one file; everything of interest is one line."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A file system's `/`, or a recording of parts of one."""

    root: Path

    def text(self, path: str | Path) -> str:
        """Content without NULs and white space around it; "" when there is none."""
        try:
            with (self.root / path).open("rb") as file:
                data = file.read(FILE_BYTES_MAX)
        except OSError:
            return ""
        return data.replace(b"\0", b" ").decode("utf-8", "replace").strip()

    def number(self, path: str | Path) -> int | None:
        """A whole number, decimal or 0x…; None when there is none."""
        try:
            return int(self.text(path), 0)
        except ValueError:
            return None

    def flags(self, path: str | Path) -> int | None:
        """Bits in hexadecimal, with or without 0x; None when there are none."""
        try:
            return int(self.text(path), 16)
        except ValueError:
            return None

    def find(self, pattern: str) -> Iterator[Path]:
        """Paths that match, sorted."""
        try:
            yield from sorted(self.root.glob(pattern))
        except OSError:
            return
