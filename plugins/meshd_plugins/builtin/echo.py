"""`computation.gpt/echo`: gives back what it is sent, in as many chunks and as slowly as one likes.

For tests and measurements; off unless `plugins.enable` names it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

import trio

from meshd_plugins.api import (
    BadRequest,
    Chunk,
    Descriptor,
    Done,
    Event,
    Operation,
    PluginConfigError,
    PluginContext,
    Request,
    Value,
)
from meshd_plugins.hookspecs import hookimpl
from meshd_plugins.prompts import prompt_of

CHUNKS_MAX: Final = 10_000
DELAY_S_MAX: Final = 60.0
SLOTS_MAX: Final = 4_096


@dataclass(frozen=True, slots=True)
class EchoConfig:
    """The table [plugins.echo]."""

    slots: int = 64  # requests served at once, 1 to 4096
    chunk_count: int = 1  # chunks of an answer, 1 to 10000; a body's "chunks" goes before it
    delay_s: float = 0.0  # wait before each chunk, 0 to 60; a body's "delay_s" goes before it


class EchoCapability:
    """Yields the text of the request in equal pieces."""

    def __init__(self, config: EchoConfig) -> None:
        self._config = config
        self._descriptor = Descriptor(
            name="computation.gpt/echo",
            operations=(Operation.RUN, Operation.CHAT, Operation.COMPLETE),
            summary="Gives back what it is sent; for tests and measurements",
            slots=config.slots,
        )

    @property
    def descriptor(self) -> Descriptor:
        """What is announced."""
        return self._descriptor

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield the text in exactly `chunks` chunks, which may be empty, then Done."""
        text = prompt_of(request)
        try:
            count = _integer(
                request.body.get("chunks", self._config.chunk_count), "chunks", CHUNKS_MAX
            )
            delay_s = _seconds(request.body.get("delay_s", self._config.delay_s), "delay_s")
        except ValueError as error:
            raise BadRequest(str(error)) from error
        for index in range(count):
            await trio.sleep(delay_s)  # of 0 s too: a checkpoint, so that cancellation arrives
            yield Chunk(text=text[len(text) * index // count : len(text) * (index + 1) // count])
        yield Done(detail={"chunks": count})


def _integer(value: Value, key: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{key} is {value!r}; it must be a whole number from 1 to {most}")
    return value


def _seconds(value: Value, key: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= DELAY_S_MAX
    ):
        raise ValueError(f"{key} is {value!r}; it must be seconds from 0 to {DELAY_S_MAX:g}")
    return float(value)


def read_config(table: dict[str, Value]) -> EchoConfig:
    """Check the table. Raises PluginConfigError."""
    unknown = sorted(set(table) - {"slots", "chunk_count", "delay_s"})
    if unknown:
        raise PluginConfigError(
            f"plugins.echo.{unknown[0]} is no setting; known: slots, chunk_count, delay_s"
        )
    default = EchoConfig()
    try:
        return EchoConfig(
            slots=_integer(table.get("slots", default.slots), "slots", SLOTS_MAX),
            chunk_count=_integer(
                table.get("chunk_count", default.chunk_count), "chunk_count", CHUNKS_MAX
            ),
            delay_s=_seconds(table.get("delay_s", default.delay_s), "delay_s"),
        )
    except ValueError as error:
        raise PluginConfigError(f"plugins.echo.{error}") from error


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Register the echo."""
    context.capabilities.add(EchoCapability(read_config(dict(context.config))))
