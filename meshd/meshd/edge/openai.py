"""The OpenAI endpoints: chat completions, completions, models.

An answer ends in one of two ways. Complete: a `finish_reason`, and in a stream `[DONE]`. Or broken: an
error; in a stream that has begun, an event `{"error": ...}` after which nothing follows, no
`finish_reason` and no `[DONE]`, so that a client never takes a torso for an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from meshd.edge.asking import EventStream, Progress, asking, extension_of, until_gone, usage_of
from meshd.edge.context import context_of, log_unexpected
from meshd.edge.errors import ClientGone, problem_of
from meshd.edge.http import read_body, send_json, to_json
from meshd.edge.json_photos import read_json
from meshd.edge.openai_answer import Choice, Part
from meshd.edge.openai_messages import check_to_the_end
from meshd.edge.openai_request import Parsed, parse_chat, parse_completion
from meshd.edge.targets import Models
from meshd.orchestrate.events import Answered, Ask, AskEvent
from meshd_plugins.api import Operation, Value

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.edge.limits import EdgeLimits
    from meshd.orchestrate.service import MeshService

_OWNER: Final = "meshd"


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between the two completion endpoints."""

    parse: Callable[[Mapping[str, Value]], Parsed]
    operation: Operation
    id_prefix: str
    object_whole: str
    object_chunk: str


CHAT: Final = Dialect(
    parse_chat, Operation.CHAT, "chatcmpl-", "chat.completion", "chat.completion.chunk"
)
COMPLETION: Final = Dialect(
    parse_completion, Operation.COMPLETE, "cmpl-", "text_completion", "text_completion"
)


class Completions:
    """`POST /v1/chat/completions` and `POST /v1/completions`, by dialect. An ASGI application."""

    def __init__(
        self, service: MeshService, models: Models, limits: EdgeLimits, dialect: Dialect
    ) -> None:
        self._service = service
        self._models = models
        self._limits = limits
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        limits = self._limits
        context = context_of(scope)
        raw = await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        parsed = self._dialect.parse(await read_json(raw))
        del raw  # a photo need not be held twice
        context.access.require(parsed.model)
        target = self._models.target_for(parsed.model)
        await check_to_the_end(parsed.body)
        deadline_s = parsed.deadline_s or limits.deadline_default_s
        ask = Ask(
            target=target,
            operation=self._dialect.operation,
            body=parsed.body,
            request_id=context.request_id,
            deadline_s=min(deadline_s, limits.deadline_max_s),
            privacy=parsed.privacy,
            split=parsed.split,
            idempotency_id=context.idempotency_id,
            trace=context.trace,
            principal=context.access.principal,
            privacy_max=context.access.privacy_max,
        )
        answer = _Answer(ask, parsed, self._dialect, scope, limits)
        if parsed.stream:
            await answer.stream(self._service, receive, send)
        else:
            await answer.whole(self._service, receive, send)


class _Answer:
    """One request being answered."""

    def __init__(
        self,
        ask: Ask,
        parsed: Parsed,
        dialect: Dialect,
        scope: Scope,
        limits: EdgeLimits,
    ) -> None:
        self._scope = scope
        self._ask = ask
        self._parsed = parsed
        self._dialect = dialect
        self._context = context_of(scope)
        self._limits = limits
        self._id = dialect.id_prefix + ask.request_id
        self._created = int(time.time())
        self._progress = Progress()

    async def whole(self, service: MeshService, receive: Receive, send: Send) -> None:
        """Collect the answer and send it in one body."""
        choice = Choice(self._dialect.operation)
        progress = self._progress

        async def take(event: AskEvent) -> None:
            choice.add(Part.of(event, progress.note(event)))

        grace_s = self._limits.deadline_grace_s
        await until_gone(receive, partial(asking, service, self._ask, grace_s, take))
        answered = progress.complete()
        body = {
            **self._head(self._dialect.object_whole),
            "choices": [choice.whole(answered.finish_reason)],
            "usage": usage_of(answered.usage),
            "meshd": extension_of(self._ask.request_id, answered),
        }
        headers = (*self._context.headers, progress.served_by_header())
        await send_json(send, 200, to_json(body), headers)

    async def stream(self, service: MeshService, receive: Receive, send: Send) -> None:
        """Send the answer as server-sent events while it comes."""
        progress = self._progress
        stream = EventStream(
            receive, send, b"text/event-stream", b": waiting\n\n", self._limits.heartbeat_s
        )
        stream.headers.extend(self._context.headers)
        before, after = self._frame()
        choice = Choice(self._dialect.operation)

        async def take(event: AskEvent) -> None:
            part = Part.of(event, progress.note(event))
            if part:
                if not choice.begun and not stream.started:
                    stream.headers.append(progress.served_by_header())
                await stream.write(before + to_json(choice.delta(part)) + after)

        async def relay() -> None:
            await asking(service, self._ask, self._limits.deadline_grace_s, take)
            await self._end(stream, progress.complete(), choice)

        try:
            await stream.run(relay)
        except ClientGone:
            raise
        except Exception as error:
            if not stream.started:
                raise
            log_unexpected(self._context, self._scope, error)
            await stream.fail(b"data: " + to_json(problem_of(error).body()) + b"\n\n")

    async def _end(self, stream: EventStream, answered: Answered, choice: Choice) -> None:
        head = self._head(self._dialect.object_chunk)
        if not stream.started:
            stream.headers.append(self._progress.served_by_header())
        chunks = [{**head, "choices": [choice.end(answered.finish_reason)]}]
        if not choice.begun:
            chunks.insert(0, {**head, "choices": [choice.delta(Part())]})
        chunks[-1]["meshd"] = extension_of(self._ask.request_id, answered)
        if self._parsed.include_usage:
            for chunk in chunks:
                chunk["usage"] = None
            chunks.append({**head, "choices": [], "usage": usage_of(answered.usage)})
        events = [b"data: " + to_json(chunk) + b"\n\n" for chunk in chunks]
        await stream.write(b"".join(events) + b"data: [DONE]\n\n")

    def _head(self, kind: str) -> dict[str, Value]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._parsed.model,
        }

    def _frame(self) -> tuple[bytes, bytes]:
        """What stands before and after the choice in every chunk with text: encoded once."""
        head = to_json(self._head(self._dialect.object_chunk)).removesuffix(b"}")
        usage = b',"usage":null' if self._parsed.include_usage else b""
        return b"data: " + head + b',"choices":[', b"]" + usage + b"}\n\n"


class ModelList:
    """`GET /v1/models` and `GET /v1/models/{id}`. An ASGI application."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._created = int(time.time())

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        context = context_of(scope)
        listed = self._models.listed()
        if (key := context.access.key) is not None and key.models:
            listed = {name: row for name, row in listed.items() if key.permits(name)}
        wanted = scope["path_params"].get("id")
        headers = context.headers
        if wanted is None:
            data = [self._entry(name, fields) for name, fields in listed.items()]
            await send_json(send, 200, to_json({"object": "list", "data": data}), headers)
            return
        if wanted not in listed:
            raise self._models.not_found(str(wanted))
        await send_json(send, 200, to_json(self._entry(wanted, listed[wanted])), headers)

    def _entry(self, name: str, fields: Mapping[str, Value]) -> dict[str, Value]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": _OWNER,
            "meshd": fields,
        }
