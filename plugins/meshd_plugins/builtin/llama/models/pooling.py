"""Which models turn texts into vectors or scores instead of writing, and how they make one of many tokens.

A model embeds when its file says so: it has a type of pooling, or its architecture is an encoder, which
cannot write. Any other model embeds when the configuration wants it to. What llama.cpp calls no pooling
has one vector for each token, which no request here can carry, so it counts as not said: the mean is
taken then.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from meshd_plugins.builtin.llama.models.gguf import Gguf

ENCODERS: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
    }
)
"""Architectures of llama.cpp (llama-arch.cpp) whose every token sees every other one."""


class Pooling(StrEnum):
    """One vector, or score, of the vectors of a text's tokens."""

    MEAN = "mean"  # of all tokens
    CLS = "cls"  # the first token's
    LAST = "last"  # the last token's
    RANK = "rank"  # what a classifier makes of the first token's: a score

    @property
    def number(self) -> int:
        """As `enum llama_pooling_type` of llama.h, and so the metadata, has it."""
        return _NUMBERS[self]


_NUMBERS: Final = {Pooling.MEAN: 1, Pooling.CLS: 2, Pooling.LAST: 3, Pooling.RANK: 4}
_BY_NUMBER: Final = {number: pooling for pooling, number in _NUMBERS.items()}
CHOICES: Final = ("", *(pooling.value for pooling in Pooling))
"""What the configuration may say; "": what the file says."""


class NoClassifier(Exception):
    """The model is to rank and has nothing to do it with. The message is for people."""

    code = "no_classifier"


def pooling_of(header: Gguf, *, wanted: bool, override: str) -> Pooling | None:
    """How a model embeds; None: it writes.

    Args:
        header: of its file.
        wanted: `embeddings = true` in its configuration.
        override: `pooling` there.

    Raises:
        NoClassifier: it is to rank, and has no tensor for that.
    """
    architecture = header.text("general.architecture")
    said = _BY_NUMBER.get(header.number(f"{architecture}.pooling_type"))
    if said is None and not wanted and not override and architecture not in ENCODERS:
        return None
    pooling = Pooling(override) if override else said or Pooling.MEAN
    if pooling is Pooling.RANK and not any(t.name.startswith("cls.") for t in header.tensors):
        raise NoClassifier(
            "this model has no classifier (no tensor cls.*): it cannot rank; set pooling to mean, cls or last"
        )
    return pooling
