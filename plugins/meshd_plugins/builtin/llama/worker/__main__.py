"""The process that holds one language model: `python -m meshd_plugins.builtin.llama.worker`.

Its configuration is one JSON argument, its model an open file whose digest the daemon has verified. It
reads the header first, and refuses the file in its hello when that is broken; llama.cpp sees only what
passed. Else it says hello when the model is loaded, warm and measured, then answers calls {"operation": "chat", "messages", "sampling"} and {"operation": "complete", "prompt",
"sampling"} with items {"text", "token_ids", "position", "seed"} and a last one {"done": {...}}.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from meshd_plugins.api import ModelFacts
from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.engine.scheduler import Engine, EngineConfig
from meshd_plugins.builtin.llama.models.adapter import AdapterMismatch
from meshd_plugins.builtin.llama.models.digest import Mark
from meshd_plugins.builtin.llama.models.facts import describe_model, facts_to_wire
from meshd_plugins.builtin.llama.models.gguf import GgufError, read_gguf
from meshd_plugins.builtin.llama.models.pooling import NoClassifier, Pooling, pooling_of
from meshd_plugins.builtin.llama.models.projector import ProjectorMismatch
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate, TemplateError
from meshd_plugins.builtin.llama.prompt.tools import tools_of
from meshd_plugins.builtin.llama.running.fit import shape_of
from meshd_plugins.builtin.llama.worker.adapters import check_adapters
from meshd_plugins.builtin.llama.worker.backend import (
    BackendConfig,
    LlamaBackend,
    ModelUnusable,
)
from meshd_plugins.builtin.llama.worker.bench import Bench, EmbeddingBench, resident_bytes
from meshd_plugins.builtin.llama.worker.devices import list_devices
from meshd_plugins.builtin.llama.worker.embed_service import Embedding
from meshd_plugins.builtin.llama.worker.embedding import EmbeddingBackend, EmbeddingLoad
from meshd_plugins.builtin.llama.worker.generation import Generation
from meshd_plugins.builtin.llama.worker.handoff import Handoff
from meshd_plugins.builtin.llama.worker.measure import measure
from meshd_plugins.builtin.llama.worker.parts import (
    EXIT_MODEL_CHANGED,
    EXIT_MODEL_UNUSABLE,
    Service,
    fail,
)
from meshd_plugins.builtin.llama.worker.projector import read_projector
from meshd_plugins.builtin.llama.worker.rpc_binding import RpcUnavailable, rpc_build
from meshd_plugins.builtin.llama.worker.rpc_socket import NoLoopback
from meshd_plugins.builtin.llama.worker.status import Status, generation_status
from meshd_plugins.workerkit import Closed, Link, Message, main


def _loading(arguments: Arguments, isolation: Message) -> BackendConfig:
    """For llama.cpp: the file is opened anew through its descriptor, never by its name."""
    return BackendConfig(
        path=f"/proc/self/fd/{arguments.file}",
        slots=arguments.slots,
        context_tokens=arguments.context_tokens,
        threads=arguments.threads,
        gpu_layers=arguments.gpu_layers,
        batch_tokens=arguments.batch_tokens,
        flash_attention=arguments.flash_attention,
        adapters=arguments.adapters,
        projector=f"/proc/self/fd/{arguments.projector.file}" if arguments.projector else "",
        parts=arguments.parts,
        isolation=isolation,
    )


def _refuse(link: Link, why: str, code: str) -> None:
    """Say that the file cannot be used, and wait for the end."""
    link.hello({"refused": why, "code": code})
    _wait_for_the_end(link)


def _wait_for_the_end(link: Link) -> None:
    while not isinstance(link.receive(None), Closed):
        pass


def _serve_embedding(
    link: Link, arguments: Arguments, facts: ModelFacts, pooling: Pooling, started_s: float
) -> None:
    """The same for a model that makes vectors or scores."""
    try:
        backend = EmbeddingBackend(EmbeddingLoad.of(arguments, pooling))
    except AdapterMismatch as error:
        _refuse(link, str(error), error.code)
        return
    except (ModelUnusable, ImportError, OSError) as error:
        fail(EXIT_MODEL_UNUSABLE, f"{type(error).__name__}: {error}")
    if Mark.of(arguments.file) != arguments.mark:
        fail(EXIT_MODEL_CHANGED, f"{arguments.path} changed after it was verified")
    measured = backend.measure()
    link.hello(
        {
            "model": facts_to_wire(facts),
            "embedding": measured.to_wire(),
            "prefill_tokens_per_s": measured.tokens_per_s,
            "step_s": backend.step_tokens / max(measured.tokens_per_s, 0.1),
            "load_s": time.monotonic() - started_s,
            "context_tokens": backend.text_tokens,
            "threads": backend.threads,
            "build": backend.build,
            "system": backend.system,
            "resident_bytes": resident_bytes(),
        }
    )
    embedding = Embedding(link, backend, pooling, measured.tokens_per_s)
    parts = (
        embedding,
        Status(link, embedding.status),
        EmbeddingBench(link, backend, embedding),
    )
    Service(link, parts, arguments.file, arguments.mark).run()


def serve(link: Link) -> None:
    """Load, measure, say hello, and work."""
    started_s = time.monotonic()
    arguments = Arguments.from_text(sys.argv[1])
    try:
        header = read_gguf(arguments.file)
    except GgufError as error:
        _refuse(link, str(error), error.code)
        return
    try:
        pooling = pooling_of(header, wanted=arguments.embeddings, override=arguments.pooling)
        check_adapters(header, arguments.adapters)
        projector = read_projector(header, arguments.projector, pooling)
    except (NoClassifier, AdapterMismatch, ProjectorMismatch) as error:
        _refuse(link, str(error), error.code)
        return
    facts = describe_model(
        header, Path(arguments.path), arguments.digest, arguments.family, pooling or "", projector
    )
    if arguments.inspect:
        shape = shape_of(header, vectors=pooling is not None, projector=projector).to_wire()
        devices = list_devices() if arguments.gpu_layers else []
        link.hello(
            {
                "model": facts_to_wire(facts),
                "shape": shape,
                "devices": devices,
                "rpc_build": rpc_build(),
            }
        )
        _wait_for_the_end(link)
        return
    if pooling is not None and arguments.parts:
        _refuse(link, "a model that makes vectors cannot be split", "not_split")
        return
    if pooling is not None:
        _serve_embedding(link, arguments, facts, pooling, started_s)
        return
    try:
        backend = LlamaBackend(_loading(arguments, link.isolation))
    except AdapterMismatch as error:
        _refuse(link, str(error), error.code)
        return
    except (NoLoopback, RpcUnavailable) as error:
        _refuse(link, str(error), "not_split")
        return
    except (ModelUnusable, ImportError, OSError) as error:
        fail(EXIT_MODEL_UNUSABLE, f"{type(error).__name__}: {error}")
    if Mark.of(arguments.file) != arguments.mark:
        fail(EXIT_MODEL_CHANGED, f"{arguments.path} changed after it was verified")
    if (beside := arguments.projector) is not None and Mark.of(beside.file) != beside.mark:
        fail(EXIT_MODEL_CHANGED, f"{beside.path} changed after it was verified")
    measured = measure(backend, arguments.slots)
    template, template_error = None, ""
    if source := backend.chat_template:
        try:
            template = ChatTemplate(source, backend.vocabulary.special_tokens)
        except TemplateError as error:
            template_error = str(error)
    chunk = min(arguments.chunk_tokens, backend.batch_tokens - arguments.slots)
    sizes = EngineConfig(
        slots=arguments.slots,
        context_tokens=backend.context_tokens,
        chunk_tokens=max(chunk, 1),
        kept_bytes_max=arguments.kept_bytes_max,
    )
    engine = Engine(backend, sizes)
    generation = Generation(link, backend, engine, template, measured, chunk)
    shared = map(generation.shared_tokens, arguments.shared_prompts)
    engine.pinned = tuple(tokens for tokens in shared if tokens)
    link.hello(
        {
            "model": facts_to_wire(facts),
            "prefill_tokens_per_s": measured.prefill_tokens_per_s,
            "decode_tokens_per_s": measured.decode_tokens_per_s,
            "decode_tokens_per_s_by_batch": {
                str(size): rate for size, rate in measured.by_batch.items()
            },
            "load_s": time.monotonic() - started_s,
            "context_tokens": backend.context_tokens,
            "chunk_tokens": engine.chunk_tokens,
            "step_s": backend.batch_tokens / max(measured.prefill_tokens_per_s, 0.1),
            "threads": backend.threads,
            "build": backend.build,
            "kv_bytes_per_token": backend.layout.bytes_per_token if backend.layout else 0,
            "system": backend.system,
            "chat": template is not None,
            "chat_template_error": template_error,
            "tools": tools_of(template),
            "modalities": backend.modalities,
            "resident_bytes": resident_bytes(),
        }
    )
    held_max = backend.context_tokens * arguments.slots
    parts = (
        generation,
        Status(link, partial(generation_status, engine, generation.pace, held_max)),
        Bench(link, backend, engine),
        Handoff(link, backend, engine),
    )
    Service(link, parts, arguments.file, arguments.mark).run()


if __name__ == "__main__":
    main(serve)
