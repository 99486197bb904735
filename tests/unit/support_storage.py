"""A disk in memory on which the power can fail at every byte, and which may lie about what it has kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import assert_never

from meshd.shell.storage import Storage

STATE = Path("/state")


class PowerCut(Exception):
    """The power failed. No `OSError`: no program sees it, the process is gone."""


class Survival(Enum):
    """What is on the disk when the power is back."""

    ALL = "everything up to the cut"
    SYNCED = "only what was synced"
    # From here on the disk lied: it reordered, and lost data that was synced, of the file written last.
    EMPTY = "the file written last has its name and no byte"
    ZEROS = "the file written last has its name, its length and nothing but zeros"
    HALF = "the file written last is cut in the middle"
    HALF_ZEROS = "the second half of the file written last is zeros"
    NO_RENAME = "the last rename never came to be"


HONEST = (Survival.ALL, Survival.SYNCED)


@dataclass
class Disk:
    """A `FileSystem` of one folder; None as content is a folder."""

    files: dict[str, bytes | None] = field(default_factory=dict[str, bytes | None])
    steps_left: int | None = None  # None: the power stays
    refusal: int | None = None  # errno of every call that writes
    steps: int = 0
    _synced: dict[str, bytes | None] = field(default_factory=dict[str, bytes | None])  # by name
    _last_written: str = ""
    _renamed: tuple[str, str, bytes | None] | None = None  # from, to, what was there

    def __post_init__(self) -> None:
        self._synced = dict(self.files)

    # -- FileSystem --------------------------------------------------------------------------------------

    def make_folder(self, folder: Path) -> None:
        assert folder == STATE

    def names(self, folder: Path) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def read(self, path: Path, bytes_max: int) -> bytes:
        if path.name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        content = self.files[path.name]
        if content is None:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        if len(content) > bytes_max:
            raise OSError(errno.EFBIG, "File too large", str(path))
        return content

    def write(self, path: Path, content: bytes) -> None:
        self._step()
        self.files[path.name] = b""
        self._last_written = path.name
        for length in range(1, len(content) + 1):
            self._step()
            self.files[path.name] = content[:length]
        self._step()  # fsync

    def rename(self, path: Path, to: Path) -> None:
        self._step()
        self._renamed = (path.name, to.name, self.files.get(to.name))
        content = self.files.pop(path.name)
        self.files[to.name] = content
        if self._last_written == path.name:
            self._last_written = to.name

    def sync_folder(self, folder: Path) -> None:
        self._step()
        self._synced = dict(self.files)

    def remove(self, path: Path) -> None:
        self._step()
        del self.files[path.name]

    def _step(self) -> None:
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))
        if self.steps_left is not None:
            if self.steps_left == 0:
                raise PowerCut
            self.steps_left -= 1
        self.steps += 1

    # -- after a cut -------------------------------------------------------------------------------------

    def survived(self, survival: Survival) -> Disk:
        """The disk after the power came back."""
        files = dict(self.files)
        lost = files.get(self._last_written)
        match survival:
            case Survival.ALL:
                pass
            case Survival.SYNCED:
                files = dict(self._synced)
            case Survival.NO_RENAME:
                if self._renamed is not None:
                    name, to, before = self._renamed
                    files[name] = files.pop(to)
                    if before is not None:
                        files[to] = before
            case Survival.EMPTY:
                files = self._with_last(files, b"")
            case Survival.ZEROS:
                files = self._with_last(files, bytes(len(lost or b"")))
            case Survival.HALF:
                files = self._with_last(files, (lost or b"")[: len(lost or b"") // 2])
            case Survival.HALF_ZEROS:
                kept = (lost or b"")[: len(lost or b"") // 2]
                files = self._with_last(files, kept.ljust(len(lost or b""), b"\0"))
            case _:
                assert_never(survival)
        return Disk(files)

    def _with_last(
        self, files: Mapping[str, bytes | None], content: bytes
    ) -> dict[str, bytes | None]:
        return dict(files) | ({self._last_written: content} if self._last_written in files else {})


def storage_on(disk: Disk, *, draw: int = 0) -> Storage:
    """A storage on this disk, whose every random number is `draw`."""
    return Storage(STATE, files=disk, draw=lambda below: min(draw, below - 1))


def visible(disk: Disk) -> dict[str, bytes | None]:
    """The files under the names that the storage reads."""
    return {name: data for name, data in disk.files.items() if not name.startswith(".")}
