"""Where requests wait for a model to be loaded, and are counted while they use it.

What is true: all requests that wait, wait for the same load, and end with it; a model with somebody inside is
never taken for idle; whoever measures a model is alone with it, and requests that come meanwhile wait.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshd_plugins.api import CapabilityError, Failed, Refused, Worker

WAITING_MAX: Final = 256  # requests that wait for one load


class _Load:
    """A load that requests wait for: it ends with a worker or an error."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: CapabilityError | None = None


class Door:
    """The way to the worker of one model.

    Args:
        clock: monotonic seconds.
        left: told when the last one has left.
    """

    def __init__(self, clock: Callable[[], float], left: Callable[[], None]) -> None:
        self._clock = clock
        self._left = left
        self._load = _Load()
        self._alone: trio.Event | None = None  # set when whoever is alone has ended
        self.worker: Worker | None = None
        self.open_calls = 0
        self.used_s = 0.0  # when somebody came or left last
        self.wanted = trio.Event()
        """Somebody waits for a load, or asked for one."""

    def open(self, worker: Worker) -> None:
        """The model is in memory: let in who waits."""
        self.worker = worker
        self.used_s = self._clock()
        self._end(None)

    def close(self) -> None:
        """The model is to go, or has gone: who comes from now on waits for the next load."""
        self.worker = None

    def refuse(self, error: CapabilityError) -> None:
        """The load that is waited for will not be."""
        self._end(error)

    def _end(self, error: CapabilityError | None) -> None:
        load, self._load, self.wanted = self._load, _Load(), trio.Event()
        load.error = error
        load.done.set()

    @asynccontextmanager
    async def use(
        self, label: str, deadline_s: float, load_s: float
    ) -> AsyncGenerator[Worker, None]:
        """The worker, loaded if need be; while the context lasts the model counts as used.

        Raises:
            Refused: `busy`: too many wait, or there was no room; `starting`: loading takes longer than
                `deadline_s`. It goes on then.
            Failed: it died while it was being loaded.
        """
        self.open_calls += 1
        try:
            while self._alone is not None:
                await self._alone.wait()
            yield self.worker or await self._loaded(label, deadline_s, load_s)
        finally:
            self._leave()

    @asynccontextmanager
    async def alone(self, label: str) -> AsyncGenerator[Worker, None]:
        """The same, with nobody else inside. Raises Refused(busy): somebody is."""
        if self.open_calls:
            raise Refused(
                f"{label} answers requests ({self.open_calls}); it is measured when it is idle",
                code="busy",
            )
        over = self._alone = trio.Event()
        self.open_calls += 1
        try:
            yield self.worker or await self._loaded(label, float("inf"), 0.0)
        finally:
            self._alone = None
            over.set()
            self._leave()

    def _leave(self) -> None:
        self.open_calls -= 1
        self.used_s = self._clock()
        if not self.open_calls:
            self._left()

    async def _loaded(self, label: str, deadline_s: float, load_s: float) -> Worker:
        if self.open_calls > WAITING_MAX:
            raise Refused(
                f"{self.open_calls - 1} requests wait for {label} to be loaded", code="busy"
            )
        load = self._load
        self.wanted.set()
        if load_s > deadline_s:
            raise Refused(
                f"{label} is being loaded, which takes {load_s:.0f} s, and the request has "
                f"{deadline_s:.0f} s left",
                code="starting",
            )
        await load.done.wait()
        if load.error is not None:
            raise type(load.error)(load.error.message, code=load.error.code)
        if self.worker is None:
            raise Failed(f"{label}: its worker died at once", code="worker_died")
        return self.worker
