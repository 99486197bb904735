"""Tokens that stand for pictures and sounds.

A model reads a medium as embeddings in the place of tokens. In a prompt each of them is a number below zero, and
the number says all that a scheduler has to know: of which medium it is, which embedding of it, how many there
are, how many positions they take together, and whether they may be computed in parts. The same medium has the
same numbers in every prompt of its caller, so whatever is done with tokens (comparing beginnings, keeping,
copying) is done with media too.

Most models count a position for each embedding. Some (M-RoPE) lay a picture out in two dimensions, and count
as many positions as its longer side has: from there on positions lag behind the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

COUNT_MAX: Final = 1 << 20  # embeddings of one piece of a medium
_COUNT_BITS: Final = 20
_MASK: Final = COUNT_MAX - 1


class Embedding(NamedTuple):
    """One embedding of a piece of a medium."""

    key: int  # of the piece, and of whose it is: below 2**64
    offset: int  # which one of them
    size: int  # embeddings of the piece
    positions: int  # that all of them take
    at_once: bool  # they look at each other: computed in one step or not at all

    @property
    def divisible(self) -> bool:
        """Whether a sequence may end within the piece and go on later."""
        return self.positions == self.size and not self.at_once


def media_tokens(key: int, count: int, positions: int, *, at_once: bool = False) -> tuple[int, ...]:
    """The tokens of one piece of a medium."""
    assert 0 < count < COUNT_MAX
    assert 0 < positions <= count
    head = (key << 1 | at_once) << _COUNT_BITS | positions
    head = (head << _COUNT_BITS | count) << _COUNT_BITS
    return tuple(-1 - (head | offset) for offset in range(count))


def embedding_of(token: int) -> Embedding:
    """What a token below zero says."""
    packed = -1 - token
    offset, packed = packed & _MASK, packed >> _COUNT_BITS
    count, packed = packed & _MASK, packed >> _COUNT_BITS
    positions, packed = packed & _MASK, packed >> _COUNT_BITS
    return Embedding(packed >> 1, offset, count, positions, bool(packed & 1))


def run_end(tokens: Sequence[int], start: int, most: int) -> int:
    """How far one step may compute from `start`, at most to `most`: text alone, or one piece of a medium alone.

    A piece that is computed at once ends where it ends, however small `most` is.
    """
    if tokens[start] >= 0:
        return next((at for at in range(start, most) if tokens[at] < 0), most)
    embedding = embedding_of(tokens[start])
    end = start - embedding.offset + embedding.size
    return end if embedding.at_once else min(end, most)


def cut_before(tokens: Sequence[int], length: int) -> int:
    """The longest beginning, of `length` at most, that a sequence may be cut to."""
    if not 0 < length < len(tokens) or tokens[length] >= 0:
        return length
    embedding = embedding_of(tokens[length])
    return length if embedding.divisible else length - embedding.offset


def lag(tokens: Sequence[int]) -> int:
    """By how much the position after these tokens is less than their number."""
    missing = 0
    for token in tokens:
        if token < 0:
            embedding = embedding_of(token)
            if embedding.offset == embedding.size - 1:
                missing += embedding.size - embedding.positions
    return missing
