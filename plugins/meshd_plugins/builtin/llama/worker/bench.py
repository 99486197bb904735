"""The call `bench`: rates of prompts of two lengths, and of up to eight sequences at once.

It has the context to itself: nobody else is served meanwhile, and what was warm is forgotten. The daemon
sends it nothing else until it ends, which each part of it does within `PART_S`, finished or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.engine.jobs import Row
from meshd_plugins.builtin.llama.engine.scheduler import Engine
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.worker.backend import LlamaBackend
from meshd_plugins.builtin.llama.worker.embed_service import Embedding
from meshd_plugins.builtin.llama.worker.embedding import MEASURE_TEXT_TOKENS, EmbeddingBackend
from meshd_plugins.workerkit import Link

PREFILL_TOKENS: Final = (128, 512)
SEQUENCES: Final = (1, 2, 4, 8)
DECODE_STEPS: Final = 48
STEPS_MIN: Final = 2
PART_S: Final = 5.0
START_TOKENS: Final = 8  # of each sequence, before it generates
FIRST_TOKEN: Final = 100  # of the made-up prompts: ordinary ones in every vocabulary


class Bench:
    """Implements `Part`; answers with items {"measured", "rate"} and {"done": {...}}."""

    operations = ("bench",)

    def __init__(self, link: Link, backend: LlamaBackend, engine: Engine[Any, Any]) -> None:
        self._link = link
        self._backend = backend
        self._engine = engine
        self._slots = len(engine.slots.all)

    @property
    def busy(self) -> bool:
        """It does all its work in `take`."""
        return False

    def take(self, call_id: int, message: Mapping[str, Value]) -> None:  # noqa: ARG002  a Part's signature
        """Measure, all at once."""
        if self._engine.busy:
            text = "the model answers requests; it is measured when it is idle"
            self._link.error(call_id, "refused", "busy", text)
            return
        prefill: dict[str, Value] = {}
        decode: dict[str, Value] = {}
        for tokens in PREFILL_TOKENS:
            if tokens < self._backend.context_tokens:
                prefill[str(tokens)] = self._prefill(tokens)
                self._tell(call_id, f"prefill of {tokens} tokens", prefill[str(tokens)])
        for sequences in SEQUENCES:
            if sequences <= self._slots:
                decode[str(sequences)] = self._decode(sequences)
                what = f"decode of {sequences} sequence{'s' if sequences > 1 else ''}"
                self._tell(call_id, what, decode[str(sequences)])
        self._empty()
        done: dict[str, Value] = {
            "prefill_tokens_per_s_by_length": prefill,
            "decode_tokens_per_s_by_batch": decode,
            "resident_bytes": resident_bytes(),
        }
        self._link.item(call_id, {"done": done})
        self._link.end(call_id)

    def cancel(self, call_id: int) -> None:
        """It has ended before it can hear of this."""

    def step(self) -> None:
        """Nothing is left to do."""

    def _tell(self, call_id: int, what: str, rate: Value) -> None:
        self._link.item(call_id, {"measured": what, "rate": rate})
        self._link.flush()

    def _empty(self) -> None:
        for slot in self._engine.slots.all:
            self._engine.slots.empty(slot)

    def _prefill(self, tokens: int) -> float:
        """Tokens a second of one prompt, in batches as large as they may be."""
        self._empty()
        size, done, started_s = self._backend.batch_tokens, 0, time.monotonic()
        while done < tokens and (not done or time.monotonic() - started_s < PART_S):
            end = min(done + size, tokens)
            rows = [Row(FIRST_TOKEN + n % 64, n, 0, output=n == end - 1) for n in range(done, end)]
            self._backend.decode(rows)
            self._wait(len(rows) - 1)
            done = end
            self._link.heartbeat()
        return round(done / max(time.monotonic() - started_s, 1e-6), 2)

    def _decode(self, sequences: int) -> float:
        """Tokens a second over all of them."""
        self._empty()
        for slot in range(sequences):
            last = START_TOKENS - 1
            rows = [Row(FIRST_TOKEN + n, n, slot, output=n == last) for n in range(START_TOKENS)]
            self._backend.decode(rows)
        started_s, steps = time.monotonic(), 0
        while steps < DECODE_STEPS and (steps < STEPS_MIN or time.monotonic() - started_s < PART_S):
            position = START_TOKENS + steps
            self._backend.decode(
                [Row(FIRST_TOKEN, position, slot, output=True) for slot in range(sequences)]
            )
            for row in range(sequences):
                self._wait(row)
            steps += 1
            self._link.heartbeat()
        return round(steps * sequences / max(time.monotonic() - started_s, 1e-6), 2)

    def _wait(self, row: int) -> None:
        """Sample once, as an answer would: what a GPU computes is not there before."""
        sampler = self._backend.new_sampler(Sampling(seed=0, temperature=0.0, repeat_penalty=1.0))
        try:
            self._backend.sample(sampler, row)
        finally:
            self._backend.free_sampler(sampler)


class EmbeddingBench:
    """The same for a model that makes vectors or scores: texts as at a start, measured again."""

    operations = ("bench",)

    def __init__(self, link: Link, backend: EmbeddingBackend, embedding: Embedding) -> None:
        self._link = link
        self._backend = backend
        self._embedding = embedding

    @property
    def busy(self) -> bool:
        """It does all its work in `take`."""
        return False

    def take(self, call_id: int, message: Mapping[str, Value]) -> None:  # noqa: ARG002  a Part's signature
        """Measure, all at once."""
        if self._embedding.busy:
            text = "the model makes vectors; it is measured when it is idle"
            self._link.error(call_id, "refused", "busy", text)
            return
        figures = self._backend.measure()
        told = f"texts of {min(MEASURE_TEXT_TOKENS, self._backend.text_tokens)} tokens"
        self._link.item(call_id, {"measured": told, "rate": round(figures.tokens_per_s, 2)})
        done: dict[str, Value] = {
            "embedding": figures.to_wire(),
            "prefill_tokens_per_s": figures.tokens_per_s,
            "resident_bytes": resident_bytes(),
        }
        self._link.item(call_id, {"done": done})
        self._link.end(call_id)

    def cancel(self, call_id: int) -> None:
        """It has ended before it can hear of this."""

    def step(self) -> None:
        """Nothing is left to do."""


def resident_bytes() -> int:
    """Memory of this process, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
