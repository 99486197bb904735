"""What a model's worker is started with: written by the daemon's half, read by the worker's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from meshd_plugins.builtin.llama.models.digest import Mark


@dataclass(frozen=True, slots=True)
class Arguments:
    """One model."""

    file: int  # its open file
    path: str  # where that was found: for people and for the family's name
    mark: Mark  # when it was verified
    digest: str
    family: str  # "": from the file's name
    slots: int
    context_tokens: int  # of one slot
    threads: int
    gpu_layers: int

    def to_text(self) -> str:
        """As JSON, for the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Arguments:
        """Read it back."""
        raw: dict[str, Any] = json.loads(text)
        raw["mark"] = Mark(**raw["mark"])
        return cls(**raw)
