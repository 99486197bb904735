"""The choice of an answer in OpenAI's two shapes, whole and piece by piece. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.edge.events_json import logprob_to_plain
from meshd.orchestrate.events import ANSWER, AskEvent, Piece
from meshd_plugins.api import Operation, TokenLogprob, ToolCallDelta, Value

TOOL_CALLS_MAX = 128  # of one answer; a peer that sends more is not believed


@dataclass(slots=True)
class _Call:
    """One call, as far as it was told."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class Part:
    """What one event adds to the answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, event: AskEvent, text: str) -> Part:
        """Of an event, and the text that it adds."""
        if isinstance(event, Piece) and event.subtask == ANSWER:
            calls = tuple(call for call in event.tool_calls if 0 <= call.index < TOOL_CALLS_MAX)
            return cls(text, event.reasoning, calls, event.logprobs)
        return cls(text)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls or self.logprobs)


class Choice:
    """The one choice of an answer, of a chat or of a completion."""

    def __init__(self, operation: Operation) -> None:
        self._completion = operation is Operation.COMPLETE
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, _Call] = {}
        self._logprobs: list[TokenLogprob] = []
        self._offset = 0  # of the next token in the text, for completions
        self.begun = False  # a delta was told

    def add(self, part: Part) -> None:
        """Take in a part, for the whole answer."""
        self._texts.append(part.text)
        self._thoughts.append(part.reasoning)
        self._logprobs += part.logprobs
        for delta in part.tool_calls:
            call = self._calls.setdefault(delta.index, _Call())
            call.id, call.name = call.id or delta.id, call.name or delta.name
            call.arguments.append(delta.arguments)

    def whole(self, finish_reason: str) -> dict[str, Value]:
        """The complete answer, of all parts that were added."""
        text = "".join(self._texts)
        logprobs = self._told(self._logprobs)
        if self._completion:
            return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        message: dict[str, Value] = {"role": "assistant", "content": text, "refusal": None}
        if thought := "".join(self._thoughts):
            message["reasoning_content"] = thought
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(call.arguments)},
                }
                for _, call in sorted(self._calls.items())
            ]
        return {
            "index": 0,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def delta(self, part: Part) -> dict[str, Value]:
        """A part, as a chunk of a stream has it."""
        logprobs = self._told(part.logprobs)
        if self._completion:
            self.begun = True
            return {"index": 0, "text": part.text, "logprobs": logprobs, "finish_reason": None}
        delta: dict[str, Value] = {}
        if not self.begun:
            delta["role"] = "assistant"
        if part.text or (not self.begun and not part.reasoning and not part.tool_calls):
            delta["content"] = part.text
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.tool_calls:
            delta["tool_calls"] = [_call_delta(each) for each in part.tool_calls]
        self.begun = True
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def end(self, finish_reason: str) -> dict[str, Value]:
        """The chunk that ends a complete answer."""
        if self._completion:
            return {"index": 0, "text": "", "logprobs": None, "finish_reason": finish_reason}
        return {"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish_reason}

    def _told(self, logprobs: Sequence[TokenLogprob]) -> Value:
        if not logprobs:
            return None
        if not self._completion:
            return {"content": [logprob_to_plain(each) for each in logprobs], "refusal": None}
        tokens = [_text(each) for each in logprobs]
        offsets: list[Value] = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": list(tokens),
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [{_text(top): top.logprob for top in each.top} for each in logprobs],
            "text_offset": offsets,
        }


def _text(each: TokenLogprob) -> str:
    return each.data.decode("utf-8", "replace")


def _call_delta(delta: ToolCallDelta) -> dict[str, Value]:
    function: dict[str, Value] = {"arguments": delta.arguments}
    if delta.name:
        function = {"name": delta.name, "arguments": delta.arguments}
    told: dict[str, Value] = {"index": delta.index}
    if delta.id:
        told |= {"id": delta.id, "type": "function"}
    return {**told, "function": function}
