"""What is asked of a capability, what it answers, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Protocol, TypeAlias

Value: TypeAlias = "bool | int | float | str | bytes | Sequence[Value] | Mapping[str, Value] | None"
"""What msgpack can carry: the only kind of data that crosses a process or a network boundary."""

HOP_HEADER = "x-meshd-hop"
"""HTTP header of requests that a plugin sends on to another server. An edge refuses them: what has left a mesh
must not come back into one, or it goes in circles."""


class Operation(StrEnum):
    """What can be done with a capability; the value travels on the wire."""

    CHAT = "chat"  # body: {"messages": [{"role", "content"}, ...], ...}: OpenAI's, see docs/api.md
    COMPLETE = "complete"  # body: {"prompt": str, sampling parameters}
    EMBED = "embed"
    """Body: {"input": [str, ...], "dimensions": int, "truncate": bool}; all but the first may be left out. Cut to
    `dimensions`, a vector is normalised anew; a text longer than the context is an error or, with `truncate`,
    cut. Rows of floats come back, see `meshd_plugins.vectors`, and `detail["dimensions"]`."""
    RERANK = "rerank"
    """Body: {"query": str, "documents": [str, ...], "truncate": bool}. Rows of one float come back: how well
    each document answers the query, more is better."""
    RUN = "run"  # body: {"input": str}
    FETCH = "fetch"  # body: {}
    TUNNEL = "tunnel"  # body: {}; bytes both ways until one end leaves: see `Request.incoming`


class Privacy(IntEnum):
    """How far a request, or the use of a capability, may travel. Ordered: LOCAL is the narrowest."""

    LOCAL = 0
    LAN = 1
    MESH = 2
    CLOUD = 3


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model file, all of it read from the file or measured."""

    digest: str  # sha256 of the file, hex
    family: str  # as users say it: "SmolLM2-135M-Instruct"
    architecture: str  # GGUF general.architecture: "llama"
    parameters: int  # count
    quantisation: str  # "Q4_1"
    context_tokens: int  # trained context
    size_bytes: int
    licence: str = ""
    modalities: tuple[str, ...] = ("text",)
    """What it takes in: text, image, audio. A request with anything else in it never reaches it; see
    `meshd_plugins.media`."""
    chat_template_digest: str = ""  # sha256, hex, "" when the file has none
    pooling: str = ""  # how it makes a vector or a score of a text; "": it writes instead
    kv_key: str = ""  # what must be equal for KV state to be exchanged
    kv_bytes_per_token: int = 0  # of that state; 0: not known, or not exchanged


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured on this device, never guessed. 0.0 means not measured."""

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0  # one sequence
    decode_tokens_per_s_by_batch: Mapping[int, float] = field(default_factory=dict[int, float])
    load_s: float = 0.0  # from start of the worker to its first token


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a node announces about one capability."""

    name: str  # "knowledge.gpt/general"; see docs/names
    operations: tuple[Operation, ...]
    summary: str  # one line, for people
    slots: int  # requests served at once, >= 1
    privacy: Privacy = Privacy.MESH  # the widest distance from which it may be called
    model: ModelFacts | None = None
    rates: Rates | None = None
    fields: Mapping[str, Value] = field(
        default_factory=dict[str, Value]
    )  # constraints compare these

    @property
    def id(self) -> str:
        """Unique on its node: the name, and the model's digest where there is one."""
        return f"{self.name}#{self.model.digest[:8]}" if self.model else self.name


@dataclass(frozen=True, slots=True)
class Request:
    """One task as a capability sees it."""

    request_id: str  # the same on every node that touches it
    name: str  # the semantic name that was asked for
    operation: Operation
    body: Mapping[str, Value]
    caller: str = ""  # who asks, the same for all requests of one caller: "<node id>/<principal>"
    privacy: Privacy = Privacy.MESH
    trace: str = ""  # W3C traceparent
    idempotency_id: str = ""
    hops: int = 0  # forwards so far
    deadline_s: float = 60.0  # remaining seconds when the request reached this capability
    tags: tuple[bytes, ...] = ()
    """Stand for the conversation's last prefixes: opaque, of 8 bytes each, at most 8, shortest first. The i-th of n
    is for all messages but the last n-i; the last for the whole prompt. Empty: unknown."""
    incoming: Callable[[], Awaitable[bytes]] | None = None
    """Of a tunnel: the next bytes that its caller sends, never none. What goes back are `Chunk`s with data.
    Only a peer opens one, so it is None for every other operation. Raises Failed: the caller broke it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; exact, or 0 where the notion does not apply."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's: what the model thought before it answered
    cached_tokens: int = 0  # of the prompt's: what was found computed


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of a call that a model wants made. The first one of a call has its id and its name."""

    index: int  # which call of the answer, from 0
    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON; those of all parts joined are the arguments


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, before any sampler had a say."""

    token: int
    logprob: float  # natural logarithm
    data: bytes  # what it stands for; need not be whole characters
    top: tuple[TokenLogprob, ...] = ()  # the likeliest tokens in its place, best first


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer."""

    text: str = ""
    token_ids: tuple[int, ...] = ()  # the tokens that this part of the answer was decoded from
    position: int = 0  # tokens of the answer before this chunk
    seed: int | None = None  # the sampler's, so that another holder can continue
    data: bytes = b""  # for data.gpt objects
    content_type: str = ""  # of `data`
    reasoning: str = ""  # what a model thinks before it answers; no part of `text`
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of `token_ids`, where they were asked for


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a complete answer; always the last event."""

    finish_reason: str = "stop"  # "stop" | "length" | "tool_calls"
    usage: Usage = Usage()
    detail: Mapping[str, Value] = field(default_factory=dict[str, Value])  # figures for people


Event: TypeAlias = Chunk | Done


class CapabilityError(Exception):
    """Root of what a capability may raise.

    CapabilityError
      BadRequest       the caller's fault: another peer would say the same; never retried
      Refused          not taken, nothing was done: may be retried elsewhere at once
      Failed           broke after it began; retried only before the first chunk
    """

    code = "capability_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class BadRequest(CapabilityError):
    """The request can never be served as it is. State: nothing was done."""

    code = "bad_request"


class Refused(CapabilityError):
    """Not taken. State: nothing was done.

    Codes: busy, draining, starting, unsupported, unsupported_modality, not_here, hop_limit, privacy, access,
    caller, observer, too_large.
    """

    code = "busy"


class Failed(CapabilityError):
    """Broke after it began. State: partial output may exist.

    Codes: failed, crashed, contract, worker_died, worker_hung, deadline_exceeded, peer_hung,
    peer_fault, unreachable, stream_lost.
    """

    code = "failed"


class Capability(Protocol):
    """One thing a node can do."""

    @property
    def descriptor(self) -> Descriptor:
        """What is announced; to change it, call `Capabilities.replace`."""
        ...

    def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Do it. See `meshd_plugins.api` for the contract. The daemon has already taken a slot."""
        ...
