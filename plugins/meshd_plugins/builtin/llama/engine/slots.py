"""The slots of a context: what each one remembers, and which one a job gets.

A slot keeps what it computed when its job ends: the next job of the same caller that begins with the same
tokens goes on from there. What would be lost when a slot gets other work is copied out of the context first,
where it is worth that.

Busy slots are kept beside each other. llama.cpp computes sequences together only when their numbers follow
one another; each gap costs another pass over the weights in every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Generic

from meshd_plugins.builtin.llama.engine.jobs import Backend, Job, SamplerT, Scope, StateT
from meshd_plugins.builtin.llama.engine.media import cut_before, lag
from meshd_plugins.builtin.llama.engine.prefixes import Kept, PrefixStore
from meshd_plugins.builtin.llama.engine.sequences import common_prefix

REUSE_TOKENS_MIN: Final = 16  # a shorter beginning is computed again: bringing it in costs as much
KEEP_TOKENS_MIN: Final = 64  # what is shorter is not copied out of the context
COPY_GAIN_TOKENS: Final = 16  # tokens by which a copy must beat what a free slot has already
ANY_PRIVACY: Final = 3  # the widest class: of a sequence that holds nothing yet


@dataclass(slots=True)
class Slot:
    """One sequence of the context."""

    index: int
    held: list[int] = field(default_factory=list[int])  # tokens in its memory, in order
    scope: Scope = field(default_factory=Scope)  # whose; meaningless while it holds nothing
    tag: bytes = b""
    busy: bool = False
    used: int = 0  # when it last got a job; counts jobs


@dataclass(frozen=True, slots=True)
class _Source(Generic[StateT]):
    """Where the beginning of a prompt is computed already."""

    tokens: int
    slot: Slot | None = None
    kept: Kept[StateT] | None = None

    @property
    def privacy(self) -> int:
        origin = self.kept if self.kept is not None else self.slot
        return ANY_PRIVACY if origin is None else origin.scope.privacy


class Slots(Generic[SamplerT, StateT]):
    """Places jobs and their memory."""

    def __init__(
        self, backend: Backend[SamplerT, StateT], count: int, store: PrefixStore[StateT]
    ) -> None:
        self._backend = backend
        self._store = store
        self._clock = 0
        self._bytes_per_token = 0.0  # of a state, as the last copy had it; 0: none was made
        self.all = [Slot(index) for index in range(count)]
        self.moved = 0  # sequences moved to another slot, since the start

    @property
    def free(self) -> int:
        """Slots without a job."""
        return sum(not slot.busy for slot in self.all)

    @property
    def held_tokens(self) -> int:
        """Tokens in the memory of the context."""
        return sum(len(slot.held) for slot in self.all)

    def take(self, job: Job) -> tuple[Slot, int]:
        """Give a job a free slot, with what is computed of its prompt in it.

        Returns the slot and how many tokens of the prompt it holds. One at least is left to compute: the
        answer begins with what the model says of the last.
        """
        self._clock += 1
        most = len(job.prompt) - 1
        here = self._best_slot(job, busy=False, most=most)
        elsewhere = max(
            self._best_slot(job, busy=True, most=most),
            self._best_kept(job, most),
            key=lambda source: source.tokens,
        )
        privacy = job.scope.privacy
        if elsewhere.tokens >= max(here.tokens + COPY_GAIN_TOKENS, REUSE_TOKENS_MIN):
            slot = self._cheapest_free()
            if self._bring(elsewhere, slot):
                privacy = min(privacy, elsewhere.privacy)
        elif here.slot is not None and here.tokens >= REUSE_TOKENS_MIN:
            slot = here.slot
            privacy = min(privacy, here.privacy)
            self._cut(slot, here.tokens)
        else:
            slot = self._cheapest_free()
            self._cut(slot, 0)
        slot.busy, slot.used = True, self._clock
        slot.scope, slot.tag = Scope(job.scope.caller, privacy), b""
        return slot, len(slot.held)

    def release(self, slot: Slot) -> None:
        """Its job ended; what it computed stays."""
        slot.busy = False

    def empty(self, slot: Slot) -> None:
        """Forget what a slot holds, at once and without a copy."""
        slot.held.clear()
        slot.tag = b""
        self._backend.keep(slot.index, 0)

    def save(self, slot: Slot) -> Kept[StateT] | None:
        """Copy what a slot holds out of the context; None where that cannot be done."""
        if not slot.held:
            return None
        state = self._backend.save(slot.index)
        if state is None:
            return None
        self._bytes_per_token = state.size_bytes / len(slot.held)
        return Kept(tuple(slot.held), state, slot.scope, slot.tag)

    def close_gap(self, slot: Slot) -> Slot | None:
        """Move the last busy slot's sequence into the first gap between busy ones.

        Returns its new slot if it is the one that was given, None when nothing was moved.
        """
        gap = self.gap
        if gap is None or slot is not self._last_busy:
            return None
        moving, staying = self._backend.save(slot.index), None
        if moving is None:
            return None
        if gap.held:
            staying = self._backend.save(gap.index)
        if not self._backend.restore(gap.index, moving):
            gap.held.clear()
            return None
        left = (gap.held, gap.scope, gap.tag)
        gap.held, gap.scope, gap.tag = slot.held, slot.scope, slot.tag
        gap.busy, gap.used = True, slot.used
        slot.busy = False
        slot.held, slot.scope, slot.tag = left
        if staying is None or not self._backend.restore(slot.index, staying):
            self.empty(slot)
        self.moved += 1
        return gap

    @property
    def gap(self) -> Slot | None:
        """The first free slot with busy ones on both sides."""
        busy = [slot.index for slot in self.all if slot.busy]
        for before, after in pairwise(busy):
            if after != before + 1:
                return self.all[before + 1]
        return None

    @property
    def _last_busy(self) -> Slot | None:
        return next((slot for slot in reversed(self.all) if slot.busy), None)

    # -- what is computed already ------------------------------------------------------------------------

    def _best_slot(self, job: Job, *, busy: bool, most: int) -> _Source[StateT]:
        best: _Source[StateT] = _Source(0)
        prompt = list(job.prompt)
        for slot in self.all:
            if slot.busy == busy and slot.scope.caller == job.scope.caller:
                common = cut_before(prompt, min(common_prefix(slot.held, prompt), most))
                if common > best.tokens:
                    best = _Source(common, slot=slot)
        return best

    def _best_kept(self, job: Job, most: int) -> _Source[StateT]:
        kept, common = self._store.find(job.prompt, job.scope)
        return _Source(cut_before(job.prompt, min(common, most)), kept=kept)

    def _bring(self, source: _Source[StateT], slot: Slot) -> bool:
        """Put a copy into a free slot; False: it could not be done, and the slot is empty."""
        if source.slot is not None:
            kept = self.save(source.slot)
        else:
            kept = source.kept
            if kept is not None:
                self._store.used(kept)
        self._cut(slot, 0)
        if kept is None or not self._backend.restore(slot.index, kept.state):
            return False
        slot.held = list(kept.tokens)
        # What is cut off is nobody's loss: the copy's source has it. And it is its caller's, not the slot's.
        self._shorten(slot, source.tokens)
        return bool(slot.held)

    def _cut(self, slot: Slot, tokens: int) -> None:
        """Let a free slot hold its first tokens only; what it loses is kept where that is worth it."""
        lost = len(slot.held) - tokens
        if (
            lost >= KEEP_TOKENS_MIN
            and self._may_fit(len(slot.held))
            and (kept := self.save(slot)) is not None
        ):
            self._store.put(kept)
        self._shorten(slot, tokens)

    def _shorten(self, slot: Slot, tokens: int) -> None:
        """Let a slot forget all but its first tokens; all of them where it cannot forget a part."""
        if len(slot.held) == tokens:
            return
        if self._backend.keep(slot.index, tokens - lag(slot.held[:tokens])):
            del slot.held[tokens:]
        else:
            slot.held.clear()

    def _may_fit(self, tokens: int) -> bool:
        """Whether a copy is worth making: as far as is known before the first, it is."""
        return 0 < self._store.bytes_max >= tokens * self._bytes_per_token

    def _cheapest_free(self) -> Slot:
        """The free slot whose loss costs least: an empty one, or the one used longest ago.

        Among empty ones the first: busy slots stay beside each other.
        """
        free = [slot for slot in self.all if not slot.busy]
        return min(free, key=lambda slot: (bool(slot.held), slot.used if slot.held else slot.index))
