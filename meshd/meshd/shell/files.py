"""The few things a node asks of its file system, so that a test can cut the power at any of them.

`LocalFiles` is the real one. It follows no link, opens nothing that could block (a pipe, a device) and reads
no more than it was told to: the state folder may hold whatever a damaged disk or a tired person left there.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC


class FileSystem(Protocol):
    """Every call blocks and raises `OSError`, as the calls of `os` do."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder for its owner alone, and those above it; no error if it is there."""
        ...

    def names(self, folder: Path) -> tuple[str, ...]:
        """What is in a folder, sorted."""
        ...

    def read(self, path: Path, bytes_max: int) -> bytes:
        """The content of a plain file: EFBIG if it is longer, EISDIR, ELOOP or EINVAL if it is none."""
        ...

    def write(self, path: Path, content: bytes) -> None:
        """Make a file with this content, on the disk on return; a file of that name is replaced."""
        ...

    def rename(self, path: Path, to: Path) -> None:
        """Give another name; what had that name is gone, at once and as a whole."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """See the names in a folder onto the disk."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file."""
        ...


class LocalFiles:
    """The file system of this machine; the `FileSystem` of a daemon."""

    def make_folder(self, folder: Path) -> None:
        """See `FileSystem`; EEXIST if something else has that name."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def names(self, folder: Path) -> tuple[str, ...]:
        """See `FileSystem`."""
        return tuple(sorted(path.name for path in folder.iterdir()))

    def read(self, path: Path, bytes_max: int) -> bytes:
        """See `FileSystem`."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _OPEN)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                raise _error(errno.EISDIR, path)
            if not stat.S_ISREG(found.st_mode):
                raise _error(errno.EINVAL, path)
            content = file.read(bytes_max + 1) if found.st_size <= bytes_max else None
        if content is None or len(content) > bytes_max:
            raise _error(errno.EFBIG, path)
        return content

    def write(self, path: Path, content: bytes) -> None:
        """See `FileSystem`; what could not be written as a whole is removed."""
        with suppress(FileNotFoundError):
            path.unlink()  # left by a power cut, or a link: never written through
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise

    def rename(self, path: Path, to: Path) -> None:
        """See `FileSystem`."""
        path.rename(to)

    def sync_folder(self, folder: Path) -> None:
        """See `FileSystem`; a file system that cannot do this for folders is let be."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """See `FileSystem`."""
        path.unlink()


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
