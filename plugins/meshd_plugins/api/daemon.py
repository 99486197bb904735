"""What the daemon gives a plugin: registration, worker processes, other nodes, a log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from meshd_plugins.api.requests import Capability, Failed, Privacy, Value


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
