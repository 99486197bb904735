"""Calls in, items out: the jobs of the engine are the calls of the link."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, assert_never

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.engine.scheduler import (
    Broken,
    Engine,
    EngineFull,
    Finished,
    Job,
    Output,
    Text,
)
from meshd_plugins.builtin.llama.models.digest import Mark
from meshd_plugins.builtin.llama.prompt.special import MessageCutter, pieces
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate, TemplateError
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.worker.backend import LlamaBackend
from meshd_plugins.workerkit import Call, Cancel, Closed, Incoming, Link

EXIT_MODEL_UNUSABLE: Final = 4
EXIT_MODEL_CHANGED: Final = 5
IDLE_WAIT_S: Final = 1.0


class BadCall(Exception):
    """The caller's fault; becomes an error of kind bad_request."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


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
        self._cutter = MessageCutter(backend.vocabulary.control_tokens())
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
                fail(EXIT_MODEL_CHANGED, f"{self._arguments.path} was written to while in use")

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
        cut, tokenise = self._cutter.cut, self._backend.vocabulary.tokenise
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


def fail(status: int, why: str) -> NoReturn:
    """End the process; the daemon shows the last lines of its stderr."""
    os.write(2, f"{why}\n".encode())
    os._exit(status)
