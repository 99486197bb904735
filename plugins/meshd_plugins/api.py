"""The types a capability plugin is written against.

A plugin registers *capabilities*: objects with a descriptor (what is announced), an admission limit
(slots) and `invoke`, which yields events. Everything built in uses what is in this module and nothing
else of the daemon.

The contract of `invoke`, in one paragraph: it yields any number of `Chunk`s and then exactly one `Done`.
A stream that ends without `Done` is a failure and is reported as one, never as a finished answer.
Before the first chunk it may raise `Refused`, and the daemon may then ask another peer; after the first
chunk it may only raise `Failed`. Cancellation arrives as trio's `Cancelled` at any await: clean up and
let it pass.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

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

    Codes: busy, draining, starting, unsupported, not_here, hop_limit, privacy, access, caller, observer,
    too_large.
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
        """Do it. See the module's docstring for the contract. The daemon has already taken a slot."""
        ...


@dataclass(frozen=True, slots=True)
class WarmPrefix:
    """A prefix whose KV state a capability holds."""

    tag: bytes  # of the request that made it: its last one
    tokens: int  # that need not be computed again


@dataclass(frozen=True, slots=True)
class PrefixHead:
    """What is said of a state before its bytes: all of it is to be checked against them."""

    tag: bytes
    caller: str  # whose it is: only a request of the same one may use it
    privacy: Privacy  # the narrowest class of the requests that made it
    token_ids: bytes  # four bytes each, little endian
    size_bytes: int
    digest: bytes  # BLAKE2b-256 of the bytes

    @property
    def tokens(self) -> int:
        """How many tokens it is of."""
        return len(self.token_ids) // 4


class PrefixExport(Protocol):
    """A state on its way out."""

    @property
    def head(self) -> PrefixHead:
        """What it is."""
        ...

    async def receive(self) -> bytes | None:
        """The next bytes, at most 1 MiB; None after the last. Raises Failed."""
        ...


@runtime_checkable
class PrefixHolder(Protocol):
    """What a capability implements beside `Capability` whose KV state other nodes may take over.

    Its descriptor has a model with `kv_key` and `kv_bytes_per_token`. The daemon has checked who asks, and
    where the state would go, before it calls; what comes in is as long and has the digest that its head says
    only once the iteration has ended, so nothing is put to use before.
    """

    def warm(self) -> Sequence[WarmPrefix]:
        """What is held now, the most recently used first. Returns at once."""
        ...

    def export_prefix(
        self, tag: bytes, caller: str, away: Privacy
    ) -> AbstractAsyncContextManager[PrefixExport]:
        """Hand a state out to a node that is so far away.

        Raises:
            Refused: `not_warm`; `caller`: it is another's; `privacy`: its class is narrower; `busy`.
            Failed: it broke.
        """
        ...

    async def import_prefix(self, head: PrefixHead, data: AsyncIterable[bytes]) -> int:
        """Take a state in; the tokens that are warm by it now. What `data` raises is passed on.

        Raises:
            Refused: it is not wanted, or not what it says; nothing of it is kept.
            Failed: it broke; nothing of it is kept.
        """
        ...


class Capabilities(Protocol):
    """The daemon's side of registration, as one plugin sees it."""

    def add(self, capability: Capability) -> None:
        """Announce it. Raises ValueError if the name is malformed or the id is taken on this node."""
        ...

    def replace(self, capability: Capability) -> None:
        """Announce a new descriptor under the same id. Raises KeyError if the id is not there."""
        ...

    def remove(self, capability_id: str) -> None:
        """Withdraw it; requests in flight go on. Raises KeyError if the id is not there."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A process to supervise. It speaks length-prefixed msgpack on stdin/stdout (see docs/plugins)."""

    name: str  # for logs and `meshd plugins`
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # nothing is inherited but PATH, HOME, LANG
    memory_bytes_max: int | None = None
    """What it may allocate, and what it may hold resident, its mapped files included. None: nine tenths
    of the machine's memory."""
    start_deadline_s: float = 120.0
    network: bool = False  # it may use IP sockets
    processes: bool = False  # it may start other processes
    gpu: bool = False  # it may use the device files of a GPU
    read_paths: tuple[Path, ...] = ()
    """Files and folders it may read, beyond its own program and the libraries of the system."""
    write_paths: tuple[
        Path, ...
    ] = ()  # those that it may also change; none by default, not even /tmp
    files: tuple[int, ...] = ()
    """Open files that it is given under the same numbers. It may open each anew as `/proc/self/fd/N`. The
    caller closes its own once the worker is up."""
    sockets: tuple[int, ...] = ()  # connected sockets that it is given, likewise
    private_loopback: bool = False
    """It may use IP sockets within a network namespace of its own, where there is nothing but loopback. Where
    the system allows no such namespace it gets none, and says so in its hello (`isolation.loopback`)."""
    shared_loopback: bool = False
    """Then it may use IP sockets of the machine instead; `doctor` warns."""
    hang_s: float | None = None
    """Silence with calls open after which it is ended; None: by the `step_s` of its hello, or 30 s."""


class WorkerCall(Protocol):
    """One multiplexed exchange with a worker; leaving the context cancels it there."""

    async def receive(self) -> Mapping[str, Value] | None:
        """Next message, None at its end. Raises Failed(worker_died | worker_hung)."""
        ...


class Worker(Protocol):
    """A running, supervised process."""

    @property
    def hello(self) -> Mapping[str, Value]:
        """What the process said when it was ready."""
        ...

    def call(self, message: Mapping[str, Value]) -> AbstractAsyncContextManager[WorkerCall]:
        """Send a request. Raises Refused(starting) when the process is not up."""
        ...

    async def wait_died(self) -> str:
        """Return, when the process has ended, why: for people and logs."""
        ...


class Supervisor(Protocol):
    """Starts worker processes and sees to it that they end with the daemon."""

    def worker(self, spec: WorkerSpec) -> AbstractAsyncContextManager[Worker]:
        """Start one and wait until it says hello. Leaving the context ends it (TERM, then KILL).

        Raises Failed(worker_died) with the last lines of its stderr if it does not come up.
        """
        ...


@dataclass(frozen=True, slots=True)
class PeerOffer:
    """A capability of another node, as its record and its last load describe it."""

    node: str  # its id, as text
    node_name: str
    capability: str  # the id on that node
    name: str
    operations: tuple[str, ...]
    slots: int
    busy: int | None  # requests that it runs; None: not known
    distance: Privacy  # LAN or MESH
    round_trip_s: float | None
    fields: Mapping[str, Value]


class Tunnel(Protocol):
    """Bytes to and from a capability of another node, in order, over the encrypted stream to it."""

    @property
    def distance(self) -> Privacy:
        """How far away the other end really is: LAN or MESH."""
        ...

    async def send(self, data: bytes) -> None:
        """Send; waits while the other end or the line is behind. Raises Failed: it is lost."""
        ...

    async def receive(self) -> bytes:
        """The next bytes, never none. Raises Refused, Failed: why there are no more."""
        ...


class Peers(Protocol):
    """The other nodes, as one plugin sees them."""

    def offers(self, name: str) -> Sequence[PeerOffer]:
        """What live peers announce under exactly this name, sorted by node. No packet leaves the node."""
        ...

    def tunnel(self, offer: PeerOffer, privacy: Privacy) -> AbstractAsyncContextManager[Tunnel]:
        """Open one to a capability that does `Operation.TUNNEL`; leaving the context ends it.

        That the peer takes it is known when its first bytes come, or from `receive`.

        Raises:
            Refused: `privacy`, `access`: it may not go there; nothing was sent.
            Failed: `unreachable`.
        """
        ...


class NoPeers:
    """Implements `Peers` for a node that knows nobody."""

    def offers(self, name: str) -> Sequence[PeerOffer]:  # noqa: ARG002
        """Return none."""
        return ()

    def tunnel(self, offer: PeerOffer, privacy: Privacy) -> AbstractAsyncContextManager[Tunnel]:  # noqa: ARG002
        """Raise Failed."""
        raise Failed(f"{offer.node_name} is not known here", code="unreachable")


class Logger(Protocol):
    """The part of structlog that plugins use."""

    def debug(self, event: str, **fields: object) -> object:
        """Something for whoever looks closely."""
        ...

    def info(self, event: str, **fields: object) -> object:
        """Something that happened."""
        ...

    def warning(self, event: str, **fields: object) -> object:
        """Something an operator may act on."""
        ...

    def error(self, event: str, **fields: object) -> object:
        """Something that failed on our side."""
        ...


@dataclass(frozen=True, slots=True)
class PluginContext:
    """All that a plugin is given; nothing else of the daemon is its business."""

    name: str  # the plugin's
    config: Mapping[str, Value]  # its table [plugins.NAME]; check it and raise PluginConfigError
    state_dir: Path  # its own, exists, 0700
    capabilities: Capabilities
    supervisor: Supervisor
    log: Logger
    clock: Callable[[], float]  # monotonic seconds
    peers: Peers = field(default_factory=NoPeers)


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something that a plugin thinks an operator should know: `meshd doctor` shows it."""

    message: str  # what is wrong, one sentence
    remedy: str  # what to do about it
    is_error: bool = False  # something does not work; else it works worse than it should


class PluginConfigError(Exception):
    """The plugin's configuration table is wrong. The message names key, value and what would be right."""


BackgroundTask: TypeAlias = Callable[[], Awaitable[None]]

PluginOperation: TypeAlias = (
    "Callable[[Mapping[str, Value]], AsyncGenerator[Mapping[str, Value], None]]"
)
"""Something that whoever administers the node can have a plugin do: called with the arguments, it yields
items of progress and, as the last one, `{"done": {...}}`; or it raises a `CapabilityError`. It is closed
when nobody waits for it any more, and then stops."""
