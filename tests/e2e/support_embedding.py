"""The real worker process of an embedding model, and the capability over it."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tests.shell.support_supervisor import RecordingLog

from meshd.shell.supervisor import ProcessSupervisor
from meshd_plugins.api import (
    Chunk,
    Descriptor,
    Done,
    Operation,
    Privacy,
    Request,
    Value,
    Worker,
    WorkerSpec,
)
from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.models.digest import open_verified
from meshd_plugins.builtin.llama.models.facts import facts_from_wire
from meshd_plugins.builtin.llama.running.launch import WORKER_ENVIRONMENT
from meshd_plugins.builtin.llama.serving.embedding import (
    EmbeddingCapability,
    EmbeddingHello,
    describe_embedding,
)
from meshd_plugins.vectors import Rows, to_floats

Array = npt.NDArray[np.float32]
NAME = "computation.gpt/embed"


@dataclass
class Embedder:
    """A running worker, as what a capability gets its workers from."""

    worker: Worker
    digest: str
    pid: int

    @asynccontextmanager
    async def use(self, deadline_s: float) -> AsyncGenerator[Worker, None]:
        assert deadline_s > 0
        yield self.worker

    @property
    def descriptor(self) -> Descriptor:
        facts = facts_from_wire(self.worker.hello.get("model"), self.digest)
        hello = EmbeddingHello.read(self.worker.hello)
        assert hello is not None
        [descriptor] = describe_embedding([NAME], 0, Privacy.MESH, facts, hello)
        return descriptor

    @property
    def capability(self) -> EmbeddingCapability:
        return EmbeddingCapability(self.descriptor, self)

    async def embed(self, texts: Sequence[str], **options: Value) -> Answer:
        return await self.answer(Operation.EMBED, {"input": list(texts), **options}, len(texts))

    async def rank(self, query: str, documents: Sequence[str], **options: Value) -> Answer:
        body = {"query": query, "documents": list(documents), **options}
        return await self.answer(Operation.RERANK, body, len(documents))

    async def answer(self, operation: Operation, body: Mapping[str, Value], count: int) -> Answer:
        """Ask, and check what comes as a stranger's answer is checked."""
        rows, done = Rows(count), None
        request = Request(request_id="r1", name=NAME, operation=operation, body=body)
        async with aclosing(self.capability.invoke(request)) as events:
            async for event in events:
                assert done is None, "nothing comes after Done"
                if isinstance(event, Chunk):
                    rows.add(event.position, event.data, event.content_type)
                else:
                    done = event
        assert done is not None
        found = [np.array(to_floats(row)) for row in rows.finish(done.detail)]
        return Answer(np.stack(found), done)


@dataclass
class Answer:
    """All rows, and the end."""

    rows: Array
    done: Done


@asynccontextmanager
async def embedding(
    path: Path,
    state: Path,
    *,
    context_tokens: int = 2048,
    wanted: bool = False,
    pooling: str = "",
) -> AsyncGenerator[Embedder, None]:
    """Start a worker on a model file."""
    file = open_verified(path, state, "")
    arguments = Arguments(
        file=file.descriptor,
        path=str(path),
        mark=file.mark,
        digest=file.digest,
        family="",
        slots=1,
        context_tokens=context_tokens,
        threads=2,
        gpu_layers=0,
        embeddings=wanted,
        pooling=pooling,
    )
    module = "meshd_plugins.builtin.llama.worker"
    spec = WorkerSpec(
        name="embedding",
        argv=(sys.executable, "-P", "-m", module, arguments.to_text()),
        environment=WORKER_ENVIRONMENT,
        files=(file.descriptor,),
    )
    supervisor = ProcessSupervisor(RecordingLog())
    try:
        async with supervisor.worker(spec) as worker:
            [status] = supervisor.statistics()
            yield Embedder(worker, file.digest, status.pid)
    finally:
        file.close()
