"""The scheduler of sequences: which tokens go into the next batch, and what comes of them.

One model context holds several sequences, one a slot. Each step is one batch: the next token of every
sequence that is generating, and, up to the chunk size, prompt tokens of one that is not there yet, or of
several that it completes. So a long prompt costs the others at most one chunk of waiting per token. The
prompt with least left goes first, so that a short request does not wait for a long one; every fourth step
the one that waited longest does, so that a long one comes to its end too.

Invariants, whatever the order of submit, cancel and step:
- a slot is free, or belongs to exactly one job; a job that ended in any way has none;
- what a slot holds is what the context has computed for it, token by token;
- a job computes on what was computed before only if that was for the same caller, or for everybody;
- a job ends with exactly one `Finished` or `Broken`, or without any if it was cancelled;
- usage counts each token once: the prompt's, and the generated ones without the end-of-text token.

Pure: no clock, no I/O; the model is behind `Backend`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, NamedTuple

from meshd_plugins.builtin.llama.engine.jobs import (
    Backend,
    BackendRefused,
    Broken,
    Finished,
    Job,
    Output,
    Row,
    SamplerT,
    Scope,
    StateT,
    Text,
    Warm,
)
from meshd_plugins.builtin.llama.engine.media import lag, run_end
from meshd_plugins.builtin.llama.engine.prefixes import Kept, PrefixStore
from meshd_plugins.builtin.llama.engine.slots import Slot, Slots
from meshd_plugins.builtin.llama.engine.text import TextAssembler

WAITING_MAX: Final = 64
OLDEST_FIRST_EVERY: Final = 4  # steps
MOVE_TOKENS_PER_REMAINING: Final = (
    8  # a sequence is moved when it is that much shorter than what is to come
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one engine."""

    slots: int
    context_tokens: int  # of one slot
    chunk_tokens: int
    """Prompt tokens in one step, and one more beside sequences that generate. More: faster prefill, longer
    steps for the others. A step has at most so many rows, and one for each slot."""
    waiting_max: int = WAITING_MAX  # jobs without a slot; beyond it they are refused
    kept_bytes_max: int = 0  # sequences kept outside of the context; 0: none
    pinned: tuple[tuple[int, ...], ...] = ()
    """Beginnings of prompts that serve every caller, once one of them has computed them."""
    alone_tokens: int = 0  # prompt tokens in one step while nobody generates; 0: `chunk_tokens`


class EngineFull(Exception):
    """As many jobs wait as may. State: nothing was done."""


class Step(NamedTuple):
    """What a batch consisted of."""

    prefill_tokens: int
    decode_tokens: int


@dataclass(slots=True)
class _Active(Generic[SamplerT]):
    """A job in its slot."""

    job: Job
    slot: Slot
    sampler: SamplerT
    text: TextAssembler
    cached: int  # prompt tokens that were found computed
    has_media: bool  # in its prompt
    lag: int  # of the position behind the tokens that its slot holds
    pin: int  # where a pinned beginning of its prompt ends that is not kept yet; 0: there is none
    next_token: int | None = None  # sampled, not computed yet; None while the prompt is not through
    generated: int = 0
    tokens: tuple[int, ...] = ()  # in the batch being built
    first_row: int = 0
    waited: int = 0  # steps in which its prompt got no part of the chunk
    started: int = 0  # order of admission

    @property
    def left(self) -> int:
        """Prompt tokens to compute."""
        return len(self.job.prompt) - len(self.slot.held)


@dataclass(slots=True)
class _Waiting:
    """Jobs without a slot: callers take turns, each with its oldest job."""

    by_caller: dict[str, deque[Job]] = field(default_factory=dict[str, deque[Job]])
    count: int = 0

    def add(self, job: Job) -> None:
        self.by_caller.setdefault(job.scope.caller, deque()).append(job)
        self.count += 1

    def next(self) -> Job:
        caller, jobs = next(iter(self.by_caller.items()))
        job = jobs.popleft()
        del self.by_caller[caller]
        if jobs:
            self.by_caller[caller] = jobs  # at the end: the others come first
        self.count -= 1
        return job

    def give_way(self, caller: str) -> Job | None:
        """Take out the latest job of whoever has most, for one of a caller who has at least two fewer."""
        most = max(self.by_caller, key=lambda each: len(self.by_caller[each]), default=None)
        if most is None or len(self.by_caller[most]) < len(self.by_caller.get(caller, ())) + 2:
            return None
        self.count -= 1
        return self.by_caller[most].pop()  # two or more were there

    def remove(self, job_id: int) -> bool:
        for caller, jobs in self.by_caller.items():
            for job in jobs:
                if job.id == job_id:
                    jobs.remove(job)
                    self.count -= 1
                    if not jobs:
                        del self.by_caller[caller]
                    return True
        return False


class Engine(Generic[SamplerT, StateT]):
    """Drive it with `submit`, `cancel` and, while `busy`, `step`."""

    def __init__(self, backend: Backend[SamplerT, StateT], config: EngineConfig) -> None:
        self._backend = backend
        self._config = config
        self._waiting = _Waiting()
        self._active: list[_Active[SamplerT]] = []  # in order of their slots
        self._steps = 0
        self._admitted = 0
        self._store: PrefixStore[StateT] = PrefixStore(config.kept_bytes_max)
        self.slots: Slots[SamplerT, StateT] = Slots(backend, config.slots, self._store)
        self.pinned = config.pinned
        self.chunk_tokens = config.chunk_tokens  # may be changed between steps, like the next
        self.alone_tokens = config.alone_tokens or config.chunk_tokens
        self.last_step = Step(0, 0)
        self.reused_tokens = 0  # prompt tokens that were found computed, since the start

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._active) or self._waiting.count > 0

    @property
    def free_slots(self) -> int:
        """Slots without a job."""
        return self.slots.free

    @property
    def waiting(self) -> int:
        """Jobs without a slot."""
        return self._waiting.count

    @property
    def kept_bytes(self) -> int:
        """What the sequences kept outside of the context take."""
        return self._store.bytes

    def submit(self, job: Job) -> Job | None:
        """Take a job; returns the one that gave way to it, which is forgotten here.

        Raises EngineFull: too many wait, and no caller has two more than this one would have had. State: as before.
        """
        assert 0 < len(job.prompt) < self._config.context_tokens, (
            "the caller checks the prompt's length"
        )
        gave_way = None
        if self._waiting.count >= self._config.waiting_max + self.slots.free:
            gave_way = self._waiting.give_way(job.scope.caller)
            if gave_way is None:
                raise EngineFull
        self._waiting.add(job)
        return gave_way

    def cancel(self, job_id: int) -> None:
        """Forget a job; its slot is free at once. Unknown and finished ones are ignored."""
        if not self._waiting.remove(job_id):
            for active in tuple(self._active):
                if active.job.id == job_id:
                    self._release(active)

    def step(self) -> list[Output]:
        """Compute one batch and return what came of it, in order."""
        while self._waiting.count and self.slots.free:
            self._admit(self._waiting.next())
        self._close_gap()
        rows = self._build()
        if not rows:
            return []
        self._steps += 1
        outputs: list[Output] = []
        members = [active for active in self._active if active.tokens]
        try:
            self._backend.decode(rows)
        except BackendRefused as error:
            for active in members:
                self._release(active)
                self.slots.empty(active.slot)
                outputs.append(Broken(active.job.id, str(error)))
            return outputs
        for active in members:
            outputs += self._computed(active, rows)
        return outputs

    # -- sequences that need not be computed again ----------------------------------------------------

    def warm(self) -> list[Warm]:
        """The sequences that have a tag, those used last at the end."""
        entries = [Warm(e.tag, len(e.tokens), e.scope) for e in self._store if e.tag]
        slots = sorted((s for s in self.slots.all if s.tag), key=lambda s: s.used)
        return [*entries, *(Warm(s.tag, len(s.held), s.scope) for s in slots)]

    def export(self, tag: bytes, caller: str) -> Kept[StateT] | None:
        """Copy the sequence that a caller's node knows by a tag; None when there is none of this caller.

        Neither is one with media in it: what they are to the model is known to this process alone.
        """
        for slot in self.slots.all:
            if slot.tag == tag and slot.scope.caller == caller and min(slot.held) >= 0:
                return self.slots.save(slot)
        for entry in self._store:
            if entry.tag != tag or entry.scope.caller != caller or entry.pinned:
                continue
            if min(entry.tokens) >= 0:
                return entry
        return None

    @property
    def room_bytes(self) -> int:
        """What one more state on its way in or out may take."""
        return self._store.room_bytes

    def hold(self, kept: Kept[StateT]) -> bool:
        """Count a state that is on its way in or out among those kept; False: there is no room for it."""
        return self._store.hold(kept)

    def let_go(self, kept: Kept[StateT]) -> None:
        """It is handed over, or will not be."""
        self._store.let_go(kept)

    def adopt(self, kept: Kept[StateT]) -> bool:
        """Take a sequence that another node computed; False: there is no room for it."""
        return self._store.put(kept)

    # -- one step ----------------------------------------------------------------------------------------

    def _admit(self, job: Job) -> None:
        slot, cached = self.slots.take(job)
        self._admitted += 1
        active = _Active(
            job=job,
            slot=slot,
            sampler=self._backend.new_sampler(job.sampling),
            text=TextAssembler(job.sampling.stop),
            cached=cached,
            has_media=min(job.prompt) < 0,
            lag=lag(slot.held),
            pin=self._unkept_pin(job.prompt, cached),
            started=self._admitted,
        )
        self.reused_tokens += cached
        self._insert(active)

    def _insert(self, active: _Active[SamplerT]) -> None:
        self._active.append(active)
        self._active.sort(key=lambda a: a.slot.index)

    def _unkept_pin(self, prompt: tuple[int, ...], cached: int) -> int:
        kept = {entry.tokens for entry in self._store if entry.pinned}
        ends = [
            len(pin)
            for pin in self.pinned
            if cached < len(pin) < len(prompt) and prompt[: len(pin)] == pin and pin not in kept
        ]
        return min(ends, default=0)

    def _close_gap(self) -> None:
        """Move the last sequence into a gap between the others, when enough of it is to come."""
        if self.slots.gap is None:
            return
        last = self._active[-1]
        remaining = last.job.sampling.max_tokens - last.generated + last.left
        if not last.slot.held or remaining * MOVE_TOKENS_PER_REMAINING < len(last.slot.held):
            return
        if (slot := self.slots.close_gap(last.slot)) is not None:
            self._active.remove(last)
            last.slot = slot
            self._insert(last)

    def _build(self) -> list[Row]:
        self._share_chunk()
        rows: list[Row] = []
        prefill = 0
        for active in self._active:
            active.first_row = len(rows)
            start, slot = len(active.slot.held) - active.lag, active.slot.index
            if active.next_token is not None:
                active.tokens = (active.next_token,)
                rows.append(Row(active.next_token, start, slot, output=True))
                continue
            prefill += len(active.tokens)
            rows += [Row(t, p, slot, output=False) for p, t in enumerate(active.tokens, start)]
            if active.tokens and len(active.tokens) == active.left:
                rows[-1] = rows[-1]._replace(output=True)
        self.last_step = Step(prefill, len(rows) - prefill)
        return rows

    def _share_chunk(self) -> None:
        """Say which prompt tokens are in the next batch: `tokens` of each sequence that prefills.

        llama.cpp computes a batch in parts in which every sequence has equally many tokens, each part with a
        pass over the weights. So beside sequences that generate (a token each) a chunk is one token longer:
        that one goes with theirs, and what is left is whole. And only one sequence gets a part of its prompt;
        of the others those that what is left of the chunk completes.
        """
        prefilling = [active for active in self._active if active.next_token is None]
        prefilling.sort(key=lambda a: (a.left, a.started))
        if len(prefilling) > 1 and self._steps % OLDEST_FIRST_EVERY == 0:
            oldest = max(prefilling, key=lambda a: (a.waited, -a.started))
            prefilling.remove(oldest)
            prefilling.insert(0, oldest)
        alone = len(prefilling) == len(self._active)
        budget = self.alone_tokens if alone else self.chunk_tokens + 1
        for turn, active in enumerate(prefilling):
            start, prompt = len(active.slot.held), active.job.prompt
            end = min(start + budget, len(prompt), active.pin or len(prompt))
            if active.has_media and budget > 0:
                end = run_end(prompt, start, end)
            if turn and end < len(prompt):
                end = start
            active.tokens = prompt[start:end]
            active.waited = 0 if active.tokens else active.waited + 1
            budget -= end - start

    def _computed(self, active: _Active[SamplerT], rows: list[Row]) -> list[Output]:
        """Take over what the batch computed for one job."""
        last = active.first_row + len(active.tokens) - 1
        active.slot.held += active.tokens
        if active.has_media and active.next_token is None:
            active.lag += lag(active.tokens)
        if active.pin and len(active.slot.held) == active.pin:
            self._keep_pin(active)
        if not rows[last].output:
            return []
        if active.next_token is None:
            active.slot.tag = active.job.tag
        try:
            token = self._backend.sample(active.sampler, last)
        except BackendRefused as error:  # its grammar leaves no token: the others are not concerned
            self._release(active)
            return [Broken(active.job.id, str(error))]
        count = active.job.sampling.logprobs
        logprob = None if count is None else self._backend.logprob(last, token, count)
        if self._backend.ends_text(token):
            return self._finish(active, "stop")
        active.generated += 1
        outputs: list[Output] = []
        if piece := active.text.add(token, self._backend.piece(token), logprob):
            outputs.append(Text(active.job.id, piece))
        if active.text.stopped:
            return outputs + self._finish(active, "stop")
        full = len(active.slot.held) + 1 >= self._config.context_tokens
        if full or active.generated >= active.job.sampling.max_tokens:
            return outputs + self._finish(active, "length")
        active.next_token = token
        return outputs

    def _keep_pin(self, active: _Active[SamplerT]) -> None:
        kept = self.slots.save(active.slot)
        if kept is not None:
            self._store.put(Kept(kept.tokens, kept.state, Scope(), b"", pinned=True))
        active.pin = self._unkept_pin(active.job.prompt, active.pin)

    def _finish(self, active: _Active[SamplerT], reason: Literal["stop", "length"]) -> list[Output]:
        outputs: list[Output] = []
        if piece := active.text.finish():
            outputs.append(Text(active.job.id, piece))
        self._release(active)
        prompt = len(active.job.prompt)
        outputs.append(Finished(active.job.id, reason, prompt, active.generated, active.cached))
        return outputs

    def _release(self, active: _Active[SamplerT]) -> None:
        self._active.remove(active)
        self._backend.free_sampler(active.sampler)
        self.slots.release(active.slot)
