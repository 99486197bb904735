"""Measuring a model that is served: asked of its worker, read like a peer's word, told in words."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Final

from meshd_plugins.api import Failed, Value, Worker

RATE_MAX: Final = 1e7
ROWS_MAX: Final = 16
TABLES: Final = ("prefill_tokens_per_s_by_length", "decode_tokens_per_s_by_batch")
KEPT: Final = (*TABLES, "prefill_tokens_per_s", "decode_tokens_per_s", "benched")
"""What outlives the next start, which measures less."""


async def bench(worker: Worker) -> AsyncGenerator[Mapping[str, Value], None]:
    """Have a worker measured: items of progress, and last what is to be put into its hello.

    Raises:
        Refused: it has other work, or cannot be measured.
        Failed: it died, or said nonsense.
    """
    async with worker.call({"operation": "bench"}) as call:
        while (item := await call.receive()) is not None:
            done = item.get("done")
            if isinstance(done, Mapping):
                yield {"done": _read(done)}  # noqa: ASYNC119  closed by its reader, as `invoke` is
                return
            what, rate = str(item.get("measured"))[:80], _rate(item.get("rate"))
            yield {"phase": what, "tokens_per_s": rate}  # noqa: ASYNC119
    raise Failed("the worker ended the measurement without a result", code="failed")


def _read(done: Mapping[str, Value]) -> dict[str, Value]:
    if (
        embedding := done.get("embedding")
    ) is not None:  # whoever announces it reads it as that of a hello
        prefill = _rate(done.get("prefill_tokens_per_s"))
        found: dict[str, Value] = {"embedding": embedding, "prefill_tokens_per_s": prefill}
    else:
        found = _read_tables(done)
    resident = done.get("resident_bytes")
    if isinstance(resident, int) and not isinstance(resident, bool) and 0 < resident < 2**62:
        found["resident_bytes"] = resident
    return found


def _read_tables(done: Mapping[str, Value]) -> dict[str, Value]:
    """Of a model that writes."""
    found: dict[str, Value] = {"benched": True}
    for name in TABLES:
        table = done.get(name)
        if not isinstance(table, Mapping) or len(table) > ROWS_MAX:
            raise Failed(f"the worker measured no {name}", code="failed")
        if not all(key.isdecimal() and len(key) < 6 for key in table):
            raise Failed(f"the worker says nonsense of {name}", code="failed")
        found[name] = {key: _rate(rate) for key, rate in table.items()}
    prefill, decode = (_rows(found[name]) for name in TABLES)
    if prefill:
        found["prefill_tokens_per_s"] = prefill[max(prefill)]
    if decode:
        found["decode_tokens_per_s"] = decode[min(decode)]
    return found


def _rows(table: Value) -> dict[int, float]:
    assert isinstance(table, Mapping)
    return {int(key): _rate(rate) for key, rate in table.items()}


def _rate(value: Value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= RATE_MAX:
        raise Failed(f"the worker gives {str(value)[:80]!r} for a rate", code="failed")
    return float(value)
