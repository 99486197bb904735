"""For authors of plugins: the messages of a worker as the events of an answer.

A worker answers a call with items, each a part of the answer, and a last one {"done": {...}}: what a capability
yields as `Chunk`s and one `Done`. What is in an item is between a plugin and its worker.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TypeAlias

from meshd_plugins.api import Chunk, Done, Event, Failed, Value, Worker

Item: TypeAlias = "Mapping[str, Value]"


async def answer_of(
    worker: Worker, message: Item, chunk: Callable[[Item], Chunk], done: Callable[[Item], Done]
) -> AsyncGenerator[Event, None]:
    """Call the worker; `chunk` and `done` read its items, and raise Failed for what makes no sense.

    Close it (`contextlib.aclosing`): that ends the call. Raises as the worker and these do, and Failed when the
    worker ends the answer without a last item.
    """
    async with worker.call(message) as call:
        while (item := await call.receive()) is not None:
            last = item.get("done")
            if isinstance(last, Mapping):
                yield done(last)  # noqa: ASYNC119  whoever reads it closes it
                return
            yield chunk(item)  # noqa: ASYNC119
    raise Failed("the worker ended the answer without saying why", code="failed")


def count_in(item: Item, name: str) -> int:
    """A count that a worker tells; 0 for what is none."""
    value = item.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
