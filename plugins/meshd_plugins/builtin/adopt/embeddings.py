"""Vectors of texts from an adopted server, as `meshd_plugins.vectors` has them.

Vectors are asked for in base64, and taken as lists of numbers too. They are cut to the wanted length here, since
not every server does, and Ollama is asked by its own API, whose OpenAI endpoint cuts long texts silently.
"""

from __future__ import annotations

import base64
import binascii
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from meshd_plugins.api import BadRequest, Chunk, Done, Usage, Value
from meshd_plugins.builtin.adopt.calls import Call, to_json
from meshd_plugins.builtin.adopt.client import within
from meshd_plugins.builtin.adopt.config import Kind
from meshd_plugins.builtin.adopt.errors import Broken, ServerError
from meshd_plugins.builtin.adopt.refusals import failure, refuse
from meshd_plugins.builtin.adopt.served import Served
from meshd_plugins.builtin.adopt.untrusted import count, parse_json, table
from meshd_plugins.vectors import (
    ANSWER_BYTES_MAX,
    CHUNK_BYTES,
    DIMENSIONS_MAX,
    FLOAT_BYTES,
    INPUTS_MAX,
    ROWS_TYPE,
    all_finite,
    to_bytes,
    to_floats,
)

ROW_BYTES_MAX: Final = 512 * 1024  # of one vector as the server writes it
HEAD_BYTES_MAX: Final = 64 * 1024
LARGE_BYTES: Final = 128 * 1024  # what is more is read in a thread: it would hold up the daemon
_reading = trio.CapacityLimiter(2)


async def embed(served: Served, body: Mapping[str, Value]) -> tuple[tuple[Chunk, ...], Done]:
    """Ask for the vectors of a request. Raises BadRequest, Refused, Failed."""
    texts, dimensions = _texts(body.get("input")), _dimensions(body.get("dimensions"))
    call = _call(served.kind, served.model, texts, truncate=body.get("truncate") is True)
    bytes_max = min(2 * ANSWER_BYTES_MAX, HEAD_BYTES_MAX + len(texts) * ROW_BYTES_MAX)
    with served.traffic.one():
        try:
            with within(served.config.first_token_s, "the vectors"):
                async with served.client.exchange("POST", call.path, call.body) as response:
                    if response.status != 200:
                        await refuse(served, response)
                    raw = await response.read(bytes_max)
            if len(raw) <= LARGE_BYTES:
                return read_vectors(raw, len(texts), dimensions)
            return await trio.to_thread.run_sync(
                read_vectors, raw, len(texts), dimensions, limiter=_reading
            )
        except ServerError as error:
            raise failure(served, error) from error


def read_vectors(raw: bytes, texts: int, dimensions: int) -> tuple[tuple[Chunk, ...], Done]:
    """Read an answer of OpenAI's or Ollama's shape. Raises Broken: it is not what was asked for.

    Args:
        raw: the answer.
        texts: how many were asked about.
        dimensions: that a vector is to have; 0: as many as it has.
    """
    answer = table(parse_json(raw))
    listed = answer.get("embeddings")
    rows = _by_index(answer.get("data"), texts) if listed is None else listed
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes) or len(rows) != texts:
        raise Broken("the server sent another number of vectors than there are texts")
    vectors = [_vector(row, dimensions) for row in rows]
    length = len(vectors[0])
    if any(len(vector) != length for vector in vectors):
        raise Broken("the server sent vectors of different lengths")
    at_once = max(1, CHUNK_BYTES // (length * FLOAT_BYTES))
    chunks = tuple(
        Chunk(
            data=b"".join(to_bytes(vector) for vector in vectors[first : first + at_once]),
            position=first,
            content_type=ROWS_TYPE,
        )
        for first in range(0, texts, at_once)
    )
    told = count(table(answer.get("usage")).get("prompt_tokens"))
    tokens = told or count(answer.get("prompt_eval_count"))
    detail: dict[str, Value] = {"dimensions": length, "texts": texts}
    if not tokens:
        detail["usage"] = "not told by the server"
    return chunks, Done(usage=Usage(prompt_tokens=tokens), detail=detail)


def _by_index(data: Value, texts: int) -> list[Value]:
    """The vectors of OpenAI's list, in the order of their texts. Raises Broken."""
    if not isinstance(data, Sequence) or isinstance(data, str | bytes) or len(data) != texts:
        raise Broken("the server sent another number of vectors than there are texts")
    found: dict[int, Value] = {}
    for number, row in enumerate(data):
        index = table(row).get("index", number)
        if not isinstance(index, int) or isinstance(index, bool) or index in found:
            raise Broken("the server sent vectors without an order")
        found[index] = table(row).get("embedding")
    if sorted(found) != list(range(texts)):
        raise Broken("the server sent vectors without an order")
    return [found[index] for index in range(texts)]


def _vector(value: Value, dimensions: int) -> array[float]:
    """One vector, cut to `dimensions` where it is longer. Raises Broken."""
    try:
        if isinstance(value, str):
            vector = to_floats(base64.b64decode(value, validate=True))
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            vector = array("f", [_finite(number) for number in value])
        else:
            raise Broken("the server sent what is no vector")
    except (binascii.Error, ValueError, OverflowError) as error:
        raise Broken("the server sent what is no vector") from error
    if not 0 < len(vector) <= DIMENSIONS_MAX or not all_finite(vector):
        raise Broken("the server sent what is no vector")
    if not dimensions or dimensions == len(vector):
        return vector
    if dimensions > len(vector):
        raise BadRequest(f"the model's vectors have {len(vector)} dimensions, not {dimensions}")
    cut = vector[:dimensions]
    norm = math.sqrt(sum(number * number for number in cut))
    return array("f", [number / norm for number in cut]) if norm else cut


def _finite(value: Value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Broken("the server sent what is no vector")
    return float(value)


def _call(kind: Kind, model: str, texts: Sequence[str], *, truncate: bool) -> Call:
    if kind is Kind.OLLAMA:
        native: dict[str, Value] = {"model": model, "input": list(texts), "truncate": truncate}
        return Call("/api/embed", to_json(native), is_native=True)
    asked: dict[str, Value] = {
        "model": model,
        "input": list(texts),
        "encoding_format": "base64",
    }
    if truncate and kind is Kind.VLLM:
        asked["truncate_prompt_tokens"] = -1
    return Call("/v1/embeddings", to_json(asked))


def _texts(value: Value) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, Sequence)
        or isinstance(texts, bytes)
        or not 0 < len(texts) <= INPUTS_MAX
    ):
        raise BadRequest(f"input must be a list of 1 to {INPUTS_MAX} texts")
    found = [text for text in texts if isinstance(text, str) and text]
    if len(found) != len(texts):
        raise BadRequest("input must hold texts that are not empty")
    return found


def _dimensions(value: Value) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= DIMENSIONS_MAX:
        raise BadRequest(f"dimensions must be an integer from 1 to {DIMENSIONS_MAX}")
    return value
