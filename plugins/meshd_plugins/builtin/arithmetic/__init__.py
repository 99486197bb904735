"""The exact calculator: `computation.gpt/arithmetic` and `knowledge.gpt/arithmetic`.

Integers, decimals and fractions are computed as exact rationals, units with their exact factors; a
value without an exact form is marked "≈" and shows certain digits only. Nothing is guessed: what is
not wholly understood is a BadRequest that says which words or which column.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
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
)
from meshd_plugins.builtin.arithmetic.answer import Answer, answer
from meshd_plugins.expressions import (
    LENGTH_MAX,
    ExpressionError,
    has_units,
    parse_question,
    size,
)
from meshd_plugins.hookspecs import hookimpl
from meshd_plugins.prompts import prompt_of

__all__ = ["ArithmeticCapability", "calculate", "meshd_register"]

SLOTS: Final = 16
INLINE_NODES_MAX: Final = 24
"""Larger expressions, and all with units (pint may have to load), are computed in a thread."""

_limiter = trio.CapacityLimiter(2)


class ArithmeticCapability:
    """The calculator under one name."""

    def __init__(self, name: str, operations: tuple[Operation, ...]) -> None:
        self._descriptor = Descriptor(
            name=name,
            operations=operations,
            summary="Exact arithmetic: integers, decimals, fractions, percentages, roots, units",
            slots=SLOTS,
            fields={"exact": True, "input_characters_max": LENGTH_MAX},
        )

    @property
    def descriptor(self) -> Descriptor:
        """What is announced."""
        return self._descriptor

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Answer with one chunk ("17 + 25 = 42") and the parts of it in `Done.detail`.

        Raises:
            BadRequest: not_arithmetic, bad_expression, too_large, undefined, ambiguous, bad_units.
        """
        text = prompt_of(request)
        try:
            result = await _computed(text)
        except ExpressionError as error:
            raise BadRequest(_explained(error, text), code=error.code) from error
        yield Chunk(text=result.text)
        yield Done(detail=result.detail)


def calculate(text: str) -> Answer:
    """Answer a question or an expression. Raises ExpressionError."""
    return answer(parse_question(text))


async def _computed(text: str) -> Answer:
    node = parse_question(text)
    if size(node) <= INLINE_NODES_MAX and not has_units(node):
        await trio.lowlevel.checkpoint()
        return answer(node)
    # The work is bounded, so a thread that nobody waits for any more ends by itself.
    return await trio.to_thread.run_sync(answer, node, abandon_on_cancel=True, limiter=_limiter)


def _explained(error: ExpressionError, text: str) -> str:
    where = f" (column {error.column} of {text[:80]!r})" if error.column else f" (in {text[:80]!r})"
    return error.message + where


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Register the calculator under both its names."""
    if context.config:
        unknown = ", ".join(sorted(context.config))
        raise PluginConfigError(f"[plugins.arithmetic] has no settings, but has: {unknown}")
    context.capabilities.add(
        ArithmeticCapability("computation.gpt/arithmetic", (Operation.RUN, Operation.CHAT))
    )
    context.capabilities.add(
        ArithmeticCapability(
            "knowledge.gpt/arithmetic", (Operation.CHAT, Operation.COMPLETE, Operation.RUN)
        )
    )
