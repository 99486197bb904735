"""All models of the node: those of the configuration and those of the library, as they come and go."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from meshd_plugins.api import (
    BadRequest,
    Complaint,
    PluginConfigError,
    PluginContext,
    PluginOperation,
    Refused,
    Value,
)
from meshd_plugins.builtin.llama.config import Limits, ModelConfig
from meshd_plugins.builtin.llama.models.entries import config_ids
from meshd_plugins.builtin.llama.models.library import SHADOWED, Library
from meshd_plugins.builtin.llama.running.figures import FiguresStore
from meshd_plugins.builtin.llama.running.hardware import Machine
from meshd_plugins.builtin.llama.running.keeping import State, Tools
from meshd_plugins.builtin.llama.running.lifecycle import Keeper
from meshd_plugins.builtin.llama.running.residency import (
    THRASH_EVICTIONS,
    THRASH_WINDOW_S,
    Residency,
)
from meshd_plugins.builtin.llama.running.restarts import Waits
from meshd_plugins.builtin.llama.split.config import read_rpc
from meshd_plugins.builtin.llama.split.keeper import SplitKeeper
from meshd_plugins.builtin.llama.split.lending import Lending

WITHDRAW_S: Final = 5.0  # for the last of a model that is taken away
RETRY_S: Final = 120.0  # whoever asked for another try is told by then how it stands


@dataclass(slots=True)
class _Kept:
    """One model with what ends it."""

    keeper: Keeper
    scope: trio.CancelScope
    gone: trio.Event


class LlamaPlugin:
    """The background task of the plugin; implements `Residents` of the library.

    Args:
        context: the plugin's.
        models: of the configuration; they stay as long as the plugin runs.
        limits: what all models share.
        library: further models, which come and go.
        root: where /proc and /sys are looked for.
    """

    def __init__(
        self,
        context: PluginContext,
        models: tuple[ModelConfig, ...],
        limits: Limits,
        library: Library,
        root: Path = Path("/"),
    ) -> None:
        self._context = context
        self._library = library
        library.serve_with(self)
        machine = Machine(root)
        self.residency = Residency(machine, limits, context.clock)
        self._tools = Tools(
            context=context,
            machine=machine,
            residency=self.residency,
            figures=FiguresStore(context.state_dir),
            disk=trio.CapacityLimiter(1),
            waits=Waits(),
        )
        self._configured = dict(zip(config_ids(models), models, strict=True))
        self._kept: dict[str, _Kept] = {}
        self._wrong: dict[str, str] = {}  # entries of the library that cannot be served, and why

    @property
    def keepers(self) -> Mapping[str, Keeper]:
        """The models by id."""
        return {key: kept.keeper for key, kept in self._kept.items()}

    async def run(self) -> None:
        """Serve every model until cancelled."""
        async with trio.open_nursery() as nursery:
            for key, model in self._configured.items():
                self._start(nursery, key, model, library=False)
            nursery.start_soon(self._library.run)
            if (rpc := read_rpc(self._context.config)).offer_mib:
                nursery.start_soon(Lending(self._context, rpc).run)
            while True:
                self._adopt(nursery)
                await self._library.wait_changed()

    def _adopt(self, nursery: trio.Nursery) -> None:
        """Start what the library has got; what it lost it has withdrawn itself."""
        for entry in self._library.entries():
            if not entry.served or entry.id in self._kept or entry.id in self._configured:
                continue
            try:
                model = entry.config
            except PluginConfigError as error:
                self._wrong[entry.id] = str(error)
                continue
            self._wrong.pop(entry.id, None)
            self._start(nursery, entry.id, model, library=True)

    def _start(self, nursery: trio.Nursery, key: str, model: ModelConfig, *, library: bool) -> None:
        kind = SplitKeeper if model.split else Keeper
        keeper = kind(self._tools, model, key, library=library)
        kept = self._kept[key] = _Kept(keeper, trio.CancelScope(), trio.Event())
        nursery.start_soon(self._keep, kept)

    async def _keep(self, kept: _Kept) -> None:
        try:
            with kept.scope:
                await kept.keeper.run()
        finally:
            kept.gone.set()

    # -- for the library and for operators -------------------------------------------------------------

    async def withdraw(self, entry_id: str) -> None:
        """Announce a model no longer, let its requests finish, end its worker; see `Residents`."""
        self._wrong.pop(entry_id, None)
        kept = self._kept.get(entry_id)
        if kept is None:
            return
        try:
            await kept.keeper.retire()
        finally:
            # Whoever asked may have gone meanwhile: a model that is put back is served by another keeper.
            kept.scope.cancel()
            with trio.move_on_after(WITHDRAW_S, shield=True):
                await kept.gone.wait()
            if self._kept.get(entry_id) is kept:
                del self._kept[entry_id]

    def operations(self) -> Mapping[str, PluginOperation]:
        """What an operator can have done, by verb."""
        return {**self._library.operations(), "bench": self._bench, "retry": self._retry}

    async def _bench(
        self, arguments: Mapping[str, Value]
    ) -> AsyncGenerator[Mapping[str, Value], None]:
        """Measure the model `id`, and announce what was measured."""
        async with aclosing(self._named(arguments).bench()) as items:
            async for item in items:
                yield item  # noqa: ASYNC119  closed by its reader

    async def _retry(
        self, arguments: Mapping[str, Value]
    ) -> AsyncGenerator[Mapping[str, Value], None]:
        """End the quarantine of the model `id`: it is tried again at once."""
        keeper = self._named(arguments)
        await trio.lowlevel.checkpoint()
        if keeper.state is not State.QUARANTINED:
            raise Refused(
                f"{keeper.key} is {keeper.state}, not quarantined", code="not_quarantined"
            )
        keeper.try_again()
        yield {"stage": "loading", "id": keeper.key}  # noqa: ASYNC119  closed by its reader
        with trio.move_on_after(RETRY_S):
            await keeper.wait_tried()
        yield {"done": {"id": keeper.key, **keeper.standing()}}  # noqa: ASYNC119

    def _named(self, arguments: Mapping[str, Value]) -> Keeper:
        """The model that is meant. Raises BadRequest, Refused."""
        key = arguments.get("id")
        if not isinstance(key, str):
            raise BadRequest("give the id of a model, as `meshd model list` shows it")
        if key in self._wrong:
            raise Refused(f"{key} is not served: {self._wrong[key]}", code="unknown_model")
        kept = self._kept.get(key)
        if kept is None:
            if any(entry.id == key for entry in self._library.entries()):
                raise Refused(f"{key} is not served by itself: `meshd model list`", code="not_here")
            raise self._library.unknown(key)
        return kept.keeper

    def complaints(self) -> tuple[Complaint, ...]:
        """What an operator should know: models that are left out, and too little memory for the others."""
        found = [
            Complaint(
                f"The model {key} is left out: {kept.keeper.reason}.",
                f"Mend that; then `meshd model retry {key}`. By itself it is tried again in "
                f"{-(-kept.keeper.retry_in_s // 60)} minutes, or when its file changes.",
                is_error=True,
            )
            for key, kept in self._kept.items()
            if kept.keeper.state is State.QUARANTINED
        ]
        found += [
            Complaint(
                f"The model {key} waits for other nodes, over which it is to be split: {kept.keeper.lacking}.",
                "Start those nodes, with `plugins.llama.rpc.offer_mib` set, or name others in the model's "
                "`split`. It is loaded as soon as they are there.",
            )
            for key, kept in self._kept.items()
            if kept.keeper.lacking
        ]
        found += [
            Complaint(
                f"The model {entry_id} cannot be served: {reason}.",
                f"`meshd model remove {entry_id}`, and add it again with other options.",
                is_error=True,
            )
            for entry_id, reason in self._wrong.items()
        ]
        found += [
            Complaint(
                f"The model {entry_id} of the library is not served: {SHADOWED}.",
                "`meshd model list` shows both. `meshd model remove` means the one of the library.",
                is_error=True,
            )
            for entry_id in self._library.shadowed()
        ]
        if self.residency.thrashes():
            found.append(
                Complaint(
                    f"Models were unloaded for one another {THRASH_EVICTIONS} times within "
                    f"{THRASH_WINDOW_S / 60:.0f} minutes: most of the time goes into loading.",
                    "Serve fewer models here, smaller ones or with a smaller context; or set "
                    "`plugins.llama.residency_min_s` higher, so that requests go to other nodes instead.",
                )
            )
        return tuple(found)

    def standing(self) -> Mapping[str, Mapping[str, Value]]:
        """How each model stands, by id; see `Residents`."""
        found: dict[str, Mapping[str, Value]] = {
            key: kept.keeper.standing() for key, kept in self._kept.items()
        }
        for entry_id, reason in self._wrong.items():
            found[entry_id] = {"state": "quarantined", "reason": reason}
        return found
