"""The parts of a daemon that are read to tell people about it. Nothing here changes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meshd.config import Config
from meshd.core.effects import Address
from meshd.core.membership import MemberView
from meshd.core.sealing import Opener
from meshd.orchestrate.announcer import Announcer
from meshd.orchestrate.audit import Audit
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.handoff import HandoffStatistics
from meshd.orchestrate.host import CapabilityHost
from meshd.orchestrate.router import Router
from meshd.orchestrate.trust_desk import TrustDesk
from meshd.shell.discovery import MdnsDiscovery
from meshd.shell.driver import GossipDriver
from meshd.shell.seeds import Seeds
from meshd.shell.storage import Storage
from meshd.shell.streams import PeerStreams
from meshd.shell.supervisor import ProcessSupervisor
from meshd.trust.identity import Identity
from meshd_cms import NodeId, Store
from meshd_plugins.api import Complaint

MDNS_SHOWN_MAX = 256  # addresses kept for `meshd status`; hints beyond it still count


@dataclass(frozen=True, slots=True)
class Discovered:
    """Where addresses of others came from."""

    mdns: dict[Address, None]
    remembered: tuple[Address, ...]

    def by_mdns(self, address: Address) -> None:
        """Heard by multicast DNS, of our mesh."""
        if len(self.mdns) < MDNS_SHOWN_MAX:
            self.mdns[address] = None


@dataclass(frozen=True, slots=True)
class Parts:
    """What a running daemon is made of.

    Attributes:
        address: where peers are told to reach this node, now.
        http: the base URL of the edge.
        software: release, such as `meshd 0.1.0`.
        began_s: when the daemon began, monotonic.
        plugin_statistics: counters of the plugin manager.
        plugin_complaints: what plugins think is wrong, by their names.
    """

    config: Config
    identity: Identity
    store: Store
    driver: GossipDriver
    opener: Opener
    streams: PeerStreams
    storage: Storage
    discovery: MdnsDiscovery
    discovered: Discovered
    seeds: Seeds
    supervisor: ProcessSupervisor
    host: CapabilityHost
    announcer: Announcer
    catalogue: Catalogue
    router: Router
    handoff: HandoffStatistics
    audit: Audit
    trust: TrustDesk
    address: Callable[[], Address]
    http: str
    software: str
    began_s: float
    plugin_statistics: Callable[[], Mapping[str, int]]
    plugin_complaints: Callable[[], Mapping[str, Sequence[Complaint]]]

    @property
    def me(self) -> NodeId:
        """This node."""
        return self.identity.node_id

    def members(self) -> dict[NodeId, MemberView]:
        """All members by id, this node included."""
        return {view.node: view for view in self.driver.core.members()}

    def names(self) -> dict[NodeId, str]:
        """The names of all members, by id."""
        return {node: view.name for node, view in self.members().items()}


def at(address: Address) -> str:
    """An address as people type it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
