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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, assert_never

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.backend import (
    BATCH_TOKENS_MAX,
    BackendConfig,
    LlamaBackend,
    ModelUnusable,
)
from meshd_plugins.builtin.llama.digest import Mark
from meshd_plugins.builtin.llama.engine import (
    Broken,
    Engine,
    EngineConfig,
    EngineFull,
    Finished,
    Job,
    Output,
    Row,
    Text,
)
from meshd_plugins.builtin.llama.facts import describe_model, facts_to_wire
from meshd_plugins.builtin.llama.gguf import GgufError, read_gguf
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.special import MessageCutter, pieces
from meshd_plugins.builtin.llama.template import ChatTemplate, TemplateError
from meshd_plugins.workerkit import Call, Cancel, Closed, Incoming, Link, main

EXIT_MODEL_UNUSABLE: Final = 4
EXIT_MODEL_CHANGED: Final = 5
CHUNK_S: Final = 0.4  # how long a prefill chunk may hold up the sequences that generate
CHUNK_TOKENS_MIN: Final = 16
CHUNK_TOKENS_MAX: Final = 128
MEASURE_PREFILL_TOKENS: Final = 64
MEASURE_DECODE_TOKENS: Final = 24
MEASURE_S: Final = 0.3  # the decode measurement ends here at the latest
IDLE_WAIT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates of this model on this device."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    by_batch: Mapping[int, float]

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens that take about `CHUNK_S`."""
        return max(
            CHUNK_TOKENS_MIN, min(CHUNK_TOKENS_MAX, int(self.prefill_tokens_per_s * CHUNK_S))
        )


class BadCall(Exception):
    """The caller's fault; becomes an error of kind bad_request."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def measure(backend: LlamaBackend, slots: int) -> Measured:
    """Warm up (the first batch reads the model from disk) and time short runs."""
    greedy = Sampling(seed=0, temperature=0.0, repeat_penalty=1.0)
    started_s = time.monotonic()
    backend.decode([Row(position, position, 0, output=position == 7) for position in range(8)])
    slow = time.monotonic() - started_s > 1.0
    tokens = 8 if slow else MEASURE_PREFILL_TOKENS
    for slot in range(slots):
        backend.forget(slot)
    started_s = time.monotonic()
    backend.decode([Row(100 + n, n, 0, output=n == tokens - 1) for n in range(tokens)])
    sampler = backend.new_sampler(greedy)
    token = backend.sample(sampler, tokens - 1)  # waits for the result
    prefill = tokens / (time.monotonic() - started_s)
    by_batch = {1: _decode_rate(backend, sampler, token, tokens, (0,))}
    if slots > 1:
        for slot in range(1, slots):
            backend.decode([Row(100 + n, n, slot, output=n == 7) for n in range(8)])
        backend.forget(0)
        backend.decode([Row(100 + n, n, 0, output=n == 7) for n in range(8)])
        by_batch[slots] = _decode_rate(backend, sampler, token, 8, tuple(range(slots)))
    backend.free_sampler(sampler)
    for slot in range(slots):
        backend.forget(slot)
    return Measured(prefill, by_batch[1], by_batch)


def _decode_rate(
    backend: LlamaBackend, sampler: Any, token: int, position: int, slots: tuple[int, ...]
) -> float:
    """Tokens a second over all slots, generating from there on."""
    started_s = time.monotonic()
    steps = 0
    while steps < MEASURE_DECODE_TOKENS and (steps < 2 or time.monotonic() - started_s < MEASURE_S):
        backend.decode([Row(token, position + steps, slot, output=True) for slot in slots])
        for row in range(len(slots)):
            token = backend.sample(sampler, row)
        steps += 1
    return steps * len(slots) / (time.monotonic() - started_s)


@dataclass(slots=True)
class _Timing:
    """When things happened to one call."""

    seed: int
    received_s: float
    first_s: float | None = None


class Service:
    """Calls in, items out: the engine's jobs are the link's calls."""

    def __init__(
        self,
        arguments: Arguments,
        link: Link,
        backend: LlamaBackend,
        engine: Engine[Any],
        template: ChatTemplate | None,
    ) -> None:
        self._arguments = arguments
        self._cutter = MessageCutter(backend.control_tokens())
        self._link = link
        self._backend = backend
        self._engine = engine
        self._template = template
        self._timings: dict[int, _Timing] = {}

    def run(self) -> None:
        """Serve until the daemon closes the link."""
        while True:
            incoming = self._link.receive(0.0 if self._engine.busy else IDLE_WAIT_S)
            while incoming is not None:
                if isinstance(incoming, Closed):
                    return
                self._take(incoming)
                incoming = self._link.receive(0.0)
            for output in self._engine.step():
                self._give(output)
            self._link.flush()
            self._link.heartbeat()
            # It is mapped, not copied: what is written into the file is computed with.
            if not self._arguments.mark.holds_the_same(Mark.of(self._arguments.file)):
                _fail(EXIT_MODEL_CHANGED, f"{self._arguments.path} was written to while in use")

    def _take(self, incoming: Incoming) -> None:
        match incoming:
            case Call(id=call_id, message=message):
                self._submit(call_id, message)
            case Cancel(id=call_id):
                self._engine.cancel(call_id)
                self._timings.pop(call_id, None)
            case Closed():
                pass
            case _:
                assert_never(incoming)

    def _submit(self, call_id: int, message: Mapping[str, Value]) -> None:
        try:
            sampling, prompt = self._prepare(message)
            self._engine.submit(Job(call_id, tuple(prompt), sampling))
        except BadCall as error:
            self._link.error(call_id, "bad_request", error.code, str(error))
        except EngineFull:
            self._link.error(call_id, "refused", "busy", "too many requests wait for this model")
        else:
            self._timings[call_id] = _Timing(sampling.seed, time.monotonic())

    def _prepare(self, message: Mapping[str, Value]) -> tuple[Sampling, list[int]]:
        """Return the parameters and the prompt's tokens. Raises BadCall."""
        wire = message["sampling"]
        assert isinstance(wire, Mapping)
        tokens = self._tokens(message)
        room = self._backend.context_tokens
        if len(tokens) >= room:
            text = f"the prompt has {len(tokens)} tokens and the context of this model holds {room}"
            raise BadCall(text, "context_length_exceeded")
        if not tokens:
            raise BadCall("the prompt is empty", "bad_request")
        return Sampling.from_wire(wire), tokens

    def _tokens(self, message: Mapping[str, Value]) -> list[int]:
        messages = message.get("messages")
        cut, tokenise = self._cutter.cut, self._backend.tokenise
        if message["operation"] == "complete":
            return tokenise(pieces(cut(str(message["prompt"]))), parse_special=False)
        assert isinstance(messages, Sequence)
        if self._template is None:
            raise BadCall("this model has no chat template that can be used", "no_chat_template")
        conversation = [
            {"role": str(m["role"]), "content": cut(str(m["content"]))}
            for m in messages
            if isinstance(m, Mapping)
        ]
        try:
            prompt = self._template.render(conversation)
        except TemplateError as error:
            raise BadCall(str(error), "chat_template") from None
        return tokenise(pieces(prompt), parse_special=True)

    def _give(self, output: Output) -> None:
        timing = self._timings[output.job]
        match output:
            case Text(job=job, piece=piece):
                if timing.first_s is None:
                    timing.first_s = time.monotonic()
                item: dict[str, Value] = {
                    "text": piece.text,
                    "token_ids": piece.token_ids,
                    "position": piece.position,
                    "seed": timing.seed,
                }
                self._link.item(job, item)
            case Finished(job=job):
                self._link.item(job, {"done": _summary(output, timing)})
                self._link.end(job)
                del self._timings[job]
            case Broken(job=job, message=message):
                self._link.error(job, "failed", "failed", message)
                del self._timings[job]
            case _:
                assert_never(output)


def _summary(finished: Finished, timing: _Timing) -> dict[str, Value]:
    now_s = time.monotonic()
    first_s = timing.first_s or now_s
    reason: Literal["stop", "length"] = finished.reason
    return {
        "finish_reason": reason,
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "first_token_s": round(first_s - timing.received_s, 4),
        "total_s": round(now_s - timing.received_s, 4),
        "decode_tokens_per_s": round((finished.completion_tokens - 1) / (now_s - first_s), 1)
        if finished.completion_tokens > 1 and now_s > first_s
        else 0.0,
    }


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


def _fail(status: int, why: str) -> NoReturn:
    os.write(2, f"{why}\n".encode())
    os._exit(status)


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
        _fail(EXIT_MODEL_UNUSABLE, f"{type(error).__name__}: {error}")
    if Mark.of(arguments.file) != arguments.mark:
        _fail(EXIT_MODEL_CHANGED, f"{arguments.path} changed after it was verified")
    measured = measure(backend, arguments.slots)
    template, template_error = None, ""
    if source := backend.chat_template:
        try:
            template = ChatTemplate(source, backend.special_tokens)
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
