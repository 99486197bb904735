"""A model file, opened and verified: what was hashed is what is loaded.

Invariant: a `ModelFile` is an open file, and `digest` the SHA-256 of what it held when it had `mark`. The
worker is given the open file and not its path, so that a file put in its place makes no difference, and
compares the mark before and after it loads: whoever wrote into the file meanwhile moved its times.

A digest is remembered for the mark: device, inode, size, time of modification and time of change, which
no program can set. Two holes remain, and are closed here or named. A file that changed within
`SETTLED_NS` before it was hashed is not remembered, as a later write might carry the same time. And
whoever can set this machine's clock, or write past the file system, can fake a mark; both are root.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

DIGEST_CACHE_FILE: Final = "digests.json"
DIGESTS_MAX: Final = 256
READ_BYTES: Final = 4 << 20
SETTLED_NS: Final = 2_000_000_000  # coarser than the times of any file system of today


class ModelRefused(Exception):
    """This file is not served as it is, and no restart helps. The message is for people."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells one state of a file from another."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Mark:
        """Of an open file. Raises OSError."""
        seen = os.fstat(descriptor)
        return cls(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)

    def holds_the_same(self, other: Mark) -> bool:
        """Whether the content is the same, though links, owner or mode may have changed."""
        return (self.size_bytes, self.modified_ns) == (other.size_bytes, other.modified_ns)


@dataclass(slots=True)
class ModelFile:
    """Closed by `close`, which may be called again."""

    descriptor: int
    mark: Mark
    digest: str  # sha256, hex

    def close(self) -> None:
        """Give the open file back."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def open_verified(
    path: Path, state_dir: Path, expected: str = "", now_ns: Callable[[], int] = time.time_ns
) -> ModelFile:
    """Open a model and compare its digest with the expected one ("": any will do).

    Reads the whole file unless its digest is remembered: gigabytes for some models. Run it in a thread.
    A cache that cannot be written costs only time.

    Raises:
        OSError: the file cannot be read.
        ModelRefused: it is no regular file (not_a_file), has another digest (digest_mismatch), or is
            being written to (changing).
    """
    # O_NONBLOCK: a pipe of that name would have us wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ModelRefused(f"{path} is no regular file", "not_a_file")
        mark = Mark.of(descriptor)
        digest = _digest(descriptor, mark, path, state_dir / DIGEST_CACHE_FILE, now_ns)
        if expected and digest != expected:
            raise ModelRefused(
                f"the file is not the one that was configured: its SHA-256 is {digest}, and "
                f"plugins.llama says {expected}; fetch it again, or correct the setting",
                "digest_mismatch",
            )
        return ModelFile(descriptor, mark, digest)
    except BaseException:
        os.close(descriptor)
        raise


def _digest(
    descriptor: int, mark: Mark, path: Path, cache_file: Path, now_ns: Callable[[], int]
) -> str:
    known = _read_cache(cache_file).get(str(path))
    if known is not None and known[:-1] == list(astuple(mark)):
        return str(known[-1])
    began_ns = now_ns()
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if Mark.of(descriptor) != mark:
        raise ModelRefused(
            f"{path} is being written to; restart the node when that is done", "changing"
        )
    if max(mark.changed_ns, mark.modified_ns) < began_ns - SETTLED_NS:
        remember(path, cache_file.parent, mark, digest)
    return digest


def hash_file(descriptor: int, tell: Callable[[int], None]) -> str:
    """Return the SHA-256 of an open file, hex; `tell` hears of bytes so far, and may raise to end it."""
    digest, so_far = hashlib.sha256(), 0
    os.lseek(descriptor, 0, os.SEEK_SET)
    while chunk := os.read(descriptor, READ_BYTES):
        digest.update(chunk)
        so_far += len(chunk)
        tell(so_far)
    return digest.hexdigest()


def remember(path: Path, state_dir: Path, mark: Mark, digest: str) -> None:
    """Spare `open_verified` the reading, as long as the file has this mark.

    For who knows that nobody writes to the file: it has settled, or nobody else can reach it.
    """
    cache_file = state_dir / DIGEST_CACHE_FILE
    # Read again: another model may have been digested meanwhile.
    cache = {**_read_cache(cache_file), str(path): [*astuple(mark), digest]}
    _write_cache(cache_file, cache)


def forget(path: Path, state_dir: Path) -> None:
    """Have `open_verified` read the file anew, since it was found to be another than its mark says."""
    cache = _read_cache(state_dir / DIGEST_CACHE_FILE)
    if cache.pop(str(path), None) is not None:
        _write_cache(state_dir / DIGEST_CACHE_FILE, cache)


def _write_cache(file: Path, cache: dict[str, list[Any]]) -> None:
    while len(cache) > DIGESTS_MAX:
        del cache[next(iter(cache))]
    temporary = file.with_suffix(f".{os.getpid()}.new")
    with suppress(OSError):
        temporary.write_text(json.dumps(cache, indent=1))
        temporary.replace(file)


def _read_cache(file: Path) -> dict[str, list[Any]]:
    """Return what is cached; a missing or damaged cache is an empty one."""
    try:
        raw: Any = json.loads(file.read_text())
        return {
            str(path): [*(int(number) for number in entry[:5]), str(entry[5])]
            for path, entry in raw.items()
            if len(str(entry[5])) == 64
        }
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}
