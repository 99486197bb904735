"""A plugin for `bench_media`: how long the event loop of its daemon was held, step by step; and a model that sees.

`computation.gpt/gaps` tells the longest steps since it was asked last. A step is what one task does until it lets the
others go on. Its time is that of the thread's own processor time: what other processes of the machine take is not in
it. With `worker = true` there is the llama plugin's capability too, with all that it does to a request, before a worker
process that looks at nothing.
"""

from __future__ import annotations

import heapq
import json
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import CoroutineType
from typing import Any

import trio

from meshd_plugins.api import (
    BackgroundTask,
    Chunk,
    Descriptor,
    Done,
    Event,
    ModelFacts,
    Operation,
    PluginContext,
    Refused,
    Request,
    Supervisor,
    Worker,
    WorkerSpec,
)
from meshd_plugins.builtin.llama.serving.capability import LlamaCapability
from meshd_plugins.hookspecs import hookimpl
from meshd_plugins.workerkit import Call, Closed, Link, main

GAPS = "computation.gpt/gaps"
SEES = "knowledge.gpt/general"
STEPS_KEPT = 12
WORTH_NS = 200_000

_FACTS = ModelFacts("ab" * 32, "Seer", "none", 1, "", 8192, 1, modalities=("text", "image"))


class Gaps(trio.abc.Instrument):
    """The longest steps of all tasks."""

    def __init__(self) -> None:
        self._began_ns = 0
        self._steps: list[tuple[int, str]] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began_ns = time.thread_time_ns()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took_ns = time.thread_time_ns() - self._began_ns
        if took_ns < WORTH_NS:
            return
        heapq.heappush(self._steps, (took_ns, _place(task)))
        if len(self._steps) > STEPS_KEPT:
            heapq.heappop(self._steps)

    def taken(self) -> list[tuple[float, str]]:
        """Milliseconds and where the step ended, the longest first; they are forgotten here."""
        steps, self._steps = self._steps, []
        return [(took_ns / 1e6, place) for took_ns, place in sorted(steps, reverse=True)]


def _place(task: trio.lowlevel.Task) -> str:
    """The innermost function of ours that the task is in."""
    found, inner = task.name.rpartition(".")[2], task.coro
    while isinstance(inner, CoroutineType):
        code: Any = inner.cr_code
        if "/meshd" in code.co_filename:
            found = code.co_qualname
        awaited: Any = inner.cr_await
        inner = awaited
    return found


class GapsCapability:
    """Tells them."""

    descriptor = Descriptor(
        name=GAPS, operations=(Operation.RUN,), summary="The longest steps", slots=1
    )

    def __init__(self) -> None:
        self._gaps = Gaps()
        trio.lowlevel.add_instrument(self._gaps)

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """One chunk of JSON."""
        await trio.lowlevel.checkpoint()
        yield Chunk(text=json.dumps(self._gaps.taken()))
        yield Done()


class Seer:
    """Implements `Served`: a model whose worker process says one word."""

    prefixes = None

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._worker: Worker | None = None

    @asynccontextmanager
    async def use(self, deadline_s: float) -> AsyncGenerator[Worker, None]:
        """Its worker."""
        if self._worker is None:
            raise Refused("the worker is not up", code="starting")
        yield self._worker

    async def run(self) -> None:
        """Keep it."""
        source = Path(__file__).parents[2]
        roots = [str(source), *(path for path in sys.path if path.startswith(str(source)))]
        spec = WorkerSpec(
            "seer",
            (sys.executable, "-m", __name__),
            environment={"PYTHONPATH": ":".join(roots)},
            read_paths=(source,),
        )
        async with self._supervisor.worker(spec) as self._worker:
            await self._worker.wait_died()


_SEERS: dict[str, Seer] = {}


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Measure from now on."""
    context.capabilities.add(GapsCapability())
    if context.config.get("worker"):
        seer = _SEERS[context.name] = Seer(context.supervisor)
        sees = Descriptor(
            name=SEES, operations=(Operation.CHAT,), summary="Sees", slots=4, model=_FACTS
        )
        context.capabilities.add(LlamaCapability(sees, seer))


@hookimpl
def meshd_background(context: PluginContext) -> BackgroundTask | None:
    """Its worker, where it has one."""
    seer = _SEERS.get(context.name)
    return seer.run if seer is not None else None


def _serve(link: Link) -> None:
    link.hello({})
    while not isinstance(incoming := link.receive(0.5), Closed):
        if isinstance(incoming, Call):
            link.item(incoming.id, {"text": "seen"})
            link.item(incoming.id, {"done": {"finish_reason": "stop"}})
            link.end(incoming.id)
            link.flush()
        link.heartbeat()


if __name__ == "__main__":
    main(_serve)
