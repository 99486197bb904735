"""How fast a model is on this device: timed once, when its worker starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshd_plugins.builtin.llama.engine.jobs import Row
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.worker.backend import LlamaBackend

CHUNK_S: Final = 0.4  # how long a prefill chunk may hold up the sequences that generate
ALONE_S: Final = 1.0  # the same while none generates: a request that comes meanwhile waits for it
CHUNK_TOKENS_MIN: Final = 16
TILE_TOKENS: Final = 64  # of queries, in llama.cpp's attention on a processor
MEASURE_PREFILL_TOKENS: Final = 64
MEASURE_DECODE_TOKENS: Final = 24
MEASURE_S: Final = 0.3  # the decode measurement ends here at the latest


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates of this model on this device."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    by_batch: Mapping[int, float]

    def expected(self, sequences: int) -> float:
        """Tokens a second of that many sequences together, between what was measured."""
        below = max((size for size in self.by_batch if size <= sequences), default=1)
        above = min((size for size in self.by_batch if size >= sequences), default=below)
        rate, next_rate = self.by_batch[below], self.by_batch[above]
        share = (sequences - below) / (above - below) if above > below else 0.0
        return max(rate + share * (next_rate - rate), 0.1)


def chunk_tokens(prefill_tokens_per_s: float, seconds: float, most: int) -> int:
    """Prompt tokens that take about so long: whole tiles, of which attention is computed faster."""
    tokens = max(1, min(most, max(CHUNK_TOKENS_MIN, int(prefill_tokens_per_s * seconds))))
    if tokens < TILE_TOKENS // 2:
        return tokens
    # A tile that is begun takes as long as a whole one.
    return min(most, max(TILE_TOKENS, tokens - tokens % TILE_TOKENS))


def measure(backend: LlamaBackend, slots: int) -> Measured:
    """Warm up (the first batch reads the model from disk) and time short runs."""
    greedy = Sampling(seed=0, temperature=0.0, repeat_penalty=1.0)
    started_s = time.monotonic()
    backend.decode([Row(position, position, 0, output=position == 7) for position in range(8)])
    slow = time.monotonic() - started_s > 1.0
    backend.learn_layout(0)
    backend.adapt_threads()
    # Short, so that a crowded machine is noticed: there a long prompt with too many threads takes many seconds.
    backend.decode([Row(108, 8, 0, output=True)])
    tokens = 8 if slow else MEASURE_PREFILL_TOKENS
    for slot in range(slots):
        backend.keep(slot, 0)
    started_s = time.monotonic()
    backend.decode([Row(100 + n, n, 0, output=n == tokens - 1) for n in range(tokens)])
    sampler = backend.new_sampler(greedy)
    token = backend.sample(sampler, tokens - 1)  # waits for the result
    prefill = tokens / (time.monotonic() - started_s)
    by_batch = {1: _decode_rate(backend, sampler, token, tokens, (0,))}
    if slots > 1:
        for slot in range(1, slots):
            backend.decode([Row(100 + n, n, slot, output=n == 7) for n in range(8)])
        backend.keep(0, 0)
        backend.decode([Row(100 + n, n, 0, output=n == 7) for n in range(8)])
        by_batch[slots] = _decode_rate(backend, sampler, token, 8, tuple(range(slots)))
    backend.free_sampler(sampler)
    for slot in range(slots):
        backend.keep(slot, 0)
    return Measured(prefill, by_batch[1], by_batch)


def _decode_rate(
    backend: LlamaBackend, sampler: Any, token: int, position: int, slots: tuple[int, ...]
) -> float:
    """Tokens a second over all slots, generating from there on."""
    started_s = time.monotonic()
    steps = 0
    while steps < MEASURE_DECODE_TOKENS and (steps < 2 or time.monotonic() - started_s < MEASURE_S):
        backend.decode([Row(token, position + steps, slot, output=True) for slot in slots])
        for row in range(len(slots)):
            token = backend.sample(sampler, row)
        steps += 1
    return steps * len(slots) / (time.monotonic() - started_s)
