"""What the worker tells the daemon by itself: how busy it is, what is warm, how fast it is of late."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.engine.jobs import Warm
from meshd_plugins.builtin.llama.engine.scheduler import Engine
from meshd_plugins.builtin.llama.engine.slots import REUSE_TOKENS_MIN
from meshd_plugins.builtin.llama.worker.generation import Pace
from meshd_plugins.workerkit import Link

INTERVAL_S: Final = 1.0
WARM_MAX: Final = 16


class Status:
    """Implements `Part`: the calls of `status` get an item when something changed, one a second at most."""

    operations = ("status",)

    def __init__(
        self,
        link: Link,
        now: Callable[[], dict[str, Value]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Tell what `now` returns; `clock` says seconds."""
        self._link = link
        self._now = now
        self._clock = clock
        self._calls: list[int] = []
        self._told: dict[str, Value] = {}
        self._told_s = 0.0

    @property
    def busy(self) -> bool:
        """It only speaks when the loop turns anyway."""
        return False

    def take(self, call_id: int, message: Mapping[str, Value]) -> None:  # noqa: ARG002  a Part's signature
        """Tell it at once, and from now on."""
        self._calls.append(call_id)
        self._link.item(call_id, self._now())

    def cancel(self, call_id: int) -> None:
        """Tell it no more."""
        if call_id in self._calls:
            self._calls.remove(call_id)

    def step(self) -> None:
        """Tell what changed."""
        now_s = self._clock()
        if not self._calls or now_s - self._told_s < INTERVAL_S:
            return
        self._told_s = now_s
        status = self._now()
        if status != self._told:
            self._told = status
            for call_id in self._calls:
                self._link.item(call_id, status)


def generation_status(engine: Engine[Any, Any], pace: Pace, tokens_max: int) -> dict[str, Value]:
    """Of a model that writes."""
    warm = [w for w in engine.warm() if w.tokens >= REUSE_TOKENS_MIN][-WARM_MAX:]
    return {
        "slots_busy": len(engine.slots.all) - engine.free_slots,
        "waiting": engine.waiting,
        "kv_tokens": engine.slots.held_tokens,
        "kv_tokens_max": tokens_max,
        "kept_bytes": engine.kept_bytes,
        "reused_tokens": engine.reused_tokens,
        "warm": [_row(entry) for entry in reversed(warm)],
        "decode_tokens_per_s": round(pace.decode_tokens_per_s, 1),
        "prefill_tokens_per_s": round(pace.prefill_tokens_per_s, 1),
    }


def _row(warm: Warm) -> list[Value]:
    return [warm.tag, warm.tokens]
