"""A large state of a known form, and the worker's part that hands it over, without a model."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, cast

from tests.unit.support_engine import FakeModel

from meshd_plugins.builtin.llama.engine.jobs import Scope
from meshd_plugins.builtin.llama.engine.prefixes import Kept
from meshd_plugins.builtin.llama.engine.scheduler import Engine, EngineConfig
from meshd_plugins.builtin.llama.worker.backend import SequenceState
from meshd_plugins.builtin.llama.worker.handoff import Handoff
from meshd_plugins.builtin.llama.worker.kv_layout import Layout

CALLER: Final = "n1/key:anna"
TAG: Final = b"tag-0001"
TOKENS: Final = 1_000
LARGE: Final = Layout(
    magic=0x67677371, streams=1, words=bytes(8), rows=((1, 4096),) * 16
)  # 64 KiB a token


def written(layout: Layout, tokens: int) -> bytearray:
    """A state as llama.cpp would write it; what its rows hold is nobody's business."""
    before, after = layout.frame()
    cells = b"".join(struct.pack("<iIi", position, 1, 0) for position in range(tokens))
    rows = (
        struct.pack("<iQ", kind, size) + bytes(range(256)) * (tokens * size // 256)
        for kind, size in layout.rows
    )
    return bytearray(
        b"".join((before, struct.pack("<I", tokens), cells, layout.words, *rows, after))
    )


def kept_state(layout: Layout, tokens: int, tag: bytes = TAG) -> Kept[SequenceState]:
    state = SequenceState.of(written(layout, tokens))
    return Kept(tuple(range(tokens)), state, Scope(CALLER, 1), tag)


def handing(
    link: Any, layout: Layout, room_bytes: int, clock: Callable[[], float] = time.monotonic
) -> tuple[Handoff, Engine[Any, Any]]:
    """The part, over an engine that may keep so much and never computes."""
    config = EngineConfig(1, 100, 10, kept_bytes_max=room_bytes)
    engine: Engine[Any, Any] = Engine(cast("Any", FakeModel(1)), config)
    backend = SimpleNamespace(
        layout=layout, context_tokens=TOKENS + 1, vocabulary=SimpleNamespace(size=TOKENS)
    )
    return Handoff(link, cast("Any", backend), engine, clock), engine
