"""The calls of an embedding model: texts in, rows out.

    {"operation": "embed", "input": [...], "truncate", "dimensions"}
    {"operation": "rerank", "query", "documents": [...], "truncate"}

Both are answered with items {"position", "data"}, rows in order, and a last one {"done": {...}}. Texts are
made into tokens a slice at a time between batches, so that one large call does not hold up the others.
The daemon's half has checked the messages; both halves are of the same version.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.models.pooling import Pooling
from meshd_plugins.builtin.llama.worker.batches import BatchFormer, BatchLimits, Member
from meshd_plugins.builtin.llama.worker.embedding import EmbeddingBackend
from meshd_plugins.builtin.llama.worker.parts import BadCall
from meshd_plugins.builtin.llama.worker.texts import TextRefused, TextTokeniser
from meshd_plugins.vectors import CHUNK_BYTES, FLOAT_BYTES, all_finite, to_bytes
from meshd_plugins.workerkit import Link

CALLS_MAX: Final = 64  # that are worked on; beyond it one is refused
WAITING_CHARACTERS_MAX: Final = 16 * 1024 * 1024  # of the texts of all of them
SLICE_CHARACTERS: Final = 64 * 1024  # made into tokens between two batches
RECENT: Final = 0.1  # weight of a batch in the recent rate


def _none() -> list[array[int]]:
    return []


@dataclass(slots=True, eq=False)
class _Embedding:
    """One call."""

    call: int
    texts: tuple[str, ...]
    query: str | None  # of a call that ranks
    truncate: bool
    dimensions: int  # of the rows that are wanted
    received_s: float
    characters: int
    tokens: list[array[int]] = field(default_factory=_none)
    rows: int = 0  # sent

    @property
    def prompt_tokens(self) -> int:
        """Of all texts, as computed."""
        return sum(map(len, self.tokens))


class EmbeddingPace:
    """How fast it has been of late.

    Only batches that are at least half full count: a few tokens take as long as many, and would look like a
    device that has become slow.
    """

    def __init__(self, measured_tokens_per_s: float, batch_tokens: int) -> None:
        self.tokens_per_s = measured_tokens_per_s
        self._tokens_min = batch_tokens / 2

    def stepped(self, tokens: int, took_s: float) -> None:
        """Take in one batch."""
        if tokens >= self._tokens_min and took_s > 0.0:
            self.tokens_per_s += RECENT * (tokens / took_s - self.tokens_per_s)


class Embedding:
    """Implements `Part` over one embedding model."""

    def __init__(
        self, link: Link, backend: EmbeddingBackend, pooling: Pooling, tokens_per_s: float
    ) -> None:
        """Serve one context, of which so many tokens a second were measured."""
        self._link = link
        self._backend = backend
        backend.alive = link.heartbeat
        self._ranks = pooling is Pooling.RANK
        self.operations = ("rerank",) if self._ranks else ("embed",)
        template = backend.rerank_template if self._ranks else ""
        self._tokeniser = TextTokeniser(
            backend.api, backend.vocabulary, template, backend.text_tokens
        )
        self._calls: dict[int, _Embedding] = {}
        self._unread: deque[_Embedding] = deque()  # not all made into tokens yet
        self._former = BatchFormer(BatchLimits(backend.batch_tokens, backend.texts_max))
        self._pace = EmbeddingPace(tokens_per_s, backend.batch_tokens)

    @property
    def busy(self) -> bool:
        """Whether any text waits."""
        return bool(self._calls)

    def take(self, call_id: int, message: Mapping[str, Value]) -> None:
        """Begin a call, or refuse it. Raises BadCall."""
        texts, query = _texts_of(message)
        characters = sum(map(len, texts)) + len(query or "") * len(texts)
        waiting = sum(each.characters for each in self._calls.values())
        too_much = waiting and waiting + characters > WAITING_CHARACTERS_MAX
        if too_much or len(self._calls) >= CALLS_MAX:
            self._link.error(call_id, "refused", "busy", "too many texts wait for this model")
            return
        most = self._backend.dimensions
        dimensions = message.get("dimensions") or most
        if not isinstance(dimensions, int) or not 1 <= dimensions <= most:
            text = f"dimensions is {dimensions}; the vectors of this model have {most}"
            raise BadCall(text, "invalid_dimensions")
        truncate = message.get("truncate") is True
        now_s = time.monotonic()
        begun = _Embedding(call_id, texts, query, truncate, dimensions, now_s, characters)
        self._calls[call_id] = begun
        self._unread.append(begun)

    def cancel(self, call_id: int) -> None:
        """Forget a call; what is being computed now is the last of it."""
        if (embedding := self._calls.pop(call_id, None)) is not None:
            self._former.cancel(call_id)
            if embedding in self._unread:
                self._unread.remove(embedding)

    def status(self) -> dict[str, Value]:
        """How busy it is, and how fast of late; for `Status`."""
        return {
            "calls": len(self._calls),
            "texts_waiting": sum(len(each.texts) - each.rows for each in self._calls.values()),
            "prefill_tokens_per_s": round(self._pace.tokens_per_s, 1),
        }

    def step(self) -> None:
        """Make a slice of the texts into tokens, compute one batch, and send its rows."""
        self._read()
        members = self._former.take()
        if not members:
            return
        texts = [self._calls[member.call].tokens[member.text] for member in members]
        began_s = time.monotonic()
        rows = self._backend.compute(texts)
        took_s = time.monotonic() - began_s
        self._pace.stepped(sum(member.tokens for member in members), took_s)
        if not all(map(all_finite, rows)):
            # What is no number spreads through sums: the one text that it comes of is found alone.
            rows = [self._backend.compute([text])[0] for text in texts]
        self._send(members, rows)

    def _read(self) -> None:
        budget = SLICE_CHARACTERS
        while self._unread and budget > 0:
            embedding = self._unread[0]
            text = embedding.texts[len(embedding.tokens)]
            budget -= len(text) + len(embedding.query or "")
            try:
                embedding.tokens.append(
                    self._tokeniser.tokens(text, embedding.query, truncate=embedding.truncate)
                )
            except TextRefused as error:
                number = len(embedding.tokens)
                self._end(embedding, "bad_request", error.code, f"text {number}: {error}")
                continue
            if len(embedding.tokens) == len(embedding.texts):
                self._unread.popleft()
                self._former.submit(embedding.call, [len(tokens) for tokens in embedding.tokens])
            else:
                self._unread.rotate(-1)

    def _send(self, members: Sequence[Member], rows: Sequence[array[float]]) -> None:
        ready: dict[int, list[bytes]] = {}
        for member, row in zip(members, rows, strict=True):
            embedding = self._calls.get(member.call)
            if embedding is None:
                continue
            if not all_finite(row):
                text = f"the model made no finite numbers of text {member.text}"
                self._end(embedding, "failed", "failed", text)
                ready.pop(member.call, None)
                continue
            if not self._ranks:
                row = unit(row[: embedding.dimensions])
            ready.setdefault(member.call, []).append(to_bytes(row[: embedding.dimensions]))
        for call, data in ready.items():
            self._send_rows(self._calls[call], data)

    def _send_rows(self, embedding: _Embedding, rows: list[bytes]) -> None:
        together = max(1, CHUNK_BYTES // (embedding.dimensions * FLOAT_BYTES))
        for begin in range(0, len(rows), together):
            data = b"".join(rows[begin : begin + together])
            self._link.item(embedding.call, {"position": embedding.rows + begin, "data": data})
        embedding.rows += len(rows)
        if embedding.rows == len(embedding.texts):
            self._link.item(embedding.call, {"done": _summary(embedding)})
            self._link.end(embedding.call)
            del self._calls[embedding.call]

    def _end(self, embedding: _Embedding, kind: str, code: str, message: str) -> None:
        self.cancel(embedding.call)
        self._link.error(embedding.call, kind, code, message)


def unit(row: array[float]) -> array[float]:
    """The row at length 1; one of zeros stays as it is."""
    length = hypot(*row)
    if not length:
        return row
    scale = 1.0 / length
    return array("f", [number * scale for number in row])


def _texts_of(message: Mapping[str, Value]) -> tuple[tuple[str, ...], str | None]:
    query = message.get("query")
    listed = message["documents" if query is not None else "input"]
    assert isinstance(listed, Sequence), "the daemon has checked it"
    return tuple(str(text) for text in listed), None if query is None else str(query)


def _summary(embedding: _Embedding) -> dict[str, Value]:
    total_s = time.monotonic() - embedding.received_s
    return {
        "prompt_tokens": embedding.prompt_tokens,
        "dimensions": embedding.dimensions,
        "texts": len(embedding.texts),
        "total_s": round(total_s, 4),
    }
