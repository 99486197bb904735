"""Any order of submit, cancel, step, refusal and hand-over leaves the scheduler's invariants standing."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.support_engine import (
    FakeModel,
    FakeState,
    answers,
    drain,
    expected,
    make_engine,
    make_job,
)

from meshd_plugins.builtin.llama.engine.jobs import Broken, Finished, Job, Output
from meshd_plugins.builtin.llama.engine.media import media_tokens
from meshd_plugins.builtin.llama.engine.prefixes import Kept
from meshd_plugins.builtin.llama.engine.scheduler import EngineFull
from meshd_plugins.builtin.llama.engine.sequences import common_prefix

CONTEXT = 150
BLOCKS = tuple(
    tuple(1 + (n * step) % 9 for n in range(length)) for step, length in ((1, 70), (2, 20), (4, 33))
)
PIN = BLOCKS[2][:30]
CALLERS = st.sampled_from(["ada", "bob", "cal"])
MEDIA = (
    media_tokens(7, 24, 24),
    media_tokens(8, 12, 12, at_once=True),
    media_tokens(9, 20, 5),  # laid out in two dimensions
)
PROMPTS = st.builds(
    lambda blocks, tail: (*(t for block in blocks for t in (*BLOCKS, *MEDIA)[block]), *tail),
    st.lists(st.integers(0, len(BLOCKS + MEDIA) - 1), max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=10),
).filter(lambda prompt: len(prompt) < CONTEXT)


class Scheduling(RuleBasedStateMachine):
    """What is true after each step, whatever came before."""

    @initialize(
        slots=st.integers(1, 4),
        chunk=st.integers(1, 60),
        kept_bytes=st.sampled_from([0, 900, 5_000, 1_000_000]),
        forgets_parts=st.booleans(),
        saves=st.booleans(),
    )
    def start(
        self, slots: int, chunk: int, kept_bytes: int, forgets_parts: bool, saves: bool
    ) -> None:
        self.slots, self.kept_bytes = slots, kept_bytes
        self.model = FakeModel(slots, batch_max=slots + max(chunk, len(MEDIA[1])))
        self.model.forgets_parts, self.model.saves = forgets_parts, saves
        self.engine = make_engine(
            self.model, slots, CONTEXT, chunk, 6, kept_bytes_max=kept_bytes, pinned=(PIN,)
        )
        self.taken: dict[int, Job] = {}
        self.cancelled: set[int] = set()
        self.outputs: list[Output] = []
        self.ended: set[int] = set()
        self.held: list[Kept[FakeState]] = []

    def took(self, outputs: list[Output]) -> None:
        self.outputs += outputs
        for output in outputs:
            if isinstance(output, Finished | Broken):
                assert output.job not in self.ended, "a job ends once"
                assert output.job not in self.cancelled, "a cancelled job says nothing more"
                self.ended.add(output.job)
            if isinstance(output, Finished):
                self.check(output)

    def check(self, finished: Finished) -> None:
        """Its answer is that of the model alone, and it profited from nobody but its own caller."""
        job = self.taken[finished.job]
        tokens, reason = expected(job, CONTEXT)
        assert answers(self.outputs).get(job.id, []) == tokens
        assert (finished.reason, finished.prompt_tokens) == (reason, len(job.prompt))
        assert finished.completion_tokens == len(tokens)
        mine = [
            [*other.prompt, *expected(other, CONTEXT)[0]]
            for other in self.taken.values()
            if other.id != job.id and other.scope.caller == job.scope.caller
        ]
        shared = [common_prefix(list(job.prompt), sequence) for sequence in (*mine, list(PIN))]
        assert finished.cached_tokens <= min(max(shared), len(job.prompt) - 1)

    @rule(
        prompt=PROMPTS,
        caller=CALLERS,
        tokens=st.integers(1, 40),
        seed=st.integers(1, 3),
        tag=st.binary(max_size=1),
    )
    def submit(
        self, prompt: tuple[int, ...], caller: str, tokens: int, seed: int, tag: bytes
    ) -> None:
        job = make_job(len(self.taken), prompt, seed, caller=caller, tag=tag, max_tokens=tokens)
        waiting = self.engine.waiting
        try:
            gave_way = self.engine.submit(job)
        except EngineFull:
            assert self.engine.waiting == waiting
            assert waiting >= 6
        else:
            self.taken[job.id] = job
            if gave_way is not None:
                assert waiting == self.engine.waiting >= 6
                assert gave_way.scope.caller != caller
                assert gave_way.id not in self.ended
                self.cancelled.add(gave_way.id)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.taken)))
        self.engine.cancel(number)
        if number in self.taken and number not in self.ended:
            self.cancelled.add(number)

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.took(self.engine.step())

    @rule()
    def refuse(self) -> None:
        self.model.refuse_next = True

    @rule()
    def stop_restoring(self) -> None:
        self.model.restores = not self.model.restores

    @rule(caller=CALLERS, tag=st.binary(min_size=1, max_size=1))
    def hand_over(self, caller: str, tag: bytes) -> None:
        if (kept := self.engine.export(tag, caller)) is not None:
            assert kept.scope.caller == caller
            assert kept.state.tokens == kept.tokens
            assert min(kept.tokens) >= 0, "media are known here alone"
            if self.engine.hold(kept):
                self.held.append(kept)
            self.engine.adopt(kept)

    @precondition(lambda self: self.held)
    @rule()
    def handed_over(self) -> None:
        self.engine.let_go(self.held.pop())

    @invariant()
    def memory_is_what_is_believed(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for slot in engine.slots.all:
            assert slot.held == self.model.memory[slot.index]
            assert len(slot.held) < CONTEXT
        assert self.model.samplers == self.slots - engine.free_slots
        assert engine.kept_bytes <= self.kept_bytes
        living = set(self.taken) - self.ended - self.cancelled
        assert len(living) == engine.waiting + self.slots - engine.free_slots

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.model.refuse_next = False
        self.took(drain(self.engine))
        assert self.engine.free_slots == self.slots
        assert self.model.samplers == 0
        assert self.ended == set(self.taken) - self.cancelled


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
