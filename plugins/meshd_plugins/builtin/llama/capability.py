"""One announced name of a model: requests checked here, answered by the worker."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

from meshd_plugins.api import (
    BadRequest,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    Operation,
    Refused,
    Request,
    Usage,
    Value,
    Worker,
)
from meshd_plugins.builtin.llama.sampling import SEEDS, read_sampling

MESSAGES_MAX: Final = 1024
ROLES: Final = ("system", "developer", "user", "assistant", "tool")


class LlamaCapability:
    """Implements `meshd_plugins.api.Capability` over one running worker."""

    def __init__(self, descriptor: Descriptor, worker: Worker) -> None:
        self._descriptor = descriptor
        self._worker = worker

    @property
    def descriptor(self) -> Descriptor:
        """What is announced."""
        return self._descriptor

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Generate; see `meshd_plugins.api` for the contract."""
        if request.operation not in self._descriptor.operations:
            raise Refused(f"{self._descriptor.name} cannot {request.operation}", code="unsupported")
        message = worker_message(request.operation, request.body)
        # The caller closes this generator (`aclosing`), and so the call: the api module asks it to.
        async with self._worker.call(message) as call:
            while (item := await call.receive()) is not None:
                done = item.get("done")
                if isinstance(done, Mapping):
                    yield _done(done)  # noqa: ASYNC119
                    return
                yield _chunk(item)  # noqa: ASYNC119
        raise Failed("the worker ended the answer without saying why", code="failed")


def worker_message(operation: Operation, body: Mapping[str, Value]) -> dict[str, Value]:
    """Check a request and put it into the worker's words. Raises BadRequest."""
    sampling = read_sampling(body, default_seed=secrets.randbelow(SEEDS))
    message: dict[str, Value] = {"operation": operation.value, "sampling": sampling.to_wire()}
    if operation is Operation.CHAT:
        message["messages"] = _messages(body.get("messages"))
        return message
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadRequest("prompt must be a string that is not empty")
    message["prompt"] = prompt
    return message


def _messages(value: Value) -> list[Value]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise BadRequest("messages must be a list that is not empty")
    if len(value) > MESSAGES_MAX:
        raise BadRequest(f"messages holds {len(value)}; the most is {MESSAGES_MAX}")
    messages: list[Value] = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise BadRequest(f"messages[{number}] must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise BadRequest(f"messages[{number}].role must be one of {', '.join(ROLES)}")
        content = _content(message.get("content"), f"messages[{number}].content")
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return messages


def _content(value: Value, where: str) -> str:
    """Return the text of a message: a string, or OpenAI's list of parts when all are text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise BadRequest(f"{where} must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        text = (
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        )
        if not isinstance(text, str):
            raise BadRequest(f"{where}: this model reads text only")
        texts.append(text)
    return "".join(texts)


def _chunk(item: Mapping[str, Value]) -> Chunk:
    tokens, position, seed = item.get("token_ids"), item.get("position"), item.get("seed")
    return Chunk(
        text=str(item.get("text", "")),
        token_ids=tuple(t for t in tokens if isinstance(t, int))
        if isinstance(tokens, Sequence)
        else (),
        position=position if isinstance(position, int) else 0,
        seed=seed if isinstance(seed, int) else None,
    )


def _done(done: Mapping[str, Value]) -> Done:
    prompt, completion = done.get("prompt_tokens"), done.get("completion_tokens")
    return Done(
        finish_reason=str(done.get("finish_reason", "stop")),
        usage=Usage(
            prompt_tokens=prompt if isinstance(prompt, int) else 0,
            completion_tokens=completion if isinstance(completion, int) else 0,
        ),
        detail={
            key: done[key]
            for key in ("first_token_s", "total_s", "decode_tokens_per_s")
            if key in done
        },
    )
