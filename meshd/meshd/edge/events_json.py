"""Ask events as JSON objects, one a line: what `POST /mesh/v1/ask` streams. See docs/api.md."""

from __future__ import annotations

import base64
from typing import assert_never

from meshd.edge.asking import failed_attempt, part_of, usage_of
from meshd.edge.errors import Problem
from meshd.orchestrate.events import (
    Answered,
    AskEvent,
    AttemptFailed,
    Piece,
    Planned,
    Routed,
    SubtaskDone,
)
from meshd_plugins.api import TokenLogprob, Value


def event_to_plain(event: AskEvent) -> dict[str, Value]:
    """One event. Fields of a piece that are empty are left out; data travels as base64."""
    match event:
        case Planned():
            return {
                "event": "planned",
                "strategy": event.strategy,
                "reason": event.reason,
                "subtasks": [
                    {
                        "id": subtask.id,
                        "name": subtask.name,
                        "operation": subtask.operation.value,
                        "prompt": subtask.prompt,
                        "needs": list(subtask.needs),
                    }
                    for subtask in event.subtasks
                ],
            }
        case Routed():
            return {
                "event": "routed",
                "subtask": event.subtask,
                "node": event.node,
                "node_name": event.node_name,
                "name": event.name,
                "capability_id": event.capability_id,
                "reason": event.reason,
                "attempt": event.attempt,
            }
        case AttemptFailed():
            return {
                "event": "attempt_failed",
                "subtask": event.subtask,
                **failed_attempt(event),
            }
        case Piece():
            return _piece(event)
        case SubtaskDone():
            return {"event": "subtask_done", **part_of(event)}
        case Answered():
            return {
                "event": "answered",
                "finish_reason": event.finish_reason,
                "usage": usage_of(event.usage),
                "parts": [part_of(part) for part in event.parts],
                "total_s": round(event.total_s, 6),
            }
        case _:
            assert_never(event)


def problem_to_plain(problem: Problem) -> dict[str, Value]:
    """The last line of an ask that failed."""
    plain: dict[str, Value] = {
        "event": "error",
        "status": problem.status,
        "code": problem.code,
        "message": problem.message,
        **problem.extra,
    }
    if problem.retry_after_s is not None:
        plain["retry_after_s"] = problem.retry_after_s
    return plain


def _piece(piece: Piece) -> dict[str, Value]:
    plain: dict[str, Value] = {"event": "piece", "subtask": piece.subtask}
    if piece.text:
        plain["text"] = piece.text
    if piece.token_ids:
        plain["token_ids"] = list(piece.token_ids)
        plain["position"] = piece.position
    if piece.seed is not None:
        plain["seed"] = piece.seed
    if piece.data:
        plain["data_base64"] = base64.b64encode(piece.data).decode("ascii")
    if piece.content_type:
        plain["content_type"] = piece.content_type
    if piece.reasoning:
        plain["reasoning"] = piece.reasoning
    if piece.tool_calls:
        plain["tool_calls"] = [
            {"index": c.index, "id": c.id, "name": c.name, "arguments": c.arguments}
            for c in piece.tool_calls
        ]
    if piece.logprobs:
        plain["logprobs"] = [logprob_to_plain(each) for each in piece.logprobs]
    return plain


def logprob_to_plain(each: TokenLogprob) -> dict[str, Value]:
    """One token as OpenAI describes it; the bytes are there since a token need not be whole characters."""
    plain = _token_to_plain(each)
    plain["top_logprobs"] = [_token_to_plain(other) for other in each.top]
    return plain


def _token_to_plain(each: TokenLogprob) -> dict[str, Value]:
    return {
        "token": each.data.decode("utf-8", "replace"),
        "logprob": each.logprob,
        "bytes": list(each.data),
    }
