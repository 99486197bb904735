"""The files of an audit trail: `<state_dir>/audit/<number of its first line>.jsonl`, and `head`.

A file is only ever appended to. A torn last line, as a power cut leaves it, stays; the trail goes on in a new file
from the last whole line. `head` names the last line written, so that lines cut off the end are missed. Every
call blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from meshd.orchestrate.audit_chain import Head, Verdict, opened, sealed, verified
from meshd_plugins.api import Value

FILES_MAX: Final = 8
"""The oldest goes when there are as many; each takes its share of the size."""
HEAD_FILE: Final = "head"

_SUFFIX: Final = ".jsonl"
_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC


class AuditFiles:
    """Appends to a trail and reads it. Not for concurrent use.

    Args:
        folder: its own; made when the first line is written.
        size_bytes_max: of all files.
    """

    def __init__(self, folder: Path, size_bytes_max: int) -> None:
        self.folder = folder
        self._file_bytes_max = max(4_096, size_bytes_max // FILES_MAX)
        self._descriptor: int | None = None
        self._size = 0
        self._found = False
        self.head = Head()

    def append(self, entries: Sequence[Mapping[str, Value]]) -> None:
        """Write lines, and see them onto the disk.

        Raises:
            OSError: the disk refused; the trail goes on in a new file when it takes writes again.
        """
        if not self._found:
            self._find()
        try:
            for start in range(0, len(entries), 256):
                self._write(entries[start : start + 256])
            self._note_head()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; a later `append` goes on in a new one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._found = False

    def newest(self) -> Iterator[Mapping[str, Value]]:
        """The fields of all lines, the newest first."""
        for path in reversed(self._paths()):
            for line in reversed(_lines(path)):
                fields = opened(line)
                if fields is not None:
                    yield fields

    def verify(self) -> Verdict:
        """Look over all of it."""
        return verified(((path.name, _lines(path)) for path in self._paths()), self._noted_head())

    def _paths(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == _SUFFIX)
        except FileNotFoundError:
            return []

    def _find(self) -> None:
        """Where the trail ended."""
        paths = self._paths()
        path, whole = self.folder, False
        self.head = Head()
        self._size = self._file_bytes_max  # so that a new file is begun
        for path in reversed(paths):
            whole = _ends_whole(path)
            for line in reversed(_lines(path)):
                fields = opened(line)
                if fields is None:
                    whole = False
                    continue
                number, chain = fields["n"], fields.get("chain")
                if isinstance(number, int) and isinstance(chain, str):
                    self.head = Head(number, chain)
                    break
            if self.head.number:
                break
        noted = self._noted_head()
        if noted is not None and noted.number > self.head.number:
            self.head = noted  # lines are gone: the numbers go on, so that the gap shows for ever
        elif self.head.number and whole and path == paths[-1]:
            self._open(path)
        self._found = True

    def _write(self, entries: Sequence[Mapping[str, Value]]) -> None:
        lines: list[str] = []
        head = self.head
        if self._descriptor is None or self._size >= self._file_bytes_max:
            head = self._begin(head, lines)
        for fields in entries:
            line, head = sealed(head, fields)
            lines.append(line)
        data = ("\n".join(lines) + "\n").encode()
        assert self._descriptor is not None
        written = 0
        while written < len(data):
            written += os.write(self._descriptor, data[written:])
        os.fdatasync(self._descriptor)
        self._size += len(data)
        self.head = head

    def _begin(self, head: Head, lines: list[str]) -> Head:
        """A new file; its first line goes into `lines`."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths = self._paths()
        for path in paths[: max(0, len(paths) - FILES_MAX + 1)]:
            path.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._open(self.folder / f"{head.number + 1:012d}{_SUFFIX}")
        line, head = sealed(head, {"kind": "continued", "before": head.chain})
        lines.append(line)
        return head

    def _open(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _FLAGS, 0o600)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def _note_head(self) -> None:
        """In place and of one length: after a power cut it names a line that was written, or an older one."""
        text = f"{self.head.number:020d} {self.head.chain}\n".encode()
        path = self.folder / HEAD_FILE
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | _FLAGS, 0o600)
        try:
            os.pwrite(descriptor, text, 0)
        finally:
            os.close(descriptor)

    def _noted_head(self) -> Head | None:
        with suppress(OSError, ValueError):
            number, chain = (self.folder / HEAD_FILE).read_text("ascii").split()
            return Head(int(number), chain)
        return None


def _lines(path: Path) -> list[str]:
    """The whole lines of a file: what a power cut left of one more was never promised to anybody."""
    whole, _, _torn = path.read_text("utf-8", "replace").rpartition("\n")
    return whole.split("\n") if whole else []


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) == b"\n"
