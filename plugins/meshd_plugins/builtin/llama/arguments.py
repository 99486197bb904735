"""What a model's worker is started with: written by the daemon's half, read by the worker's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from meshd_plugins.builtin.llama.models.digest import Mark


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that is put on the model."""

    file: int  # its open file, verified like the model's
    path: str  # for people
    digest: str
    scale: float


@dataclass(frozen=True, slots=True)
class Projector:
    """What turns pictures and sounds into embeddings of the model."""

    file: int  # its open file, verified like the model's
    path: str  # for people
    mark: Mark  # when it was verified
    digest: str


@dataclass(frozen=True, slots=True)
class RemotePart:
    """The layers of a model that another node holds."""

    socket: int  # over which this end's connection goes to the daemon
    node: str  # its name, for people
    layers: int


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
    batch_tokens: int = 512  # of one step at most
    chunk_tokens: int = 0  # of prompts in one step; 0: as measured
    flash_attention: str = "auto"  # or on, off
    adapters: tuple[Adapter, ...] = ()
    projector: Projector | None = None  # None: it reads text only
    embeddings: bool = False  # make vectors, whatever the model could do besides
    pooling: str = ""  # "": what the file says
    parts: tuple[RemotePart, ...] = ()  # the last layers, in order; the first ones stay here
    shared_prompts: tuple[str, ...] = ()  # system messages whose beginning serves every caller
    kept_bytes_max: int = 256 * 1024 * 1024  # of sequences kept outside of the context
    inspect: bool = False  # say what the header and the machine say, and load nothing

    def to_text(self) -> str:
        """As JSON, for the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Arguments:
        """Read it back."""
        raw: dict[str, Any] = json.loads(text)
        raw["shared_prompts"] = tuple(raw["shared_prompts"])
        raw["mark"] = Mark(**raw["mark"])
        raw["adapters"] = tuple(Adapter(**each) for each in raw["adapters"])
        if (projector := raw["projector"]) is not None:
            projector["mark"] = Mark(**projector["mark"])
            raw["projector"] = Projector(**projector)
        raw["parts"] = tuple(RemotePart(**each) for each in raw["parts"])
        return cls(**raw)
