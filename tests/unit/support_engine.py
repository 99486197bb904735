"""A fake model for the scheduler of sequences: its next token is a function of the sequence so far."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from meshd_plugins.builtin.llama.engine.jobs import (
    BackendRefused,
    Finished,
    Job,
    Output,
    Row,
    Scope,
    Text,
)
from meshd_plugins.builtin.llama.engine.media import embedding_of, lag
from meshd_plugins.builtin.llama.engine.scheduler import Engine, EngineConfig
from meshd_plugins.builtin.llama.engine.text import Logprob
from meshd_plugins.builtin.llama.sampling import Sampling

END = 0
BYTES_PER_TOKEN = 10


@dataclass(frozen=True)
class FakeState:
    tokens: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return BYTES_PER_TOKEN * len(self.tokens)


class FakeModel:
    """Checks what a real context would: positions without gaps, outputs only where asked, slots in range.

    Of media: that a slot's part of a batch is of one piece, and whole where it must be.
    """

    def __init__(self, slots: int, batch_max: int = 10_000) -> None:
        self.memory: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        self.samplers = 0
        self.batches: list[list[Row]] = []
        self.refuse_next = False
        self.forgets_parts = True
        self.saves = True
        self.restores = True
        self._batch_max = batch_max

    def decode(self, rows: Sequence[Row]) -> None:
        assert 0 < len(rows) <= self._batch_max
        if self.refuse_next:
            self.refuse_next = False
            raise BackendRefused("full")
        assert [row.slot for row in rows] == sorted(row.slot for row in rows), "slots out of order"
        for slot in {row.slot for row in rows}:
            check_media([row for row in rows if row.slot == slot])
        for row in rows:
            held = self.memory[row.slot]
            assert row.position == len(held) - lag(held), "a gap or a leftover in the slot"
            held.append(row.token)
        self.batches.append(list(rows))

    def new_sampler(self, sampling: Sampling) -> int:
        self.samplers += 1
        return sampling.seed

    def sample(self, sampler: int, row: int) -> int:
        rows = self.batches[-1]
        assert rows[row].output
        sequence = self.memory[rows[row].slot]
        assert len(sequence) - lag(sequence) == rows[row].position + 1
        return next_token(sequence, sampler)

    def logprob(self, row: int, token: int, count: int) -> Logprob:
        assert self.batches[-1][row].output
        return Logprob(token, -0.5, tuple((n, -1.0) for n in range(count)))

    def free_sampler(self, sampler: int) -> None:
        self.samplers -= 1

    def keep(self, slot: int, positions: int) -> bool:
        held = self.memory[slot]
        assert 0 <= positions <= len(held) - lag(held)
        if positions and not self.forgets_parts:
            held.clear()
            return False
        while len(held) - lag(held) > positions or (held and ends_within(held)):
            held.pop()
        return True

    def save(self, slot: int) -> FakeState | None:
        assert self.memory[slot], "there is nothing to save"
        return FakeState(tuple(self.memory[slot])) if self.saves else None

    def restore(self, slot: int, state: FakeState) -> bool:
        assert state.tokens, "llama.cpp leaves the slot as it is"
        self.memory[slot] = list(state.tokens) if self.restores else []
        return self.restores

    def piece(self, token: int) -> bytes:
        return b"<%d>" % token

    def ends_text(self, token: int) -> bool:
        return token == END


def check_media(rows: Sequence[Row]) -> None:
    if all(row.token >= 0 for row in rows):
        return
    pieces = [embedding_of(row.token) for row in rows]
    assert len({piece.key for piece in pieces}) == 1, "text and media, or two media, of one slot"
    offsets = [piece.offset for piece in pieces]
    assert offsets == list(range(offsets[0], offsets[0] + len(rows)))
    assert not any(row.output for row in rows), "nothing can be sampled from a medium"
    if pieces[0].at_once:
        assert len(rows) == pieces[0].size, "a part of what looks at all of itself"


def ends_within(held: Sequence[int]) -> bool:
    """Whether the last piece of a medium is not whole and may not be left so."""
    if held[-1] >= 0:
        return False
    piece = embedding_of(held[-1])
    return piece.offset < piece.size - 1 and not piece.divisible


def next_token(sequence: Sequence[int], seed: int) -> int:
    return zlib.crc32(bytes([seed % 256, *(token % 251 for token in sequence)])) % 11


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


def make_job(
    number: int,
    prompt: Sequence[int] = (1, 2, 3),
    seed: int = 1,
    *,
    caller: str = "",
    tag: bytes = b"",
    privacy: int = 2,
    **options: object,
) -> Job:
    sampling = Sampling(seed=seed, **options)  # type: ignore[arg-type]
    return Job(number, tuple(prompt), sampling, Scope(caller, privacy), tag)


def make_engine(
    model: FakeModel,
    slots: int = 1,
    context: int = 50,
    chunk: int = 4,
    waiting: int = 8,
    **options: object,
) -> Engine[int, FakeState]:
    return Engine(model, EngineConfig(slots, context, chunk, waiting, **options))  # type: ignore[arg-type]


def drain(subject: Engine[int, FakeState]) -> list[Output]:
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


def first_seed(prompt: Sequence[int], tokens: int, distinct: int = 0) -> int:
    """A seed with which the fake model's answer is at least that long."""
    for seed in range(1, 256):
        answer = expected(make_job(1, prompt, seed=seed, max_tokens=tokens), 10_000)[0]
        if len(answer) == tokens and len(set(answer)) >= distinct:
            return seed
    raise AssertionError("no such seed")


def cached(outputs: Sequence[Output]) -> dict[int, int]:
    """Prompt tokens that were found computed, by job."""
    return {o.job: o.cached_tokens for o in outputs if isinstance(o, Finished)}
