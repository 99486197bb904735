"""`data.gpt/…`: files of this node, fetched by name.

    [plugins.document.files]
    "data.gpt/notes/readme" = "/srv/notes/README.md"

or, with a line for people, `files = [{name = "...", path = "...", summary = "..."}]`.

What is fetched is what the file holds at that moment, whole: a file that changes while it is being read
ends in Failed, never in a mix. Its size and SHA-256 are announced, and announced anew when a fetch
finds them changed.
"""

from __future__ import annotations

import hashlib
import mimetypes
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from meshd_plugins.api import (
    BackgroundTask,
    BadRequest,
    Capabilities,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    Operation,
    PluginConfigError,
    PluginContext,
    Refused,
    Request,
    Value,
)
from meshd_plugins.hookspecs import hookimpl

CHUNK_BYTES: Final = 64 * 1024
SIZE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Default of `size_bytes_max`: the largest file that is served; raising it lengthens single answers."""

HASH_AT_ONCE_BYTES_MAX: Final = 1024 * 1024
"""Larger files are announced once they have been hashed in the background, so that start-up stays quick."""

READ_DEADLINE_S: Final = 10.0
"""One read of a chunk may take this long (a sleeping disk, a network mount)."""

SLOTS: Final = 16
_limiter = trio.CapacityLimiter(4)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One configured file."""

    name: str
    path: Path
    summary: str
    size_bytes_max: int


@dataclass(frozen=True, slots=True)
class _Identity:
    """What must not change while a file is read."""

    inode: int
    size_bytes: int
    modified_ns: int


def _identity(descriptor: int) -> _Identity:
    stat = os.fstat(descriptor)
    return _Identity(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _look(path: Path) -> _Identity:
    with path.open("rb") as file:
        return _identity(file.fileno())


def _read_at(path: Path, offset: int, expected: _Identity) -> bytes | None:
    """Read one chunk; None when the file is not the same any more.

    Opened for each chunk: an abandoned read then leaves no open file behind.
    """
    with path.open("rb") as file:
        if _identity(file.fileno()) != expected:
            return None
        data = os.pread(file.fileno(), CHUNK_BYTES, offset)
        return data if _identity(file.fileno()) == expected else None


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


class DocumentCapability:
    """One file under one name."""

    def __init__(
        self, entry: FileEntry, size_bytes: int, sha256: str, capabilities: Capabilities
    ) -> None:
        self._entry = entry
        self._capabilities = capabilities
        self._content_type = mimetypes.guess_type(entry.path.name)[0] or "application/octet-stream"
        self._descriptor = Descriptor(
            name=entry.name,
            operations=(Operation.FETCH,),
            summary=entry.summary,
            slots=SLOTS,
            fields={
                "size_bytes": size_bytes,
                "sha256": sha256,
                "content_type": self._content_type,
            },
        )

    @property
    def descriptor(self) -> Descriptor:
        """What is announced: the size and digest of the last fetch, or of the start."""
        return self._descriptor

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield the file in chunks of 64 KiB; `Done.detail` has the size and SHA-256 of what was sent.

        Raises:
            BadRequest: another operation than FETCH.
            Refused: not_here (gone or unreadable), too_large.
            Failed: the file changed or a read took too long.
        """
        if request.operation is not Operation.FETCH:
            raise BadRequest(f"{self._entry.name} can only be fetched, not {request.operation}")
        identity = await self._look()
        sha = hashlib.sha256()
        offset = 0
        while offset < identity.size_bytes or offset == 0:
            data = await self._read(offset, identity)
            sha.update(data)
            offset += len(data)
            yield Chunk(data=data, content_type=self._content_type)
            if not data:
                break
        if offset != identity.size_bytes:
            raise Failed(f"{self._entry.name} changed while it was being read")
        self._announce(offset, sha.hexdigest())
        yield Done(
            detail={
                "size_bytes": offset,
                "sha256": sha.hexdigest(),
                "content_type": self._content_type,
            }
        )

    async def _look(self) -> _Identity:
        try:
            identity = await _in_thread(partial(_look, self._entry.path))
        except OSError as error:
            raise Refused(
                f"{self._entry.name} cannot be read: {error.strerror}", code="not_here"
            ) from error
        if identity.size_bytes > self._entry.size_bytes_max:
            raise Refused(
                f"{self._entry.name} has grown to {identity.size_bytes} bytes; "
                f"at most {self._entry.size_bytes_max} are served",
                code="too_large",
            )
        return identity

    async def _read(self, offset: int, identity: _Identity) -> bytes:
        try:
            data = await _in_thread(partial(_read_at, self._entry.path, offset, identity))
        except OSError as error:
            raise Failed(f"{self._entry.name} cannot be read: {error.strerror}") from error
        if data is None:
            raise Failed(f"{self._entry.name} changed while it was being read")
        return data

    def _announce(self, size_bytes: int, sha256: str) -> None:
        """Replace the descriptor if the file is not what was announced."""
        fields = {**self._descriptor.fields, "size_bytes": size_bytes, "sha256": sha256}
        if fields != self._descriptor.fields:
            self._descriptor = replace(self._descriptor, fields=fields)
            self._capabilities.replace(self)


async def _in_thread(read: Callable[[], _T]) -> _T:
    """Run a read in a thread. Raises Failed(deadline_exceeded); the thread is then left to itself."""
    with trio.move_on_after(READ_DEADLINE_S):
        return await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=_limiter)
    raise Failed(f"a read took more than {READ_DEADLINE_S:g} s", code="deadline_exceeded")


def read_config(table: Mapping[str, Value]) -> tuple[FileEntry, ...]:
    """Check the table [plugins.document]; files are looked at, not read.

    Raises:
        PluginConfigError: naming the key, or the file that is missing, unreadable or too large.
    """
    unknown = sorted(set(table) - {"files", "size_bytes_max"})
    if unknown:
        raise PluginConfigError(
            f"plugins.document.{unknown[0]} is no setting; known: files, size_bytes_max"
        )
    most = table.get("size_bytes_max", SIZE_BYTES_MAX)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise PluginConfigError(
            f"plugins.document.size_bytes_max is {most!r}; it must be a whole number of bytes, at least 1"
        )
    entries = [
        _entry(f"plugins.document.files[{index}]", item, most)
        for index, item in enumerate(_items(table.get("files", [])))
    ]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PluginConfigError(f"plugins.document.files has {twice[0]!r} twice")
    for entry in entries:
        _check_file(entry)
    return tuple(entries)


def _items(files: Value) -> list[Mapping[str, Value]]:
    if isinstance(files, Mapping):
        return [{"name": name, "path": path} for name, path in files.items()]
    if isinstance(files, Sequence) and not isinstance(files, str | bytes):
        items = [item for item in files if isinstance(item, Mapping)]
        if len(items) == len(files):
            return items
    raise PluginConfigError(
        "plugins.document.files must be a table of name = path, or a list of {name, path, summary}"
    )


def _entry(where: str, item: Mapping[str, Value], size_bytes_max: int) -> FileEntry:
    unknown = sorted(set(item) - {"name", "path", "summary"})
    if unknown:
        raise PluginConfigError(f"{where}.{unknown[0]} is no setting; known: name, path, summary")
    name, path = item.get("name"), item.get("path")
    if not isinstance(name, str) or not name.startswith("data.gpt/"):
        raise PluginConfigError(f"{where}.name is {name!r}; it must begin with data.gpt/")
    if not isinstance(path, str) or not path:
        raise PluginConfigError(f"{where}.path is {path!r}; it must be the path of a file")
    summary = item.get("summary", f"The file {Path(path).name}")
    if not isinstance(summary, str) or not summary or "\n" in summary:
        raise PluginConfigError(f"{where}.summary must be one line of text")
    return FileEntry(name, Path(path).expanduser(), summary, size_bytes_max)


def _check_file(entry: FileEntry) -> None:
    where = f"plugins.document.files: {entry.name!r} is the file {str(entry.path)!r}, which"
    if entry.path.exists() and not entry.path.is_file():  # before opening: a pipe would block
        raise PluginConfigError(f"{where} is no regular file")
    try:
        size_bytes = _look(entry.path).size_bytes
    except OSError as error:
        raise PluginConfigError(f"{where} cannot be read: {error.strerror}") from error
    if size_bytes > entry.size_bytes_max:
        raise PluginConfigError(
            f"{where} has {size_bytes} bytes; size_bytes_max is {entry.size_bytes_max}"
        )


def _add(entry: FileEntry, digest: tuple[int, str], capabilities: Capabilities) -> None:
    try:
        capabilities.add(DocumentCapability(entry, *digest, capabilities))
    except ValueError as error:
        raise PluginConfigError(f"plugins.document.files: {error}") from error


def _is_small(entry: FileEntry) -> bool:
    return entry.path.stat().st_size <= HASH_AT_ONCE_BYTES_MAX


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Announce the small files at once."""
    for entry in read_config(context.config):
        if _is_small(entry):
            _add(entry, _digest(entry.path), context.capabilities)


@hookimpl
def meshd_background(context: PluginContext) -> BackgroundTask | None:
    """Hash the large files in a thread, then announce them."""
    large = [entry for entry in read_config(context.config) if not _is_small(entry)]
    return partial(_announce_large, large, context) if large else None


async def _announce_large(entries: Sequence[FileEntry], context: PluginContext) -> None:
    for entry in entries:
        digest = await trio.to_thread.run_sync(
            _digest, entry.path, abandon_on_cancel=True, limiter=_limiter
        )
        _add(entry, digest, context.capabilities)
        context.log.info("document.announced", name=entry.name, size_bytes=digest[0])
