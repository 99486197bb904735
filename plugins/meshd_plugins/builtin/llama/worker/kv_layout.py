"""The bytes in which llama.cpp writes the memory of one sequence: understood, so that foreign ones can be checked.

What llama.cpp writes of a sequence (`state_seq_get_data`, `llama_kv_cache::state_write` of llama.cpp):

    u32 magic, i32 sequence, u32 streams          the frame: depends on how many slots the context has
    for each stream: u32 cells                    0 for all streams but the sequence's own
        cells x (i32 position, u32 count of sequences, i32 sequence)
        u32 V transposed, u32 layers, (u32, u32 rotations, in newer builds)
        layers x (i32 type of K, u64 bytes of a row, rows)
        layers x (i32 type of V, u64 bytes of a row, rows)

A `Layout` is learnt from a sequence that this very process has computed. A foreign sequence is taken only
when it is, but for the numbers in its rows, what this process would have written for as many tokens: then
llama.cpp reads nothing that it could stumble over. Other forms (a transposed V, positions in two dimensions,
recurrent states) are not understood, and such a model's sequences are not handed over.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_U32: Final = struct.Struct("<I")
_FRAME: Final = struct.Struct("<IiI")
_CELL: Final = struct.Struct("<iIi")
_ROWS: Final = struct.Struct("<iQ")
LAYERS_MAX: Final = 1024
STREAMS_MAX: Final = 4096
ROW_BYTES_MAX: Final = 1 << 24


class LayoutError(Exception):
    """These bytes are not a sequence as this model's context writes it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the memory of a sequence is laid out in this context."""

    magic: int
    streams: int
    words: bytes  # between the cells and the layers
    rows: tuple[tuple[int, int], ...]  # type and bytes of a row: all K, then all V

    @property
    def bytes_per_token(self) -> int:
        """What one more token adds."""
        return _CELL.size + sum(size for _, size in self.rows)

    def size_bytes(self, tokens: int) -> int:
        """Of a sequence without its frame."""
        fixed = _U32.size + len(self.words) + len(self.rows) * _ROWS.size
        return fixed + tokens * self.bytes_per_token

    def frame(self) -> tuple[bytes, bytes]:
        """What stands before and after a sequence so that llama.cpp reads it into any slot."""
        return _FRAME.pack(self.magic, 0, self.streams), bytes(_U32.size * (self.streams - 1))

    def check(self, data: memoryview, tokens: int) -> None:
        """Check a sequence without its frame. Raises LayoutError."""
        if len(data) != self.size_bytes(tokens):
            raise LayoutError(
                f"{len(data)} bytes for {tokens} tokens; this model writes {self.size_bytes(tokens)}"
            )
        if _U32.unpack_from(data)[0] != tokens:
            raise LayoutError("the number of cells is not that of the tokens")
        at = _U32.size
        cells = _CELL.iter_unpack(data[at : at + tokens * _CELL.size])
        for expected, (position, sequences, _) in enumerate(cells):
            if position != expected or sequences != 1:
                raise LayoutError(f"cell {expected} is at position {position}")
        at += tokens * _CELL.size
        if bytes(data[at : at + len(self.words)]) != self.words:
            raise LayoutError("another form of the cache")
        at += len(self.words)
        for number, expected_rows in enumerate(self.rows):
            if _ROWS.unpack_from(data, at) != expected_rows:
                raise LayoutError(f"rows {number} are of another type or size")
            at += _ROWS.size + tokens * expected_rows[1]


def learn_layout(written: memoryview) -> Layout:
    """Understand what this context writes. Raises LayoutError: it is of a form that is not handed over."""
    magic, streams, at, tokens = _find_cells(written)
    at += _U32.size + tokens * _CELL.size
    for words in (4, 2):
        head = bytes(written[at : at + words * _U32.size])
        if len(head) < words * _U32.size:
            continue
        transposed, layers = struct.unpack_from("<II", head)
        if transposed or not 0 < layers <= LAYERS_MAX:
            break
        rows = _read_rows(written, at + len(head), tokens)
        if rows is not None and layers <= len(rows) <= 2 * layers:
            layout = Layout(magic, streams, head, rows)
            layout.check(unframed(written, layout), tokens)
            return layout
    raise LayoutError("this model's cache has a form that is not handed over")


def unframed(written: memoryview, layout: Layout) -> memoryview:
    """The sequence itself, of what this context has written. Raises LayoutError."""
    _, streams, at, tokens = _find_cells(written)
    if streams != layout.streams:
        raise LayoutError("another number of streams")
    return written[at : at + layout.size_bytes(tokens)]


def _find_cells(written: memoryview) -> tuple[int, int, int, int]:
    """Return magic, streams, where the count of cells of the one used stream stands, and that count."""
    if len(written) < _FRAME.size:
        raise LayoutError("too short")
    magic, _, streams = _FRAME.unpack_from(written)
    at = _FRAME.size
    if not 0 < streams <= STREAMS_MAX:
        raise LayoutError("no number of streams")
    for _ in range(streams):
        if at + _U32.size > len(written):
            break
        (cells,) = _U32.unpack_from(written, at)
        if cells:
            return magic, streams, at, cells
        at += _U32.size
    raise LayoutError("it holds nothing")


def _read_rows(written: memoryview, at: int, tokens: int) -> tuple[tuple[int, int], ...] | None:
    """Types and sizes of the rows from there on, if they end where nothing but empty streams follow."""
    rows: list[tuple[int, int]] = []
    while at + _ROWS.size <= len(written) and len(rows) < 2 * LAYERS_MAX:
        kind, size = _ROWS.unpack_from(written, at)
        if not 0 <= kind < 256 or not 0 < size <= ROW_BYTES_MAX:
            break
        end = at + _ROWS.size + tokens * size
        if end > len(written):
            return None
        rows.append((kind, size))
        at = end
    return tuple(rows) if rows and not any(written[at:]) else None
