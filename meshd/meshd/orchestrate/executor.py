"""Runs a plan: subtasks side by side, their answers joined in the order in which they were asked.

The answer streams: the first subtask's pieces pass through as they come; those of later ones wait, within
a bound, until it is their turn, and each subtask is told to be done after its last piece. If one subtask
fails, the others are cancelled and the ask fails with its error: half an answer is not passed off as a
whole one.

A calculation that the calculator does not understand, or that nobody calculates, goes to a model, once
(`Step.fallback`). So does an image that no general model takes in to any other model that does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from meshd.orchestrate.callers import Caller
from meshd.orchestrate.events import (
    ANSWER,
    Answered,
    Ask,
    AskEvent,
    Piece,
    Planned,
    SubtaskDone,
)
from meshd.orchestrate.modalities import UNSUPPORTED_MODALITY
from meshd.orchestrate.planner import Plan, Step
from meshd.orchestrate.router import Router
from meshd_cms import NodeId
from meshd_naming import NotServed
from meshd_plugins.api import BadRequest, Chunk, Request, Usage

# What sends a calculation to a model instead: it was none after all, or nobody here calculates. And an image
# from the general models to any that takes it in.
_FALLBACK_CODES = frozenset({"not_arithmetic", UNSUPPORTED_MODALITY, NotServed.code})

Send = Callable[[AskEvent], Awaitable[None]]
Emit = Callable[[Chunk], Awaitable[None]]
RunStep = Callable[[Step, Send, Emit], Awaitable[SubtaskDone]]
PIECES_WAITING_MAX = 1_024  # of one subtask before its turn; then its peer is held back by credit
SEPARATOR = "\n\n"


class Executor:
    """Runs plans over a router.

    Args:
        router: runs single subtasks.
        me: this node: where every ask that starts here was asked.
    """

    def __init__(self, router: Router, me: NodeId) -> None:
        self._router = router
        self._me = me

    async def run(self, ask: Ask, plan: Plan, send: Send) -> None:
        """Run a plan; the last event is `Answered`.

        Raises:
            NamingError, CapabilityError: of the first subtask that failed; the others were cancelled.
        """
        began_s = trio.current_time()
        await send(Planned(plan.strategy, plan.reason, tuple(step.subtask for step in plan.steps)))
        run_step = partial(self._run_step, ask, began_s)
        if len(plan.steps) == 1:
            only = await run_step(plan.steps[0], send, partial(_send_piece, send))
            await send(only)
            done: tuple[SubtaskDone, ...] = (only,)
        else:
            done = await _side_by_side(plan.steps, run_step, send)
        await send(
            Answered(
                finish_reason=_finish_reason(done),
                usage=Usage(
                    sum(part.usage.prompt_tokens for part in done),
                    sum(part.usage.completion_tokens for part in done),
                    sum(part.usage.reasoning_tokens for part in done),
                    sum(part.usage.cached_tokens for part in done),
                ),
                parts=done,
                total_s=trio.current_time() - began_s,
            )
        )

    async def _run_step(
        self, ask: Ask, began_s: float, step: Step, send: Send, emit: Emit
    ) -> SubtaskDone:
        try:
            return await self._run_subtask(ask, began_s, step, send, emit)
        except (BadRequest, NotServed) as error:
            if step.fallback is None or error.code not in _FALLBACK_CODES:
                raise
            return await self._run_subtask(ask, began_s, step.fallback, send, emit)

    async def _run_subtask(
        self, ask: Ask, began_s: float, step: Step, send: Send, emit: Emit
    ) -> SubtaskDone:
        subtask = step.subtask
        caller = Caller(self._me, ask.principal)
        assert ask.privacy is not None, "the mesh sees to it"
        request = Request(
            request_id=ask.request_id,
            name=subtask.name,
            operation=subtask.operation,
            body=step.body,
            caller=str(caller),
            privacy=ask.privacy,
            trace=ask.trace,
            idempotency_id=f"{ask.idempotency_id or ask.request_id}/{subtask.id}",
            deadline_s=ask.deadline_s - (trio.current_time() - began_s),
        )
        return await self._router.run(subtask, request, caller, routed=send, emit=emit)


async def _side_by_side(
    steps: tuple[Step, ...], run_step: RunStep, send: Send
) -> tuple[SubtaskDone, ...]:
    """Run all steps at once; pieces go out in the order of the steps.

    Raises:
        NamingError, CapabilityError: of the first that failed; the others were cancelled.
    """
    results: dict[str, SubtaskDone] = {}
    failures: list[Exception] = []

    async def run_one(
        step: Step, queue: trio.MemorySendChannel[Chunk], scope: trio.CancelScope
    ) -> None:
        with queue:
            try:
                results[step.subtask.id] = await run_step(step, send, queue.send)
            except Exception as error:  # noqa: BLE001 - raised below, as itself and not in a group
                failures.append(error)
                scope.cancel()

    async with trio.open_nursery() as nursery:
        queues: list[trio.MemoryReceiveChannel[Chunk]] = []
        for step in steps:
            queue_in, queue_out = trio.open_memory_channel[Chunk](PIECES_WAITING_MAX)
            queues.append(queue_out)
            nursery.start_soon(run_one, step, queue_in, nursery.cancel_scope)
        for index, (step, queue) in enumerate(zip(steps, queues, strict=True)):
            if index:
                await send(Piece(ANSWER, text=SEPARATOR))
            async for chunk in queue:
                await _send_piece(send, chunk)
            if (done := results.get(step.subtask.id)) is not None:
                await send(done)
    if failures:
        raise failures[0]
    return tuple(results[step.subtask.id] for step in steps)


async def _send_piece(send: Send, chunk: Chunk) -> None:
    await send(
        Piece(
            ANSWER,
            chunk.text,
            chunk.token_ids,
            chunk.position,
            chunk.seed,
            chunk.data,
            chunk.content_type,
            chunk.reasoning,
            chunk.tool_calls,
            chunk.logprobs,
        )
    )


def _finish_reason(parts: tuple[SubtaskDone, ...]) -> str:
    """`stop` only if every part says so."""
    return next((part.finish_reason for part in parts if part.finish_reason != "stop"), "stop")
