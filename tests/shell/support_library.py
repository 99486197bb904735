"""A library of models that runs, with what is around it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from tests.shell.support_supervisor import RecordingLog

from meshd.shell.supervisor import ProcessSupervisor
from meshd_plugins.api import CapabilityError, PluginContext, Value
from meshd_plugins.builtin.llama.fetch.download import DownloadLimits
from meshd_plugins.builtin.llama.models.bringing import Bringer
from meshd_plugins.builtin.llama.models.library import Library
from meshd_plugins.testing import FakeCapabilities

T = TypeVar("T")


@dataclass
class FakeResidents:
    """Serves nothing, and remembers what it was asked to let go of."""

    library: Library
    withdrawn: list[str] = field(default_factory=list)
    listed_then: list[str] = field(default_factory=list)
    holding: trio.Event | None = None

    async def withdraw(self, entry_id: str) -> None:
        self.withdrawn.append(entry_id)
        self.listed_then = [entry.id for entry in self.library.entries()]
        if self.holding is not None:
            await self.holding.wait()

    def standing(self) -> Mapping[str, Mapping[str, Value]]:
        return {
            entry.id: {"state": "cold", "reason": ""}
            for entry in self.library.entries()
            if entry.served
        }


@dataclass
class Shelf:
    """A library that runs, with what is around it."""

    library: Library
    residents: FakeResidents
    log: RecordingLog
    state: Path
    items: list[Mapping[str, Value]] = field(default_factory=list)

    async def do(self, verb: str, **arguments: Value) -> Any:
        """Carry an operation out; what it says at last."""
        operation = self.library.operations()[verb]
        with trio.fail_after(60):
            async with aclosing(operation(arguments)) as items:
                async for item in items:
                    self.items.append(item)
        return self.items[-1]["done"]

    async def refused(self, verb: str, code: str, **arguments: Value) -> str:
        """The message of an operation that is refused with that code."""
        with pytest.raises(CapabilityError) as raised:
            await self.do(verb, **arguments)
        assert raised.value.code == code, raised.value.message
        return raised.value.message

    async def rows(self) -> dict[str, Any]:
        done = await self.do("list")
        return {row["id"]: row for row in done["models"]}

    @property
    def files(self) -> list[str]:
        """What lies in the folder, transfers too."""
        folder = self.state / "models"
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@asynccontextmanager
async def shelf(state: Path, **config: Value) -> AsyncGenerator[Shelf, None]:
    log = RecordingLog()
    supervisor = ProcessSupervisor(log, hidden=(state.parent,))
    context = PluginContext(
        name="llama",
        config=config,
        state_dir=state,
        capabilities=FakeCapabilities(),
        supervisor=supervisor,
        log=log,
        clock=trio.current_time,
    )
    limits = DownloadLimits(0, backoff_first_s=0.001, backoff_max_s=0.002, sync_s=0.0)
    library = Library(context, Bringer(supervisor, limits))
    residents = FakeResidents(library)
    library.serve_with(residents)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(library.run)
        with trio.fail_after(10):
            await library.wait_changed()
        yield Shelf(library, residents, log, state)
        nursery.cancel_scope.cancel()


def run(body: Callable[..., Awaitable[T]], *arguments: object) -> T:
    async def bounded() -> T:
        with trio.fail_after(120):
            return await body(*arguments)

    return trio.run(bounded)


def state_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder, and no proxy on the way to loopback."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"
