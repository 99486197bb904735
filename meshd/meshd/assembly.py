"""What a daemon is made of: every part, built from the configuration and wired to the others.

Nothing runs yet: `meshd.app` starts the parts, says what they tell each other, and ends them.
"""

from __future__ import annotations

import random
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import trio

from meshd import __version__
from meshd.config import Config, describe, handoff_config
from meshd.config.gossip import gossip_config
from meshd.core.bodies import Bodies
from meshd.core.effects import Address
from meshd.core.events import (
    Event,
)
from meshd.core.handoff import Links
from meshd.core.membership import LocalNode, MemberState, MemberView
from meshd.core.mux import MuxConfig
from meshd.core.node import NodeCore
from meshd.core.prefixes import SECRET_BYTES, Tagger
from meshd.core.scheduler import ExpectedTimePolicy, Scheduler, SchedulerConfig
from meshd.core.sealing import Opener, Sealer
from meshd.edge.app import build_app
from meshd.edge.counters import EdgeCounters
from meshd.edge.exposure import open_exposure
from meshd.edge.invite_api import EdgeClients
from meshd.edge.limits import EdgeLimits
from meshd.edge.server import EdgeError, open_edge_sockets
from meshd.orchestrate.access_parts import build_access
from meshd.orchestrate.access_view import AccessView
from meshd.orchestrate.announcer import Announcer
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.executor import Executor
from meshd.orchestrate.handoff import HandoffStatistics, PrefixServer
from meshd.orchestrate.host import CapabilityHost, HostChange
from meshd.orchestrate.lookout import Lookout
from meshd.orchestrate.mesh import Faces, Mesh
from meshd.orchestrate.parts import Discovered, Parts, at
from meshd.orchestrate.plugin_peers import PluginPeers
from meshd.orchestrate.prefix_fetcher import PrefixFetcher
from meshd.orchestrate.presence import announcement, node_value
from meshd.orchestrate.remote import CallServer, PeerCapabilities
from meshd.orchestrate.router import Router, RouterConfig
from meshd.orchestrate.trust_desk import TrustDesk
from meshd.orchestrate.warmth import Warmth
from meshd.shell.addresses import (
    ANY,
    Whereabouts,
    all_addresses,
    listen,
    multicast_interfaces,
    parse_seed,
)
from meshd.shell.discovery import Announcement, MdnsDiscovery
from meshd.shell.driver import GossipDriver
from meshd.shell.joining_desk import JoinDesk
from meshd.shell.joining_facts import TrustFacts
from meshd.shell.joining_server import JoinServer
from meshd.shell.keeper import StateKeeper, load_store
from meshd.shell.seeds import Seeds
from meshd.shell.storage import Storage
from meshd.shell.stream_calls import OUTGOING_BYTES_MAX
from meshd.shell.streams import IncomingCall, PeerStreams, StreamConfig
from meshd.shell.supervisor import ProcessSupervisor
from meshd.shell.trust_calls import TrustServer
from meshd.shell.trust_state import load_trust
from meshd.shell.warden import Warden
from meshd.shell.warden_tools import Contact, Tools
from meshd.shell.witness import WitnessStreams
from meshd.trust.identity import Identity, Role, load_identity
from meshd_cms import Epoch, NodeId
from meshd_plugins.api import Logger, PluginContext, Privacy, Value
from meshd_plugins.manager import PluginManager
from meshd_plugins.sources import entry_points

SOFTWARE: Final = f"meshd {__version__}"


class Assembly(ABC):
    """The parts of one node.

    Args:
        config: everything that can be set.
        log: bound logger.
    """

    def __init__(self, config: Config, log: Logger) -> None:
        self._config = config
        self._log = log
        self._stop = trio.Event()
        self._left = False
        self._out = ""  # why this node was shut out
        self._began_s = 0.0

    # -- construction ------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Everything that can fail before the node is up fails here, in the order of cheapness."""
        config, log = self._config, self._log
        state_dir = config.node.state_dir
        self._identity = load_identity(state_dir)
        self._me: NodeId = self._identity.node_id
        self._storage = Storage(state_dir)
        self._trust = load_trust(
            state_dir,
            self._identity,
            certificate_days=config.trust.certificate_days,
            log=log,
        )
        self._identity = self._trust.identity
        remembered = self._storage.load_peers() if config.discovery.remember else ()
        self._discovered = Discovered({}, remembered)
        self._seeds = Seeds(
            config.discovery.seeds,
            found=lambda address: self._join((address,)),
            log=log,
            resolve=partial(parse_seed, listening=config.listen.host),
        )
        interfaces = partial(multicast_interfaces, config.listen.host, config.discovery.interfaces)
        interfaces()  # a name that is wrong is told before anything is open
        self._supervisor = ProcessSupervisor(log, hidden=(state_dir,))
        self._plugins = self._build_plugins()
        self._listening = listen(config.listen.host, config.listen.port)
        try:
            self._exposure = open_exposure(config, all_addresses)
            self._edge_sockets = open_edge_sockets(config.http)
        except EdgeError:
            self._listening.close()
            raise
        self._build_gossip()
        self._catalogue = Catalogue(self._store, self._core.members, trio.current_time)
        self._access = build_access(
            config,
            self._identity,
            self._store,
            self._catalogue,
            self._core.decrees.is_revoked,
            mesh_s=self._trust.gate.now_s,
            log=log,
        )
        self._links = Links(handoff_config(config.handoff))
        self._fetcher = PrefixFetcher(
            self._me,
            self._streams,
            self._catalogue,
            self._access.passports,
            handoff_config(config.handoff),
            self._links,
            HandoffStatistics(),
            log,
        )
        self._host = CapabilityHost(
            guard=self._access.guard,
            warmer=self._fetcher.warm,
            departed=self._access.departed,
            queue_max=config.limits.queue_max,
            changed=self._capability_changed,
            load_changed=lambda: self._announcer.load_changed(),
            log=log,
        )
        self._discovery = MdnsDiscovery(
            self._announcement(), interfaces=interfaces, found=self._found, log=log
        )
        self._build_serving()
        self._plugins.load()
        self._plugins.register()
        self._announcer.node(self._about_node(), self._plugins.facts())

    def _build_gossip(self) -> None:
        config = self._config
        epoch = self._storage.next_epoch()
        self._store = load_store(self._storage, self._identity, epoch, self._log)
        listening, advertise = self._listening, config.listen.advertise
        self._whereabouts = Whereabouts(listening.host, advertise, listening.port)
        core = NodeCore(
            gossip_config(config.gossip),
            LocalNode(self._me, config.node.name, self._address),
            self._store,
            random.Random(secrets.randbits(64)),
            self._trust.decrees,
        )
        ring, mesh_id = self._trust.ring, self._identity.mesh_id
        self._sealer = Sealer(ring.current.key, mesh_id, self._me, self._store.epoch)
        self._opener = Opener(ring.opening, mesh_id, self._me)
        self._opener.restore(self._storage.load_windows())
        self._witness = WitnessStreams(
            self._me,
            self._sealer,
            self._opener,
            lambda node, epoch, evident: self._driver.watch_ended(node, epoch, evident),
            self._trust.gate,
        )
        self._streams = PeerStreams(
            self._identity,
            StreamConfig(
                mux=MuxConfig(frame_bytes_max=config.limits.request_bytes_max),
                outgoing_bytes_max=OUTGOING_BYTES_MAX + config.limits.request_bytes_max,
                bodies_bytes_max=config.limits.bodies_bytes_max,
            ),
            epoch=self._store.epoch,
            handler=self._serve_call,
            on_gossip=self._gossip_from_stream,
            load=self._own_load,
            on_load=self._load_on_reply,
            witness=self._witness.accept,
            joiner=JoinServer(lambda: self._trust.identity, self._build_desk(), self._log).accept,
            gate=self._trust.gate,
            log=self._log,
        )
        self._driver = GossipDriver(
            core,
            self._listening.datagrams,
            sealer=self._sealer,
            opener=self._opener,
            streams=self._streams,
            witness=self._witness,
            notify=self._notified,
            unsealed=lambda source: self._warden.unsealed(source),
            log=self._log,
        )
        self._warden = Warden(self._trust, self._warden_tools(), self._log)
        self._trust_server = TrustServer(self._trust)
        self._trust_desk = TrustDesk(self._warden, self._members, self._store, self._opener)
        self._core = core
        self._keeper = StateKeeper(
            self._storage,
            self._store,
            self._live_peers,
            interval_s=config.storage.snapshot_interval_s,
            peers_max=config.storage.remembered_peers_max,
            floors=self._opener.floors,
        )

    def _build_desk(self) -> JoinDesk:
        self._join_desk = JoinDesk(
            lambda: self._trust.identity,
            self._config.node.state_dir,
            TrustFacts(self._trust, self._whereabouts, self._live_peers),
            clients=EdgeClients(self._exposure, self._edge_address),
            wall=self._trust.gate.now_s,
            clock=trio.current_time,
            days=self._config.trust.certificate_days,
            changed=lambda: self._discovery.announce(self._announcement()),
            admitted=lambda node, name, role: self._access.joined(node, name, role),
            log=self._log,
        )
        return self._join_desk

    def _edge_address(self) -> Address:
        """Where others reach the HTTP edge, if it listens beyond loopback."""
        host = self._config.http.host
        return (self._address[0] if host in ANY else host), self._edge_sockets.port

    def _warden_tools(self) -> Tools:
        return Tools(
            streams=self._streams,
            witness=self._witness,
            sealer=self._sealer,
            opener=self._opener,
            post=self._driver.post,
            contacts=self._contacts,
            rejoin=lambda: self._join([each.address for each in self._contacts()]),
            renewed=self._certificate_renewed,
            out=self._shut_out,
        )

    def _build_serving(self) -> None:
        config, log, access = self._config, self._log, self._access
        self._announcer = Announcer(
            self._me,
            post=self._driver.post,
            catalogue=self._catalogue,
            figures=self._plugins.load_figures,
            log=log,
        )
        self._announcer.host = self._host
        self._call_server = CallServer(
            self._host,
            hops_max=config.limits.hops_max,
            log=log,
            passports=access.passports,
            audit=access.audit,
            name_of=self._catalogue.name_of,
        )
        self._plugin_peers = PluginPeers(
            self._me, self._streams, self._catalogue, access.guard, access.audit
        )
        self._prefix_server = PrefixServer(
            self._host,
            access.guard,
            access.passports,
            access.audit,
            handoff_config(config.handoff),
            self._fetcher.statistics,
            log,
            self._catalogue.name_of,
        )
        scheduling = SchedulerConfig()
        router = Router(
            RouterConfig(
                attempts_max=config.limits.attempts_max,
                first_piece_s=config.limits.first_piece_s,
                between_pieces_s=config.limits.between_pieces_s,
            ),
            self._catalogue,
            Scheduler(
                ExpectedTimePolicy(scheduling), scheduling, random.Random(secrets.randbits(64))
            ),
            self._host,
            PeerCapabilities(
                self._streams, access.passports, access.audit, self._catalogue.name_of
            ),
            access.guard,
            Warmth(
                self._catalogue,
                Tagger(secrets.token_bytes(SECRET_BYTES)),
                trio.current_time,
                handoff_config(config.handoff),
                self._links,
            ),
        )
        self._access_view = AccessView(
            access,
            self._host,
            self._catalogue,
            self._streams,
            default_privacy=Privacy[config.access.default_privacy.name],
            role=self._identity.role,
        )
        self._lookout = self._build_lookout(router)
        self._mesh = Mesh(
            self._catalogue,
            Executor(router, self._me),
            Faces(self._lookout, self._plugins.status, self._described, self._leave),
            requests_max=config.limits.requests_max,
            default_privacy=Privacy[config.access.default_privacy.name],
            record=access.audit.record,
            log=log,
        )
        limits = EdgeLimits(
            request_bytes_max=config.http.request_bytes_max,
            body_deadline_s=config.http.body_s,
            require_key=config.http.require_key,
            deadline_default_s=config.limits.deadline_s,
            deadline_max_s=config.limits.deadline_max_s,
        )
        self._edge_counters = EdgeCounters()
        self._edge = build_app(
            self._mesh,
            limits,
            exposure=self._exposure,
            counters=self._edge_counters,
            access=self._access_view,
            trust=self._trust_desk,
            desk=self._join_desk,
            operate=self._plugins,
            bodies=Bodies(config.limits.bodies_bytes_max),
        )

    def _build_lookout(self, router: Router) -> Lookout:
        parts = Parts(
            config=self._config,
            identity=self._identity,
            store=self._store,
            driver=self._driver,
            opener=self._opener,
            streams=self._streams,
            storage=self._storage,
            discovery=self._discovery,
            discovered=self._discovered,
            seeds=self._seeds,
            supervisor=self._supervisor,
            host=self._host,
            announcer=self._announcer,
            catalogue=self._catalogue,
            router=router,
            handoff=self._fetcher.statistics,
            audit=self._access.audit,
            trust=self._trust_desk,
            address=lambda: self._address,
            http=self._http,
            software=SOFTWARE,
            began_s=self._began_s,
            plugin_statistics=self._plugins.statistics,
            plugin_complaints=self._plugins.complaints,
        )
        return Lookout(parts, time.time)

    def _build_plugins(self) -> PluginManager:
        section = self._config.plugins
        installed = {source.name for source in entry_points()}
        disabled = set(section.disable)
        if section.enable:  # a list says exactly which ones
            disabled |= installed - set(section.enable)
        return PluginManager(
            self._plugin_context,
            log=self._log,
            clock=trio.current_time,
            enabled=[name for name in section.enable if name not in disabled],
            disabled=sorted(disabled),
            configured=section.tables,
        )

    def _plugin_context(self, name: str) -> PluginContext:
        folder = self._config.node.state_dir / "plugins" / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return PluginContext(
            name=name,
            config=self._config.plugins.tables.get(name, {}),
            state_dir=folder,
            capabilities=self._host,
            supervisor=self._supervisor,
            log=self._log,
            clock=trio.current_time,
            peers=self._plugin_peers,
        )

    def _stream_listener(self) -> trio.SocketListener:
        return trio.SocketListener(trio.socket.from_stdlib_socket(self._listening.streams))

    def _about_node(self) -> dict[str, Value]:
        role = self._trust.identity.role
        return node_value(self._config, self._address, self._store.epoch, SOFTWARE, role)

    # -- what several parts ask ------------------------------------------------------------------------------

    def _members(self) -> Mapping[NodeId, MemberView]:
        return {view.node: view for view in self._core.members()}

    def _announcement(self) -> Announcement:
        serves = self._identity.role is not Role.OBSERVER
        names = (descriptor.name for descriptor in self._host.descriptors() if serves)
        joinable = self._join_desk.pins.current is not None
        return announcement(self._config, self._identity, self._whereabouts, names, joinable)

    def _described(self) -> list[Mapping[str, Value]]:
        return list(describe(self._config))

    def _live_peers(self) -> tuple[Address, ...]:
        return tuple(
            view.address
            for view in self._core.members()
            if view.state is MemberState.ALIVE and not view.is_self
        )

    @property
    def _address(self) -> Address:
        return self._whereabouts.address

    @property
    def _http(self) -> str:
        scheme = "http" if self._exposure.certificate is None else "https"
        return f"{scheme}://{at((self._config.http.host, self._edge_sockets.port))}"

    # -- what the parts tell each other: see `meshd.app` -----------------------------------------------------

    @abstractmethod
    def _notified(self, event: Event) -> None: ...

    @abstractmethod
    def _capability_changed(self, change: HostChange) -> None: ...

    @abstractmethod
    def _found(self, address: Address) -> None: ...

    @abstractmethod
    async def _serve_call(self, call: IncomingCall) -> Value: ...

    @abstractmethod
    def _gossip_from_stream(self, sender: NodeId, epoch: Epoch, payload: bytes) -> None: ...

    @abstractmethod
    def _own_load(self) -> Value: ...

    @abstractmethod
    def _load_on_reply(self, node: NodeId, load: Value) -> None: ...

    @abstractmethod
    def _contacts(self) -> Sequence[Contact]: ...

    @abstractmethod
    def _certificate_renewed(self, identity: Identity) -> None: ...

    @abstractmethod
    def _shut_out(self, why: str) -> None: ...

    @abstractmethod
    def _join(self, addresses: Sequence[Address]) -> None: ...

    @abstractmethod
    async def _leave(self) -> None: ...
