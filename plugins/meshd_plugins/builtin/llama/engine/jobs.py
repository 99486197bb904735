"""What the scheduler is given and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from meshd_plugins.builtin.llama.engine.text import Logprob, Piece
from meshd_plugins.builtin.llama.sampling import Sampling

SamplerT = TypeVar("SamplerT")
StateT = TypeVar("StateT", bound="State")


class Row(NamedTuple):
    """One token of a batch."""

    token: int  # below 0: an embedding of a medium (`media`)
    position: (
        int  # in its sequence; within a piece that takes fewer positions: as if it took one each
    )
    slot: int
    output: bool  # whether it will be sampled from


class BackendRefused(Exception):
    """The model could not compute this batch; its state is as before. The jobs in it are broken."""


class State(Protocol):
    """The memory of one sequence, outside of the context; opaque."""

    @property
    def size_bytes(self) -> int:
        """What keeping it costs."""
        ...


class Backend(Protocol, Generic[SamplerT, StateT]):
    """What the scheduler needs of a model."""

    def decode(self, rows: Sequence[Row]) -> None:
        """Compute one batch. Raises BackendRefused; anything else means the context is lost.

        Of one slot it holds either tokens or embeddings of one piece of a medium.
        """
        ...

    def new_sampler(self, sampling: Sampling) -> SamplerT:
        """Make the sampler of one job."""
        ...

    def sample(self, sampler: SamplerT, row: int) -> int:
        """Choose the token that follows a row of the last batch.

        Raises BackendRefused: there is none for this job. Nothing was chosen.
        """
        ...

    def logprob(self, row: int, token: int, count: int) -> Logprob:
        """How likely the token was at a row of the last batch, and the `count` likeliest beside it."""
        ...

    def free_sampler(self, sampler: SamplerT) -> None:
        """Give a sampler back."""
        ...

    def keep(self, slot: int, positions: int) -> bool:
        """Let a slot remember what is before a position only; 0: nothing.

        False: this model cannot forget a part (a recurrent one, a sliding window). The slot is empty then.
        """
        ...

    def save(self, slot: int) -> StateT | None:
        """Copy the memory of a slot; it stays as it is. None: this model has none that can be copied."""
        ...

    def restore(self, slot: int, state: StateT) -> bool:
        """Replace the memory of a slot by a copy. False: it was refused, and the slot is empty."""
        ...

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token."""
        ...

    def ends_text(self, token: int) -> bool:
        """Whether the token means that the answer is complete."""
        ...


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose a sequence is: its memory serves nobody else, not even by being faster for them."""

    caller: str = ""  # "<node id>/<principal>"
    privacy: int = 2  # `Privacy` of the narrowest request that went into it


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    id: int
    prompt: tuple[int, ...]  # at least one token, fewer than the context holds
    sampling: Sampling
    scope: Scope = Scope()
    tag: bytes = b""  # what the caller's node calls this prompt; opaque


@dataclass(frozen=True, slots=True)
class Text:
    """A part of a job's answer."""

    job: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Finished:
    """A job's answer is complete."""

    job: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found computed


@dataclass(frozen=True, slots=True)
class Broken:
    """A job could not go on."""

    job: int
    message: str


Output: TypeAlias = Text | Finished | Broken


class Warm(NamedTuple):
    """A sequence that the caller's node knows by a tag, and that need not be computed again."""

    tag: bytes
    tokens: int
    scope: Scope
