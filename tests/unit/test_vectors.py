"""Rows of floats from strangers: taken when whole, refused in every other case."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.api import Value
from meshd_plugins.vectors import (
    ANSWER_BYTES_MAX,
    ROWS_TYPE,
    BrokenRows,
    Rows,
    all_finite,
    to_bytes,
    to_floats,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def row(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_rows_in_any_chunks_come_out_as_they_went_in(
    data: st.DataObject, count: int, dimensions: int
) -> None:
    sent = [
        row(*data.draw(st.lists(FLOATS, min_size=dimensions, max_size=dimensions)))
        for _ in range(count)
    ]
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    rows = Rows(count)
    for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
        rows.add(begin, b"".join(sent[begin:end]), ROWS_TYPE)
    assert list(rows.finish({"dimensions": dimensions})) == sent


def test_floats_are_little_endian() -> None:
    assert to_bytes(array("f", [1.0, -2.5])) == row(1.0, -2.5)
    assert list(to_floats(row(1.0, -2.5))) == [1.0, -2.5]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), max_size=40))
def test_finite_means_every_one_of_them(numbers: list[float]) -> None:
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    expected = all(abs(number) <= largest for number in numbers)
    assert all_finite(array("f", numbers)) == expected


@pytest.mark.parametrize(
    ("position", "data", "content_type"),
    [
        (0, row(1.0), "application/octet-stream"),
        (0, row(1.0), ""),
        (0, b"", ROWS_TYPE),
        (0, b"\0\0\0", ROWS_TYPE),
        (-1, row(1.0), ROWS_TYPE),
        (2, row(1.0), ROWS_TYPE),
        (0, bytes(ANSWER_BYTES_MAX + 4), ROWS_TYPE),
    ],
)
def test_a_chunk_that_cannot_be_is_refused(position: int, data: bytes, content_type: str) -> None:
    with pytest.raises(BrokenRows):
        Rows(2).add(position, data, content_type)


def test_rows_do_not_come_twice_or_backwards() -> None:
    rows = Rows(3)
    rows.add(1, row(1.0), ROWS_TYPE)
    for position in (0, 1):
        with pytest.raises(BrokenRows, match="came after"):
            rows.add(position, row(1.0), ROWS_TYPE)


@pytest.mark.parametrize(
    ("chunks", "dimensions"),
    [
        ([(0, row(1, 2))], 2),  # a row is missing
        ([(0, row(1, 2, 3, 4, 5, 6))], 2),  # one too many
        ([(0, row(1, 2, 3, 4))], 1),  # another length than it says
        ([(0, row(1, 2, 3, 4))], 0),
        ([(0, row(1, 2, 3, 4))], None),
        ([(0, row(1, 2, 3, 4))], "2"),
        ([(0, row(1, 2, 3, 4))], 2**31),
        ([(0, row(1)), (1, row(2, 3, 4))], 2),  # a chunk begins within a row
        ([(0, row(1, 2, 3, float("nan")))], 2),
        ([(0, row(1, 2, float("inf"), float("-inf")))], 2),
    ],
)
def test_rows_that_are_not_whole_are_refused(
    chunks: list[tuple[int, bytes]], dimensions: Value
) -> None:
    rows = Rows(2)
    for position, data in chunks:
        rows.add(position, data, ROWS_TYPE)
    with pytest.raises(BrokenRows):
        rows.finish({"dimensions": dimensions})
