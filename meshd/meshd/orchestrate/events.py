"""What a person or a program that asks sees happen: the events of one ask, in order.

For every ask: one `Planned`, then for each subtask one `Routed` per attempt, with an `AttemptFailed` before each
further one, any number of `Piece`s and one `SubtaskDone`; last, one `Answered`. Pieces of the final answer carry `subtask == ANSWER`; for a plan
of one subtask that subtask's pieces are the answer and carry `ANSWER` too. An ask that fails raises; it
never ends without `Answered`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from meshd_plugins.api import Operation, Privacy, TokenLogprob, ToolCallDelta, Usage, Value

ANSWER = "answer"
REASON_CHARS_MAX: Final = 300  # of what a peer says of its failure; it came from outside


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to the mesh."""

    target: str  # "auto", or a semantic name with constraints
    operation: Operation
    body: Mapping[str, Value]  # as in `meshd_plugins.api.Operation`
    request_id: str
    deadline_s: float = 120.0
    privacy: Privacy | None = None  # None: the node's own default
    split: bool = True  # may `auto` decompose it
    idempotency_id: str = ""
    trace: str = ""
    principal: str = "local"  # who asks at this node: "local", "loopback" or "key:NAME"
    privacy_max: Privacy = Privacy.CLOUD  # the farthest that this principal may send anything


@dataclass(frozen=True, slots=True)
class PlannedSubtask:
    """One node of the plan."""

    id: str
    name: str  # the semantic name it goes to
    operation: Operation
    prompt: str  # for people
    needs: tuple[str, ...] = ()  # ids of subtasks whose output it wants


@dataclass(frozen=True, slots=True)
class Planned:
    """What will be done."""

    strategy: str  # "single" | "decompose"
    reason: str  # why this name, why split or not
    subtasks: tuple[PlannedSubtask, ...]


@dataclass(frozen=True, slots=True)
class Routed:
    """A subtask was given to a peer; a further one for the same subtask is a retry."""

    subtask: str
    node: str  # node id, text
    node_name: str
    name: str  # of the capability that serves it
    capability_id: str
    reason: str  # why that peer
    attempt: int  # 1-based


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """Who was asked did not do it, and another one is asked; what the last one says is the ask's error."""

    subtask: str
    node: str  # node id, text
    node_name: str
    capability_id: str
    attempt: int  # of its `Routed`
    refused: bool  # it did not begin; otherwise it broke
    code: str
    reason: str  # in its words, both up to REASON_CHARS_MAX


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the answer, or of a subtask's output."""

    subtask: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    position: int = 0
    seed: int | None = None
    data: bytes = b""
    content_type: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SubtaskDone:
    """A subtask ended well."""

    subtask: str
    node_name: str
    name: str
    first_s: float  # from the ask's start of this subtask to its first piece
    total_s: float
    usage: Usage
    finish_reason: str
    detail: Mapping[str, Value] = field(default_factory=dict[str, Value])
    failed: tuple[AttemptFailed, ...] = ()  # before it; one less than were asked


@dataclass(frozen=True, slots=True)
class Answered:
    """The end of a complete answer."""

    finish_reason: str
    usage: Usage
    parts: tuple[SubtaskDone, ...]
    total_s: float


AskEvent: TypeAlias = Planned | Routed | AttemptFailed | Piece | SubtaskDone | Answered
