"""How vectors and scores travel: rows of 32-bit floats, little endian, in chunks.

The answer to `Operation.EMBED` is one row for each input, in their order, and to `Operation.RERANK` one
row of one number, the score, for each document. A chunk's `data` is one or more whole rows, its
`position` the index of the first of them, its `content_type` `ROWS_TYPE`. The length of a row is in the
last event's `detail["dimensions"]`, and the same for all. What comes from another process or node is
gathered by `Rows`, which believes none of it.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from meshd_plugins.api import Value

ROWS_TYPE: Final = "application/vnd.meshd.f32"
INPUTS_MAX: Final = 2_048  # texts of one request
DIMENSIONS_MAX: Final = 65_536
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
CHUNK_BYTES: Final = 64 * 1024  # of a chunk with more than one row
FLOAT_BYTES: Final = 4
_SWAPPED: Final = sys.byteorder != "little"


class BrokenRows(ValueError):
    """What came is not the answer it should be. The message is for people."""


def to_bytes(numbers: array[float]) -> bytes:
    """Of 32-bit floats."""
    if _SWAPPED:
        numbers = array("f", numbers)
        numbers.byteswap()
    return numbers.tobytes()


def to_floats(data: bytes) -> array[float]:
    """Of bytes whose length is a multiple of four."""
    numbers = array("f")
    numbers.frombytes(data)
    if _SWAPPED:
        numbers.byteswap()
    return numbers


def all_finite(numbers: array[float]) -> bool:
    """Whether none is infinite or no number. The sum of 32-bit floats in 64 bits cannot overflow."""
    return math.isfinite(sum(numbers))


class Rows:
    """Gathers the rows of one answer.

    Args:
        count: how many there must be.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._data = bytearray()
        self._begins: list[tuple[int, int]] = []  # position, and bytes before it

    def add(self, position: int, data: bytes, content_type: str) -> None:
        """Take the next chunk. Raises BrokenRows."""
        if content_type != ROWS_TYPE:
            raise BrokenRows(f"data of type {content_type[:80]!r} came instead of {ROWS_TYPE}")
        if not data or len(data) % FLOAT_BYTES or not 0 <= position < self._count:
            raise BrokenRows(f"{len(data)} bytes at row {position} of {self._count}")
        if len(self._data) + len(data) > ANSWER_BYTES_MAX:
            raise BrokenRows(f"more than {ANSWER_BYTES_MAX} bytes of rows")
        if self._begins and position <= self._begins[-1][0]:
            raise BrokenRows(f"row {position} came after row {self._begins[-1][0]}")
        self._begins.append((position, len(self._data)))
        self._data += data

    def finish(self, detail: Mapping[str, Value]) -> tuple[bytes, ...]:
        """Return the rows. Raises BrokenRows: they are not whole, or hold what is no finite number.

        Args:
            detail: of the last event; says how long a row is.
        """
        dimensions = detail.get("dimensions")
        if not isinstance(dimensions, int) or not 1 <= dimensions <= DIMENSIONS_MAX:
            raise BrokenRows(f"rows of {str(dimensions)[:40]} numbers")
        row_bytes = dimensions * FLOAT_BYTES
        if len(self._data) != self._count * row_bytes:
            raise BrokenRows(
                f"{len(self._data)} bytes came instead of {self._count} rows of {dimensions} numbers"
            )
        if any(position * row_bytes != before for position, before in self._begins):
            raise BrokenRows("a chunk does not begin at the row that it says")
        data = bytes(self._data)
        if not all_finite(to_floats(data)):
            raise BrokenRows("there is a number that is not finite")
        return tuple(data[at : at + row_bytes] for at in range(0, len(data), row_bytes))
