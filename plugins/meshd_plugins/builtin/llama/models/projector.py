"""What a projector is for: its header, and whether it goes with a model's, before llama.cpp sees either.

A projector (llama.cpp's mmproj) is a GGUF file of its own: an encoder of pictures, sounds or both, and what turns
that encoder's values into embeddings of a text model. llama.cpp compares only how long those are, and so does this:
two models of one width cannot be told apart. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from meshd_plugins.builtin.llama.models.gguf import Gguf

ARCHITECTURE: Final = "clip"  # of every projector, whatever its encoder is
TEXT_ONLY: Final = ("text",)
MODALITIES: Final[Mapping[str, str]] = {"vision": "image", "audio": "audio"}
"""Encoders of a projector, and what a model reads with them: in the order in which it is announced."""
KNOWN: Final = (*TEXT_ONLY, *MODALITIES.values())

_WIDTHS: Final[Mapping[str, tuple[tuple[str, int], ...]]] = {
    # Types whose files do not say how wide an embedding is: a tensor, and the axis of it that is as wide.
    "mlp": (("mm.3.bias", 0), ("mm.2.weight", 1)),
    "ldp": (("mm.model.mb_block.1.block.2.1.bias", 0),),
    "ldpv2": (("mm.model.peg.0.bias", 0),),
    "resampler": (("resampler.proj.weight", 0),),
    "adapter": (("adapter.linear.dense_4h_to_h.weight", 1),),
}
_NAME_LENGTH_MAX: Final = 60


class ProjectorMismatch(Exception):
    """This projector does not go with this model. The message is for people."""

    code = "projector_mismatch"


@dataclass(frozen=True, slots=True)
class Encoder:
    """One encoder of a projector."""

    name: str  # as its keys say it: "vision", "audio"
    kind: str  # type of its projection: "idefics3"
    embedding: int  # values of what comes out; 0: the header does not say


def is_projector(header: Gguf) -> bool:
    """Whether a file is one."""
    return header.text("general.architecture") == ARCHITECTURE


def modalities_of(projector: Gguf) -> tuple[str, ...]:
    """What a model reads with it, text first. Raises ProjectorMismatch: it is no projector, or none for this."""
    return (*TEXT_ONLY, *(MODALITIES[each.name] for each in encoders_of(projector)))


def encoders_of(projector: Gguf) -> tuple[Encoder, ...]:
    """Its encoders, at least one. Raises ProjectorMismatch: it is no projector, or has none."""
    if not is_projector(projector):
        raise ProjectorMismatch(f"it is no projector but {what_it_is(projector)}")
    found = tuple(_encoders(projector))
    if not found:
        raise ProjectorMismatch(
            "it reads neither pictures nor sounds: it says of no encoder that it has it"
        )
    return found


def check_projector(model: Gguf, projector: Gguf) -> None:
    """Compare headers. Raises ProjectorMismatch."""
    if is_projector(model):
        raise ProjectorMismatch("the model is itself a projector: what it goes with is missing")
    width = model.number(f"{model.text('general.architecture')}.embedding_length")
    for encoder in encoders_of(projector):
        if encoder.embedding not in (0, width):
            raise ProjectorMismatch(
                f"it is for models with {encoder.embedding:,} values an embedding, and "
                f"{_name(model)} has {width:,}"
            )


def what_it_is(header: Gguf) -> str:
    """A file, in words."""
    if is_projector(header):
        return "a projector"
    if header.text("general.type") == "adapter":  # as `kinds` has it, which is built on this
        return "a LoRA adapter"
    return f"a model of the architecture {header.text('general.architecture')[:40]!r}"


def _encoders(projector: Gguf) -> Iterator[Encoder]:
    for name in MODALITIES:
        if projector.metadata.get(f"clip.has_{name}_encoder") is True:
            kind = projector.text("clip.projector_type") or projector.text(
                f"clip.{name}.projector_type"
            )
            yield Encoder(name, kind, _width(projector, name, kind))


def _width(projector: Gguf, name: str, kind: str) -> int:
    if kind not in _WIDTHS:
        return projector.number(f"clip.{name}.projection_dim")
    shapes = {tensor.name: tensor.shape for tensor in projector.tensors}
    for tensor, axis in _WIDTHS[kind]:
        if len(shape := shapes.get(tensor, ())) > axis:
            return shape[axis]
    return 0


def _name(model: Gguf) -> str:
    name = "".join(c for c in model.text("general.name")[:_NAME_LENGTH_MAX] if c.isprintable())
    return name or "the model"
