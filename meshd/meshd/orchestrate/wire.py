"""How the events of a capability travel between peers as plain values.

Short keys, and nothing is sent that is empty: a token's chunk is about 30 bytes. Decoding trusts
nothing: from a peer that sends something else comes `Failed` with code `peer_fault`, and what it says
later is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Final

from meshd.orchestrate.decoding import Malformed, count, mapping, sequence, text, typed
from meshd_plugins.api import Chunk, Done, Failed, TokenLogprob, ToolCallDelta, Usage, Value

TOOL_CALLS_MAX: Final = 128  # of one answer
LOGPROBS_MAX: Final = 4_096  # of one chunk
LIKELIEST_MAX: Final = 20  # beside each
TOKEN_BYTES_MAX: Final = 1_024

_TEXT, _TOKENS, _POSITION, _SEED, _DATA, _TYPE = "t", "k", "p", "s", "d", "c"
_REASONING, _TOOL_CALLS, _LOGPROBS = "h", "f", "l"
_REASON, _PROMPT, _COMPLETION, _DETAIL = "r", "u", "v", "x"
_THOUGHT, _CACHED = "w", "y"


def chunk_to_value(chunk: Chunk) -> dict[str, Value]:
    """What a CHUNK frame carries."""
    value: dict[str, Value] = {}
    if chunk.text:
        value[_TEXT] = chunk.text
    if chunk.token_ids:
        value[_TOKENS] = list(chunk.token_ids)
    if chunk.position:
        value[_POSITION] = chunk.position
    if chunk.seed is not None:
        value[_SEED] = chunk.seed
    if chunk.data:
        value[_DATA] = chunk.data
    if chunk.content_type:
        value[_TYPE] = chunk.content_type
    if chunk.reasoning:
        value[_REASONING] = chunk.reasoning
    if chunk.tool_calls:
        value[_TOOL_CALLS] = [[c.index, c.id, c.name, c.arguments] for c in chunk.tool_calls]
    if chunk.logprobs:
        value[_LOGPROBS] = [
            [each.token, each.logprob, each.data, [[t.token, t.logprob, t.data] for t in each.top]]
            for each in chunk.logprobs
        ]
    return value


def done_to_value(done: Done) -> dict[str, Value]:
    """What the trailer of an END frame carries."""
    value: dict[str, Value] = {_REASON: done.finish_reason}
    if done.usage.prompt_tokens:
        value[_PROMPT] = done.usage.prompt_tokens
    if done.usage.completion_tokens:
        value[_COMPLETION] = done.usage.completion_tokens
    if done.usage.reasoning_tokens:
        value[_THOUGHT] = done.usage.reasoning_tokens
    if done.usage.cached_tokens:
        value[_CACHED] = done.usage.cached_tokens
    if done.detail:
        value[_DETAIL] = done.detail
    return value


def chunk_from_value(value: Value) -> Chunk:
    """Decode a CHUNK.

    Raises:
        Failed: code `peer_fault`; the peer sent something that is no chunk.
    """
    try:
        table = mapping(value, "chunk")
        seed = table.get(_SEED)
        return Chunk(
            text=text(table.get(_TEXT, ""), "text"),
            token_ids=tuple(
                count(token, "token id") for token in sequence(table.get(_TOKENS, ()), "token ids")
            ),
            position=count(table.get(_POSITION, 0), "position"),
            seed=None if seed is None else count(seed, "seed"),
            data=typed(table.get(_DATA, b""), bytes, "data"),
            content_type=text(table.get(_TYPE, ""), "content type"),
            reasoning=text(table.get(_REASONING, ""), "reasoning"),
            tool_calls=tuple(
                _tool_call(each) for each in _rows(table, _TOOL_CALLS, TOOL_CALLS_MAX, "tool calls")
            ),
            logprobs=tuple(
                _logprob(each) for each in _rows(table, _LOGPROBS, LOGPROBS_MAX, "logprobs")
            ),
        )
    except Malformed as error:
        raise Failed(f"the peer sent a malformed chunk: {error}", code="peer_fault") from error


def done_from_value(value: Value) -> Done:
    """Decode a trailer.

    Raises:
        Failed: code `peer_fault`; without a trailer that says how it ended, an answer is not complete.
    """
    try:
        table = mapping(value, "trailer")
        reason = text(table.get(_REASON), "finish reason")
        if not reason:
            raise Malformed("finish reason: it is empty")
        return Done(
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=count(table.get(_PROMPT, 0), "prompt tokens"),
                completion_tokens=count(table.get(_COMPLETION, 0), "completion tokens"),
                reasoning_tokens=count(table.get(_THOUGHT, 0), "reasoning tokens"),
                cached_tokens=count(table.get(_CACHED, 0), "cached tokens"),
            ),
            detail=mapping(table.get(_DETAIL, {}), "detail"),
        )
    except Malformed as error:
        raise Failed(f"the peer sent a malformed trailer: {error}", code="peer_fault") from error


def _rows(table: Mapping[str, Value], key: str, most: int, where: str) -> Sequence[Value]:
    found = sequence(table.get(key, ()), where)
    if len(found) > most:
        raise Malformed(f"{where}: {len(found)}, of at most {most}")
    return found


def _tool_call(value: Value) -> ToolCallDelta:
    row = sequence(value, "tool call")
    if len(row) != 4:
        raise Malformed("tool call: expected four fields")
    index = count(row[0], "tool call")
    if index >= TOOL_CALLS_MAX:
        raise Malformed(f"tool call: number {index}, of at most {TOOL_CALLS_MAX}")
    identity, name, arguments = (text(field, "tool call") for field in row[1:])
    return ToolCallDelta(index, identity, name, arguments)


def _logprob(value: Value) -> TokenLogprob:
    row = sequence(value, "logprob")
    if len(row) != 4:
        raise Malformed("logprob: expected four fields")
    likeliest = sequence(row[3], "likeliest tokens")
    if len(likeliest) > LIKELIEST_MAX:
        raise Malformed(f"likeliest tokens: {len(likeliest)}, of at most {LIKELIEST_MAX}")
    top: list[TokenLogprob] = []
    for each in likeliest:
        entry = sequence(each, "likeliest token")
        if len(entry) != 3:
            raise Malformed("likeliest token: expected three fields")
        top.append(_token(entry))
    return replace(_token(row), top=tuple(top))


def _token(row: Sequence[Value]) -> TokenLogprob:
    logprob, data = row[1], typed(row[2], bytes, "token")
    if not isinstance(logprob, float) or not isfinite(logprob) or logprob > 0:
        raise Malformed("logprob: expected a finite number that is not above 0")
    if len(data) > TOKEN_BYTES_MAX:
        raise Malformed(f"token: {len(data)} bytes, of at most {TOKEN_BYTES_MAX}")
    return TokenLogprob(count(row[0], "token id"), logprob, data)
