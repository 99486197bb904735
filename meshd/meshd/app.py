"""The composition root: what a daemon is made of, in which order it starts, and how it ends.

`Daemon.run` is the whole nursery tree. Starting: keys, epoch, sockets, gossip, plugins, edges; then the
node is ready, whatever discovery is still doing. Stopping: refuse new work, finish or refuse what runs,
announce the leave, write the snapshot, close.
"""

from __future__ import annotations

import gc
import random
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial

import trio

from meshd import __version__
from meshd.config import Config, ConfigError, describe
from meshd.config.gossip import gossip_config
from meshd.core.effects import Address
from meshd.core.events import Event, MemberUpdated, RecordChanged, SelfEpochRaised, SoftChanged
from meshd.core.membership import LocalNode, MemberState
from meshd.core.mux import MuxConfig
from meshd.core.node import NodeCore
from meshd.core.scheduler import ExpectedTimePolicy, Scheduler, SchedulerConfig
from meshd.core.sealing import Opener, Sealer
from meshd.edge.app import build_app
from meshd.edge.limits import EdgeLimits
from meshd.edge.server import EdgeError, open_edge_sockets, serve_edge
from meshd.orchestrate.announcer import Announcer
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.executor import Executor
from meshd.orchestrate.host import CapabilityHost, HostChange
from meshd.orchestrate.incidents import event_fields, event_name
from meshd.orchestrate.inspection import is_inspection
from meshd.orchestrate.lookout import Lookout
from meshd.orchestrate.mesh import Faces, Mesh
from meshd.orchestrate.parts import Discovered, Parts, at
from meshd.orchestrate.presence import announcement, node_value
from meshd.orchestrate.records import LOAD_KEY
from meshd.orchestrate.remote import CallServer, PeerCapabilities
from meshd.orchestrate.router import Router, RouterConfig
from meshd.shell.addresses import (
    ListenError,
    Whereabouts,
    listen,
    multicast_interfaces,
    parse_seed,
)
from meshd.shell.discovery import Announcement, MdnsDiscovery
from meshd.shell.driver import GossipDriver
from meshd.shell.keeper import StateKeeper, load_store
from meshd.shell.logs import configure_logs
from meshd.shell.seeds import Seeds
from meshd.shell.storage import Storage, StorageError
from meshd.shell.streams import IncomingCall, PeerStreams, StreamConfig
from meshd.shell.supervisor import ProcessSupervisor
from meshd.shell.systemd import Notifier
from meshd.shell.witness import WitnessStreams
from meshd.trust.identity import IdentityError, load_identity
from meshd_cms import Epoch, NodeId, node_id_text
from meshd_plugins.api import Logger, PluginContext, Value
from meshd_plugins.manager import PluginManager
from meshd_plugins.sources import UnknownPluginError, entry_points

StartError = (ConfigError, EdgeError, IdentityError, ListenError, StorageError, UnknownPluginError)
"""What can be wrong before a daemon is up; each says what to do."""

SOFTWARE = f"meshd {__version__}"
EXIT_NOT_STARTED = 78  # EX_CONFIG: the unit does not restart on it
GC_THRESHOLD = 10_000  # allocations between collections of the young; up: fewer, longer ones
STREAM_DRAIN_S = 2.0
UNKNOWN_ADDRESS: Address = ("0.0.0.0", 0)  # noqa: S104 - a placeholder, never bound


def run_daemon(config: Config) -> int:
    """Run a daemon until it is told to stop; the exit status.

    What is wrong before it is up is one sentence on standard error, and 1.
    """
    log = configure_logs(config.log, config.node.name)
    wrong: list[str] = []
    try:
        trio.run(Daemon(config, log).run)
    except* StartError as group:
        wrong = [str(error) for error in leaves(group)]
    for sentence in wrong:
        print(f"meshd: {sentence}", file=sys.stderr)  # noqa: T201 - for the person who started it
    return EXIT_NOT_STARTED if wrong else 0


def leaves(group: BaseExceptionGroup[Exception]) -> Iterator[Exception]:
    """The exceptions in a group of groups."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def settle_garbage_collector() -> None:
    """What was made at start stays for life: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    gc.enable()


class Daemon:
    """One node, built from its configuration.

    Args:
        config: everything that can be set.
        log: bound logger.
    """

    def __init__(self, config: Config, log: Logger) -> None:
        self._config = config
        self._log = log
        self._stop = trio.Event()
        self._left = False
        self._began_s = 0.0

    # -- the nursery tree --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until a signal or `meshd leave`, then stop in order.

        Raises:
            StartError: something is wrong before the node is up; nothing is left open.
        """
        self._began_s = trio.current_time()
        self._build()
        notifier = Notifier()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals, signals, nursery.cancel_scope)
                await nursery.start(self._streams.serve, [self._stream_listener()])
                await nursery.start(self._witness.run)
                await nursery.start(self._driver.run)
                await nursery.start(self._plugins.run)
                nursery.start_soon(self._announcer.run)
                nursery.start_soon(self._keeper.run)
                nursery.start_soon(self._lookout.incidents.run)
                nursery.start_soon(self._whereabouts.watch, self._network_changed)
                await nursery.start(
                    partial(serve_edge, self._edge, self._edge_sockets, graceful_s=1.0)
                )
                self._join(self._discovered.remembered)
                nursery.start_soon(self._seeds.run)
                if self._config.discovery.mdns:
                    nursery.start_soon(self._discovery.run)
                nursery.start_soon(notifier.watchdog)
                settle_garbage_collector()
                self._say_ready()
                notifier.ready(f"{self._config.node.name} in {self._identity.mesh_name}")
                await self._stop.wait()
                notifier.stopping()
                await self._stop_in_order()
                nursery.cancel_scope.cancel()
        self._log.info("daemon.stopped")

    async def _watch_signals(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in signals:
            self._log.info("daemon.signalled", signal=signal.Signals(number).name)
            if self._stop.is_set():  # asked twice: now
                scope.cancel()
            self._stop.set()

    async def _stop_in_order(self) -> None:
        """Refuse, finish, leave, save; each with a deadline."""
        limits = self._config.limits
        self._host.close_to_peers()
        with trio.move_on_after(limits.stop_s) as waited:
            await self._mesh.drain()  # first: asks taken here may still need the capabilities here
            await self._host.drain()
        if waited.cancelled_caught:
            self._log.warning("daemon.cut_off", in_flight=self._host.in_flight)
        await self._announce_leave()
        with trio.move_on_after(STREAM_DRAIN_S):
            await self._streams.drain()
        await self._keeper.save()

    # -- construction ------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Everything that can fail before the node is up fails here, in the order of cheapness."""
        config, log = self._config, self._log
        state_dir = config.node.state_dir
        self._identity = load_identity(state_dir)
        self._me: NodeId = self._identity.node_id
        self._storage = Storage(state_dir)
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
        self._supervisor = ProcessSupervisor(log)
        self._plugins = self._build_plugins()
        self._listening = listen(config.listen.host, config.listen.port)
        try:
            self._edge_sockets = open_edge_sockets(config.http)
        except EdgeError:
            self._listening.close()
            raise
        self._build_gossip()
        self._host = CapabilityHost(
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
        )
        key, mesh_id = self._identity.datagram_key, self._identity.mesh_id
        self._sealer = Sealer(key, mesh_id, self._me, self._store.epoch)
        self._opener = Opener((key,), mesh_id, self._me)
        self._witness = WitnessStreams(
            self._me,
            self._sealer,
            self._opener,
            lambda node, epoch, evident: self._driver.watch_ended(node, epoch, evident),
        )
        self._streams = PeerStreams(
            self._identity,
            StreamConfig(mux=MuxConfig(frame_bytes_max=config.limits.request_bytes_max)),
            epoch=self._store.epoch,
            handler=self._serve_call,
            on_gossip=self._gossip_from_stream,
            load=self._own_load,
            on_load=self._load_on_reply,
            witness=self._witness.accept,
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
            log=self._log,
        )
        self._core = core
        self._keeper = StateKeeper(
            self._storage,
            self._store,
            self._live_peers,
            interval_s=config.storage.snapshot_interval_s,
            peers_max=config.storage.remembered_peers_max,
        )

    def _build_serving(self) -> None:
        config, log = self._config, self._log
        self._catalogue = Catalogue(self._store, self._core.members, trio.current_time)
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
            reach_of=self._catalogue.reach_of,
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
            PeerCapabilities(self._streams),
        )
        self._lookout = self._build_lookout(router)
        self._mesh = Mesh(
            self._catalogue,
            Executor(router, self._me.hex()),
            Faces(self._lookout, self._plugins.status, self._described, self._leave),
            requests_max=config.limits.requests_max,
            log=log,
        )
        limits = EdgeLimits(
            request_bytes_max=config.http.request_bytes_max,
            deadline_default_s=config.limits.deadline_s,
            deadline_max_s=config.limits.deadline_max_s,
        )
        self._edge = build_app(self._mesh, limits)

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
            address=lambda: self._address,
            http=self._http,
            software=SOFTWARE,
            began_s=self._began_s,
            plugin_statistics=self._plugins.statistics,
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
        )

    def _stream_listener(self) -> trio.SocketListener:
        return trio.SocketListener(trio.socket.from_stdlib_socket(self._listening.streams))

    def _about_node(self) -> dict[str, Value]:
        return node_value(self._config, self._address, self._store.epoch, SOFTWARE)

    # -- what the parts tell each other ------------------------------------------------------------------

    def _notified(self, event: Event) -> None:
        """An event of the node core; runs in the driver's task."""
        self._lookout.incidents.note(event)
        match event:
            case RecordChanged():
                self._catalogue.record_changed(event.owner)
            case SoftChanged(key=key) if key == LOAD_KEY:
                reading = self._core.soft.read(event.owner, key, trio.current_time())
                if reading is not None:
                    self._catalogue.note_load(event.owner, reading.value, reading.age_s)
            case SoftChanged():
                pass
            case SelfEpochRaised():
                if not self._storage.try_keep_epoch(event.epoch):
                    self._log.warning("epoch.not_kept", epoch=event.epoch)
                self._sealer.rekey(event.epoch)
                self._streams.raise_epoch(event.epoch)
                self._witness.renew()
            case _:
                if isinstance(event, MemberUpdated):
                    self._streams.moved(event.node)
                self._catalogue.members_changed()
                self._log.info(event_name(event), **event_fields(event))

    def _capability_changed(self, change: HostChange) -> None:
        self._announcer.capability_changed(change)
        self._discovery.announce(self._announcement())

    def _found(self, address: Address) -> None:
        """MDNS heard of an address: contact it, unless a member is there."""
        self._discovered.by_mdns(address)
        known = {
            view.address for view in self._catalogue.members() if view.state is MemberState.ALIVE
        }
        if address not in known:
            self._driver.post(lambda core, now_s: core.join((address,), now_s))

    def _network_changed(self) -> None:
        """An interface came or went: be reached where we are now, and look for peers there."""
        self._log.info("network.changed", address=self._address[0])
        address = self._address
        self._driver.post(lambda core, now_s: core.update_address(address, now_s))
        self._announcer.node(self._about_node(), {})
        self._discovery.restart(self._announcement())
        self._streams.doubt()
        self._join((*self._seeds.addresses, *self._discovered.remembered))

    async def _serve_call(self, call: IncomingCall) -> Value:
        if is_inspection(call):
            return await self._lookout.inspections.serve(call)
        return await self._call_server.serve(call)

    def _gossip_from_stream(self, sender: NodeId, epoch: Epoch, payload: bytes) -> None:
        address = self._catalogue.address_of(sender)
        self._driver.stream_message(sender, epoch, address or UNKNOWN_ADDRESS, payload)

    def _own_load(self) -> Value:
        return self._announcer.load()

    def _load_on_reply(self, node: NodeId, load: Value) -> None:
        self._catalogue.note_load(node, load)

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
        return f"http://{self._config.http.host}:{self._edge_sockets.port}"

    # -- for people --------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        await self._announce_leave()
        self._stop.set()

    async def _announce_leave(self) -> None:
        if self._left:
            return
        self._left = True
        self._driver.post(lambda core, now_s: core.leave(now_s))
        await trio.sleep(gossip_config(self._config.gossip).leave_linger_s)

    def _described(self) -> list[Mapping[str, Value]]:
        return list(describe(self._config))

    def _announcement(self) -> Announcement:
        names = (descriptor.name for descriptor in self._host.descriptors())
        return announcement(self._config, self._identity, self._whereabouts, names)

    def _join(self, addresses: Sequence[Address]) -> None:
        """Contact configured seeds or the peers of the last run."""
        others = tuple(address for address in addresses if address != self._address)
        if others:
            self._driver.post(lambda core, now_s: core.join(others, now_s))

    def _say_ready(self) -> None:
        self._log.info(
            "daemon.ready",
            node=node_id_text(self._me),
            mesh=self._identity.mesh_name,
            address=at(self._address),
            http=self._http,
            socket=str(self._edge_sockets.path),
            took_s=round(trio.current_time() - self._began_s, 3),
        )
