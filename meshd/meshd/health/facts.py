"""A snapshot of what is known when somebody asks what is wrong.

Whatever was not measured is None (or empty where nothing can be told from its absence): the checks that
need it find nothing. Ages and times are seconds; `_ago_s` counts back from the snapshot. Addresses are
texts, `host:port`, as people type them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from meshd.core.membership import MemberState
from meshd.core.sealing import DropReason


@dataclass(frozen=True, slots=True)
class InterfaceFact:
    """A network interface that is up and has an IPv4 address."""

    name: str
    address: str
    network: str  # in CIDR form, such as 192.0.2.0/24
    is_loopback: bool
    is_bridge: bool
    has_multicast: bool  # the MULTICAST flag
    for_mdns: bool = True  # discovery uses it


@dataclass(frozen=True, slots=True)
class MulticastFact:
    """What became of one mDNS question that was sent through one interface."""

    interface: str
    address: str
    error: str = ""  # why it could not be sent; "" when it was
    own_heard: bool = False
    others: tuple[str, ...] = ()  # hosts that spoke mDNS meanwhile


@dataclass(frozen=True, slots=True)
class MdnsFacts:
    """What discovery did since the start."""

    enabled: bool
    registered: bool = True
    last_error: str = ""
    other_protocol: int = 0
    other_mesh: tuple[str, ...] = ()  # addresses that announce another mesh


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What a peer said when it was asked over a stream just now."""

    error: str = ""  # why there is no answer; all else is then at its default
    clock_ahead_s: float | None = None  # its wall clock less ours, corrected by half the round trip
    clock_error_s: float = 0.0  # half the round trip: the most by which that may be wrong
    software: str = ""
    protocol: int | None = None
    heard_us_ago_s: float | None = None  # the last datagram of ours that reached it
    up_s: float | None = None  # its process


@dataclass(frozen=True, slots=True)
class PeerFact:
    """Another member."""

    node: str  # id
    name: str
    address: str
    state: MemberState
    since_s: float  # in that state
    heard_ago_s: float | None = None  # its last datagram
    answer: PeerAnswer | None = None  # None: it was not asked


@dataclass(frozen=True, slots=True)
class StrangerFact:
    """A source whose datagrams are dropped."""

    reason: DropReason
    address: str
    count: int
    last_ago_s: float


@dataclass(frozen=True, slots=True)
class SeedFact:
    """A configured first contact."""

    seed: str  # as configured
    address: str | None  # None: its name does not resolve
    silent: bool  # it was asked again and again and never answered


@dataclass(frozen=True, slots=True)
class StoreDifference:
    """Somebody lacks what the other holds of an owner, and still did a while later."""

    owner: str  # name
    peer: str  # name: the other side
    here: bool  # it is this node that is behind
    lasted_s: float  # between the two looks


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """The state folder."""

    folder: str
    error: str = ""  # of the last try, within the last minutes; "" when it went well
    set_aside: int = 0  # damaged files that were renamed since the start


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """Whether this process keeps up, over the last `window_s`."""

    window_s: float
    stalls: int = 0  # times that it stood still
    lost: int = 0  # commands and stream tasks for which there was no room
    local_health: int = 0  # 0 is well; the core's ceiling is 8
    sent: int = 0
    send_errors: int = 0  # the operating system did not take the datagram
    epochs_raised: int = 0


@dataclass(frozen=True, slots=True)
class ClockFacts:
    """The wall clock."""

    unix_s: float
    epoch_ms: int | None = None  # of this node, where it is known


@dataclass(frozen=True, slots=True)
class WorkerFact:
    """A worker process."""

    name: str
    exposed: tuple[str, ...] = ()  # steps of its isolation that matter and do not hold, and why


@dataclass(frozen=True, slots=True)
class PluginFact:
    """What a plugin thinks is wrong."""

    plugin: str
    message: str
    remedy: str
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class TrustFacts:
    """This node's certificate, keys and clock in its mesh; times by the mesh's clock."""

    left_s: float  # until the certificate ends; negative: since
    renewal_overdue_s: float  # since it was due; negative: until
    key_generation: int  # that this node seals with
    standing_code: str = ""  # why peers serve it nothing, "" when they do
    standing: str = ""  # the same as a sentence, without its point
    last_error: str = ""  # of the last try to renew
    wanted_generation: int | None = None  # of a datagram key that is in force and not here
    clock_ahead_s: float = 0.0  # of the mesh's
    issuers: tuple[str, ...] = ()  # names


class TroubleKind(Enum):
    """Why a daemon that is not running could not start now."""

    SOCKET_DENIED = "socket_denied"
    CONFIG = "config"
    IDENTITY = "identity"
    PORT = "port"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Trouble:
    """One such reason; the message says what to do, as the daemon itself would."""

    kind: TroubleKind
    message: str


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """This machine's network, as of now."""

    interfaces: tuple[InterfaceFact, ...]
    multicast: tuple[MulticastFact, ...] | None = None
    listens_everywhere: bool = True  # rather than on one address


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """A running daemon and the mesh as it sees it."""

    node: str
    name: str
    mesh: str
    address: str
    software: str
    protocol: int
    up_s: float
    silence_max_s: float  # a live peer's datagrams come more often than that
    mdns: MdnsFacts
    disk: DiskFacts
    load: LoadFacts
    workers: tuple[WorkerFact, ...] = ()
    plugins: tuple[PluginFact, ...] = ()
    peers: tuple[PeerFact, ...] = ()
    seeds: tuple[SeedFact, ...] = ()
    remembered: int = 0  # addresses of the last run that were tried
    strangers: tuple[StrangerFact, ...] = ()
    contested: tuple[tuple[str, str, str], ...] = ()  # address, who keeps it, who else claims it
    doubles: Mapping[str, tuple[str, ...]] = field(  # name of a node -> addresses it takes in turn
        default_factory=dict[str, tuple[str, ...]]
    )
    offences: Mapping[str, Mapping[str, int]] = field(  # name of a node -> kind -> times
        default_factory=dict[str, Mapping[str, int]]
    )
    differences: tuple[StoreDifference, ...] | None = None
    trust: TrustFacts | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything. `daemon` is None when none answers; `troubles` then says what stands in its way."""

    clock: ClockFacts
    daemon: DaemonFacts | None = None
    machine: MachineFacts | None = None
    troubles: tuple[Trouble, ...] = ()
    socket: str = ""  # where a daemon was looked for
