"""Calls and messages to peers, over one mutual-TLS connection a pair. See docs/protocol.md.

`PeerStreams.serve` is the whole nursery: it accepts, dials on demand and carries every connection.
When two nodes dial each other at once, the connection dialed by the lower node id stays, and the other
is closed once the calls on it are done (decision 0006).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from meshd.core.bodies import Bodies
from meshd.core.effects import Address
from meshd.core.frames import CallHeader, FrameTooLarge, UnsendableError
from meshd.core.mux import Mux
from meshd.shell.gate import TIME_TELLS, Gate
from meshd.shell.stream_calls import Handler, IncomingCall, OutgoingCall, StreamConfig
from meshd.shell.stream_connection import DRAINING, Connection
from meshd.shell.stream_errors import (
    PeerRejected,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamError,
    StreamLost,
)
from meshd.shell.stream_owner import StreamStatistics
from meshd.shell.stream_peers import check_callee, never_up, out_of_standing, secure
from meshd.shell.witness import WITNESS_BYTE, first_byte
from meshd.trust.certificates import Role
from meshd.trust.identity import Identity
from meshd.trust.join_messages import JOIN_BYTE
from meshd.trust.standing import Standing
from meshd_cms.types import Epoch, NodeId, Value, node_id_short
from meshd_plugins.api import Logger

__all__ = [
    "CallHeader",
    "FrameTooLarge",
    "Handler",
    "IncomingCall",
    "OutgoingCall",
    "PeerRejected",
    "PeerStreams",
    "PeerUnreachable",
    "RemoteFailed",
    "RemoteRefused",
    "StreamConfig",
    "StreamError",
    "StreamLost",
    "StreamStatistics",
    "UnsendableError",
]

DIALS_MAX: Final = 256
"""Dials that wait to be begun."""
RECHECK_S: Final = 60.0
"""How often the standing of connected peers is looked at again. Up: an expired one stays longer."""
_CONNECT_ATTEMPTS: Final = 3


@dataclass(slots=True, eq=False)
class _Dial:
    """A connection somebody waits for. Many may wait for one."""

    node: NodeId | None  # None: whoever answers there
    address: Address
    settled: trio.Event = field(default_factory=trio.Event)
    connection: Connection | None = None
    error: PeerUnreachable | None = None


class PeerStreams:
    """The streams of this node to all its peers.

    Args:
        identity: who we are, and the TLS contexts.
        config: bounds and deadlines.
        epoch: of this process; goes into HELLO.
        handler: serves a call of a peer and returns its trailer. What it raises is told to the peer:
            `Refused`, `BadRequest` and `Failed` as they are, anything else as `internal`, logged.
        on_gossip: called with sender, its epoch and the message; must not block.
        load: this node's load, sent with every final frame.
        on_load: called with a peer and the load its reply carried.
        witness: carries an accepted connection that is a witness stream, to its end.
        joiner: carries an accepted connection that is a joiner's, to its end.
        gate: judges peers; without one, by this machine's clock and no decree.
        log: bound logger.
    """

    def __init__(
        self,
        identity: Identity,
        config: StreamConfig,
        *,
        epoch: int,
        handler: Handler,
        on_gossip: Callable[[NodeId, Epoch, bytes], None],
        load: Callable[[], Value],
        log: Logger,
        on_load: Callable[[NodeId, Value], None] | None = None,
        witness: Callable[[trio.SocketStream], Awaitable[None]] | None = None,
        joiner: Callable[[trio.SocketStream], Awaitable[None]] | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.config = config
        self.statistics = StreamStatistics()
        self.log = log
        self.handler = handler
        self.load = load
        self.gossip_heard = on_gossip
        self.draining = False
        self.bodies = Bodies(config.bodies_bytes_max)
        self.gate = Gate() if gate is None else gate
        self._identity = identity
        self._me = identity.node_id
        self._epoch = Epoch(epoch)
        self._on_load = on_load
        self._others = {WITNESS_BYTE: witness, JOIN_BYTE: joiner}
        self._handshakes = 0
        self._connections: dict[Connection, _Dial | None] = {}  # all; the dial until it is up
        self._preferred: dict[NodeId, Connection] = {}  # the one that new calls go to
        self._dials: dict[tuple[NodeId | None, Address], _Dial] = {}
        self._requests: trio.MemorySendChannel[_Dial] | None = None
        self._all_closed = trio.Event()

    # The tasks

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept, dial and carry connections until cancelled; closes the listeners."""
        assert self._requests is None, "serve runs once at a time"
        self._requests, requests = trio.open_memory_channel[_Dial](DIALS_MAX)
        try:
            async with trio.open_nursery() as nursery:
                if listeners:
                    accept = partial(trio.serve_listeners, self._accept, list(listeners))
                    nursery.start_soon(partial(accept, handler_nursery=nursery))
                nursery.start_soon(self._watch_standings)
                task_status.started()
                async for dial in requests:
                    nursery.start_soon(self._dial, dial)
        finally:
            self._requests = None
            for dial in tuple(self._dials.values()):
                self._settle(dial, PeerUnreachable("this node is going down"))

    async def _accept(self, stream: trio.SocketStream) -> None:
        bounds = (len(self._connections), self._handshakes)
        if bounds[0] >= self.config.connections_max or bounds[1] >= self.config.handshakes_max:
            self.statistics.accepts_failed += 1
            self.log.warning("peer.turned_away", connections=bounds[0], handshakes=bounds[1])
            await trio.aclose_forcefully(stream)
            return
        self._handshakes += 1
        try:
            first = None
            with trio.move_on_after(self.config.dial_deadline_s):
                first = await first_byte(stream)
            if first is None:
                raise PeerUnreachable("nothing was said in time")
            if not first or first in self._others:
                connection = None
            else:
                connection = await self._secure(stream, None, dialed=False)
        except PeerUnreachable as error:
            self.statistics.accepts_failed += 1
            self.log.warning("peer.rejected", code=error.code, reason=error.message)
            await trio.aclose_forcefully(stream)
            return
        finally:
            self._handshakes -= 1
        if connection is not None:
            self.statistics.accepted += 1
            await self._carry(connection, None)
        elif first and (other := self._others[first]) is not None:
            await other(stream)
        else:
            self.statistics.knocks += (
                1  # closed without a word: somebody looked whether we are here
            )
            await trio.aclose_forcefully(stream)

    async def _dial(self, dial: _Dial) -> None:
        self.statistics.dials += 1
        host, port = dial.address
        try:
            with trio.fail_after(self.config.dial_deadline_s):
                stream = await trio.open_tcp_stream(host, port)
            connection = await self._secure(stream, dial.node, dialed=True)
        except trio.TooSlowError:
            error = PeerUnreachable(f"{host} port {port} does not answer")
        except OSError as raised:
            error = PeerUnreachable(f"{host} port {port}: {raised.__cause__ or raised}")
        except PeerUnreachable as raised:
            error = raised
        else:
            connection.address = dial.address
            await self._carry(connection, dial)
            if dial.settled.is_set():
                return
            error = never_up(connection)
        self.statistics.dials_failed += 1
        self.log.info(
            "peer.unreachable", host=host, port=port, code=error.code, reason=error.message
        )
        self._settle(dial, error)

    async def _secure(
        self, stream: trio.SocketStream, expected: NodeId | None, *, dialed: bool
    ) -> Connection:
        """TLS, and who is at the other end. Raises PeerUnreachable; the stream is then closed."""
        identity, deadline_s = self._identity, self.config.dial_deadline_s
        secured, proof = await secure(stream, identity, expected, deadline_s, dialed=dialed)
        mux = Mux(
            self.config.mux,
            identity.mesh_id,
            self._me,
            self._epoch,
            proof.credential.node,
            dialer=dialed,
            clock_s=self.gate.wall_s(),
        )
        return Connection(self, secured, mux, proof, dialed=dialed)

    async def _carry(self, connection: Connection, dial: _Dial | None) -> None:
        self._connections[connection] = dial
        self.statistics.connections += 1
        try:
            await connection.run()
        finally:
            self.statistics.connections -= 1
            del self._connections[connection]
            self._replace_preferred(connection)
            if connection.fault is not None:
                fault = connection.fault
                peer = node_id_short(connection.peer)
                self.log.warning(
                    "peer.misbehaved", peer=peer, code=fault.code, reason=fault.message
                )
            elif connection.up_since_s is not None:
                self.log.info(
                    "peer.disconnected", peer=node_id_short(connection.peer), reason=connection.lost
                )
            if not self._connections:
                self._all_closed.set()

    # For the rest of the daemon

    @asynccontextmanager
    async def call(
        self,
        node: NodeId | None,
        address: Address,
        header: CallHeader,
        body: Value,
        *,
        check: Callable[[str], None] = lambda _host: None,
    ) -> AsyncGenerator[OutgoingCall]:
        """Call a peer (without a node: whoever of the mesh answers there), dialing `address` if there is no connection; leaving early cancels it there.

        Raises:
            PeerUnreachable: no connection came about, or the peer is not in good standing, or an observer;
                nothing was sent.
            RemoteRefused: the peer is known to be going down, or has too many calls of ours in flight.
            UnsendableError: the request is too large or not data; nothing was sent.
        """
        connection = await self._connected(node, address)
        for _ in range(_CONNECT_ATTEMPTS):
            await connection.room()
            if connection.is_usable or connection.is_peer_draining:
                break
            connection = await self._connected(node, address)
        check_callee(connection, header.capability_id)
        check(connection.host)  # raises what the caller knows; nothing was sent
        call = connection.open(header, body)
        try:
            yield call
        finally:
            connection.leave(call)

    async def ping(self, node: NodeId, address: Address) -> float:
        """Round trip to a peer in seconds, dialing if needed. Raises StreamLost or PeerUnreachable."""
        return await (await self._connected(node, address, for_calls=False)).ping()

    async def send_gossip(self, node: NodeId | None, address: Address, payload: bytes) -> None:
        """Send a message of the node core; without a node, to whoever in the mesh answers there.

        Raises:
            StreamLost, PeerUnreachable: it may not have arrived.
            FrameTooLarge: it does not fit a frame.
        """
        connection = await self._connected(node, address, for_calls=False)
        if not connection.verdict.is_good:
            raise out_of_standing(connection)
        await connection.gossip(payload)

    async def drain(self) -> None:
        """Refuse new calls, tell the peers, and return when all connections have ended in peace.

        Calls in flight, either way, are finished first. Callers set a deadline.
        """
        self.draining = True
        for connection in tuple(self._connections):
            connection.goaway(DRAINING)
        while self._connections:
            self._all_closed = trio.Event()
            await self._all_closed.wait()
        await trio.lowlevel.checkpoint()

    def use_identity(self, identity: Identity) -> None:
        """Our certificate was renewed: connections that showed the old one are replaced, in peace."""
        self._identity = identity
        for connection in tuple(self._connections):
            connection.goaway("renewed")

    def recheck(self) -> None:
        """Judge all peers again: revoked ones are cut off, expired ones have to come anew."""
        for connection in tuple(self._connections):
            if connection.up_since_s is None or connection.lost is not None:
                continue
            before, verdict = connection.verdict, self.gate.judge(connection.proof)
            connection.verdict = verdict
            if verdict.standing is Standing.REVOKED:
                self._cut_off(connection)
            elif not verdict.is_good and before.is_good:
                self._log_standing(connection)
                connection.goaway(verdict.code)

    def raise_epoch(self, epoch: int) -> None:
        """This node's epoch was raised: connections that said the old one are replaced."""
        self._epoch = Epoch(epoch)
        for connection in tuple(self._connections):
            connection.goaway("epoch_raised")

    def moved(self, node: NodeId) -> None:
        """A peer is reached elsewhere now: new calls dial it there; those in flight go on if they can."""
        for connection in tuple(self._connections):
            if connection.peer == node:
                if self._preferred.get(node) is connection:
                    del self._preferred[node]
                connection.goaway("moved")
                connection.doubt()

    def doubt(self) -> None:
        """The network of this node changed: ask on every connection whether it still carries."""
        for connection in tuple(self._connections):
            connection.doubt()

    def connected(self) -> tuple[NodeId, ...]:
        """The peers there is a connection with, sorted."""
        return tuple(sorted(self._preferred))

    # For the connections

    def load_heard(self, peer: NodeId, load: Value) -> None:
        """A reply brought a peer's load."""
        if self._on_load is not None and load is not None:
            self._on_load(peer, load)

    @property
    def is_observer(self) -> bool:
        """Whether this node serves nothing."""
        return self._identity.role is Role.OBSERVER

    def told_off(self, code: str) -> None:
        """A peer refused a call because of our certificate."""
        self.gate.told_off(code)

    def connection_up(self, connection: Connection, clock_s: float) -> None:
        """Judge the peer; choose between this connection and the one there is; wake who waits for it."""
        connection.verdict = self.gate.greeted(connection.proof, clock_s)
        if connection.verdict.standing is Standing.REVOKED:
            self._cut_off(connection)
            return
        if not connection.verdict.is_good:
            self._log_standing(connection)
        elif any(each.verdict.code in TIME_TELLS for each in self._connections):
            self.recheck()  # one more clock: it may be another time now
        peer = connection.peer
        old = self._preferred.get(peer)
        self.log.info("peer.connected", peer=node_id_short(peer), dialed=connection.dialed)
        if old is None or self._wins(connection, old):
            self._preferred[peer] = connection
            loser = old
        else:
            loser = connection
        if loser is not None:
            self._retire(loser)
        if self.draining:
            connection.goaway(DRAINING)
        dial = self._connections[connection]
        if dial is not None:
            self._connections[connection] = None
            dial.connection = self._preferred[peer]
            self._settle(dial, None)

    def connection_leaving(self, connection: Connection) -> None:
        """The peer said GOAWAY: new calls go elsewhere, unless the peer itself goes."""
        if not connection.is_peer_draining:
            self._replace_preferred(connection)

    def _wins(self, new: Connection, old: Connection) -> bool:
        """Whether `new` takes the place of `old`; the peer comes to the same result."""
        if not old.is_usable or new.epoch > old.epoch:
            return True
        if new.verdict.is_good != old.verdict.is_good:
            return new.verdict.is_good
        if new.epoch < old.epoch:
            return False
        if new.dialed == old.dialed:
            return True
        # Who dials while a connection has been up for so long has lost it; this is no simultaneous dial.
        assert old.up_since_s is not None
        if trio.current_time() - old.up_since_s > self.config.dial_deadline_s:
            return True
        dialer = self._me if new.dialed else new.peer
        return dialer == min(self._me, new.peer)

    async def _watch_standings(self) -> None:
        """A certificate ends while its connection lives."""
        while True:
            await trio.sleep(RECHECK_S)
            self.recheck()

    def _cut_off(self, connection: Connection) -> None:
        self._log_standing(connection)
        connection.cut(connection.verdict, self.gate.farewell(connection.peer))

    def _log_standing(self, connection: Connection) -> None:
        self.statistics.peers_restricted += 1
        self.log.warning(
            "peer.restricted",
            peer=node_id_short(connection.peer),
            code=connection.verdict.code,
            reason=connection.verdict.message,
        )

    def _retire(self, loser: Connection) -> None:
        winner = self._preferred[loser.peer]
        # Of two that the peer dialed, the peer chooses: it may have seen them come up in another order.
        if loser.dialed or winner.dialed or winner.epoch != loser.epoch:
            loser.goaway("duplicate")

    def _replace_preferred(self, gone: Connection) -> None:
        if self._preferred.get(gone.peer) is not gone:
            return
        del self._preferred[gone.peer]
        for other in self._connections:
            if other is not gone and other.peer == gone.peer and other.is_usable:
                self._preferred[gone.peer] = other

    async def _connected(
        self, node: NodeId | None, address: Address, *, for_calls: bool = True
    ) -> Connection:
        """The connection to a node (or to whoever is at the address), dialed if there is none."""
        connection = self._existing(node, address)
        if connection is not None and connection.lost is None:
            serves = connection.is_usable or connection.is_peer_draining
            if serves or not for_calls:
                return connection
        dial = self._dials.get((node, address)) or self._request(node, address)
        await dial.settled.wait()
        if dial.error is not None:
            raise type(dial.error)(dial.error.message, code=dial.error.code)
        assert dial.connection is not None
        return dial.connection

    def _existing(self, node: NodeId | None, address: Address) -> Connection | None:
        if node is not None:
            return self._preferred.get(node)
        found = (each for each in self._preferred.values() if each.address == address)
        return next(found, None)

    def _request(self, node: NodeId | None, address: Address) -> _Dial:
        dial = _Dial(node, address)
        try:
            if self._requests is None:
                raise PeerUnreachable("the peer streams of this node are not running")
            self._requests.send_nowait(dial)
        except trio.WouldBlock:
            raise PeerUnreachable(f"{DIALS_MAX} dials wait already") from None
        self._dials[node, address] = dial
        return dial

    def _settle(self, dial: _Dial, error: PeerUnreachable | None) -> None:
        self._dials.pop((dial.node, dial.address), None)
        dial.error = error
        dial.settled.set()
