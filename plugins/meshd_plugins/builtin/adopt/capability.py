"""One announced name of an adopted model: requests go on to its server, and its answer comes back.

A request costs one connection, which is closed as soon as the request has ended, for whatever reason: a server
stops generating when its client is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress
from typing import Final

import trio

from meshd_plugins.api import (
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    Operation,
    Refused,
    Request,
)
from meshd_plugins.builtin.adopt.answers import Answer, answer_to
from meshd_plugins.builtin.adopt.calls import TEXT_ONLY, call_of
from meshd_plugins.builtin.adopt.client import Response, within
from meshd_plugins.builtin.adopt.config import ServerConfig
from meshd_plugins.builtin.adopt.embeddings import embed
from meshd_plugins.builtin.adopt.errors import ServerError, TooLarge
from meshd_plugins.builtin.adopt.rates import Timing
from meshd_plugins.builtin.adopt.refusals import failure, refuse
from meshd_plugins.builtin.adopt.served import Served
from meshd_plugins.builtin.adopt.tools import ToolDuty
from meshd_plugins.builtin.adopt.untrusted import Lines
from meshd_plugins.checking import check_media

ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024  # of a stream: about 200,000 tokens
TRAILER_S: Final = 2.0  # for the usage, once the answer is complete


class AdoptedCapability:
    """Implements `meshd_plugins.api.Capability` over a model of another server."""

    def __init__(self, descriptor: Descriptor, served: Served) -> None:
        self._descriptor = descriptor
        self.served = served

    @property
    def descriptor(self) -> Descriptor:
        """What is announced."""
        return self._descriptor

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Pass a request on; see `meshd_plugins.api` for the contract."""
        served = self.served
        if request.operation not in self._descriptor.operations:
            raise Refused(f"{self._descriptor.name} cannot {request.operation}", code="unsupported")
        if request.operation is Operation.EMBED:
            chunks, done = await embed(served, request.body)
            for rows in chunks:
                yield rows
            yield done
            return
        model = self._descriptor.model
        modalities = model.modalities if model is not None else TEXT_ONLY
        duty = ToolDuty(request.body, served.tools)
        asked = duty.body_for(served.kind)
        call = call_of(served.kind, served.model, request.operation, asked, modalities)
        if request.operation is Operation.CHAT:
            await check_media(request.body.get("messages"))
        answer = answer_to(call, request.operation)
        with served.traffic.one():
            stopwatch = _Stopwatch(served)
            async with AsyncExitStack() as stack:
                try:
                    with within(served.config.first_token_s, "the answer's beginning"):
                        response = await stack.enter_async_context(
                            served.client.exchange("POST", call.path, call.body)
                        )
                        if response.status != 200:
                            await refuse(served, response)
                    stream = _Stream(response, answer, served.config)
                    while (chunk := await stream.next()) is not None:
                        for ready in duty.take(chunk):
                            yield ready  # noqa: ASYNC119
                except ServerError as error:
                    raise failure(served, error) from error
            if not answer.is_complete:
                served.troubled()
            done = answer.done()
            stopwatch.note(stream, answer, done)
            left, done = duty.end(done)
        for ready in left:
            yield ready  # noqa: ASYNC119
        yield done  # noqa: ASYNC119


class _Stream:
    """The chunks of one answer, each within its deadline."""

    def __init__(self, response: Response, answer: Answer, config: ServerConfig) -> None:
        self._response = response
        self._answer = answer
        self._lines = Lines()
        self._ready: deque[Chunk] = deque()  # of one piece of the body: bounded by its size
        self._bytes = 0
        self._limit_s = config.first_token_s
        self._between_s = config.between_tokens_s
        self.parts = 0
        self.first_s: float | None = None  # when the first part came
        self.last_s = 0.0

    async def next(self) -> Chunk | None:
        """Return the next chunk; None when no more will come. Raises ServerError, Failed."""
        if self._is_waiting():
            with within(self._limit_s, "the answer's next part"):
                while self._is_waiting() and await self._receive():
                    pass
        if self._ready:
            self._limit_s = self._between_s
            return self._ready.popleft()
        await self._read_trailer()
        return None

    def _is_waiting(self) -> bool:
        return not (self._ready or self._answer.is_complete or self._answer.is_over)

    async def _read_trailer(self) -> None:
        """Wait a moment for the usage, which comes after the end. The answer is complete without it."""
        if not self._answer.is_complete:
            return
        with trio.move_on_after(TRAILER_S), suppress(ServerError, Failed):
            while not self._answer.is_over and await self._receive():
                pass

    async def _receive(self) -> bool:
        """Read a piece of the body; False at its end."""
        piece = await self._response.receive()
        self._bytes += len(piece)
        if self._bytes > ANSWER_BYTES_MAX:
            raise TooLarge(f"the server sent more than {ANSWER_BYTES_MAX} bytes")
        for line in self._lines.feed(piece):
            chunk = self._answer.take(line)
            if chunk is not None:
                self._ready.append(chunk)
                self.parts += 1
                self.last_s = trio.current_time()
                self.first_s = self.last_s if self.first_s is None else self.first_s
        return bool(piece)


class _Stopwatch:
    """Times one request at our end, for servers that do not say."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._began_s = trio.current_time()
        self._turn = served.traffic.begun
        self._was_alone = served.traffic.busy == 1

    def note(self, stream: _Stream, answer: Answer, done: Done) -> None:
        """The answer is complete: remember how fast it came, if nothing else ran meanwhile."""
        served = self._served
        if not self._was_alone or served.traffic.begun != self._turn or stream.first_s is None:
            return
        timing = answer.timing()
        if timing is None:
            waited_s = stream.first_s - self._began_s
            cold = served.is_warm is False
            # A server that does not count its tokens sends one a part, as far as they are known.
            tokens = done.usage.completion_tokens or stream.parts
            timing = Timing(
                prefill_tokens=0 if cold else done.usage.prompt_tokens - done.usage.cached_tokens,
                prefill_s=waited_s,
                decode_tokens=tokens - 1,
                decode_s=stream.last_s - stream.first_s,
                load_s=waited_s if cold else 0.0,
            )
        served.meter.note(timing)
