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

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Protocol, TypeAlias

Value: TypeAlias = "bool | int | float | str | bytes | Sequence[Value] | Mapping[str, Value] | None"
"""What msgpack can carry: the only kind of data that crosses a process or a network boundary."""


class Operation(StrEnum):
    """What can be done with a capability; the value travels on the wire."""

    CHAT = "chat"  # body: {"messages": [{"role", "content"}, ...], sampling parameters}
    COMPLETE = "complete"  # body: {"prompt": str, sampling parameters}
    EMBED = "embed"  # body: {"input": [str, ...]}
    RUN = "run"  # body: {"input": str}
    FETCH = "fetch"  # body: {}


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
    kv_key: str = ""  # what must be equal for KV state to be exchanged


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


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; exact, or 0 where the notion does not apply."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer."""

    text: str = ""
    token_ids: tuple[int, ...] = ()  # the tokens `text` was decoded from
    position: int = 0  # tokens of the answer before this chunk
    seed: int | None = None  # the sampler's, so that another holder can continue
    data: bytes = b""  # for data.gpt objects
    content_type: str = ""  # of `data`


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a complete answer; always the last event."""

    finish_reason: str = "stop"  # "stop" | "length"
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


class PluginConfigError(Exception):
    """The plugin's configuration table is wrong. The message names key, value and what would be right."""


BackgroundTask: TypeAlias = Callable[[], Awaitable[None]]
