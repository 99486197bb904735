"""The mesh API: what the command line, and anything else that wants more than OpenAI's API, talks to.

It carries what OpenAI's shape has no room for: the plan, who was chosen and why, each subtask's output,
and resolution with its reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import parse_qs

from meshd.edge.asking import EventStream, asking
from meshd.edge.context import context_of, log_unexpected
from meshd.edge.embeddings_request import parse_embeddings, parse_rerank
from meshd.edge.errors import ClientGone, RequestError, problem_of
from meshd.edge.events_json import event_to_plain, problem_to_plain
from meshd.edge.http import read_body, send_json, to_json
from meshd.edge.json_photos import read_json
from meshd.edge.openai_messages import check_to_the_end, messages_of
from meshd.edge.openai_request import deadline, privacy, sampling
from meshd.edge.openai_structure import structure_of_chat, structure_of_completion
from meshd.edge.targets import AUTO, Models
from meshd.orchestrate.events import Answered, Ask, AskEvent
from meshd_plugins.api import Failed, Operation, Value

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.edge.context import RequestContext
    from meshd.edge.exposure import Exposure
    from meshd.edge.limits import EdgeLimits
    from meshd.orchestrate.service import MeshService

_BEAT: Final = b'{"event":"waiting"}\n'


class View:
    """A `GET` of one of the service's synchronous views. An ASGI application."""

    def __init__(self, key: str, read: Callable[[], Value]) -> None:
        self._key = key
        self._read = read

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer `{KEY: [...]}`, or the mapping itself where the view is one."""
        value = self._read()
        body = value if isinstance(value, Mapping) else {self._key: value}
        await send_json(send, 200, to_json(body), context_of(scope).headers)


class Status:
    """`GET /mesh/v1/status`, with what only the edge knows of this node. An ASGI application."""

    def __init__(self, service: MeshService, exposure: Exposure | None) -> None:
        self._service = service
        self._exposure = exposure

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = dict(self._service.status())
        if self._exposure is not None and self._exposure.pin:
            body["http_pin"] = self._exposure.pin
        await send_json(send, 200, to_json(body), context_of(scope).headers)


class Resolve:
    """`GET /mesh/v1/resolve?name=...`. An ASGI application."""

    def __init__(self, service: MeshService, models: Models) -> None:
        self._service = service
        self._models = models

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        query = cast("bytes", scope["query_string"]).decode("latin-1")
        names = parse_qs(query, keep_blank_values=True).get("name", [])
        if len(names) != 1:
            raise RequestError("Exactly one `name` is wanted in the query", param="name")
        if names[0] == AUTO:
            raise RequestError(
                "'auto' gets its name from the question: `meshd ask -v auto QUESTION` shows it",
                param="name",
            )
        context = context_of(scope)
        context.access.require(names[0])
        body = to_json(self._service.resolve(self._models.target_for(names[0])))
        await send_json(send, 200, body, context.headers)


class Leave:
    """`POST /mesh/v1/leave`. An ASGI application."""

    def __init__(self, service: MeshService, limits: EdgeLimits) -> None:
        self._service = service
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, once the leave was announced."""
        # It says nothing, but a client that is still sending it must not find the connection closed.
        limits = self._limits
        await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        await self._service.leave()
        await send_json(send, 200, to_json({"left": True}), context_of(scope).headers)


class MeshAsk:
    """`POST /mesh/v1/ask`: the events of an ask, a JSON object a line. An ASGI application."""

    def __init__(self, service: MeshService, models: Models, limits: EdgeLimits) -> None:
        self._service = service
        self._models = models
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. The last line is `answered` or `error`; anything else is a torso."""
        limits = self._limits
        context = context_of(scope)
        raw = await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        ask = self._ask_of(await read_json(raw), context)
        del raw  # a photo need not be held twice
        await check_to_the_end(ask.body)
        stream = EventStream(receive, send, b"application/x-ndjson", _BEAT, limits.heartbeat_s)
        stream.headers.extend(context.headers)

        answered = False

        async def take(event: AskEvent) -> None:
            nonlocal answered
            answered = answered or isinstance(event, Answered)
            await stream.write(to_json(event_to_plain(event)) + b"\n")

        async def relay() -> None:
            await asking(self._service, ask, limits.deadline_grace_s, take)
            if not answered:
                raise Failed("the answer ended before it was complete", code="stream_lost")

        try:
            await stream.run(relay)
        except ClientGone:
            raise
        except Exception as error:
            if not stream.started:
                raise
            log_unexpected(context, scope, error)
            await stream.fail(to_json(problem_to_plain(problem_of(error))) + b"\n")

    def _ask_of(self, payload: Mapping[str, Value], context: RequestContext) -> Ask:
        limits = self._limits
        named = payload.get("target")
        if not isinstance(named, str) or not named:
            raise RequestError("`target` must be 'auto' or a name", param="target")
        context.access.require(named)
        operation = _operation(payload)
        target = self._models.target_for(named, operation)
        split = payload.get("split", True)
        if not isinstance(split, bool):
            raise RequestError("`split` must be true or false", param="split")
        return Ask(
            target=target,
            operation=operation,
            body=_body(payload, operation, target),
            request_id=context.request_id,
            deadline_s=min(deadline(payload) or limits.deadline_default_s, limits.deadline_max_s),
            privacy=privacy(payload),
            split=split,
            idempotency_id=context.idempotency_id,
            trace=context.trace,
            principal=context.access.principal,
            privacy_max=context.access.privacy_max,
        )


def _operation(payload: Mapping[str, Value]) -> Operation:
    named = payload.get("operation", Operation.CHAT.value)
    try:
        return Operation(str(named))
    except ValueError as error:
        known = ", ".join(Operation)
        raise RequestError(f"`operation` must be one of {known}", param="operation") from error


def _body(payload: Mapping[str, Value], operation: Operation, target: str) -> dict[str, Value]:
    prompt = payload.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError("`prompt` must be a string", param="prompt")
    if operation is Operation.FETCH or (prompt is None and target.startswith("data.")):
        return {}
    if operation is Operation.TUNNEL:
        raise RequestError("a tunnel is opened by peers only", param="operation")
    if operation is Operation.RERANK:
        return dict(parse_rerank({**payload, "model": target}).body)
    if operation is Operation.EMBED and prompt is None:
        return dict(parse_embeddings({**payload, "model": target}).body)
    if operation is Operation.CHAT:
        messages = payload.get("messages")
        if prompt is not None:
            messages = [{"role": "user", "content": prompt}]
        elif messages is None:
            raise RequestError("`prompt` (or `messages`) is missing", param="prompt")
        return {
            "messages": messages_of(messages),
            **sampling(payload),
            **structure_of_chat(payload),
        }
    if prompt is None:
        raise RequestError("`prompt` is missing", param="prompt")
    match operation:
        case Operation.COMPLETE:
            return {"prompt": prompt, **sampling(payload), **structure_of_completion(payload)}
        case Operation.EMBED:
            return {"input": [prompt]}
        case Operation.RUN:
            return {"input": prompt}
