"""What a check may find. The codes are stable: scripts and docs/operate.md name them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Severity(IntEnum):
    """How bad it is; the higher, the worse."""

    NOTE = 0  # worth knowing; nothing is broken
    WARNING = 1  # something works worse than it should, or will soon
    ERROR = 2  # something does not work

    @property
    def word(self) -> str:
        """In lower case, for JSON and for people."""
        return self.name.lower()


class Code(StrEnum):
    """One name for each thing that can be wrong."""

    # Of the daemon, which cannot be asked or could not start
    DAEMON_DOWN = "daemon_down"
    SOCKET_DENIED = "socket_denied"
    CONFIG_WRONG = "config_wrong"
    NO_IDENTITY = "no_identity"
    PORT_TAKEN = "port_taken"
    # Of this machine's disk, load and clock
    DISK_REFUSES = "disk_refuses"
    STATE_SET_ASIDE = "state_set_aside"
    OVERLOADED = "overloaded"
    HEALTH_LOW = "health_low"
    WORKER_EXPOSED = "worker_exposed"
    PLUGIN_COMPLAINS = "plugin_complains"
    CLOCK_UNSET = "clock_unset"
    CLOCK_OFF = "clock_off"
    PEER_CLOCK_OFF = "peer_clock_off"
    EPOCH_AHEAD = "epoch_ahead"
    # Of this node's standing in its mesh
    CERTIFICATE_BAD = "certificate_bad"
    CERTIFICATE_ENDING = "certificate_ending"
    KEY_BEHIND = "key_behind"
    # Of the network
    NO_NETWORK = "no_network"
    BRIDGE_ADDRESS = "bridge_address"
    MULTICAST_OFF = "multicast_off"
    MULTICAST_BLOCKED = "multicast_blocked"
    MULTICAST_SILENT = "multicast_silent"
    MDNS_FAILED = "mdns_failed"
    UDP_BLOCKED = "udp_blocked"
    TCP_BLOCKED = "tcp_blocked"
    SEND_FAILS = "send_fails"
    # Of who else is there
    NO_PEERS = "no_peers"
    PEERS_LOST = "peers_lost"
    SEED_SILENT = "seed_silent"
    OTHER_MESH = "other_mesh"
    BAD_SEAL = "bad_seal"
    OTHER_PROTOCOL = "other_protocol"
    SOFTWARE_MIXED = "software_mixed"
    IDENTITY_DUPLICATE = "identity_duplicate"
    NAME_DUPLICATE = "name_duplicate"
    ADDRESS_CONTESTED = "address_contested"
    PEER_MISBEHAVES = "peer_misbehaves"
    STORE_BEHIND = "store_behind"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    code: Code
    severity: Severity
    says: str  # one sentence: what was seen
    do: str  # what mends it
