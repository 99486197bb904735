"""The two ends of one call, as their users see them."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from meshd.core.bodies import HELD_BYTES_MAX
from meshd.core.frames import CallHeader, End, Error, Refuse, UnsendableError
from meshd.core.mux import CallState, ChunkReceived, MuxConfig
from meshd.shell.stream_errors import RemoteFailed, RemoteRefused, StreamLost
from meshd.trust.tls import PeerProof
from meshd_cms.types import NodeId, Value

if TYPE_CHECKING:
    from meshd.shell.stream_connection import Connection

OUTGOING_BYTES_MAX: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """Bounds and deadlines of the peer streams. Seconds, unless it says bytes."""

    mux: MuxConfig = field(default_factory=MuxConfig)
    connections_max: int = 256  # more are closed at once; larger: more peers, ~100 KiB each
    handshakes_max: int = 32  # connections that have not yet shown who they are
    dial_deadline_s: float = 5.0  # TCP, TLS and HELLO together, dialing or accepting
    ping_interval_s: float = 15.0  # silence after which the peer is asked whether it lives
    ping_deadline_s: float = 5.0  # silence after that which counts as a hung peer
    close_deadline_s: float = 1.0  # for the last bytes and TLS's goodbye
    call_deadline_max_s: float = 3600.0  # a caller's `remaining_s` is cut to this
    outgoing_bytes_high: int = 256 * 1024  # above it, senders wait for the writer
    outgoing_bytes_max: int = OUTGOING_BYTES_MAX
    """Above it, the peer does not read: it is cut off. Above `outgoing_bytes_high` and a frame."""
    bodies_bytes_max: int = HELD_BYTES_MAX  # of requests that are served, of all peers together


_Outcome: TypeAlias = End | Refuse | Error | StreamLost


class OutgoingCall:
    """A call of ours in flight.

    `trailer` and `load` are set once `receive` gave None; before, they are None. `sent_bytes` is what the
    request took on the line, with all that was sent along.
    """

    __slots__ = (
        "_connection",
        "_credited",
        "_inbox",
        "_outbox",
        "_outcome",
        "host",
        "id",
        "load",
        "peer",
        "sent_bytes",
        "trailer",
    )

    def __init__(self, connection: Connection, call: int) -> None:
        self._connection = connection
        # Unbounded on purpose: the credit of the call bounds what a peer may put in it.
        self._inbox, self._outbox = trio.open_memory_channel[ChunkReceived | _Outcome](math.inf)
        self._outcome: _Outcome | None = None
        self._credited: trio.Event | None = None
        self.id = call
        self.peer: NodeId = connection.peer
        self.host: str = connection.host  # where it really goes
        self.sent_bytes = 0
        self.trailer: Value = None
        self.load: Value = None

    async def receive(self) -> Value | None:
        """The next part of the answer; None after the last one of a complete answer.

        How a call ended is told each time: one that failed never looks complete.

        Raises:
            RemoteRefused: the peer did not take it.
            RemoteFailed: it broke there.
            StreamLost: the connection broke.
        """
        while self._outcome is None:
            event = await self._outbox.receive()
            if not isinstance(event, ChunkReceived):
                self._outcome = event
                break
            self._connection.consumed(event.call, event.size)
            if event.value is not None:  # None says "complete" here, so no chunk may
                return event.value
        else:
            await trio.lowlevel.checkpoint()
        match self._outcome:
            case End(_, trailer, load):
                self.trailer, self.load = trailer, load
                return None
            case Refuse(_, code, message, load):
                raise RemoteRefused(code, message, load)
            case Error(_, code, message, callers_fault, load):
                raise RemoteFailed(code, message, load, callers_fault=callers_fault)
            case StreamLost(message=message):
                raise StreamLost(message)

    async def send(self, value: Value) -> bool:
        """Send something along with the request; waits until the peer has asked for more, and the line takes it.

        False when the call has ended meanwhile: `receive` says how, once all that came before was read.

        Raises:
            UnsendableError: too large for a frame or not data; the call can go on.
        """
        connection = self._connection
        await connection.room()
        while not connection.mux.may_send(self.id):
            if connection.lost is not None or connection.mux.state(self.id) is not CallState.ASKING:
                return False
            self._credited = trio.Event()
            await self._credited.wait()
            await connection.room()
        if connection.lost is not None:
            return False
        self.sent_bytes += connection.send_chunk(self.id, value)
        return True

    def abandon(self, reason: str) -> None:
        """End it from elsewhere: whoever uses it is told the reason, once what came was read."""
        self._connection.leave(self)
        self.deliver(StreamLost(reason))

    def deliver(self, outcome: ChunkReceived | _Outcome) -> None:
        """Called by the connection: something came, or the connection is gone."""
        self._inbox.send_nowait(outcome)
        if not isinstance(outcome, ChunkReceived):
            self.credit()  # whoever waits for it learns that there will be none

    def credit(self) -> None:
        """Called by the connection: the peer read something."""
        if self._credited is not None:
            self._credited.set()
            self._credited = None


class IncomingCall:
    """A call of a peer, as its handler sees it."""

    __slots__ = (
        "_connection",
        "_credited",
        "_inbox",
        "_outbox",
        "body",
        "cancelled",
        "header",
        "host",
        "id",
        "peer",
        "proof",
        "scope",
        "sent_bytes",
    )

    def __init__(self, connection: Connection, call: int, header: CallHeader, body: Value) -> None:
        self._connection = connection
        self._credited: trio.Event | None = None
        self._inbox: trio.MemorySendChannel[ChunkReceived] | None = None
        self._outbox: trio.MemoryReceiveChannel[ChunkReceived] | None = None
        self.id = call
        self.header = header
        self.body = body
        self.peer: NodeId = connection.peer
        self.proof: PeerProof = connection.proof
        self.host: str = connection.host  # the address that it came from
        self.sent_bytes = 0  # of the answer so far
        self.scope = trio.CancelScope()
        self.cancelled = False  # by the peer

    async def send(self, value: Value) -> None:
        """Send a part of the answer; waits while the peer's reader or the line is behind.

        Raises:
            UnsendableError: too large for a frame, not data, or None; the call can go on.
        """
        if value is None:
            raise UnsendableError("None is no part of an answer")
        connection = self._connection
        await connection.room()
        while not connection.mux.may_send(self.id):
            if connection.mux.state(self.id) is not CallState.SERVING:
                await trio.sleep_forever()  # cancelled by the peer: this task is told right now
            self._credited = trio.Event()
            await self._credited.wait()
            await connection.room()
        self.sent_bytes += connection.send_chunk(self.id, value)

    async def receive(self) -> Value:
        """What the caller sends along next; before the first time it may send nothing. For one task."""
        if self._outbox is None:
            # Unbounded on purpose: the credit that is granted bounds what a peer may put in it.
            self._inbox, self._outbox = trio.open_memory_channel[ChunkReceived](math.inf)
            self._connection.accept_chunks(self.id)
        event = await self._outbox.receive()
        self._connection.consumed(event.call, event.size)
        return event.value

    def deliver(self, event: ChunkReceived) -> None:
        """Called by the connection: the caller sent something along."""
        assert self._inbox is not None, "it has no credit before `receive`"
        self._inbox.send_nowait(event)

    def cancel(self) -> None:
        """Called by the connection: the peer does not want it any more."""
        self.cancelled = True
        self.scope.cancel()

    def credit(self) -> None:
        """Called by the connection: the peer read something."""
        if self._credited is not None:
            self._credited.set()
            self._credited = None


Handler: TypeAlias = Callable[[IncomingCall], Awaitable[Value]]
"""Serves one call; what it returns is the trailer of END."""
