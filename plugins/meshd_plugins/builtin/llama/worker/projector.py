"""The projector of a model, by its header: read and compared before llama.cpp sees it."""

from __future__ import annotations

from meshd_plugins.builtin.llama.arguments import Projector
from meshd_plugins.builtin.llama.models.gguf import Gguf, GgufError, read_gguf
from meshd_plugins.builtin.llama.models.pooling import Pooling
from meshd_plugins.builtin.llama.models.projector import (
    ProjectorMismatch,
    check_projector,
    is_projector,
)


def read_projector(
    model: Gguf, projector: Projector | None, pooling: Pooling | None
) -> Gguf | None:
    """Return its header; None: the model has none. Raises ProjectorMismatch, in words for people."""
    if is_projector(model):
        raise ProjectorMismatch(
            "this is a projector and no model: name it as the `projector` of the model that it goes with"
        )
    if projector is None:
        return None
    try:
        if pooling is not None:
            raise ProjectorMismatch("a model that makes vectors or scores reads text only")
        header = read_gguf(projector.file)
        check_projector(model, header)
    except (GgufError, ProjectorMismatch) as error:
        raise ProjectorMismatch(f"the projector {projector.path} cannot be used: {error}") from None
    return header
