"""The models that a node keeps: added, listed, verified and removed while it runs.

What is true: `entries()` is what the folder holds, in the order of ids; every change of it is one rename
in the folder, and is told to `wait_changed`. A file is in the library only after the daemon itself has
read it whole and found the digest that was asked for. Headers are read by a worker that has nothing but
the open file. A transfer that is cancelled, cut or killed leaves what it has, and goes on from there when
the same thing is asked for again.

Who serves the models (`plugin.py`) reads `entries()`, waits with `wait_changed()`, and gives itself to
`serve_with` as `Residents`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Final, Protocol, TypeAlias

import trio

from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Failed,
    PluginConfigError,
    PluginContext,
    PluginOperation,
    Reading,
    Refused,
    Value,
)
from meshd_plugins.builtin.llama.config import (
    locate_model,
    read_config,
    read_library,
    require_library,
)
from meshd_plugins.builtin.llama.models.arriving import (
    Arrivals,
    hash_of,
    open_plain,
    wrong_digest,
)
from meshd_plugins.builtin.llama.models.bringing import Bringer
from meshd_plugins.builtin.llama.models.digest import forget
from meshd_plugins.builtin.llama.models.entries import Entry, config_ids, free_id, slug
from meshd_plugins.builtin.llama.models.folder import Begun, ModelFolder
from meshd_plugins.builtin.llama.models.intake import Intake
from meshd_plugins.builtin.llama.models.jobs import Job, Jobs
from meshd_plugins.builtin.llama.models.kinds import Kind
from meshd_plugins.builtin.llama.models.listing import configured_row, entry_row, transfer_row
from meshd_plugins.builtin.llama.models.orders import (
    Wanted,
    projector_named,
    read_given,
    read_id,
    read_wanted,
    with_adapters,
)

FOLDER: Final = "models"
WITHDRAW_S: Final = 120.0  # for who serves a model to let go of it; then its file goes all the same
SETTLE_S: Final = (
    3600.0  # at most, for a model that was added to be served; its own deadline comes first
)
LOOK_S: Final = 0.25
SETTLED: Final = frozenset({"serving", "loaded", "cold", "quarantined"})

Item: TypeAlias = "Mapping[str, Value]"
SHADOWED: Final = (
    "a model of the configuration has the same id now: rename its file there, or remove this one and add it "
    "with another --id"
)
NO_STANDING: Final[Item] = {}


class Residents(Protocol):
    """What the library asks of who serves the models."""

    async def withdraw(self, entry_id: str) -> None:
        """Announce it no longer, let requests in flight finish within a deadline, end its worker.

        The entry is no longer in `entries()` when this is called. No error when it is not served.
        """
        ...

    def standing(self) -> Mapping[str, Mapping[str, Value]]:
        """How each model stands, by id: the library's `Entry.id`, and `config_ids` for the others.

        Keys, each optional: `state` (starting, serving, loaded, cold, loading, backing_off, quarantined),
        `reason`, `resident_bytes`, `load_s`, `prefill_tokens_per_s`, `decode_tokens_per_s`; and, of models
        from the configuration, `quantisation`, `size_bytes`, `family`.
        """
        ...


class Library:
    """All models of one node that are not in its configuration.

    Raises:
        PluginConfigError: the plugin's table is wrong.
    """

    def __init__(self, context: PluginContext, bringer: Bringer | None = None) -> None:
        self._context = context
        self._config = read_library(context.config)
        models = read_config(context.config)
        self._configured = dict(zip(config_ids(models), models, strict=True))
        self._folder = ModelFolder(context.state_dir / FOLDER, self._config.disk_mib_max)
        self._bringer = bringer or Bringer(context.supervisor)
        self._disk = trio.CapacityLimiter(1)  # one file at a time: it is the disk that is slow
        self._jobs = Jobs()
        self._entries: dict[str, Entry] = {}
        self._intake = Intake(
            self._folder,
            Arrivals(self._folder, self._bringer, self._disk),
            self._bringer,
            self._jobs,
            self._entries,
            self._taken_ids,
            self._tell_changed,
        )
        self._residents: Residents | None = None
        self._changed = trio.Event()

    # -- for who serves them -----------------------------------------------------------------------------------

    def serve_with(self, residents: Residents) -> None:
        """Say who serves the models. Before `run`."""
        self._residents = residents

    def entries(self) -> tuple[Entry, ...]:
        """All of them, by id. Those with `entry.served` are to be announced, as `entry.config` says."""
        return tuple(self._entries[key] for key in sorted(self._entries))

    async def wait_changed(self) -> None:
        """Return when `entries()` has changed since the last return. For one task; none is missed."""
        await self._changed.wait()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Read the folder, then carry out what is asked for, until cancelled.

        Raises nothing for a bad folder.
        """
        log = self._context.log
        try:
            found = await trio.to_thread.run_sync(self._folder.load)
        except OSError as error:
            log.error("library.unreadable", folder=str(self._folder.path), error=str(error))
        else:
            self._entries.update({entry.id: entry for entry in found.entries})
            self._tell_changed()
            for damaged in found.damaged:
                log.warning("library.description_damaged", model=damaged)
            for stray in found.strays:
                await self._take_stray(stray)
        await self._jobs.run()

    async def _take_stray(self, entry_id: str) -> None:
        """A file whose description was lost: it is listed, and not served before somebody names it."""
        path, job = self._folder.file(entry_id), Job("find", entry_id)
        try:
            file = open_plain(path)
            try:
                file.digest = await hash_of(file, job, self._disk)
                inspected = await self._bringer.inspect(file, path.name)
            finally:
                file.close()
            entry = Entry(
                id=entry_id,
                path=str(path),
                kept=True,
                sha256=file.digest,
                size_bytes=file.mark.size_bytes,
                source=str(path),
                facts=inspected.facts,
                kind=inspected.kind,
                names=(),
                added_at_s=int(time.time()),
            )
            await trio.to_thread.run_sync(self._folder.save, entry)
        except (CapabilityError, OSError) as error:
            self._context.log.warning("library.file_unusable", file=str(path), error=str(error))
            return
        self._keep(entry)
        self._context.log.warning("library.model_found", model=entry_id, file=str(path))

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._tell_changed()

    def _tell_changed(self) -> None:
        self._changed.set()

    # -- what an administrator asks for ------------------------------------------------------------------------

    def operations(self) -> Mapping[str, PluginOperation]:
        """The verbs add, list, verify and remove, for `meshd_operations`."""
        return {
            "add": self.add,
            "list": Reading(self.listed),
            "verify": self.verify,
            "remove": self.remove,
        }

    def add(self, arguments: Item) -> AsyncGenerator[Item, None]:
        """Take a model in, or give one that is here a projector: progress items, the last one `{"done": {...}}`.

        Raises:
            CapabilityError: it was not taken in; what has arrived of it is kept, unless it is wrong.
        """
        try:
            require_library()
        except PluginConfigError as error:
            raise Failed(str(error), code="not_installed") from error
        if (given := read_given(arguments, self._entries, self._config)) is not None:
            return self._give(*given)
        wanted = read_wanted(arguments, self._config)
        with_adapters(wanted, self._entries)
        if isinstance(wanted.projector, str):
            projector_named(wanted.projector, self._entries)
        job = Job("add", self._id_for(wanted), wanted.source.text)
        if any(job.source == other.source for other in self._jobs.open if other.verb == "add"):
            raise BadRequest(f"{job.source} is being added already", code="being_added")
        return self._jobs.follow(job, partial(self._add, wanted))

    async def listed(self, arguments: Item) -> AsyncGenerator[Item, None]:
        """All models, those of the configuration and those that are on their way too."""
        del arguments
        begun = await trio.to_thread.run_sync(self._arrived)
        standing: Mapping[str, Item] = {}
        if self._residents is not None:
            standing = self._residents.standing()
        rows: list[Value] = [
            configured_row(key, model, standing.get(key, {}))
            for key, model in self._configured.items()
        ]
        rows += [
            entry_row(entry, self._standing(entry.id, standing), self._users(entry))
            for entry in self.entries()
        ]
        adding = {job.source: job for job in self._jobs.open if job.verb == "add"}
        known = {each.source for each, _ in begun}
        rows += [transfer_row(each, here, adding.get(each.source)) for each, here in begun]
        rows += [
            transfer_row(Begun("", job.id, source), 0, job)
            for source, job in adding.items()
            if source not in known
        ]
        yield {"done": {"models": rows}}

    def verify(self, arguments: Item) -> AsyncGenerator[Item, None]:
        """Read files whole and compare digests: of one model, or of all.

        Raises:
            CapabilityError: there is no such model, or at least one is damaged.
        """
        wanted = str(arguments.get("id") or "")
        if wanted and wanted not in self._entries and wanted not in self._configured:
            raise self.unknown(wanted)
        job = Job("verify", wanted or "all")
        return self._jobs.follow(job, partial(self._verify, wanted))

    def remove(self, arguments: Item) -> AsyncGenerator[Item, None]:
        """Withdraw a model and delete its file; or throw away what has arrived of one.

        Raises:
            CapabilityError: there is none, or it is not ours to remove.
        """
        entry_id = read_id(arguments)
        entry = self._entries.get(entry_id)
        if entry is not None:
            self._check_removable(entry)
        elif entry_id in self._configured:
            raise BadRequest(
                f"{entry_id} is in the node's configuration: take it out of plugins.llama.models there, and "
                "restart the node",
                code="configured",
            )
        elif any(other.id == entry_id for other in self._jobs.open):
            raise BadRequest(f"{entry_id} is being added: stop that first", code="being_added")
        work = self._drop if entry is None else partial(self._remove, entry)
        return self._jobs.follow(Job("remove", entry_id), work)

    # -- adding ------------------------------------------------------------------------------------------------

    def _id_for(self, wanted: Wanted) -> str:
        for entry in self._entries.values():
            is_lost = entry.kind is Kind.MODEL and not entry.served
            if entry.path == wanted.source.text and is_lost:
                return entry.id  # a file whose description was lost gets a new one
        taken = self._taken_ids()
        if not wanted.id:
            return free_id(slug(wanted.source.stem), taken)
        if wanted.id in taken:
            raise BadRequest(
                f"there is a model {wanted.id} already: remove it, or give another --id",
                code="taken",
            )
        return wanted.id

    def _taken_ids(self) -> list[str]:
        return [*self._entries, *self._configured, *(job.id for job in self._jobs.open)]

    async def _add(self, wanted: Wanted, job: Job) -> Item:
        entry = await self._intake.add(wanted, job)
        self._context.log.info("library.model_added", model=entry.id, source=entry.source)
        standing = await self._served(entry, job) if wanted.wait else NO_STANDING
        return entry_row(entry, standing)

    def _give(self, entry: Entry, wanted: Wanted) -> AsyncGenerator[Item, None]:
        if isinstance(wanted.projector, str):
            projector_named(wanted.projector, self._entries)
        if any(other.id == entry.id for other in self._jobs.open):
            raise BadRequest(
                f"something is being done to {entry.id}: let it end first", code="being_added"
            )
        work = partial(self._given, entry, wanted)
        return self._jobs.follow(Job("give a projector to", entry.id), work)

    async def _given(self, entry: Entry, wanted: Wanted, job: Job) -> Item:
        """Bring the projector; then the model is served anew, with it."""
        changed = await self._intake.give(entry, wanted, job)
        if self._entries.get(entry.id) is not entry:  # removed meanwhile
            raise self.unknown(entry.id)
        await trio.to_thread.run_sync(self._folder.save, changed)
        try:
            await self._withdraw(entry, job)
        finally:
            self._keep(changed)
        for each in self._projectors_left_by(entry):
            await self._forget(each)
        self._tell_changed()
        self._context.log.info(
            "library.projector_given", model=entry.id, source=str(wanted.projector)
        )
        standing = await self._served(changed, job) if wanted.wait else NO_STANDING
        return entry_row(changed, standing)

    async def _served(self, entry: Entry, job: Job) -> Mapping[str, Value]:
        """Wait until it is known whether the model can be served; return how it stands."""
        if self._residents is None or not entry.served:
            return {}
        job.begin("loading")
        standing: Mapping[str, Value] = {}
        with trio.move_on_after(min(SETTLE_S, 2 * entry.config.start_deadline_s)):
            while standing.get("state") not in SETTLED:
                await trio.sleep(LOOK_S)
                standing = self._residents.standing().get(entry.id, {})
        return standing

    # -- verifying ---------------------------------------------------------------------------------------------

    async def _verify(self, wanted: str, job: Job) -> Item:
        models = [(e.id, e.path, e.sha256) for e in self.entries()]
        for key, model in self._configured.items():
            models.append((key, model.path, model.sha256))
            models += [(key, each.path, each.sha256) for each in model.lora]
            if model.projector:
                models.append((key, model.projector, model.projector_sha256))
        chosen = [each for each in models if wanted in ("", each[0])]
        rows: list[Value] = []
        for number, (key, path, sha256) in enumerate(chosen, 1):
            job.part, job.parts, job.id = number, len(chosen), key
            rows.append(await self._compared(key, path, sha256, job))
        return {"models": rows, "sound": all(row.get("sound") for row in rows)}  # type: ignore[union-attr]

    async def _compared(self, key: str, path: str, sha256: str, job: Job) -> Item:
        try:
            file = open_plain(locate_model(path))
            try:
                digest = await hash_of(file, job, self._disk)
            finally:
                file.close()
            if sha256 and digest != sha256:
                forget(
                    locate_model(path), self._context.state_dir
                )  # what loads it shall see it too
                raise wrong_digest(path, digest, sha256)
        except (CapabilityError, PluginConfigError) as error:
            return {"id": key, "sound": False, "reason": str(error)}
        return {"id": key, "sound": True, "sha256": digest, "compared": bool(sha256)}

    # -- removing ----------------------------------------------------------------------------------------------

    def _check_removable(self, entry: Entry) -> None:
        if users := self._users(entry):
            raise BadRequest(
                f"{entry.id} is {entry.kind.words} of {', '.join(users)}: remove that first",
                code="in_use",
            )

    def _users(self, entry: Entry) -> list[str]:
        """The models that an adapter or a projector is served with."""
        return [other.id for other in self.entries() if entry.path in other.uses]

    async def _remove(self, entry: Entry, job: Job) -> Item:
        try:
            await self._withdraw(entry, job)
        except BaseException:
            self._keep(entry)  # nothing was deleted: it is as it was
            raise
        gone = [entry, *self._projectors_left_by(entry)]
        for each in gone:
            await self._forget(each)
        self._tell_changed()
        freed = sum(each.size_bytes for each in gone if each.kept)
        left = "" if entry.kept else entry.path
        beside: list[Value] = [each.id for each in gone[1:]]
        return {"id": entry.id, "freed_bytes": freed, "left": left, "with": beside}

    async def _withdraw(self, entry: Entry, job: Job) -> None:
        """Serve it no more; whoever uses it has `WITHDRAW_S` to end."""
        job.begin("withdrawing")
        del self._entries[entry.id]
        self._changed.set()
        if self._residents is not None and entry.id not in self._configured:
            with trio.move_on_after(WITHDRAW_S):
                await self._residents.withdraw(entry.id)

    async def _forget(self, entry: Entry) -> None:
        self._entries.pop(entry.id, None)
        await trio.to_thread.run_sync(self._folder.forget, entry)
        self._context.log.info("library.model_removed", model=entry.id, deleted=entry.kept)

    def _projectors_left_by(self, entry: Entry) -> list[Entry]:
        """Projectors of a model that is no longer there which no other model uses: they go with it."""
        return [
            each
            for each in self._entries.values()
            if each.kind is Kind.PROJECTOR and each.path in entry.uses and not self._users(each)
        ]

    async def _drop(self, job: Job) -> Item:
        """Throw away what has arrived of a model."""
        noted = await trio.to_thread.run_sync(self._folder.begun)
        begun = next((each for each in noted if each.id == job.id), None)
        if begun is None:
            raise self.unknown(job.id)
        freed = await trio.to_thread.run_sync(self._folder.arrived_bytes, begun)
        await trio.to_thread.run_sync(self._folder.drop, begun)
        return {"id": job.id, "freed_bytes": freed, "left": ""}

    # -- ids that the configuration has got too -----------------------------------------------------------------

    def shadowed(self) -> tuple[str, ...]:
        """Models of the library that are not served, since one of the configuration has their id by now."""
        return tuple(
            each.id for each in self.entries() if each.served and each.id in self._configured
        )

    def _standing(self, entry_id: str, standing: Mapping[str, Item]) -> Item:
        if entry_id in self._configured:
            return {"state": "quarantined", "reason": SHADOWED}
        return standing.get(entry_id, NO_STANDING)

    # -- telling -----------------------------------------------------------------------------------------------

    def _arrived(self) -> list[tuple[Begun, int]]:
        return [(each, self._folder.arrived_bytes(each)) for each in self._folder.begun()]

    def unknown(self, entry_id: str) -> Refused:
        """The error for an id that is no model's."""
        known = ", ".join(sorted([*self._entries, *self._configured])) or "none"
        return Refused(
            f"there is no model {entry_id[:80]!r} here; there are {known}", code="no_such_model"
        )
