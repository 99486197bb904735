"""What a GGUF file can be here, by its header."""

from __future__ import annotations

from enum import StrEnum

from meshd_plugins.builtin.llama.models.gguf import Gguf
from meshd_plugins.builtin.llama.models.projector import is_projector

_ADAPTER = "adapter"  # general.type of a LoRA adapter


class Kind(StrEnum):
    """A file of the library; the value is in its description."""

    MODEL = "model"
    ADAPTER = "adapter"  # served with a model that names it
    PROJECTOR = "projector"  # the same: it has the model read pictures or sounds

    @property
    def words(self) -> str:
        """With its article."""
        return f"{'an' if self is Kind.ADAPTER else 'a'} {self}"


def kind_of(header: Gguf) -> Kind:
    """What a file is; what is nothing else is a model."""
    if is_projector(header):
        return Kind.PROJECTOR
    return Kind.ADAPTER if header.text("general.type") == _ADAPTER else Kind.MODEL
