"""Taking a model in: from a file that has arrived to an entry of the library, its projector before it.

A projector is an entry of its own, since others may use it too. It comes first: it is the smaller file, and one
that is none is found before the model is fetched. That the two go together is known once both are here; what has
arrived of the model then stays for another try, and a projector that came for it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from meshd_plugins.api import BadRequest, CapabilityError, Failed, Value
from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.models.arriving import Arrivals, Arrived, open_plain
from meshd_plugins.builtin.llama.models.bringing import Bringer, Inspected
from meshd_plugins.builtin.llama.models.digest import Mark, ModelFile, remember
from meshd_plugins.builtin.llama.models.entries import Entry, free_id, name_for, slug
from meshd_plugins.builtin.llama.models.facts import family_of
from meshd_plugins.builtin.llama.models.folder import ModelFolder
from meshd_plugins.builtin.llama.models.jobs import Job, Jobs
from meshd_plugins.builtin.llama.models.kinds import Kind
from meshd_plugins.builtin.llama.models.orders import Wanted, projector_named, with_adapters
from meshd_plugins.builtin.llama.models.projector import ProjectorMismatch
from meshd_plugins.builtin.llama.models.sources import PathSource, Source

MISMATCH: Final = ProjectorMismatch.code


class Intake:
    """Adds to `entries`, which the library reads.

    Args:
        folder: where files are kept.
        arrivals: brings them.
        bringer: has their headers read.
        jobs: of the library.
        entries: by id.
        taken: further ids that nothing new may have.
        changed: told after each change of `entries`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        arrivals: Arrivals,
        bringer: Bringer,
        jobs: Jobs,
        entries: dict[str, Entry],
        taken: Callable[[], list[str]],
        changed: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._arrivals = arrivals
        self._bringer = bringer
        self._jobs = jobs
        self._entries = entries
        self._taken = taken
        self._changed = changed

    async def add(self, wanted: Wanted, job: Job) -> Entry:
        """Take a model in, and its projector. Raises CapabilityError, OSError."""
        projector, is_new = await self._projector(wanted, job)
        arrived = await self._bring(wanted.source, wanted.sha256, job)
        try:
            entry = await self._taken_in(wanted, arrived, job, projector)
        except Failed as error:
            if is_new and projector is not None and error.code == MISMATCH:
                await self._discard(projector)  # noqa: ASYNC120  a cancelled add says so instead
            raise
        finally:
            arrived.file.close()
        self._keep(entry)
        return entry

    async def give(self, entry: Entry, wanted: Wanted, job: Job) -> Entry:
        """Bring a projector for a model that is here; how it then is. It is changed by nobody yet.

        Raises:
            CapabilityError: it did not come, or does not go with the model; then it is not kept.
        """
        projector, is_new = await self._projector(wanted, job)
        assert projector is not None, "who asks for it names it"
        job.begin("reading")
        try:
            file = open_plain(locate_model(entry.path))
            try:
                file.digest = entry.sha256  # compared when it is loaded, as ever
                inspected = await self._inspected(file, entry.id, projector)
            finally:
                file.close()
        except Failed as error:
            if is_new and error.code == MISMATCH:
                await self._discard(projector)  # noqa: ASYNC120  a cancelled one says so instead
            raise
        beside = {"projector": projector.path, "projector_sha256": projector.sha256}
        facts = replace(entry.facts or inspected.facts, modalities=inspected.facts.modalities)
        return replace(entry, facts=facts, options={**wanted.options, **beside})

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._changed()

    async def _bring(self, source: Source, sha256: str, job: Job) -> Arrived:
        try:
            return await self._arrivals.bring(source, sha256, job)
        except CapabilityError:
            with trio.CancelScope(shield=True):  # a thread ends in any case
                await trio.to_thread.run_sync(self._folder.give_up, job.source)
            raise

    # -- projectors --------------------------------------------------------------------------------------------

    async def _projector(self, wanted: Wanted, job: Job) -> tuple[Entry | None, bool]:
        """The projector that is wanted, and whether it came just now."""
        source = wanted.projector
        if source is None:
            return None, False
        if isinstance(source, str):
            return projector_named(source, self._entries), False
        if (there := self._fetched(source, wanted.projector_sha256)) is not None:
            return there, False
        if any(source.text == each.source for each in self._jobs.open):
            raise BadRequest(f"{source.text} is being added already", code="being_added")
        known = set(self._entries)
        inner = Job("add", free_id(slug(source.stem), self._taken()), source.text)
        self._jobs.open.append(inner)
        job.inner = inner
        try:
            entry = await self._projector_taken_in(source, wanted, inner)
        finally:
            self._jobs.open.remove(inner)
            job.inner = None
        return entry, entry.id not in known

    def _fetched(self, source: Source, sha256: str) -> Entry | None:
        """One that was fetched from there before: `meshd model add` was cut after it."""
        if isinstance(source, PathSource):
            return None  # it may be another file by now
        for entry in self._entries.values():
            same = source.text in (entry.source, entry.source.partition("@")[0])
            if entry.kind is Kind.PROJECTOR and same and sha256 in ("", entry.sha256):
                return entry
        return None

    async def _projector_taken_in(self, source: Source, wanted: Wanted, job: Job) -> Entry:
        arrived = await self._bring(source, wanted.projector_sha256, job)
        order = replace(wanted, source=source, names=(), options={}, lora=(), projector=None)
        try:
            entry = await self._taken_in(order, arrived, job, expected=Kind.PROJECTOR)
        finally:
            arrived.file.close()
        self._keep(entry)
        return entry

    async def _discard(self, projector: Entry) -> None:
        with trio.CancelScope(shield=True):  # a thread ends in any case
            del self._entries[projector.id]
            self._changed()
            await trio.to_thread.run_sync(self._folder.forget, projector)

    # -- any file ----------------------------------------------------------------------------------------------

    async def _taken_in(
        self,
        wanted: Wanted,
        arrived: Arrived,
        job: Job,
        projector: Entry | None = None,
        *,
        expected: Kind | None = None,
    ) -> Entry:
        """Understand a file that has arrived, and give it its place."""
        file = arrived.file
        job.begin("reading")
        try:
            inspected = await self._inspected(file, arrived.name, projector)
            _check_kind(inspected, arrived, expected)
        except Failed as error:
            if projector is None or error.code != MISMATCH:  # it would be wrong again
                await self._drop(arrived)  # noqa: ASYNC120  the same
            raise
        options = with_adapters(wanted, self._entries)
        if projector is not None:
            beside: dict[str, Value] = {
                "projector": projector.path,
                "projector_sha256": projector.sha256,
            }
            options = {**options, **beside}
        is_model = inspected.kind is Kind.MODEL
        names = (wanted.names or (name_for(inspected.facts, options),)) if is_model else ()
        for twin in self._entries.values():
            if twin.sha256 != file.digest:
                continue
            if twin.kind is expected:
                await self._drop(arrived)
                return twin
            if set(twin.names) & set(names):
                await self._drop(arrived)
                raise BadRequest(
                    f"this very file is here already, as {twin.id}: to serve it otherwise, remove that first, "
                    "or give it another --name",
                    code="already_there",
                )
        entry = Entry(
            id=job.id,
            path=arrived.path,
            kept=arrived.begun is not None or job.id in self._entries,
            sha256=file.digest,
            size_bytes=file.mark.size_bytes,
            source=arrived.source,
            facts=inspected.facts,
            kind=inspected.kind,
            names=names,
            options=_named_after(options, arrived),
            added_at_s=int(time.time()),
        )
        # A few renames, which belong together: a thread is not cancelled under way.
        return await trio.to_thread.run_sync(self._settle, entry, arrived)

    async def _inspected(self, file: ModelFile, name: str, projector: Entry | None) -> Inspected:
        if projector is None:
            return await self._bringer.inspect(file, name)
        beside = open_plain(locate_model(projector.path))
        try:
            return await self._bringer.inspect(file, name, beside)
        finally:
            beside.close()

    async def _drop(self, arrived: Arrived) -> None:
        """Throw away what has arrived, where it was fetched."""
        if arrived.begun is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._folder.drop, arrived.begun)

    def _settle(self, entry: Entry, arrived: Arrived) -> Entry:
        """Give a file its place and write its description."""
        if arrived.begun is None:
            place = locate_model(entry.path)
        else:
            place = self._folder.place(Path(arrived.path), entry.id)
            entry = replace(entry, path=str(place))
        self._folder.save(entry)
        if arrived.settled:
            # Renamed, it has another mark; who wrote it has ended, and nobody else reaches it.
            mark = Mark.of(arrived.file.descriptor)
            remember(place, self._folder.path.parent, mark, entry.sha256)
        if arrived.begun is not None:
            self._folder.drop(arrived.begun)
        return entry


def _check_kind(inspected: Inspected, arrived: Arrived, expected: Kind | None) -> None:
    """Raises Failed: something else was asked for."""
    if expected in (None, inspected.kind):
        return
    what = f"{inspected.kind.words} of the architecture {inspected.facts.architecture!r}"
    raise Failed(f"{arrived.name} is no {expected} but {what}", code=MISMATCH)


def _named_after(options: Mapping[str, Value], arrived: Arrived) -> Mapping[str, Value]:
    """The options; a file that gets another name here keeps the family that its old one says."""
    if arrived.begun is None or options.get("family"):
        return options
    return {**options, "family": family} if (family := family_of(arrived.name)) else options
