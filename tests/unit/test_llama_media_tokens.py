"""Tokens that stand for pictures and sounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshd_plugins.builtin.llama.engine.media import (
    cut_before,
    embedding_of,
    lag,
    media_tokens,
    run_end,
)

SIZES = st.integers(1, 40)
PIECES = st.builds(
    lambda key, size, share, at_once: media_tokens(
        key, size, max(1, size * share // 4), at_once=at_once
    ),
    st.integers(0, 2**64 - 1),
    SIZES,
    st.integers(1, 4),
    st.booleans(),
)
TEXTS = st.lists(st.integers(0, 50_000), max_size=12).map(tuple)
PROMPTS = st.lists(st.one_of(PIECES, TEXTS), max_size=6).map(
    lambda parts: tuple(token for part in parts for token in part)
)


@given(st.integers(0, 2**64 - 1), SIZES, st.booleans())
def test_a_token_says_all_of_its_embedding(key: int, size: int, at_once: bool) -> None:
    for offset, token in enumerate(media_tokens(key, size, size, at_once=at_once)):
        assert token < 0
        assert embedding_of(token) == (key, offset, size, size, at_once)


@given(PROMPTS)
def test_steps_go_through_a_prompt_without_mixing_and_to_its_end(prompt: tuple[int, ...]) -> None:
    at = 0
    while at < len(prompt):
        end = run_end(prompt, at, min(at + 7, len(prompt)))
        run = prompt[at:end]
        assert run
        if run[0] >= 0:
            assert min(run) >= 0
        else:
            pieces = [embedding_of(token) for token in run]
            assert len({piece.key for piece in pieces}) == 1
            if pieces[0].at_once:
                assert len(run) == pieces[0].size
        at = end
    assert at == len(prompt)


@given(PROMPTS, st.integers(0, 100))
def test_a_cut_is_the_longest_that_leaves_no_piece_in_halves(
    prompt: tuple[int, ...], length: int
) -> None:
    length = min(length, len(prompt))
    cut = cut_before(prompt, length)
    assert cut <= length
    for at in range(cut, length + 1):
        if at == cut or at == len(prompt) or prompt[at] >= 0:
            continue
        piece = embedding_of(prompt[at])
        assert piece.offset > 0, "a longer beginning could be kept"
        assert not piece.divisible, "a longer beginning could be kept"
    if cut < len(prompt) and prompt[cut] < 0:
        piece = embedding_of(prompt[cut])
        assert piece.offset == 0 or piece.divisible


def test_positions_lag_behind_what_is_laid_out_in_two_dimensions() -> None:
    picture = media_tokens(1, 12, 4)
    assert lag(picture) == 8
    assert lag(picture[:-1]) == 0, "it takes its positions when it is whole"
    assert lag((5, *media_tokens(2, 12, 12), 6)) == 0
    assert lag((5, *picture, 6, *picture)) == 16
