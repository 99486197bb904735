"""One announced name of a model that embeds or ranks: requests checked here, answered by the worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

from meshd_plugins.answering import answer_of, count_in
from meshd_plugins.api import (
    BadRequest,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    ModelFacts,
    Operation,
    Privacy,
    Rates,
    Refused,
    Request,
    Usage,
    Value,
    Worker,
)
from meshd_plugins.builtin.llama.models.pooling import Pooling
from meshd_plugins.builtin.llama.serving.capability import LlamaCapability, Served
from meshd_plugins.vectors import DIMENSIONS_MAX, INPUTS_MAX, ROWS_TYPE, BrokenRows, Rows

CALLS_MAX: Final = 32
"""Requests that a model takes at once, unless its configuration says another number of slots: their texts
share batches, and none reserves any memory."""
TEXT_BYTES_MAX: Final = 1024 * 1024  # of all texts of a request


@dataclass(frozen=True, slots=True)
class EmbeddingHello:
    """What a worker says of itself beside the model's facts, checked."""

    dimensions: int
    context_tokens: int  # of one text
    tokens_per_s: float
    texts_per_s: float
    load_s: float

    @classmethod
    def read(cls, hello: Mapping[str, Value]) -> EmbeddingHello | None:
        """Return None when it is the hello of a model that writes. Raises ValueError: it makes no sense."""
        said = hello.get("embedding")
        if not isinstance(said, Mapping):
            return None
        dimensions, context = said.get("dimensions"), hello.get("context_tokens")
        if not isinstance(dimensions, int) or not 1 <= dimensions <= DIMENSIONS_MAX:
            raise ValueError(f"the worker says that a vector has {str(dimensions)[:40]} numbers")
        if not isinstance(context, int) or context < 1:
            raise ValueError(f"the worker says that a text has {str(context)[:40]} tokens at most")
        return cls(
            dimensions=dimensions,
            context_tokens=context,
            tokens_per_s=_rate(said.get("tokens_per_s")),
            texts_per_s=_rate(said.get("texts_per_s")),
            load_s=_rate(hello.get("load_s")),
        )

    def lately(self, tokens_per_s: float) -> EmbeddingHello:
        """The same at the rate of late; 0.0: that is not known."""
        if tokens_per_s <= 0.0 or self.tokens_per_s <= 0.0:
            return self
        texts_per_s = self.texts_per_s * tokens_per_s / self.tokens_per_s
        return replace(self, tokens_per_s=tokens_per_s, texts_per_s=texts_per_s)


class WorkerSource(Protocol):
    """Where the worker of a model is got, loaded if need be."""

    def use(self, deadline_s: float) -> AbstractAsyncContextManager[Worker]:
        """While the context lasts, the model stays in memory. Raises Refused, Failed."""
        ...


def operation_of(facts: ModelFacts) -> Operation:
    """What a model with a pooling can do: one of the two, never both."""
    return Operation.RERANK if facts.pooling == Pooling.RANK else Operation.EMBED


def describe_embedding(
    names: Sequence[str], slots: int, privacy: Privacy, facts: ModelFacts, hello: EmbeddingHello
) -> tuple[Descriptor, ...]:
    """Return what is announced: one descriptor a name. `slots` 0: as many as the worker takes well."""
    operation = operation_of(facts)
    fields: dict[str, Value] = {
        "context": hello.context_tokens,
        "pooling": facts.pooling,
        "texts_per_s": round(hello.texts_per_s, 1),
    }
    made = "scores"
    if operation is Operation.EMBED:
        fields["dimensions"] = hello.dimensions
        made = f"vectors of {hello.dimensions} numbers, {facts.pooling} pooling"
    return tuple(
        Descriptor(
            name=name,
            operations=(operation,),
            summary=f"{facts.family}: {made}",
            slots=slots or CALLS_MAX,
            privacy=privacy,
            model=facts,
            rates=Rates(
                prefill_tokens_per_s=round(hello.tokens_per_s, 1), load_s=round(hello.load_s, 1)
            ),
            fields=fields,
        )
        for name in names
    )


def capability_for(descriptor: Descriptor, model: Served) -> EmbeddingCapability | LlamaCapability:
    """Return what answers the requests for a model."""
    if descriptor.model is not None and descriptor.model.pooling:
        return EmbeddingCapability(descriptor, model)
    return LlamaCapability(descriptor, model)


class EmbeddingCapability:
    """Implements `meshd_plugins.api.Capability` over one running worker."""

    def __init__(self, descriptor: Descriptor, workers: WorkerSource) -> None:
        self._descriptor = descriptor
        self._workers = workers

    @property
    def descriptor(self) -> Descriptor:
        """What is announced."""
        return self._descriptor

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Embed or rank; see `meshd_plugins.vectors` for what is yielded."""
        if request.operation not in self._descriptor.operations:
            raise Refused(f"{self._descriptor.name} cannot {request.operation}", code="unsupported")
        message = embedding_message(request.operation, request.body)
        # The class, for whoever stands before the worker. Not the caller: it keeps nothing of a request.
        message["privacy"] = int(request.privacy)
        texts = message.get("input") or message.get("documents")
        assert isinstance(texts, Sequence)
        rows = Rows(len(texts))
        # The caller closes this generator (`aclosing`), and so the call: the api module asks it to.
        chunk, done = partial(_chunk, rows), partial(self._done, rows)
        async with (
            self._workers.use(request.deadline_s) as worker,
            aclosing(answer_of(worker, message, chunk, done)) as events,
        ):
            async for event in events:
                yield event  # noqa: ASYNC119

    def _done(self, rows: Rows, done: Mapping[str, Value]) -> Done:
        """Raises Failed: the worker says that it is done, and it is not."""
        detail = {key: done[key] for key in ("dimensions", "texts", "total_s") if key in done}
        try:
            rows.finish(detail)
        except BrokenRows as error:
            raise Failed(f"the worker's rows are not whole: {error}", code="failed") from error
        if (model := self._descriptor.model) is not None:  # vectors of two models do not compare
            detail["model"] = f"{model.family}#{model.digest[:16]}"
        return Done(usage=Usage(prompt_tokens=count_in(done, "prompt_tokens")), detail=detail)


def embedding_message(operation: Operation, body: Mapping[str, Value]) -> dict[str, Value]:
    """Check a request and put it into the worker's words. Raises BadRequest."""
    message: dict[str, Value] = {
        "operation": operation.value,
        "truncate": _truncate(body.get("truncate")),
    }
    if operation is Operation.RERANK:
        query = body.get("query")
        if not isinstance(query, str) or not query:
            raise BadRequest("query must be a string that is not empty")
        documents = _texts(body.get("documents"), "documents")
        _check_size([query, *documents])
        return {**message, "query": query, "documents": documents}
    texts = _texts(body.get("input"), "input")
    _check_size(texts)
    message["input"] = texts
    dimensions = body.get("dimensions")
    if dimensions is not None:
        if isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1:
            raise BadRequest("dimensions must be a positive integer")
        message["dimensions"] = dimensions
    return message


def _truncate(value: Value) -> bool:
    if value is not None and not isinstance(value, bool):
        raise BadRequest("truncate must be true or false")
    return value is True


def _texts(value: Value, where: str) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        raise BadRequest(f"{where} must be a text or a list of texts that is not empty")
    if len(value) > INPUTS_MAX:
        raise BadRequest(f"{where} holds {len(value)} texts; the most is {INPUTS_MAX}")
    texts: list[str] = []
    for number, text in enumerate(value):
        if not isinstance(text, str) or not text:
            raise BadRequest(f"{where}[{number}] must be a text that is not empty")
        texts.append(text)
    return texts


def _check_size(texts: Sequence[str]) -> None:
    """Raises BadRequest: more than may be, or no Unicode text."""
    try:
        size = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise BadRequest("a text holds half of a character (a lone surrogate)") from error
    if size > TEXT_BYTES_MAX:
        raise BadRequest(f"the texts have {size} bytes; the most is {TEXT_BYTES_MAX}")


def _chunk(rows: Rows, item: Mapping[str, Value]) -> Chunk:
    """Raises Failed: the worker sent no rows."""
    position, data = item.get("position"), item.get("data")
    if not isinstance(position, int) or not isinstance(data, bytes):
        raise Failed("the worker sent no rows", code="failed")
    try:
        rows.add(position, data, ROWS_TYPE)
    except BrokenRows as error:
        raise Failed(f"the worker's rows are not whole: {error}", code="failed") from error
    return Chunk(data=data, position=position, content_type=ROWS_TYPE)


def _rate(value: Value) -> float:
    """Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ValueError(f"the worker says that a rate is {str(value)[:40]}")
    return float(value)
