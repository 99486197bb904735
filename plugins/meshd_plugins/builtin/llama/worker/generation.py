"""Chat and completion: calls become jobs of the engine, and what it puts out becomes items."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, assert_never

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.engine.jobs import Broken, Finished, Job, Output, Scope, Text
from meshd_plugins.builtin.llama.engine.scheduler import Engine, EngineFull, Step
from meshd_plugins.builtin.llama.engine.sequences import common_prefix
from meshd_plugins.builtin.llama.engine.text import Logprob, Piece
from meshd_plugins.builtin.llama.prompt.answers import AnswerReader, Parts
from meshd_plugins.builtin.llama.prompt.conversation import (
    Conversations,
    Prepared,
    RequestUnusable,
)
from meshd_plugins.builtin.llama.prompt.special import Medium, MessageCutter
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.worker.backend import LlamaBackend
from meshd_plugins.builtin.llama.worker.measure import (
    ALONE_S,
    CHUNK_S,
    CHUNK_TOKENS_MIN,
    Measured,
    chunk_tokens,
)
from meshd_plugins.builtin.llama.worker.media import MediaReader
from meshd_plugins.builtin.llama.worker.parts import BadCall
from meshd_plugins.builtin.llama.worker.samplers import GrammarUnusable
from meshd_plugins.workerkit import Link

RECENT: Final = 0.1  # weight of a step in the recent rates
SPEED_MIN: Final = 0.01


@dataclass(slots=True)
class _Answer:
    """One call being answered: its reader, and when things happened to it."""

    seed: int
    received_s: float
    reader: AnswerReader | None  # None: all of it is text
    unenforced: tuple[str, ...] = ()  # places of keywords that it is not held to
    first_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Reading:
    """One call whose media are being read."""

    prepared: Prepared
    sampling: Sampling
    scope: Scope
    tag: bytes
    received_s: float


class Pace:
    """How fast it has been of late, beside what was measured at the start."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self.prefill_tokens_per_s = measured.prefill_tokens_per_s
        self.speed = (
            1.0  # of generating, as a share of what was measured; below 1: throttled or shared
        )

    @property
    def decode_tokens_per_s(self) -> float:
        """Of one sequence alone."""
        return self._measured.decode_tokens_per_s * self.speed

    def stepped(self, step: Step, took_s: float) -> None:
        """Take in one step. Of one that does both, what generating is expected to take is not prefill."""
        expected_s = 0.0
        if step.decode_tokens:
            expected_s = step.decode_tokens / self._measured.expected(step.decode_tokens)
        if took_s <= 0.0:
            return
        if not step.prefill_tokens:
            self.speed += RECENT * (expected_s / took_s - self.speed)
            return
        prefill_s = took_s - expected_s / max(self.speed, SPEED_MIN)
        if step.prefill_tokens >= CHUNK_TOKENS_MIN and prefill_s > 0.0:
            rate = step.prefill_tokens / prefill_s
            self.prefill_tokens_per_s += RECENT * (rate - self.prefill_tokens_per_s)


class Generation:
    """Implements `Part` over the engine."""

    operations = ("chat", "complete")

    def __init__(
        self,
        link: Link,
        backend: LlamaBackend,
        engine: Engine[Any, Any],
        template: ChatTemplate | None,
        measured: Measured,
        chunk: int = 0,
    ) -> None:
        """Cut prompts into chunks of so many tokens; 0: as many as the pace of the time allows."""
        cutter = MessageCutter(backend.vocabulary.control_tokens())
        self.conversations = Conversations(template, cutter)
        self._link = link
        self._backend = backend
        self._engine = engine
        self._answers: dict[int, _Answer] = {}
        self.pace = Pace(measured)
        self._chunk = chunk
        self._reading: dict[int, _Reading] = {}
        self._media: MediaReader | None = None
        if backend.media_encoder is not None:
            self._media = MediaReader(backend.media_encoder, link.wake, backend.batch_tokens)
            backend.read_media_from(self._media.embeddings)
        self._size_chunks()

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return self._engine.busy

    def take(self, call_id: int, message: Mapping[str, Value]) -> None:
        """Begin an answer. Raises BadCall."""
        sampling, prepared = self._prepare(message)
        tags, caller, privacy = (message.get(name) for name in ("tags", "caller", "privacy"))
        tag = tags[-1] if isinstance(tags, Sequence) and tags else b""
        scope = Scope(str(caller or ""), privacy if isinstance(privacy, int) else Scope().privacy)
        tag = tag if isinstance(tag, bytes) else b""
        reading = _Reading(prepared, sampling, scope, tag, time.monotonic())
        media = message.get("media")
        if not media:
            self._submit(call_id, reading, ())
            return
        if self._media is None:
            raise BadCall("this model reads text only", "unsupported_modality")
        assert isinstance(media, Sequence)
        encoded = [each for each in media if isinstance(each, str)]
        if self._media.begin(call_id, scope.caller, encoded):
            self._reading[call_id] = reading
        else:
            self._refuse(call_id)

    def _submit(self, call_id: int, reading: _Reading, media: Sequence[tuple[int, ...]]) -> None:
        """Hand a call to the engine. Raises BadCall."""
        prompt = self._tokens(reading.prepared, media)
        job = Job(call_id, tuple(prompt), reading.sampling, reading.scope, reading.tag)
        try:
            gave_way = self._engine.submit(job)
        except EngineFull:
            self._refuse(call_id)
        else:
            if gave_way is not None:
                del self._answers[gave_way.id]
                self._refuse(gave_way.id)
            prepared = reading.prepared
            self._answers[call_id] = _Answer(
                reading.sampling.seed, reading.received_s, prepared.reader, prepared.unenforced
            )

    def _refuse(self, call_id: int) -> None:
        self._link.error(call_id, "refused", "busy", "too many requests wait for this model")
        self._forget_media(call_id)

    def _forget_media(self, call_id: int) -> None:
        if self._media is not None:
            self._media.embeddings.ended(call_id)

    def cancel(self, call_id: int) -> None:
        """Its slot is free at once."""
        if self._answers.pop(call_id, None) is not None:
            self._engine.cancel(call_id)
        if self._media is not None:
            self._reading.pop(call_id, None)
            self._media.cancel(call_id)

    def _take_read(self, reader: MediaReader) -> None:
        """Go on with the calls whose media were read."""
        for read in reader.ready():
            reading = self._reading.pop(read.call, None)
            if reading is None:
                self._forget_media(read.call)
                continue
            try:
                if read.wrong:
                    raise BadCall(read.wrong, "bad_medium")
                self._submit(read.call, reading, read.tokens)
            except BadCall as error:
                self._link.error(read.call, "bad_request", error.code, str(error))
                self._forget_media(read.call)
        self._backend.leave_threads(reader.threads if reader.encoding else 0)

    def step(self) -> None:
        """Compute one batch."""
        if self._media is not None:
            self._take_read(self._media)
        if not self._engine.busy:
            return
        began_s = time.monotonic()
        outputs = self._engine.step()
        self.pace.stepped(self._engine.last_step, time.monotonic() - began_s)
        self._size_chunks()
        for output in outputs:
            self._give(output)

    def _size_chunks(self) -> None:
        engine, most, rate = (
            self._engine,
            self._backend.batch_tokens,
            self.pace.prefill_tokens_per_s,
        )
        # A batch must hold a token of every slot beside the chunk.
        beside = most - len(engine.slots.all)
        engine.chunk_tokens = self._chunk or chunk_tokens(rate, CHUNK_S, beside)
        engine.alone_tokens = self._chunk or chunk_tokens(rate, ALONE_S, most)

    def _prepare(self, message: Mapping[str, Value]) -> tuple[Sampling, Prepared]:
        """Return the parameters and the prompt. Raises BadCall."""
        wire = message["sampling"]
        assert isinstance(wire, Mapping)
        try:
            prepared = self.conversations.prepare(message)
            if prepared.constraint is not None:
                self._backend.samplers.check(prepared.constraint)
        except RequestUnusable as error:
            raise BadCall(str(error), error.code) from None
        except GrammarUnusable as error:
            raise BadCall(str(error), "unsupported_grammar") from None
        return replace(Sampling.from_wire(wire), constraint=prepared.constraint), prepared

    def shared_tokens(self, system: str) -> tuple[int, ...]:
        """What every conversation with this system message begins with; () when it cannot be rendered."""
        both: list[list[int]] = []
        for text in ("a", "b"):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            try:
                prepared = self.conversations.prepare({"operation": "chat", "messages": messages})
                both.append(self._tokens(prepared, ()))
            except (RequestUnusable, BadCall):
                return ()
        return tuple(both[0][: common_prefix(*both)])

    def _tokens(self, prepared: Prepared, media: Sequence[tuple[int, ...]]) -> list[int]:
        """The prompt, with what stands for its media in their places. Raises BadCall."""
        tokens: list[int] = []
        for is_medium, group in groupby(prepared.parts, lambda part: isinstance(part, Medium)):
            if is_medium:
                tokens += [
                    t for part in group if isinstance(part, Medium) for t in media[part.number]
                ]
                continue
            pieces = [part for part in group if isinstance(part, str)]
            tokens += self._backend.vocabulary.tokenise(
                pieces, parse_special=prepared.special, begins=not tokens
            )
        room = self._backend.context_tokens
        if len(tokens) >= room:
            text = f"the prompt has {len(tokens)} tokens and the context of this model holds {room}"
            raise BadCall(text, "context_length_exceeded")
        if not tokens:
            raise BadCall("the prompt is empty", "bad_request")
        if tokens[-1] < 0:
            raise BadCall("there must be text behind the last picture or sound", "bad_request")
        return tokens

    def _give(self, output: Output) -> None:
        answer = self._answers[output.job]
        match output:
            case Text(job=job, piece=piece):
                if answer.first_s is None:
                    answer.first_s = time.monotonic()
                reader = answer.reader
                tokens = len(piece.token_ids)
                parts = Parts(piece.text) if reader is None else reader.feed(piece.text, tokens)
                self._link.item(job, self._item(answer, parts, piece))
            case Finished(job=job):
                if answer.reader is not None and (rest := answer.reader.finish()) != Parts():
                    self._link.item(job, {**_parts(rest), "position": output.completion_tokens})
                self._link.item(job, {"done": _summary(output, answer)})
                self._link.end(job)
                del self._answers[job]
                self._forget_media(job)
            case Broken(job=job, message=message):
                self._link.error(job, "failed", "failed", message)
                del self._answers[job]
                self._forget_media(job)
            case _:
                assert_never(output)

    def _item(self, answer: _Answer, parts: Parts, piece: Piece) -> dict[str, Value]:
        item: dict[str, Value] = {
            **_parts(parts),
            "token_ids": piece.token_ids,
            "position": piece.position,
            "seed": answer.seed,
        }
        if piece.logprobs:
            item["logprobs"] = [self._logprob(each) for each in piece.logprobs]
        return item

    def _logprob(self, each: Logprob) -> list[Value]:
        text = self._backend.vocabulary.text
        top: list[Value] = [[token, logprob, text(token)] for token, logprob in each.top]
        return [each.token, each.logprob, text(each.token), top]


def _parts(parts: Parts) -> dict[str, Value]:
    item: dict[str, Value] = {"text": parts.text}
    if parts.reasoning:
        item["reasoning"] = parts.reasoning
    if parts.tool_calls:
        item["tool_calls"] = [[c.index, c.id, c.name, c.arguments] for c in parts.tool_calls]
    return item


def _summary(finished: Finished, answer: _Answer) -> dict[str, Value]:
    now_s = time.monotonic()
    first_s = answer.first_s or now_s
    reader = answer.reader
    called = reader is not None and reader.called and finished.reason == "stop"
    return {
        "finish_reason": "tool_calls" if called else finished.reason,
        "reasoning_tokens": reader.reasoning_tokens if reader is not None else 0,
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "cached_tokens": finished.cached_tokens,
        "first_token_s": round(first_s - answer.received_s, 4),
        "total_s": round(now_s - answer.received_s, 4),
        "decode_tokens_per_s": round((finished.completion_tokens - 1) / (now_s - first_s), 1)
        if finished.completion_tokens > 1 and now_s > first_s
        else 0.0,
        **({"unenforced": answer.unenforced} if answer.unenforced else {}),
    }
