"""`POST /v1/embeddings` and `POST /v1/rerank`: rows of floats, as OpenAI's and Jina's clients want them.

An answer comes whole or as an error. What a node of the mesh sends is checked here before any of it goes
out: as many rows as texts, all of one length, all finite.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from meshd.edge.asking import Progress, asking, extension_of, until_gone, usage_of
from meshd.edge.context import context_of
from meshd.edge.embeddings_request import VectorRequest
from meshd.edge.http import from_json, read_body, send_json, to_json
from meshd.edge.targets import Models
from meshd.orchestrate.events import ANSWER, Answered, Ask, AskEvent, Piece
from meshd_plugins.api import Failed, Operation, Value
from meshd_plugins.vectors import BrokenRows, Rows, to_floats

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.edge.limits import EdgeLimits
    from meshd.orchestrate.service import MeshService

_DIGITS: Final = "%.9g"  # enough to name a 32-bit float exactly, and a third of the time of repr


class Vectors:
    """One of the two endpoints, by what reads its bodies. An ASGI application."""

    def __init__(
        self,
        service: MeshService,
        models: Models,
        limits: EdgeLimits,
        parse: Callable[[Mapping[str, Value]], VectorRequest],
    ) -> None:
        self._service = service
        self._models = models
        self._limits = limits
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        limits = self._limits
        context = context_of(scope)
        raw = await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        wanted = self._parse(from_json(raw))
        context.access.require(wanted.model)
        ask = Ask(
            target=self._models.target_for(wanted.model, wanted.operation),
            operation=wanted.operation,
            body=wanted.body,
            request_id=context.request_id,
            deadline_s=min(wanted.deadline_s or limits.deadline_default_s, limits.deadline_max_s),
            privacy=wanted.privacy,
            idempotency_id=context.idempotency_id,
            trace=context.trace,
            principal=context.access.principal,
            privacy_max=context.access.privacy_max,
        )
        gathering = _Gathering(len(wanted.texts))
        await until_gone(
            receive, partial(asking, self._service, ask, limits.deadline_grace_s, gathering.take)
        )
        answered, rows = gathering.finish()
        if wanted.operation is Operation.RERANK:
            body = to_json(_ranked(wanted, rows, answered, ask.request_id))
        else:
            body = await _embedded(wanted, rows, answered, ask.request_id)
        headers = (*context.headers, gathering.progress.served_by_header())
        await send_json(send, 200, body, headers)


class _Gathering:
    """What has come of an answer."""

    def __init__(self, texts: int) -> None:
        self.progress = Progress()
        self._rows = Rows(texts)

    async def take(self, event: AskEvent) -> None:
        """Take an event in. Raises Failed: it is no part of such an answer."""
        if not isinstance(event, Piece):
            self.progress.note(event)
        elif event.subtask == ANSWER:
            try:
                self._rows.add(event.position, event.data, event.content_type)
            except BrokenRows as error:
                raise _fault(error) from error

    def finish(self) -> tuple[Answered, tuple[bytes, ...]]:
        """The end of the answer, and its rows. Raises Failed: it is not whole."""
        answered = self.progress.complete()
        try:
            return answered, self._rows.finish(answered.parts[-1].detail if answered.parts else {})
        except BrokenRows as error:
            raise _fault(error) from error


def _fault(error: BrokenRows) -> Failed:
    return Failed(f"the answer makes no sense: {error}", code="peer_fault")


async def _embedded(
    wanted: VectorRequest, rows: tuple[bytes, ...], answered: Answered, request_id: str
) -> bytes:
    """The body of an answer; other requests get their turn while a large one is written."""
    parts: list[bytes] = []
    pattern = "[" + ",".join([_DIGITS] * (len(rows[0]) // 4)) + "]"
    for index, row in enumerate(rows):
        await trio.lowlevel.checkpoint()
        vector = (
            b'"' + base64.b64encode(row) + b'"'
            if wanted.base64
            else (pattern % tuple(to_floats(row))).encode()
        )
        parts.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector))
    tail = to_json(
        {
            "model": wanted.model,
            "usage": _usage(answered),
            "meshd": extension_of(request_id, answered),
        }
    )
    return b'{"object":"list","data":[' + b",".join(parts) + b"]," + tail.removeprefix(b"{")


def _ranked(
    wanted: VectorRequest, rows: tuple[bytes, ...], answered: Answered, request_id: str
) -> dict[str, Value]:
    """The body of an answer, the best document first."""
    scores: array[float] = to_floats(b"".join(row[:4] for row in rows))
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    results: list[Value] = []
    for index in order[: wanted.top_n]:
        result: dict[str, Value] = {"index": index, "relevance_score": scores[index]}
        if wanted.return_documents:
            result["document"] = {"text": wanted.texts[index]}
        results.append(result)
    return {
        "object": "list",
        "model": wanted.model,
        "results": results,
        "usage": _usage(answered),
        "meshd": extension_of(request_id, answered),
    }


def _usage(answered: Answered) -> dict[str, Value]:
    """Nothing is written, so OpenAI leaves `completion_tokens` out."""
    usage = usage_of(answered.usage)
    return {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
