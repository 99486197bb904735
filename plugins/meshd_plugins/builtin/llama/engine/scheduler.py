"""The scheduler of slots: which tokens go into the next batch, and what comes of them.

One model context holds several sequences, one a slot. Each step is one batch: the next token of every
sequence that is generating, and then, up to the chunk size, prompt tokens of the sequences that are
not there yet, in turn. So a long prompt costs the others at most one chunk of waiting per token.

Invariants, whatever the order of submit, cancel and step:
- a slot is free, or belongs to exactly one job; a job that ended in any way has none;
- a slot's memory in the backend is emptied before another job gets it;
- a job ends with exactly one `Finished` or `Broken`, or without any if it was cancelled;
- usage counts each token once: the prompt's, and the generated ones without the end-of-text token.

Pure: no clock, no I/O; the model is behind `Backend`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from meshd_plugins.builtin.llama.engine.text import Piece, TextAssembler
from meshd_plugins.builtin.llama.sampling import Sampling

SamplerT = TypeVar("SamplerT")

WAITING_MAX: Final = 64


class Row(NamedTuple):
    """One token of a batch."""

    token: int
    position: int  # in its sequence
    slot: int
    output: bool  # whether it will be sampled from


class BackendRefused(Exception):
    """The model could not compute this batch; its state is as before. The jobs in it are broken."""


class Backend(Protocol[SamplerT]):
    """What the scheduler needs of a model."""

    def decode(self, rows: Sequence[Row]) -> None:
        """Compute one batch. Raises BackendRefused; anything else means the context is lost."""
        ...

    def new_sampler(self, sampling: Sampling) -> SamplerT:
        """Make the sampler of one job."""
        ...

    def sample(self, sampler: SamplerT, row: int) -> int:
        """Choose the token that follows a row of the last batch."""
        ...

    def free_sampler(self, sampler: SamplerT) -> None:
        """Give a sampler back."""
        ...

    def forget(self, slot: int) -> None:
        """Empty the memory of a slot."""
        ...

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token."""
        ...

    def ends_text(self, token: int) -> bool:
        """Whether the token means that the answer is complete."""
        ...


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one engine."""

    slots: int
    context_tokens: int  # of one slot
    chunk_tokens: (
        int  # prompt tokens in one step; more: faster prefill, longer steps for the others
    )
    waiting_max: int = WAITING_MAX  # jobs without a slot; beyond it they are refused


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    id: int
    prompt: tuple[int, ...]  # at least one token, fewer than the context holds
    sampling: Sampling


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


@dataclass(frozen=True, slots=True)
class Broken:
    """A job could not go on."""

    job: int
    message: str


Output: TypeAlias = Text | Finished | Broken


class EngineFull(Exception):
    """As many jobs wait as may. State: nothing was done."""


@dataclass(slots=True)
class _Active(Generic[SamplerT]):
    """A job in its slot."""

    job: Job
    slot: int
    sampler: SamplerT
    text: TextAssembler
    prefilled: int = 0  # prompt tokens computed
    next_token: int | None = None  # sampled, not computed yet; None while the prompt is not through
    generated: int = 0
    rows: list[int] = field(default_factory=list[int])  # of the batch being built


class Engine(Generic[SamplerT]):
    """Drive it with `submit`, `cancel` and, while `busy`, `step`."""

    def __init__(self, backend: Backend[SamplerT], config: EngineConfig) -> None:
        self._backend = backend
        self._config = config
        self._waiting: deque[Job] = deque()
        self._active: dict[int, _Active[SamplerT]] = {}  # by slot
        self._free: deque[int] = deque(range(config.slots))
        self._turn = 0  # which prompt goes first; rotates

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._active or self._waiting)

    @property
    def free_slots(self) -> int:
        """Slots without a job."""
        return len(self._free)

    @property
    def waiting(self) -> int:
        """Jobs without a slot."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Take a job. Raises EngineFull."""
        assert 0 < len(job.prompt) < self._config.context_tokens, (
            "the caller checks the prompt's length"
        )
        if len(self._waiting) >= self._config.waiting_max + len(self._free):
            raise EngineFull
        self._waiting.append(job)

    def cancel(self, job_id: int) -> None:
        """Forget a job; its slot is free at once. Unknown and finished ones are ignored."""
        for job in self._waiting:
            if job.id == job_id:
                self._waiting.remove(job)
                return
        for active in tuple(self._active.values()):
            if active.job.id == job_id:
                self._release(active)

    def step(self) -> list[Output]:
        """Compute one batch and return what came of it, in order."""
        self._admit()
        rows = self._build()
        if not rows:
            return []
        outputs: list[Output] = []
        members = [active for active in self._active.values() if active.rows]
        try:
            self._backend.decode(rows)
        except BackendRefused as error:
            for active in members:
                self._release(active)
                outputs.append(Broken(active.job.id, str(error)))
            return outputs
        for active in members:
            last = active.rows[-1]
            if rows[last].output:
                outputs += self._advance(active, self._backend.sample(active.sampler, last))
        return outputs

    def _admit(self) -> None:
        while self._waiting and self._free:
            job = self._waiting.popleft()
            slot = self._free.popleft()
            sampler = self._backend.new_sampler(job.sampling)
            self._active[slot] = _Active(job, slot, sampler, TextAssembler(job.sampling.stop))

    def _build(self) -> list[Row]:
        rows: list[Row] = []
        prefilling: list[_Active[SamplerT]] = []
        for active in self._active.values():
            active.rows.clear()
            if active.next_token is None:
                prefilling.append(active)
            else:
                active.rows.append(len(rows))
                position = len(active.job.prompt) + active.generated - 1
                rows.append(Row(active.next_token, position, active.slot, output=True))
        budget = self._config.chunk_tokens
        self._turn += 1
        for index in range(len(prefilling)):
            active = prefilling[(index + self._turn) % len(prefilling)]
            prompt = active.job.prompt
            end = min(active.prefilled + budget, len(prompt))
            for position in range(active.prefilled, end):
                active.rows.append(len(rows))
                rows.append(
                    Row(prompt[position], position, active.slot, output=position == len(prompt) - 1)
                )
            budget -= end - active.prefilled
            active.prefilled = end
        return rows

    def _advance(self, active: _Active[SamplerT], token: int) -> list[Output]:
        """Take a sampled token; the job goes on with it, or ends."""
        job = active.job
        if self._backend.ends_text(token):
            return self._finish(active, "stop")
        active.generated += 1
        outputs: list[Output] = []
        if piece := active.text.add(token, self._backend.piece(token)):
            outputs.append(Text(job.id, piece))
        if active.text.stopped:
            return outputs + self._finish(active, "stop")
        full = len(job.prompt) + active.generated >= self._config.context_tokens
        if full or active.generated >= job.sampling.max_tokens:
            return outputs + self._finish(active, "length")
        active.next_token = token
        return outputs

    def _finish(self, active: _Active[SamplerT], reason: Literal["stop", "length"]) -> list[Output]:
        outputs: list[Output] = []
        if piece := active.text.finish():
            outputs.append(Text(active.job.id, piece))
        self._release(active)
        outputs.append(Finished(active.job.id, reason, len(active.job.prompt), active.generated))
        return outputs

    def _release(self, active: _Active[SamplerT]) -> None:
        del self._active[active.slot]
        self._backend.free_sampler(active.sampler)
        self._backend.forget(active.slot)
        self._free.append(active.slot)
