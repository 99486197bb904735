"""The process that holds one language model: `python -m meshd_plugins.builtin.llama.worker`.

Its configuration is one JSON argument, its model an open file whose digest the daemon has verified. It
reads the header first, and refuses the file in its hello when that is broken; llama.cpp sees only what
passed. Else it says hello when the model is loaded, warm and measured, then answers calls {"operation": "chat", "messages", "sampling"} and {"operation": "complete", "prompt",
"sampling"} with items {"text", "token_ids", "position", "seed"} and a last one {"done": {...}}.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.engine.scheduler import Engine, EngineConfig
from meshd_plugins.builtin.llama.models.digest import Mark
from meshd_plugins.builtin.llama.models.facts import describe_model, facts_to_wire
from meshd_plugins.builtin.llama.models.gguf import GgufError, read_gguf
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate, TemplateError
from meshd_plugins.builtin.llama.worker.backend import (
    BATCH_TOKENS_MAX,
    BackendConfig,
    LlamaBackend,
    ModelUnusable,
)
from meshd_plugins.builtin.llama.worker.measure import measure
from meshd_plugins.builtin.llama.worker.service import (
    EXIT_MODEL_CHANGED,
    EXIT_MODEL_UNUSABLE,
    Service,
    fail,
)
from meshd_plugins.workerkit import Closed, Link, main


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _loading(arguments: Arguments) -> BackendConfig:
    """For llama.cpp: the file is opened anew through its descriptor, never by its name."""
    return BackendConfig(
        path=f"/proc/self/fd/{arguments.file}",
        slots=arguments.slots,
        context_tokens=arguments.context_tokens,
        threads=arguments.threads,
        gpu_layers=arguments.gpu_layers,
    )


def serve(link: Link) -> None:
    """Load, measure, say hello, and work."""
    started_s = time.monotonic()
    arguments = Arguments.from_text(sys.argv[1])
    try:
        header = read_gguf(arguments.file)
    except GgufError as error:
        link.hello({"refused": str(error), "code": error.code})
        while not isinstance(link.receive(None), Closed):
            pass
        return
    facts = describe_model(header, Path(arguments.path), arguments.digest, arguments.family)
    try:
        backend = LlamaBackend(_loading(arguments))
    except (ModelUnusable, ImportError, OSError) as error:
        fail(EXIT_MODEL_UNUSABLE, f"{type(error).__name__}: {error}")
    if Mark.of(arguments.file) != arguments.mark:
        fail(EXIT_MODEL_CHANGED, f"{arguments.path} changed after it was verified")
    measured = measure(backend, arguments.slots)
    template, template_error = None, ""
    if source := backend.chat_template:
        try:
            template = ChatTemplate(source, backend.vocabulary.special_tokens)
        except TemplateError as error:
            template_error = str(error)
    # A batch must hold a token of every slot beside the chunk.
    chunk = min(measured.chunk_tokens, BATCH_TOKENS_MAX - arguments.slots)
    sizes = EngineConfig(
        slots=arguments.slots, context_tokens=backend.context_tokens, chunk_tokens=chunk
    )
    engine = Engine(backend, sizes)
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
            "chunk_tokens": chunk,
            "threads": backend.threads,
            "build": backend.build,
            "system": backend.system,
            "chat": template is not None,
            "chat_template_error": template_error,
            "resident_bytes": _resident_bytes(),
        }
    )
    Service(arguments, link, backend, engine, template).run()


if __name__ == "__main__":
    main(serve)
