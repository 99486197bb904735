"""The scheduler of slots over a fake model whose next token is a function of the sequence so far."""

import zlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.builtin.llama.engine.scheduler import (
    BackendRefused,
    Broken,
    Engine,
    EngineConfig,
    EngineFull,
    Finished,
    Job,
    Output,
    Row,
    Text,
)
from meshd_plugins.builtin.llama.sampling import Sampling

END = 0


class FakeModel:
    """Checks what a real context would: positions without gaps, outputs only where asked, slots in range."""

    def __init__(self, slots: int, batch_max: int = 10_000) -> None:
        self.memory: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        self.samplers = 0
        self.batches: list[list[Row]] = []
        self.refuse_next = False
        self._batch_max = batch_max

    def decode(self, rows: Sequence[Row]) -> None:
        assert 0 < len(rows) <= self._batch_max
        if self.refuse_next:
            self.refuse_next = False
            raise BackendRefused("full")
        for row in rows:
            assert row.position == len(self.memory[row.slot]), (
                "a gap or a leftover in the slot's memory"
            )
            self.memory[row.slot].append(row.token)
        self.batches.append(list(rows))

    def new_sampler(self, sampling: Sampling) -> int:
        self.samplers += 1
        return sampling.seed

    def sample(self, sampler: int, row: int) -> int:
        rows = self.batches[-1]
        assert rows[row].output
        sequence = self.memory[rows[row].slot]
        assert len(sequence) == rows[row].position + 1
        return next_token(sequence, sampler)

    def free_sampler(self, sampler: int) -> None:
        self.samplers -= 1

    def forget(self, slot: int) -> None:
        self.memory[slot].clear()

    def piece(self, token: int) -> bytes:
        return b"<%d>" % token

    def ends_text(self, token: int) -> bool:
        return token == END


def next_token(sequence: Sequence[int], seed: int) -> int:
    return zlib.crc32(bytes([seed % 256, *sequence])) % 11


def expected(job: Job, context: int) -> tuple[list[int], str]:
    """The answer that the job must get, whoever its neighbours are."""
    sequence = list(job.prompt)
    answer: list[int] = []
    while True:
        token = next_token(sequence, job.sampling.seed)
        if token == END:
            return answer, "stop"
        answer.append(token)
        sequence.append(token)
        if len(answer) >= job.sampling.max_tokens or len(sequence) >= context:
            return answer, "length"


def job(number: int, prompt: Sequence[int] = (1, 2, 3), seed: int = 1, **options: object) -> Job:
    return Job(number, tuple(prompt), Sampling(seed=seed, **options))  # type: ignore[arg-type]


def engine(
    model: FakeModel, slots: int = 1, context: int = 50, chunk: int = 4, waiting: int = 8
) -> Engine[int]:
    return Engine(model, EngineConfig(slots, context, chunk, waiting))


def drain(subject: Engine[int]) -> list[Output]:
    outputs: list[Output] = []
    for _ in range(10_000):
        if not subject.busy:
            return outputs
        outputs += subject.step()
    raise AssertionError("it never comes to an end")


def answers(outputs: Sequence[Output]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for output in outputs:
        if isinstance(output, Text):
            tokens = found.setdefault(output.job, [])
            assert output.piece.position == len(tokens)
            tokens += output.piece.token_ids
    return found


def test_prompts_are_computed_in_chunks_and_only_the_last_token_is_an_output() -> None:
    model = FakeModel(1)
    subject = engine(model, chunk=4)
    subject.submit(job(1, range(1, 11), max_tokens=1))
    drain(subject)
    assert [len(batch) for batch in model.batches] == [4, 4, 2]
    assert [row.position for batch in model.batches for row in batch if row.output] == [9]


def first_seed(prompt: Sequence[int], tokens: int, distinct: int = 0) -> int:
    """A seed with which the fake model's answer is at least that long."""
    for seed in range(1, 256):
        answer = expected(job(1, prompt, seed=seed, max_tokens=tokens), 200)[0]
        if len(answer) == tokens and len(set(answer)) >= distinct:
            return seed
    raise AssertionError("no such seed")


def test_a_long_prompt_does_not_stall_a_running_sequence() -> None:
    model = FakeModel(2)
    subject = engine(model, slots=2, context=200, chunk=4)
    subject.submit(job(1, (1,), seed=first_seed((1,), 10), max_tokens=10))
    subject.step()
    subject.submit(job(2, [5] * 40, max_tokens=1))
    for _ in range(3):
        subject.step()
        rows = model.batches[-1]
        assert rows[0].slot == 0
        assert rows[0].output
        assert len([row for row in rows if row.slot == 1]) == 4


def test_cancel_frees_the_slot_at_once_and_the_next_job_gets_it() -> None:
    model = FakeModel(1)
    subject = engine(model)
    subject.submit(job(1, max_tokens=40))
    subject.submit(job(2, (4, 5), max_tokens=5))
    subject.step()
    assert (subject.free_slots, subject.waiting) == (0, 1)
    subject.cancel(1)
    assert subject.free_slots == 1
    assert model.memory[0] == []
    outputs = drain(subject)
    assert {output.job for output in outputs} == {2}
    assert answers(outputs)[2] == expected(job(2, (4, 5), max_tokens=5), 50)[0]


def test_a_waiting_job_can_be_cancelled() -> None:
    subject = engine(FakeModel(1))
    subject.submit(job(1))
    subject.submit(job(2))
    subject.step()
    subject.cancel(2)
    assert {output.job for output in drain(subject)} <= {1}


def test_too_many_jobs_are_refused() -> None:
    subject = engine(FakeModel(1), waiting=2)
    for number in range(3):
        subject.submit(job(number))
    with pytest.raises(EngineFull):
        subject.submit(job(9))


def test_an_answer_ends_where_the_context_is_full() -> None:
    subject = engine(FakeModel(1), context=6)
    subject.submit(job(1, seed=first_seed((1, 2, 3), 3), max_tokens=100))
    *_, last = drain(subject)
    assert last == Finished(1, "length", 3, 3)


def test_a_stop_string_ends_the_answer_and_is_not_shown() -> None:
    seed = first_seed((1, 2, 3), 3, distinct=3)
    first, second, third = expected(job(1, seed=seed, max_tokens=3), 50)[0]
    subject = engine(FakeModel(1))
    subject.submit(job(1, seed=seed, max_tokens=20, stop=(f"<{third}>",)))
    outputs = drain(subject)
    text = "".join(output.piece.text for output in outputs if isinstance(output, Text))
    assert text == f"<{first}><{second}>"
    assert outputs[-1] == Finished(1, "stop", 3, 3)


def test_a_batch_that_is_refused_breaks_its_jobs_and_leaks_nothing() -> None:
    model = FakeModel(2)
    subject = engine(model, slots=2)
    subject.submit(job(1))
    subject.submit(job(2))
    model.refuse_next = True
    assert subject.step() == [Broken(1, "full"), Broken(2, "full")]
    assert (subject.free_slots, model.samplers, subject.busy) == (2, 0, False)
    subject.submit(job(3, max_tokens=2))
    assert isinstance(drain(subject)[-1], Finished)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.lists(st.integers(1, 9), min_size=1, max_size=15),
            st.integers(1, 12),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
        st.tuples(st.just("refuse"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(ACTIONS, st.integers(1, 4), st.integers(1, 8))
def test_no_slot_is_leaked_no_token_lost_and_neighbours_never_matter(
    actions: list[tuple[str, object, int]], slots: int, chunk: int
) -> None:
    context = 20
    model = FakeModel(slots, batch_max=slots + chunk)
    subject = engine(model, slots, context, chunk, waiting=3)
    taken: dict[int, Job] = {}
    cancelled: set[int] = set()
    outputs: list[Output] = []
    for action, value, limit in actions:
        if action == "submit":
            assert isinstance(value, list)
            candidate = job(len(taken), value, seed=limit, max_tokens=limit)
            try:
                subject.submit(candidate)
            except EngineFull:
                continue
            taken[candidate.id] = candidate
        elif action == "cancel":
            assert isinstance(value, int)
            subject.cancel(value)
            ended = {o.job for o in outputs if isinstance(o, Finished | Broken)}
            if value in taken and value not in ended:
                cancelled.add(value)
        elif action == "refuse":
            model.refuse_next = True
        else:
            outputs += subject.step()
        assert model.samplers == slots - subject.free_slots
    model.refuse_next = False
    outputs += drain(subject)

    assert subject.free_slots == slots
    assert model.samplers == 0
    assert all(memory == [] for memory in model.memory.values())
    ends = [o for o in outputs if isinstance(o, Finished | Broken)]
    assert sorted(o.job for o in ends) == sorted(set(taken) - cancelled)
    texts = answers(outputs)
    for end in ends:
        if isinstance(end, Finished):
            tokens, reason = expected(taken[end.job], context)
            assert texts.get(end.job, []) == tokens
            assert end == Finished(end.job, reason, len(taken[end.job].prompt), len(tokens))  # type: ignore[arg-type]
