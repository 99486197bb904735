"""Runs what an administrator has a plugin do, at the plugin boundary.

What a plugin yields is checked, what it raises beside the errors of its contract becomes `Failed`, and
its generator is closed whatever happens, within `CLOSE_S`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Final, TypeAlias

import trio

from meshd_plugins.api import CapabilityError, Failed, Logger, PluginOperation, Value

CLOSE_S: Final = 5.0

Item: TypeAlias = "Mapping[str, Value]"
Take: TypeAlias = Callable[[Item], Awaitable[None]]
"""Where the items of an operation go, in order."""


async def run_operation(
    operation: PluginOperation, label: str, arguments: Item, take: Take, log: Logger
) -> None:
    """Run one to its end; what `take` raises is raised as it is.

    Raises:
        CapabilityError: as the operation says; `Failed` with the code `contract` or `crashed` if it
            breaks its contract or raises something else.
    """
    items: AsyncGenerator[Item, None] | None = None
    done = False
    try:
        items = _guarded(lambda: operation(arguments), label, log)
        while (item := await _next(items, label, log)) is not None:
            if done or not isinstance(item, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise Failed(f"{label} yielded what is no item, or one too many", code="contract")
            done = "done" in item
            await take(item)
    finally:
        if items is not None:
            with trio.move_on_after(CLOSE_S, shield=True):
                await items.aclose()
    if not done:
        raise Failed(f"{label} stopped without saying that it was done", code="contract")


async def _next(items: AsyncGenerator[Item, None], label: str, log: Logger) -> Item | None:
    try:
        return await anext(items, None)
    except CapabilityError:
        raise
    except Exception as error:
        raise _crashed(error, label, log) from error


def _guarded(
    call: Callable[[], AsyncGenerator[Item, None]], label: str, log: Logger
) -> AsyncGenerator[Item, None]:
    try:
        return call()
    except CapabilityError:
        raise
    except Exception as error:
        raise _crashed(error, label, log) from error


def _crashed(error: Exception, label: str, log: Logger) -> Failed:
    """The log has the words of the error; who asked has its kind."""
    log.error("plugin.operation_crashed", operation=label, error=repr(error))
    return Failed(f"{label} crashed: {type(error).__name__}", code="crashed")
