"""Files for their owner alone that are replaced as a whole: what a power cut leaves is the old one or the new."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC


def read_private(path: Path, bytes_max: int) -> bytes:
    """The content of a plain file.

    Raises:
        OSError: there is none (FileNotFoundError), it is no plain file or too long, or the system refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _OPEN)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no plain file")
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(f"{path} is longer than {bytes_max} bytes")
    return content


def replace_private(path: Path, content: bytes) -> None:
    """Give a file of mode 0600 this content; it is on the disk on return, the folder made if it is missing.

    Written by root it belongs to the folder's owner, so that `sudo meshd ...` shuts no daemon out.

    Raises:
        OSError: the system refused; the file is as it was.
    """
    make_private_folder(path.parent)
    beside = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        beside.unlink()  # left by a power cut, or a link: never written through
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _give_to_owner(descriptor, path.parent)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def make_private_folder(folder: Path) -> None:
    """Make a folder for its owner alone, who is that of the one above; no error if it is there.

    Raises:
        OSError: the system refused.
    """
    if folder.is_dir():
        return
    make_private_folder(folder.parent)
    with suppress(FileExistsError):  # somebody was faster
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _OPEN)
        try:
            _give_to_owner(descriptor, folder.parent)
        finally:
            os.close(descriptor)


def _give_to_owner(descriptor: int, folder: Path) -> None:
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def sync_folder(folder: Path) -> None:
    """See the names in a folder onto the disk, where its file system can do that for folders."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Generator[None]:
    """Keep other processes, which ask the same, out of a folder meanwhile. Blocks; ends with the process.

    Raises:
        OSError: the folder cannot be made or opened.
    """
    make_private_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
