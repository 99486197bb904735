"""The sections of the configuration: one frozen dataclass each, described field by field.

A default is what a node in a home or lab network needs; a machine with nothing configured runs well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from meshd.config.fields import about
from meshd.config.guard_sections import AccessSection, AuditSection, TrustSection
from meshd.config.handoff import HandoffSection
from meshd_plugins.api import Value

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_LABEL_MEANS = "1 to 63 of a-z, 0-9 and '-', not at either end"
_HOST_PORT = r"(\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]|[^\s:\[\]]+):[0-9]{1,5}"


class Preset(StrEnum):
    """What kind of network and device the timers are for."""

    LAN = "lan"
    WAN = "wan"
    LOCAL = "local"
    CONSTRAINED = "constrained"


class LogLevel(StrEnum):
    """The least severe line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How a line looks."""

    AUTO = "auto"
    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class NodeSection:
    """Who this node is."""

    name: str = field(
        default="node",
        metadata=about(
            "Name of this node, for people and for names such as computation.gpt/arithmetic@NAME.",
            pattern=_LABEL,
            pattern_means=_LABEL_MEANS,
            derived="the host name, in lower case, up to its first dot",
        ),
    )
    zone: str = field(
        default="",
        metadata=about(
            "Where it stands: a room, a lab, a site. Names can ask for it (zone=lab). Empty: nowhere.",
            pattern=f"({_LABEL})?",
            pattern_means=f"empty, or {_LABEL_MEANS}",
        ),
    )
    labels: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Anything else that is true of it, announced to the mesh. At most 16 are kept in a record.",
            pattern=_LABEL,
            pattern_means=_LABEL_MEANS,
            maximum=16,
        ),
    )
    state_dir: Path = field(
        default=Path("/var/lib/meshd"),
        metadata=about(
            "Folder for keys, catalogue, remembered peers and plugin state. Only its owner can read it.",
            derived="STATE_DIRECTORY from systemd; /var/lib/meshd for root and for the user that owns"
            " it; otherwise meshd in XDG_STATE_HOME",
        ),
    )


@dataclass(frozen=True, slots=True)
class ListenSection:
    """Where other nodes reach this one: UDP and TCP on the same port."""

    host: str = field(
        default="0.0.0.0",  # noqa: S104 - peers must reach it; nothing is answered without mesh keys
        metadata=about(
            "Address to listen on. 0.0.0.0 is every IPv4 interface. Only holders of the mesh's keys are"
            " answered.",
            pattern=r"[^\s/]+",
            pattern_means="an IP address",
        ),
    )
    port: int = field(
        default=7946,
        metadata=about("UDP and TCP port. 0 takes any free one.", minimum=0, maximum=65535),
    )
    advertise: str = field(
        default="",
        metadata=about(
            "IP address that peers are told to use, where the one found is wrong (several networks,"
            " address translation). Empty: found by itself.",
            pattern=r"[0-9A-Fa-f:.]*",
            pattern_means="empty or an IP address",
        ),
    )


@dataclass(frozen=True, slots=True)
class DiscoverySection:
    """How a first peer is found. Losing all of it never loses members."""

    mdns: bool = field(
        default=True,
        metadata=about("Announce this node and look for others by multicast DNS (_meshd._tcp)."),
    )
    interfaces: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Interfaces or IP addresses that multicast uses. Empty: all that are up.",
            pattern=r"[^\s/]+",
            pattern_means="an interface's name or an IP address",
        ),
    )
    announce_models: bool = field(
        default=True,
        metadata=about(
            "Put served names and a coarse load into the announcement, for everybody on the link to"
            " read. Without it only an opaque tag of the mesh is seen.",
            derived="true with gossip.preset lan and local, false with wan and constrained",
        ),
    )
    seeds: tuple[str, ...] = field(
        default=(),
        metadata=about(
            'Peers to contact at start, as "host:port", for networks where multicast does not pass.',
            pattern=_HOST_PORT,
            pattern_means='"host:port" or "[ipv6]:port"',
        ),
    )
    remember: bool = field(
        default=True,
        metadata=about("Contact the peers of the last run at start. They are kept in state_dir."),
    )


@dataclass(frozen=True, slots=True)
class GossipSection:
    """How fast membership notices things, and what that costs."""

    preset: Preset = field(
        default=Preset.LAN,
        metadata=about(
            "Timers for a kind of network: lan (home, lab), wan (slow links: more patience), local"
            " (several nodes on one machine: quick), constrained (battery or radio: fewer packets,"
            " slower to notice)."
        ),
    )
    overrides: Mapping[str, Value] = field(
        default_factory=dict[str, Value],
        metadata=about(
            "Table [gossip.overrides]: single timers that differ from the preset, by the names that"
            " `meshd config show` prints. For experiments; all nodes of a mesh should agree."
        ),
    )


@dataclass(frozen=True, slots=True)
class HttpSection:
    """The OpenAI-compatible API and the mesh API, for programs on this machine or, with keys, beyond it."""

    host: str = field(
        default="127.0.0.1",
        metadata=about(
            "Address to listen on. Beyond loopback (0.0.0.0: all) everybody needs TLS and an API key:"
            " make one first with `meshd key create`. Loopback goes on without either.",
            pattern=r"[0-9A-Fa-f:.]+|localhost",
            pattern_means="an IP address, such as 127.0.0.1 or 0.0.0.0, or localhost",
        ),
    )
    port: int = field(
        default=8642,
        metadata=about("TCP port. 0 takes any free one.", minimum=0, maximum=65535),
    )
    socket: Path = field(
        default=Path("/run/meshd/meshd.sock"),
        metadata=about(
            "Unix socket of the same API; the command line uses it. At most 107 bytes long.",
            derived="meshd.sock in RUNTIME_DIRECTORY from systemd, in node.state_dir where that is set,"
            " in /run/meshd for root, in XDG_RUNTIME_DIR, or else in node.state_dir",
        ),
    )
    socket_group: str = field(
        default="meshd",
        metadata=about(
            "Group that may use the socket (mode 0660), where it exists and the daemon may give it away."
        ),
    )
    request_bytes_max: int = field(
        default=8_388_608,
        metadata=about(
            "Bytes of a request body. Raising it allows longer prompts and larger pictures (4 bytes are 3"
            " of a file) and costs memory for each request in flight. Not above limits.request_bytes_max.",
            minimum=1024,
            maximum=16_777_216,
        ),
    )
    connections_max: int = field(
        default=256,
        metadata=about(
            "TCP connections at once; further ones wait. Raising it costs about 50 kB each, and twice"
            " http.send_buffer_bytes for a client that does not read.",
            minimum=1,
            maximum=65_536,
        ),
    )
    connections_per_source_max: int = field(
        default=100,
        metadata=about(
            "TCP connections at once from one address; further ones are closed. Raising it lets one"
            " machine take the places of others.",
            minimum=1,
            maximum=65_536,
        ),
    )
    keep_alive_s: float = field(
        default=60.0,
        metadata=about(
            "Seconds an idle connection is kept. Raising it saves reconnects and holds connections.",
            minimum=0.0,
            maximum=86_400.0,
        ),
    )
    head_s: float = field(
        default=10.0,
        metadata=about(
            "Seconds for the line and the headers of a request, and for a TLS handshake. Raising it"
            " helps very slow links and lets slow clients hold connections.",
            minimum=0.1,
            maximum=3600.0,
        ),
    )
    body_s: float = field(
        default=30.0,
        metadata=about(
            "Seconds for the body of a request, once its headers are there.",
            minimum=0.1,
            maximum=3600.0,
        ),
    )
    stalled_s: float = field(
        default=30.0,
        metadata=about(
            "Seconds in which a client must take what was sent to it; then its connection is closed.",
            minimum=0.1,
            maximum=3600.0,
        ),
    )
    send_buffer_bytes: int = field(
        default=131_072,
        metadata=about(
            "Bytes that the system holds for a client that does not read. Raising it helps fast"
            " answers over slow links and costs memory for each connection.",
            minimum=8192,
            maximum=16_777_216,
        ),
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Further names that a Host header may have. Loopback's, the addresses, and with TLS the"
            " names in the node's own certificate are allowed anyway. For a name in your own DNS.",
            maximum=64,
            pattern=r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?",
            pattern_means="a DNS name, such as board.example.org",
        ),
    )
    require_key: bool = field(
        default=False,
        metadata=about(
            "Whether programs on this machine need an API key too when they use TCP. A wrong key is"
            " refused in any case; the Unix socket is for its group."
        ),
    )
    certificate: Path = field(
        default=Path("/var/lib/meshd/edge/certificate.pem"),
        metadata=about(
            "PEM file of the certificate, chain included, to show beyond loopback; read again when it"
            " changes. Give key too.",
            derived="one that the daemon makes and renews, in the folder edge of node.state_dir",
        ),
    )
    key: Path = field(
        default=Path("/var/lib/meshd/edge/key.pem"),
        metadata=about(
            "PEM file of the certificate's private key.",
            derived="made with the certificate",
        ),
    )


@dataclass(frozen=True, slots=True)
class LimitsSection:
    """Bounds on work. Beyond them a request is refused at once, and the caller asks elsewhere."""

    request_bytes_max: int = field(
        default=8_519_680,
        metadata=about(
            "Bytes of one request from a peer. Raising it costs memory for each request in flight.",
            minimum=4096,
            maximum=16_842_752,
        ),
    )
    bodies_bytes_max: int = field(
        default=67_108_864,
        metadata=about(
            "Bytes of requests held at once, those of clients together, and those of peers together;"
            " further ones are refused as busy. Of each request 64 KiB are not counted. Raising it allows"
            " more pictures and long prompts at once; each byte of it may take up to five of memory.",
            minimum=1_048_576,
            maximum=17_179_869_184,
        ),
    )
    requests_max: int = field(
        default=256,
        metadata=about(
            "Asks of this node's own clients in flight; further ones are refused. Calls of peers are"
            " bounded for each connection, at 256.",
            minimum=1,
            maximum=65_536,
        ),
    )
    queue_max: int = field(
        default=16,
        metadata=about(
            "Requests that wait for a slot of one capability. Raising it trades refusals, which other"
            " nodes could serve, for waiting here. 0: never wait.",
            minimum=0,
            maximum=4096,
        ),
    )
    hops_max: int = field(
        default=4,
        metadata=about(
            "Times a request is forwarded before it is refused as going in circles.",
            minimum=1,
            maximum=16,
        ),
    )
    attempts_max: int = field(
        default=3,
        metadata=about(
            "Peers that are tried for one subtask. Raising it answers more often and later.",
            minimum=1,
            maximum=16,
        ),
    )
    deadline_s: float = field(
        default=120.0,
        metadata=about(
            "Seconds for a whole request when the caller gives none.", minimum=0.1, maximum=86_400.0
        ),
    )
    deadline_max_s: float = field(
        default=600.0,
        metadata=about(
            "Seconds that a caller may ask for at most. Raising it lets slow requests hold slots.",
            minimum=0.1,
            maximum=86_400.0,
        ),
    )
    first_piece_s: float = field(
        default=30.0,
        metadata=about(
            "Seconds without a first piece before a peer counts as hung and another is asked. Raising"
            " it helps devices that take long over a prompt.",
            minimum=0.1,
            maximum=3600.0,
        ),
    )
    between_pieces_s: float = field(
        default=15.0,
        metadata=about(
            "Seconds between two pieces of an answer before a peer counts as hung.",
            minimum=0.1,
            maximum=3600.0,
        ),
    )
    stop_s: float = field(
        default=10.0,
        metadata=about(
            "Seconds that running requests get to finish when the daemon is stopped. systemd kills it"
            " after TimeoutStopSec (30 s in our unit): keep it well below.",
            minimum=0.0,
            maximum=3600.0,
        ),
    )


@dataclass(frozen=True, slots=True)
class LogSection:
    """Logs go to standard error; under systemd that is the journal."""

    level: LogLevel = field(
        default=LogLevel.INFO,
        metadata=about("Least severe line written: debug, info, warning or error."),
    )
    format: LogFormat = field(
        default=LogFormat.AUTO,
        metadata=about(
            "console (for people), json (a line each, for machines), or auto: console on a terminal,"
            " otherwise json."
        ),
    )


@dataclass(frozen=True, slots=True)
class StorageSection:
    """What is written to disk, and how often."""

    snapshot_interval_s: float = field(
        default=60.0,
        metadata=about(
            "Seconds between two snapshots of the catalogue, when it has changed. Raising it spares"
            " flash; what a power cut loses is repaired from peers.",
            minimum=1.0,
            maximum=86_400.0,
        ),
    )
    remembered_peers_max: int = field(
        default=64,
        metadata=about("Peers remembered for the next start.", minimum=1, maximum=4096),
    )


@dataclass(frozen=True, slots=True)
class PluginsSection:
    """Which plugins run. Each may have a table of its own, [plugins.NAME], which it checks itself."""

    enable: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Plugins to load, and no others. Empty: all that are installed, except echo, which is for"
            " measurements. hardware costs little and tells the mesh what this device is.",
            pattern=r"\S+",
            pattern_means="a plugin's name",
        ),
    )
    disable: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Plugins not to load, whatever enable says.",
            pattern=r"\S+",
            pattern_means="a plugin's name",
        ),
    )
    tables: Mapping[str, Mapping[str, Value]] = field(
        default_factory=dict[str, Mapping[str, Value]],
        metadata=about("The tables [plugins.NAME], by name, as written."),
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All settings in force. `origins` maps "section.key" to where the value came from."""

    node: NodeSection = field(default_factory=NodeSection)
    listen: ListenSection = field(default_factory=ListenSection)
    discovery: DiscoverySection = field(default_factory=DiscoverySection)
    gossip: GossipSection = field(default_factory=GossipSection)
    http: HttpSection = field(default_factory=HttpSection)
    limits: LimitsSection = field(default_factory=LimitsSection)
    handoff: HandoffSection = field(default_factory=HandoffSection)
    access: AccessSection = field(default_factory=AccessSection)
    trust: TrustSection = field(default_factory=TrustSection)
    audit: AuditSection = field(default_factory=AuditSection)
    log: LogSection = field(default_factory=LogSection)
    storage: StorageSection = field(default_factory=StorageSection)
    plugins: PluginsSection = field(default_factory=PluginsSection)
    origins: Mapping[str, str] = field(default_factory=dict[str, str])


SECTIONS = {
    "node": NodeSection,
    "listen": ListenSection,
    "discovery": DiscoverySection,
    "gossip": GossipSection,
    "http": HttpSection,
    "limits": LimitsSection,
    "handoff": HandoffSection,
    "access": AccessSection,
    "trust": TrustSection,
    "audit": AuditSection,
    "log": LogSection,
    "storage": StorageSection,
    "plugins": PluginsSection,
}
