"""A device with models of which only the sizes are real: files of a few bytes, and workers that answer at once."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshd_plugins.api import Failed, Operation, Request, Value, Worker, WorkerSpec
from meshd_plugins.builtin.llama.config import Limits, ModelConfig
from meshd_plugins.builtin.llama.running.figures import FiguresStore
from meshd_plugins.builtin.llama.running.fit import MIB, Shape
from meshd_plugins.builtin.llama.running.hardware import Machine
from meshd_plugins.builtin.llama.running.keeping import Tools
from meshd_plugins.builtin.llama.running.lifecycle import Keeper
from meshd_plugins.builtin.llama.running.residency import Residency
from meshd_plugins.builtin.llama.running.restarts import Waits
from meshd_plugins.testing import FakeCapabilities, FakeLogger, FakeWorker, fake_context

DEADLINE_S = 30
RESERVE_MIB = 1


def shape(weights_mib: int) -> Shape:
    """A model that takes little more than its weights."""
    return Shape(
        weights_bytes=weights_mib * MIB,
        block_bytes=weights_mib * MIB,
        layers=1,
        kv_row_bytes=1,
        state_bytes=0,
        embedding=1,
        feed_forward=1,
        heads=1,
        vocabulary=1,
        context_tokens=512,
    )


class Device(AbstractAsyncContextManager["Device"]):
    """Implements `Supervisor`; the memory it has is what its meminfo says, whatever runs."""

    def __init__(
        self,
        folder: Path,
        memory_mib: int,
        limits: Limits | None = None,
        waits: Waits | None = None,
    ) -> None:
        self.folder = folder
        self.memory_mib = memory_mib
        self.capabilities = FakeCapabilities()
        self.log = FakeLogger()
        self.now_s = 1000.0
        self.sizes: dict[str, int] = {}
        self.running: dict[str, FakeWorker] = {}
        self.started: list[str] = []  # models, in the order of their loads
        self.refusals: dict[str, Mapping[str, Value]] = {}  # hellos that say no, by model
        self.crashing: set[str] = set()  # models whose workers die before their hello
        self.gate = trio.Event()  # loads wait for it
        self.gate.set()
        self.calls: list[Mapping[str, Value]] = []
        self.answers: dict[str, list[Mapping[str, Value]]] = {}  # by operation
        self._write_meminfo()
        context = fake_context(
            "llama",
            folder,
            capabilities=self.capabilities,
            supervisor=self,
            log=self.log,
            clock=lambda: self.now_s,
        )
        machine = Machine(folder, frozenset({0}))
        self.residency = Residency(
            machine, limits or Limits(reserve_mib=RESERVE_MIB), context.clock
        )
        self.tools = Tools(
            context,
            machine,
            self.residency,
            FiguresStore(folder),
            trio.CapacityLimiter(1),
            waits or Waits(),
        )

    def _write_meminfo(self) -> None:
        """All of it is available: what the workers take are mapped files, but for little."""
        (self.folder / "proc").mkdir(exist_ok=True)
        kib = self.memory_mib * 1024
        (self.folder / "proc/meminfo").write_text(f"MemTotal: {kib} kB\nMemAvailable: {kib} kB\n")

    def model(self, name: str, weights_mib: int, **options: object) -> Keeper:
        """A model with a file of its own."""
        path = self.folder / f"{name}.gguf"
        path.write_text(name)
        self.sizes[name] = weights_mib
        model = ModelConfig(
            path=str(path),
            names=(f"knowledge.gpt/{name}",),
            **{"prefix_cache_mib": 0, **options},  # type: ignore[arg-type]
        )
        return Keeper(self.tools, model, name)

    def worker(self, spec: WorkerSpec) -> AbstractAsyncContextManager[Worker]:
        return self._worker(spec)

    @asynccontextmanager
    async def _worker(self, spec: WorkerSpec) -> AsyncGenerator[Worker, None]:
        name = spec.name.removeprefix("llama:")
        arguments = json.loads(spec.argv[-1])
        await trio.lowlevel.checkpoint()
        if arguments["inspect"]:
            hello = self.refusals.get(name) or {
                "model": facts(name),
                "shape": shape(self.sizes[name]).to_wire(),
                "devices": [],
            }
            yield FakeWorker(spec, self._answer, hello)
            return
        await self.gate.wait()
        self.started.append(name)
        if name in self.crashing:
            raise Failed(f"worker {name} died: killed by SIGKILL", code="worker_died")
        worker = FakeWorker(spec, self._answer, hello_of(name))
        self.running[name] = worker
        try:
            yield worker
        finally:
            if self.running.get(name) is worker:
                del self.running[name]

    def _answer(self, message: Mapping[str, Value]) -> list[Mapping[str, Value]]:
        self.calls.append(message)
        if (answer := self.answers.get(str(message["operation"]))) is not None:
            return answer
        done: Mapping[str, Value] = {"finish_reason": "stop", "completion_tokens": 1}
        return [{"text": "yes", "token_ids": [1], "position": 0}, {"done": done}]

    async def __aexit__(self, *_: object) -> None:
        pass


def facts(name: str) -> dict[str, Value]:
    """What a header says."""
    texts = ("architecture", "quantisation", "licence", "chat_template_digest", "pooling")
    return {
        **dict.fromkeys(texts, ""),
        "family": name,
        "parameters": 1,
        "context_tokens": 512,
        "size_bytes": 1,
        "modalities": ["text"],
    }


def hello_of(name: str, **changes: Value) -> dict[str, Value]:
    """What a worker says when it is ready."""
    return {
        "model": facts(name),
        "prefill_tokens_per_s": 100.0,
        "decode_tokens_per_s": 10.0,
        "decode_tokens_per_s_by_batch": {"1": 10.0},
        "load_s": 2.0,
        "context_tokens": 512,
        "build": "1",
        "chat": True,
        "resident_bytes": 1,
        **changes,
    }


@dataclass
class Asked:
    """Requests that use a model until they are told to end."""

    keeper: Keeper
    end: trio.Event = field(default_factory=trio.Event)
    begun: trio.Event = field(default_factory=trio.Event)

    async def run(self, deadline_s: float = 60.0) -> None:
        async with self.keeper.use(deadline_s):
            self.begun.set()
            await self.end.wait()


def request(name: str, deadline_s: float = 60.0) -> Request:
    messages: Value = [{"role": "user", "content": "?"}]
    return Request("r", name, Operation.CHAT, {"messages": messages}, deadline_s=deadline_s)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(DEADLINE_S):
            await body()

    trio.run(bounded)
