"""Batches of embeddings: what llama.cpp is given in the place of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, Protocol, cast

from meshd_plugins.builtin.llama.engine.jobs import Row
from meshd_plugins.builtin.llama.engine.media import Embedding, embedding_of
from meshd_plugins.builtin.llama.worker.mtmd import Encoded

DIMENSIONS: Final = 4  # of a position, where a model counts in several


class MediaTable(Protocol):
    """Where embeddings are found."""

    def __getitem__(self, key: int, /) -> Encoded:
        """Raises KeyError."""
        ...


class MediaBatch:
    """Computes pieces of media, one piece of one sequence at a time."""

    def __init__(
        self, api: Any, model: Any, context: Any, table: MediaTable, rows_max: int
    ) -> None:
        self._api = api
        self._context = context
        self._table = table
        self._width = int(api.llama_model_n_embd_inp(model))
        self._values = (ctypes.c_float * (rows_max * self._width))()
        self._positions = (api.llama_pos * (rows_max * DIMENSIONS))()
        self._sequence = (api.llama_seq_id * 1)()
        pointer = _pointer_to(api.llama_seq_id)
        same = [ctypes.cast(self._sequence, pointer)] * rows_max
        self._sequences: Any = (pointer * rows_max)(*same)
        self._counts = (ctypes.c_int32 * rows_max)(*[1] * rows_max)
        self._outputs = (ctypes.c_int8 * rows_max)()

    def decode(self, rows: Sequence[Row]) -> int:
        """Return llama.cpp's status: 0, or that of the first piece it refused."""
        for _, group in groupby(rows, attrgetter("slot")):
            status = self._decode_piece(list(group))
            if status != 0:
                return status
        return 0

    def _decode_piece(self, rows: list[Row]) -> int:
        """Rows of one piece that follow one another."""
        first = embedding_of(rows[0].token)
        encoded = self._table[first.key]
        row_bytes = self._width * ctypes.sizeof(ctypes.c_float)
        begin = ctypes.addressof(encoded.values) + first.offset * row_bytes
        ctypes.memmove(self._values, begin, len(rows) * row_bytes)
        self._place(rows, first, encoded)
        self._sequence[0] = rows[0].slot
        batch = self._api.llama_batch(
            n_tokens=len(rows),
            token=None,
            embd=self._values,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._sequences,
            logits=self._outputs,
        )
        if not first.at_once:
            return int(self._api.llama_decode(self._context, batch))
        self._api.llama_set_causal_attn(self._context, False)
        try:
            return int(self._api.llama_decode(self._context, batch))
        finally:
            self._api.llama_set_causal_attn(self._context, True)

    def _place(self, rows: list[Row], first: Embedding, encoded: Encoded) -> None:
        if not encoded.places:
            for index, row in enumerate(rows):
                self._positions[index] = row.position
            return
        begin = rows[0].position - first.offset
        for index in range(len(rows)):
            *place, fourth = encoded.places[first.offset + index]
            for dimension, value in enumerate(place):
                self._positions[index + dimension * len(rows)] = begin + value
            self._positions[index + 3 * len(rows)] = fourth


def _pointer_to(kind: Any) -> Any:
    return cast("Any", ctypes.POINTER(kind))
