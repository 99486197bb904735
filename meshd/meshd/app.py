"""The daemon: in which order its parts start, what they tell each other, and how it ends.

`Daemon.run` is the whole nursery tree. Starting: keys, epoch, sockets, gossip, plugins, edges; then the
node is ready, whatever discovery is still doing. Stopping: refuse new work, finish or refuse what runs,
announce the leave, write the snapshot, close.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial

import trio

from meshd.assembly import Assembly
from meshd.config import Config, ConfigError
from meshd.config.gossip import gossip_config
from meshd.core.effects import Address
from meshd.core.events import (
    Decreed,
    DecreesPassedOver,
    Event,
    MemberJoined,
    MemberUpdated,
    RecordChanged,
    SelfEpochRaised,
    SoftChanged,
)
from meshd.core.membership import MemberState
from meshd.edge.limits import ConnectionLimits
from meshd.edge.server import EdgeError, serve_edge
from meshd.orchestrate.access_view import is_access_question
from meshd.orchestrate.handoff import is_handoff
from meshd.orchestrate.host import HostChange
from meshd.orchestrate.incidents import event_fields, event_name
from meshd.orchestrate.inspection import is_inspection
from meshd.orchestrate.parts import at
from meshd.orchestrate.records import LOAD_KEY
from meshd.orchestrate.trust_contacts import contacts
from meshd.shell.addresses import (
    ListenError,
)
from meshd.shell.logs import configure_logs
from meshd.shell.storage import StorageError
from meshd.shell.streams import IncomingCall
from meshd.shell.systemd import Notifier
from meshd.shell.trust_calls import is_trust
from meshd.shell.trust_state import NodeRevoked
from meshd.shell.warden_tools import Contact
from meshd.trust.identity import Identity, IdentityError, Role
from meshd_cms import Epoch, NodeId, node_id_text
from meshd_plugins.api import Value
from meshd_plugins.sources import UnknownPluginError

StartError = (
    ConfigError,
    EdgeError,
    IdentityError,
    ListenError,
    NodeRevoked,
    StorageError,
    UnknownPluginError,
)
"""What can be wrong before a daemon is up; each says what to do."""

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


class Daemon(Assembly):
    """One node, built from its configuration; `meshd.assembly` has its parts."""

    # -- the nursery tree --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until a signal or `meshd leave`, then stop in order.

        Raises:
            StartError: something is wrong before the node is up; nothing is left open.
        """
        self._began_s = trio.current_time()
        self._build()
        notifier = self._notifier = Notifier()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals, signals, nursery.cancel_scope)
                await nursery.start(self._streams.serve, [self._stream_listener()])
                await nursery.start(self._witness.run)
                await nursery.start(self._driver.run)
                await nursery.start(self._warden.run)
                await nursery.start(self._plugins.run)
                nursery.start_soon(self._announcer.run)
                nursery.start_soon(self._keeper.run)
                nursery.start_soon(self._access.audit.run)
                nursery.start_soon(self._lookout.incidents.run)
                nursery.start_soon(self._whereabouts.watch, self._network_changed)
                await nursery.start(self._edge_service())
                nursery.start_soon(self._exposure.run)
                nursery.start_soon(self._join_desk.watch)
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
        if self._out:
            raise NodeRevoked(self._out)

    def _edge_service(self) -> Callable[..., Awaitable[None]]:
        http, certificate = self._config.http, self._exposure.certificate
        return partial(
            serve_edge,
            self._edge,
            self._edge_sockets,
            graceful_s=1.0,
            limits=ConnectionLimits(
                head_s=http.head_s,
                stalled_s=http.stalled_s,
                per_source_max=http.connections_per_source_max,
            ),
            tls=None if certificate is None else certificate.context,
            counters=self._edge_counters,
        )

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
        self._plugin_peers.close()
        await self._announce_leave()
        with trio.move_on_after(STREAM_DRAIN_S):
            await self._streams.drain()
        await self._keeper.save(last=True)
        await self._warden.save()
        await self._access.audit.flush()

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
            case Decreed():
                self._warden.decreed(event.decree)
                self._access.decreed(event.decree)
            case DecreesPassedOver():
                self._warden.look_for_decrees()
            case SelfEpochRaised():
                if not self._storage.try_keep_epoch(event.epoch):
                    self._log.warning("epoch.not_kept", epoch=event.epoch)
                self._sealer.rekey(event.epoch)
                self._streams.raise_epoch(event.epoch)
                self._witness.renew()
            case _:
                if isinstance(event, MemberUpdated):
                    self._streams.moved(event.node)
                if isinstance(event, MemberJoined | MemberUpdated):
                    self._warden.member_seen(event.node, event.name)
                self._catalogue.members_changed()
                self._access.policy.members_changed()
                self._log.info(event_name(event), **event_fields(event))

    def _capability_changed(self, change: HostChange) -> None:
        if self._identity.role is Role.OBSERVER:
            return  # it serves nothing, and so it offers nothing
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
        if is_trust(call):
            return await self._trust_server.serve(call)
        if self._catalogue.note_role(call.peer, call.proof.credential.role):
            self._access.policy.members_changed()
        if is_access_question(call):
            return await self._access_view.serve(call)
        if is_handoff(call):
            return await self._prefix_server.serve(call)
        return await self._call_server.serve(call)

    def _gossip_from_stream(self, sender: NodeId, epoch: Epoch, payload: bytes) -> None:
        address = self._catalogue.address_of(sender)
        self._driver.stream_message(sender, epoch, address or UNKNOWN_ADDRESS, payload)

    def _contacts(self) -> Sequence[Contact]:
        elsewhere = (*self._seeds.addresses, *self._discovered.remembered, *self._discovered.mdns)
        return contacts(
            self._me,
            self._core.members(),
            self._store,
            self._streams.connected(),
            [each for each in elsewhere if each != self._address],
        )

    def _certificate_renewed(self, identity: Identity) -> None:
        if identity.role is not self._identity.role:
            self._announcer.node(self._about_node(), {})
        self._identity = identity

    def _shut_out(self, why: str) -> None:
        """This node was revoked: nobody listens to it any more."""
        if not self._out:
            self._out = why
            self._log.error("daemon.revoked", why=why)
            self._notifier.status(why)
            self._stop.set()

    def _own_load(self) -> Value:
        return self._announcer.load()

    def _load_on_reply(self, node: NodeId, load: Value) -> None:
        self._catalogue.note_load(node, load)

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

    def _join(self, addresses: Sequence[Address]) -> None:
        """Contact configured seeds or the peers of the last run."""
        others = tuple(address for address in addresses if address != self._address)
        if others:
            self._driver.post(lambda core, now_s: core.join(others, now_s))

    def _say_ready(self) -> None:
        self._exposure.say()
        self._log.info(
            "daemon.ready",
            node=node_id_text(self._me),
            mesh=self._identity.mesh_name,
            address=at(self._address),
            http=self._http,
            socket=str(self._edge_sockets.path),
            took_s=round(trio.current_time() - self._began_s, 3),
        )
