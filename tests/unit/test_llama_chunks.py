"""How many prompt tokens a step takes."""

from __future__ import annotations

import pytest

from meshd_plugins.builtin.llama.worker.measure import chunk_tokens


@pytest.mark.parametrize(
    ("rate", "most", "tokens"),
    [
        (1000.0, 512, 384),  # 400, down to whole tiles
        (215.0, 512, 64),
        (100.0, 512, 64),  # 40 would take as long
        (60.0, 512, 24),  # too slow for a tile
        (1.0, 512, 16),
        (9000.0, 500, 448),  # within the batch, and still whole tiles
        (215.0, 40, 40),
        (215.0, 1, 1),
    ],
)
def test_a_chunk_is_whole_tiles_where_the_device_is_fast_enough(
    rate: float, most: int, tokens: int
) -> None:
    assert chunk_tokens(rate, 0.4, most) == tokens
