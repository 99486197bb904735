"""One ask, run for an HTTP client: it ends when the client leaves, when time is up, or answered.

Two things are watched at once, the mesh's events and the connection. A client that has gone cancels
its ask at once, here and on the peers, whether or not anything was being written to it.
"""

from __future__ import annotations

import codecs
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final, assert_never

import trio

from meshd.edge.errors import ClientGone, unwrapped
from meshd.edge.http import wait_gone
from meshd.orchestrate.events import (
    ANSWER,
    Answered,
    Ask,
    AskEvent,
    AttemptFailed,
    Piece,
    Planned,
    Routed,
    SubtaskDone,
)
from meshd_plugins.api import BadRequest, Failed, Usage, Value

if TYPE_CHECKING:
    from starlette.types import Receive, Send

    from meshd.orchestrate.service import MeshService, Take

Header = tuple[bytes, bytes]

_TEXT_TYPES: Final = ("application/json", "application/xml", "application/toml", "application/yaml")


async def asking(service: MeshService, ask: Ask, grace_s: float, take: Take) -> None:
    """Run an ask. The mesh answers for its own deadline; this is the net below it.

    Raises:
        Failed: `deadline_exceeded`, when the mesh did not end it by itself; and what `ask` raises.
    """
    with trio.move_on_after(ask.deadline_s + grace_s):
        await service.ask(ask, take)
        return
    raise Failed(f"no answer within {ask.deadline_s:g} s", code="deadline_exceeded")


async def until_gone(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work`; cancel it when the client's connection closes.

    Raises:
        ClientGone: it did; and whatever `work` raises, unwrapped.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        await wait_gone(receive)
        gone = True
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await work()
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        raise unwrapped(group) from None
    if gone:
        raise ClientGone


class EventStream:
    """A response written bit by bit; its status and headers go out with the first bit.

    Until then the request can still be answered with an error of its own status. When nothing was
    written for `beat_s`, `beat` is written, so that clients and proxies with read deadlines hold on.
    """

    def __init__(
        self, receive: Receive, send: Send, content_type: bytes, beat: bytes, beat_s: float
    ) -> None:
        self._receive = receive
        self._send = send
        self._beat = beat
        self._beat_s = beat_s
        self._lock = trio.Lock()
        self._wrote_at_s = trio.current_time()
        self.headers: list[Header] = [
            (b"content-type", content_type),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        self.started = False

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`, which writes, beside the heartbeat and the watch for the client's leaving.

        When `work` returns, the response is ended. That happens outside the watch: the end of a response
        looks to the watch like the client's leaving, and would cancel its own last steps.
        """

        async def beating() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat_always)
                await work()
                nursery.cancel_scope.cancel()

        await until_gone(self._receive, beating)
        await self._close()

    async def write(self, data: bytes) -> None:
        """Write one whole event or line.

        Shielded, since half a write would spoil the connection; the server bounds its time.
        """
        with trio.CancelScope(shield=True):
            await self._write(data)

    async def fail(self, data: bytes) -> None:
        """End a response that has begun with a last event which says what went wrong."""
        await self.write(data)
        await self._close()

    async def _write(self, data: bytes) -> None:
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": self.headers}
                )
            self._wrote_at_s = trio.current_time()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _close(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def _beat_always(self) -> None:
        while True:
            due_s = self._wrote_at_s + self._beat_s
            if due_s <= trio.current_time():
                await self.write(self._beat)
            else:
                await trio.sleep_until(due_s)


class Progress:
    """What has been seen of an ask so far."""

    def __init__(self) -> None:
        self._started_s = trio.current_time()
        self._nodes: dict[str, str] = {}
        self._decoder: codecs.IncrementalDecoder | None = None
        self._content_type = ""
        self.first_s: float | None = None
        self.answered: Answered | None = None

    def note(self, event: AskEvent) -> str:
        """Take an event in; the text it adds to the answer, often "".

        Raises:
            BadRequest: `binary_answer`: the answer is data that text cannot carry.
        """
        match event:
            case Piece(subtask=subtask) if subtask == ANSWER:
                if self.first_s is None:
                    self.first_s = trio.current_time() - self._started_s
                return event.text + self._decoded(event) if event.data else event.text
            case Routed(subtask=subtask, node_name=node_name):
                self._nodes[subtask] = node_name
            case Answered():
                self.answered = event
                return self._decoder.decode(b"", final=True) if self._decoder else ""
            case Planned() | AttemptFailed() | Piece() | SubtaskDone():
                pass
            case _:
                assert_never(event)
        return ""

    def complete(self) -> Answered:
        """The end of the answer.

        Raises:
            Failed: `stream_lost`, when the events ended without it: what there is, is not an answer.
        """
        if self.answered is None:
            raise Failed("the answer ended before it was complete", code="stream_lost")
        return self.answered

    def served_by(self) -> str:
        """The nodes that work on it, in the order in which they were given work, comma-separated."""
        return ",".join(dict.fromkeys(self._nodes.values()))

    def served_by_header(self) -> Header:
        """The same as a response header; names that a header cannot carry are mended."""
        text = "".join(c if " " <= c <= "~" else "?" for c in self.served_by())
        return (b"x-meshd-served-by", text.encode("ascii"))

    def _decoded(self, piece: Piece) -> str:
        self._content_type = self._content_type or piece.content_type
        kind = self._content_type.partition(";")[0].strip().lower()
        if not (
            kind.startswith("text/") or kind in _TEXT_TYPES or kind.endswith(("+json", "+xml"))
        ):
            raise BadRequest(
                f"the answer is {kind or 'data of no stated type'}, which a chat cannot carry; "
                "`meshd ask NAME --output FILE` fetches it",
                code="binary_answer",
            )
        if self._decoder is None:
            self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return self._decoder.decode(piece.data)


def usage_of(usage: Usage) -> dict[str, Value]:
    """Token counts in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def part_of(done: SubtaskDone) -> Mapping[str, Value]:
    """One entry of the provenance: who did this part and how long it took, and who did not."""
    part: dict[str, Value] = {
        "subtask": done.subtask,
        "node": done.node_name,
        "name": done.name,
        "first_s": round(done.first_s, 6),
        "total_s": round(done.total_s, 6),
        "usage": usage_of(done.usage),
        "finish_reason": done.finish_reason,
        "detail": done.detail,
    }
    if done.failed:
        part["failed"] = [failed_attempt(each) for each in done.failed]
    return part


def failed_attempt(event: AttemptFailed) -> dict[str, Value]:
    """Who did not do it, and why, in its own words."""
    return {
        "node": event.node,
        "node_name": event.node_name,
        "capability_id": event.capability_id,
        "attempt": event.attempt,
        "refused": event.refused,
        "code": event.code,
        "reason": event.reason,
    }


def extension_of(request_id: str, answered: Answered) -> Mapping[str, Value]:
    """The `meshd` field of an answer."""
    return {
        "request_id": request_id,
        "total_s": round(answered.total_s, 6),
        "parts": [part_of(part) for part in answered.parts],
    }
