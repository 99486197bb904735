"""From what a server streams to events: chat and completions as OpenAI has them, and Ollama's own lines. Pure.

Invariant: an answer is complete only once its server has said how it ended (`finish_reason`, `done`). A stream
that stops before that is lost, whatever came; `[DONE]` alone says nothing of how it ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Protocol

from meshd_plugins.api import (
    Chunk,
    Done,
    Failed,
    Operation,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    Value,
)
from meshd_plugins.builtin.adopt.calls import Call
from meshd_plugins.builtin.adopt.errors import Broken
from meshd_plugins.builtin.adopt.rates import Timing, from_llama_server, from_ollama
from meshd_plugins.builtin.adopt.untrusted import (
    ServerSentEvents,
    clean,
    count,
    error_message,
    parse_json,
    rows,
    sound,
    table,
)

FINISHES: Final[Mapping[str, str]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
"""Ways for an answer to be complete; with another one ("abort", "error", "load") it is not."""

TOOL_CALLS_MAX: Final = 128
TOOL_NAME_CHARS_MAX: Final = 256
LOGPROBS_MAX: Final = 4_096  # of one chunk
LIKELIEST_MAX: Final = 20  # beside each
LOGPROB_MAX: Final = 1e6
TOKEN_BYTES_MAX: Final = 1_024


class Answer(Protocol):
    """What is made of a stream."""

    is_over: bool  # nothing more is worth waiting for

    @property
    def is_complete(self) -> bool:
        """Whether the server said how it ended."""
        ...

    def take(self, line: bytes) -> Chunk | None:
        """Take a line of the stream. Raises Broken, TooLarge; Failed when the server tells an error."""
        ...

    def done(self) -> Done:
        """The end. Raises Failed with code `stream_lost` unless the answer is complete."""
        ...

    def timing(self) -> Timing | None:
        """What the server says of its time, if it does."""
        ...


def answer_to(call: Call, operation: Operation) -> Answer:
    """Make what reads the answer to a call."""
    return OllamaAnswer() if call.is_native else OpenAIAnswer(operation)


class _Base:
    def __init__(self) -> None:
        self.is_over = False
        self.usage: Usage | None = None
        self._finish = ""
        self._timing: Timing | None = None

    @property
    def is_complete(self) -> bool:
        return bool(self._finish)

    def timing(self) -> Timing | None:
        return self._timing

    def done(self) -> Done:
        if not self._finish:
            raise Failed("the server's answer stopped before its end", code="stream_lost")
        detail: dict[str, Value] = {}
        if self.usage is None:
            detail["usage"] = "not told by the server"
        if self._timing is not None and self._timing.decode_rate:
            detail["decode_tokens_per_s"] = round(self._timing.decode_rate, 1)
        return Done(self._finish, self.usage or Usage(), detail)

    def _finished(self, reason: Value) -> None:
        if reason is None or self._finish:
            return
        finish = FINISHES.get(reason) if isinstance(reason, str) else None
        if finish is None:
            raise Failed(f"the server gave up: {clean(reason, 40) or 'no reason'}", code="failed")
        self._finish = finish

    def _check(self, value: Value) -> Mapping[str, Value]:
        """The object of an event. Raises Broken; Failed when it tells an error."""
        if not isinstance(value, Mapping):
            raise Broken("the server streamed what is no object")
        if value.get("error") is not None:
            raise Failed(f"the server failed: {error_message(value) or 'no reason'}", code="failed")
        return value


class OpenAIAnswer(_Base):
    """`chat.completion.chunk`s or `text_completion`s in server-sent events."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self._operation = operation
        self._events = ServerSentEvents()

    def take(self, line: bytes) -> Chunk | None:
        """Take a line."""
        data = self._events.take(line)
        if data is None or self.is_over:
            return None
        if data.strip() == b"[DONE]":
            self.is_over = True
            return None
        event = self._check(parse_json(data))
        self._note_figures(event)
        chunk: Chunk | None = None
        for choice in rows(event.get("choices"), 1):
            if not self._finish:
                chunk = self._chunk(choice)
            self._finished(choice.get("finish_reason"))
        return chunk

    def _note_figures(self, event: Mapping[str, Value]) -> None:
        usage = event.get("usage")
        if isinstance(usage, Mapping):
            self.usage = Usage(
                prompt_tokens=count(usage.get("prompt_tokens")),
                completion_tokens=count(usage.get("completion_tokens")),
                reasoning_tokens=count(
                    table(usage.get("completion_tokens_details")).get("reasoning_tokens")
                ),
                cached_tokens=count(table(usage.get("prompt_tokens_details")).get("cached_tokens")),
            )
        self._timing = from_llama_server(event.get("timings")) or self._timing

    def _chunk(self, choice: Mapping[str, Value]) -> Chunk | None:
        likely = table(choice.get("logprobs"))
        logprobs = _logprobs(likely.get("content") or _rows_of_columns(likely))
        if self._operation is Operation.COMPLETE:
            return _chunk(Chunk(text=_sound(choice.get("text")), logprobs=logprobs))
        said = table(choice.get("delta"))
        return _chunk(
            Chunk(
                text=_sound(said.get("content")),
                reasoning=_sound(said.get("reasoning_content")) or _sound(said.get("reasoning")),
                tool_calls=_tool_calls(said.get("tool_calls")),
                logprobs=logprobs,
            )
        )


class OllamaAnswer(_Base):
    """The lines of `/api/generate`."""

    def take(self, line: bytes) -> Chunk | None:
        """Take a line."""
        if self.is_over or not line.strip():
            return None
        event = self._check(parse_json(line))
        chunk = _chunk(Chunk(text=_sound(event.get("response"))))
        if event.get("done") is True:
            self._finished(event.get("done_reason") or "stop")
            self._timing = from_ollama(event)
            if "eval_count" in event:
                self.usage = Usage(
                    prompt_tokens=count(event.get("prompt_eval_count")),
                    completion_tokens=count(event.get("eval_count")),
                )
            self.is_over = True
        return chunk


def _chunk(chunk: Chunk) -> Chunk | None:
    """The chunk, unless there is nothing in it."""
    return chunk if chunk.text or chunk.reasoning or chunk.tool_calls or chunk.logprobs else None


def _sound(value: Value) -> str:
    return sound(value) if isinstance(value, str) else ""


def _tool_calls(value: Value) -> tuple[ToolCallDelta, ...]:
    """Parts of calls. Raises Broken: more than a mesh carries."""
    found: list[ToolCallDelta] = []
    for number, row in enumerate(rows(value, TOOL_CALLS_MAX)):
        index, function = row.get("index", number), table(row.get("function"))
        if not isinstance(index, int) or not 0 <= index < TOOL_CALLS_MAX:
            raise Broken("the server streamed a tool call out of order")
        found.append(
            ToolCallDelta(
                index=int(index),
                id=clean(row.get("id"), TOOL_NAME_CHARS_MAX),
                name=clean(function.get("name"), TOOL_NAME_CHARS_MAX),
                arguments=_sound(function.get("arguments")),
            )
        )
    return tuple(found)


def _logprobs(value: Value) -> tuple[TokenLogprob, ...]:
    """How likely tokens were, as far as they make sense."""
    found: list[TokenLogprob] = []
    for row in rows(value, LOGPROBS_MAX):
        one = _logprob(row)
        if one is not None:
            top = map(_logprob, rows(row.get("top_logprobs"), LIKELIEST_MAX))
            found.append(replace(one, top=tuple(each for each in top if each is not None)))
    return tuple(found)


def _rows_of_columns(likely: Mapping[str, Value]) -> Value:
    """The same in the older shape of completions, which vLLM has: a list for each field."""
    tokens, logprobs = likely.get("tokens"), likely.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(logprobs, list):
        return None
    tops = likely.get("top_logprobs")
    found: list[Value] = []
    for number, (token, logprob) in enumerate(zip(tokens, logprobs, strict=False)):
        top = table(tops[number] if isinstance(tops, list) and number < len(tops) else None)
        ranked: list[Value] = [{"token": name, "logprob": value} for name, value in top.items()]
        found.append({"token": token, "logprob": logprob, "top_logprobs": ranked})
    return found


def _logprob(row: Mapping[str, Value]) -> TokenLogprob | None:
    logprob, data = row.get("logprob"), row.get("bytes")
    if isinstance(logprob, bool) or not isinstance(logprob, int | float):
        return None
    if not -LOGPROB_MAX <= logprob <= LOGPROB_MAX:  # nor is infinity, or no number
        return None
    token = _sound(row.get("token")).encode()
    if isinstance(data, list) and all(type(byte) is int and 0 <= byte < 256 for byte in data):
        token = bytes(byte for byte in data if isinstance(byte, int))
    return TokenLogprob(count(row.get("id")), min(float(logprob), 0.0), token[:TOKEN_BYTES_MAX])
