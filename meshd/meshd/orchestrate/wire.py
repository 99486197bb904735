"""How the events of a capability travel between peers as plain values.

Short keys, and nothing is sent that is empty: a token's chunk is about 30 bytes. Decoding trusts
nothing: from a peer that sends something else comes `Failed` with code `peer_fault`, and what it says
later is not read.
"""

from __future__ import annotations

from meshd.orchestrate.decoding import Malformed, count, mapping, sequence, text, typed
from meshd_plugins.api import Chunk, Done, Failed, Usage, Value

_TEXT, _TOKENS, _POSITION, _SEED, _DATA, _TYPE = "t", "k", "p", "s", "d", "c"
_REASON, _PROMPT, _COMPLETION, _DETAIL = "r", "u", "v", "x"


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
    return value


def done_to_value(done: Done) -> dict[str, Value]:
    """What the trailer of an END frame carries."""
    value: dict[str, Value] = {_REASON: done.finish_reason}
    if done.usage.prompt_tokens:
        value[_PROMPT] = done.usage.prompt_tokens
    if done.usage.completion_tokens:
        value[_COMPLETION] = done.usage.completion_tokens
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
            ),
            detail=mapping(table.get(_DETAIL, {}), "detail"),
        )
    except Malformed as error:
        raise Failed(f"the peer sent a malformed trailer: {error}", code="peer_fault") from error
