"""The adopting plugin beside a server on loopback, and questions to what it announces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from tests.shell.support_adopt_servers import FakeServer, running

from meshd_plugins.api import Capability, Chunk, Done, Event, Operation, Request, Value
from meshd_plugins.builtin.adopt.capability import AdoptedCapability
from meshd_plugins.builtin.adopt.client import Client
from meshd_plugins.builtin.adopt.config import Kind, ServerConfig, read_settings
from meshd_plugins.builtin.adopt.keeper import Keeper
from meshd_plugins.builtin.adopt.models import ServedModel, describe
from meshd_plugins.builtin.adopt.served import Served, Traffic
from meshd_plugins.testing import FakeCapabilities, FakeLogger, fake_context, make_request

WAIT_S = 10.0


class WatchedCapabilities(FakeCapabilities):
    """A registry that one can wait on."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = trio.Event()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def add(self, capability: Capability) -> None:
        super().add(capability)
        self._tell()

    def replace(self, capability: Capability) -> None:
        super().replace(capability)
        self._tell()

    def remove(self, capability_id: str) -> None:
        super().remove(capability_id)
        self._tell()

    @property
    def families(self) -> list[str]:
        """What is announced, by name and family."""
        return sorted(
            f"{each.descriptor.name} {each.descriptor.model.family}"
            for each in self.added
            if each.descriptor.model
        )

    async def until(self, done: Callable[[], bool]) -> None:
        with trio.fail_after(WAIT_S):
            while not done():
                await self._changed.wait()


@dataclass
class Adopted:
    """A server under a keeper's eyes."""

    keeper: Keeper
    capabilities: WatchedCapabilities
    log: FakeLogger

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until it is so after a look at the server."""
        with trio.fail_after(WAIT_S):
            while not done():
                await self.keeper.wait_looked()

    async def looks(self, count: int) -> None:
        for _ in range(count):
            await self.keeper.wait_looked()

    def only(self) -> Capability:
        [capability] = self.capabilities.added
        return capability


def server_config(url: str, **settings: Value) -> ServerConfig:
    entry: dict[str, Value] = {"url": url, "poll_s": 0.05, "measure": False, **settings}
    [server] = read_settings({"servers": [entry]}).servers
    return server


@asynccontextmanager
async def keeping(
    url: str, folder: Path, *, is_expected: bool = True, **settings: Value
) -> AsyncGenerator[Adopted]:
    """Watch a server while the block runs."""
    capabilities, log = WatchedCapabilities(), FakeLogger()
    context = fake_context("adopt", folder, capabilities=capabilities, log=log)
    keeper = Keeper(context, server_config(url, **settings), is_expected=is_expected)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        yield Adopted(keeper, capabilities, log)
        nursery.cancel_scope.cancel()
    assert not capabilities.added


def capability_at(url: str, **settings: Value) -> AdoptedCapability:
    """A model of a server that nobody watches."""
    config = server_config(url, **settings)
    [descriptor] = describe(ServedModel("m"), Kind.VLLM, config, 4, None)
    served = Served(
        client=Client(config.url),
        kind=Kind.VLLM,
        config=config,
        model="m",
        traffic=Traffic(),
        troubled=lambda: None,
        gone=lambda _model: None,
    )
    return AdoptedCapability(descriptor, served)


@asynccontextmanager
async def adopting(
    server: FakeServer, folder: Path, *, count: int = 1, **settings: Value
) -> AsyncGenerator[Adopted]:
    """Run a server and watch it until so many capabilities are announced."""
    async with running(server), keeping(server.url, folder, **settings) as adopted:
        await adopted.capabilities.until(lambda: len(adopted.capabilities.added) >= count)
        yield adopted


# -- asking ------------------------------------------------------------------------------------------------

MESSAGES: Value = [{"role": "user", "content": "Hi"}]
CHAT = make_request(Operation.CHAT, {"messages": MESSAGES, "max_tokens": 20, "temperature": 0.5})
COMPLETE = make_request(Operation.COMPLETE, {"prompt": "1 2", "max_tokens": 20, "top_k": 3})


async def ask(
    capability: Capability, request: Request = CHAT, wait_s: float = WAIT_S
) -> list[Event]:
    with trio.fail_after(wait_s):
        async with aclosing(capability.invoke(request)) as events:
            return [event async for event in events]


def done_of(events: list[Event]) -> Done:
    done = events[-1]
    assert isinstance(done, Done)
    return done


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))
