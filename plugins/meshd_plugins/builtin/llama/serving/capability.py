"""One announced name of a model: requests checked here, answered by the worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Protocol

from meshd_plugins.answering import answer_of, count_in
from meshd_plugins.api import (
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    PrefixExport,
    PrefixHead,
    Privacy,
    Refused,
    Request,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    Value,
    WarmPrefix,
    Worker,
)
from meshd_plugins.builtin.llama.serving.requests import TEXT_ONLY, worker_message
from meshd_plugins.builtin.llama.serving.warmth import WarmPrefixes
from meshd_plugins.checking import check_media


class Served(Protocol):
    """A model, in memory or not."""

    def use(self, deadline_s: float) -> AbstractAsyncContextManager[Worker]:
        """Its worker, loaded if need be; it stays as long as the context. Raises Refused, Failed."""
        ...

    @property
    def prefixes(self) -> WarmPrefixes | None:
        """What its worker keeps of requests; None while it is not in memory."""
        ...


class LlamaCapability:
    """Implements `meshd_plugins.api.Capability` and `PrefixHolder` over one model."""

    def __init__(self, descriptor: Descriptor, model: Served) -> None:
        self._descriptor = descriptor
        self._model = model

    @property
    def descriptor(self) -> Descriptor:
        """What is announced."""
        return self._descriptor

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Generate; see `meshd_plugins.api` for the contract."""
        if request.operation not in self._descriptor.operations:
            raise Refused(f"{self._descriptor.name} cannot {request.operation}", code="unsupported")
        model = self._descriptor.model
        modalities = model.modalities if model is not None else TEXT_ONLY
        message = worker_message(request.operation, request.body, modalities)
        if "media" in message:
            await check_media(request.body.get("messages"))
        message |= {
            "caller": request.caller,
            "privacy": int(request.privacy),
            "tags": list(request.tags),
        }
        # The caller closes this generator (`aclosing`), and so the call: the api module asks it to.
        async with (
            self._model.use(request.deadline_s) as worker,
            aclosing(answer_of(worker, message, _chunk, _done)) as events,
        ):
            async for event in events:
                yield event  # noqa: ASYNC119

    def warm(self) -> Sequence[WarmPrefix]:
        """What its worker keeps; see `meshd_plugins.api.PrefixHolder`."""
        prefixes = self._model.prefixes
        return prefixes.warm() if prefixes is not None else ()

    def export_prefix(
        self, tag: bytes, caller: str, away: Privacy
    ) -> AbstractAsyncContextManager[PrefixExport]:
        """Hand a state out."""
        return self._held().export_prefix(tag, caller, away)

    async def import_prefix(self, head: PrefixHead, data: AsyncIterable[bytes]) -> int:
        """Take a state in."""
        return await self._held().import_prefix(head, data)

    def _held(self) -> WarmPrefixes:
        prefixes = self._model.prefixes
        if prefixes is None:
            raise Refused(f"{self._descriptor.name} is not in memory", code="not_warm")
        return prefixes


def _chunk(item: Mapping[str, Value]) -> Chunk:
    tokens, position, seed = item.get("token_ids"), item.get("position"), item.get("seed")
    return Chunk(
        text=str(item.get("text", "")),
        token_ids=tuple(t for t in tokens if isinstance(t, int))
        if isinstance(tokens, Sequence)
        else (),
        position=position if isinstance(position, int) else 0,
        seed=seed if isinstance(seed, int) else None,
        reasoning=str(item.get("reasoning", "")),
        tool_calls=tuple(_tool_calls(item.get("tool_calls"))),
        logprobs=tuple(_logprobs(item.get("logprobs"))),
    )


def _rows(value: Value) -> Iterator[Sequence[Any]]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for row in value:
            if isinstance(row, Sequence) and not isinstance(row, str | bytes):
                yield row


def _tool_calls(value: Value) -> Iterator[ToolCallDelta]:
    for row in _rows(value):
        match row:
            case [int(index), str(identity), str(name), str(arguments)]:
                yield ToolCallDelta(index, identity, name, arguments)
            case _:
                raise Failed("the worker told a tool call that is none")


def _logprobs(value: Value) -> Iterator[TokenLogprob]:
    for row in _rows(value):
        match row:
            case [int(token), float(logprob), bytes(data), *rest]:
                yield TokenLogprob(token, logprob, data, tuple(_logprobs(rest[0] if rest else ())))
            case _:
                raise Failed("the worker told a probability that is none")


def _done(done: Mapping[str, Value]) -> Done:
    return Done(
        finish_reason=str(done.get("finish_reason", "stop")),
        usage=Usage(
            prompt_tokens=count_in(done, "prompt_tokens"),
            completion_tokens=count_in(done, "completion_tokens"),
            reasoning_tokens=count_in(done, "reasoning_tokens"),
            cached_tokens=count_in(done, "cached_tokens"),
        ),
        detail={
            key: done[key]
            for key in ("first_token_s", "total_s", "decode_tokens_per_s", "unenforced")
            if key in done
        },
    )
