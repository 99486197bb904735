"""One connection to a peer: a reader, a writer and a pulse around a `Mux`, and a task for each call.

All tasks of a connection live in `Connection.run`; when it returns or raises, every call on it has its
outcome. Commands are synchronous: they put bytes into the mux and wake the writer, which sends whatever
has gathered in one piece. So small frames of many calls share one TLS record and one system call.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from math import inf
from typing import Final, assert_never, cast

import trio

from meshd.core.bodies import BodyShare
from meshd.core.effects import Address
from meshd.core.frames import (
    Call,
    CallHeader,
    Cancel,
    Credit,
    End,
    Error,
    Goaway,
    Gossip,
    Pong,
    ProtocolError,
    Refuse,
    UnsendableError,
)
from meshd.core.mux import (
    CallExcess,
    CallState,
    ChunkReceived,
    Event,
    Mux,
    Up,
)
from meshd.shell.gate import OUR_FAULT, is_internal, may_ask
from meshd.shell.stream_calls import IncomingCall, OutgoingCall
from meshd.shell.stream_errors import PeerUnreachable, RemoteRefused, StreamLost
from meshd.shell.stream_owner import Owner
from meshd.trust.standing import GOOD, Verdict
from meshd.trust.tls import PeerProof
from meshd_cms.types import Epoch, NodeId, Value, node_id_short
from meshd_plugins.api import BadRequest, Failed, Operation, Refused

RECEIVE_BYTES: Final = 64 * 1024
SEND_BYTES: Final = 256 * 1024
"""Sent in one go: what is encrypted at once, and how often a long frame is seen to move."""
_PULSE_TOKEN: Final = 0
_FAREWELL_TOKEN: Final = 2**63 - 1
DOUBT_DEADLINE_S: Final = 2.0
"""For the answer of a peer that may no longer be reached; up: in-flight calls hang longer after a move."""
DRAINING: Final = "draining"
CLOSING: Final = "closing"


class Connection:
    """One authenticated connection. `run` it; everything else works while it runs."""

    def __init__(
        self,
        owner: Owner,
        stream: trio.SSLStream[trio.SocketStream],
        mux: Mux,
        proof: PeerProof,
        *,
        dialed: bool,
    ) -> None:
        self._owner = owner
        self._config = owner.config
        self._stream = stream
        self.mux = mux
        self.proof = proof
        self.peer: NodeId = proof.credential.node
        self.verdict: Verdict = GOOD  # the peer's standing, once up
        self.host = _host_of(stream)  # where it really leads, whatever is gossiped
        self.dialed = dialed
        self.address: Address | None = None  # that was dialed
        self.epoch = Epoch(0)  # the peer's, once up
        self.up_since_s: float | None = None
        self.lost: str | None = None  # why
        self.fault: ProtocolError | None = None
        self.is_tls_fault = False
        self._up_or_lost = trio.Event()
        self._farewell = False
        self._scope = trio.CancelScope()
        self._wake = trio.Event()
        self._room: trio.Event | None = None
        self._write_scope = trio.CancelScope(shield=True)
        self._heard_s = self._moved_s = trio.current_time()
        self._doubt = trio.CancelScope()
        self._token = 0
        self._pings: dict[int, trio.Event] = {}
        self._asked: dict[int, OutgoingCall] = {}
        self._served: dict[int, IncomingCall] = {}

    async def run(self) -> None:
        """Carry the connection until it ends; returns, whatever ended it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._pulse)
                    try:
                        await self._read(nursery)
                    finally:
                        self._lose("this node closes it")
        finally:
            with trio.move_on_after(self._config.close_deadline_s, shield=True):
                await self._close()

    # For the pool

    @property
    def is_usable(self) -> bool:
        """Whether a call may be opened on it."""
        return self.lost is None and self.mux.may_open

    @property
    def is_peer_draining(self) -> bool:
        """Whether the peer goes down and takes no more calls."""
        return self.mux.goaway_received == DRAINING

    def goaway(self, reason: str) -> None:
        """Open no more calls here, ask the peer for the same; it closes when those that run are done."""
        if self.lost is None:
            self.mux.goaway(reason)
            self._wake.set()

    def cut(self, verdict: Verdict, farewell: bytes | None) -> None:
        """Close it at once: the peer is out. `farewell` is a gossip message that proves it."""
        if farewell is not None:
            self.mux.gossip(farewell)
        self.mux.goaway(verdict.code)
        self._lose(verdict.message)

    def doubt(self) -> None:
        """The network under it changed: ask the peer now, and wait for `DOUBT_DEADLINE_S` only.

        TCP notices by itself neither that an address of ours is gone nor that one of the peer's is.
        """
        self._doubt.cancel()

    async def ping(self) -> float:
        """Round trip in seconds. Raises StreamLost."""
        began_s = trio.current_time()
        self._token += 1
        token, answered = self._token, trio.Event()
        self._pings[token] = answered
        try:
            self._raise_if_lost()
            self.mux.ping(token)
            self._wake.set()
            await answered.wait()
        finally:
            del self._pings[token]
        self._raise_if_lost()
        return trio.current_time() - began_s

    async def gossip(self, payload: bytes) -> None:
        """Queue a message. Raises StreamLost, FrameTooLarge."""
        await self.room()
        self._raise_if_lost()
        self.mux.gossip(payload)
        self._wake.set()
        self._owner.statistics.gossip_sent += 1

    # For calls

    def open(self, header: CallHeader, body: Value) -> OutgoingCall:
        """Send a call.

        Raises:
            StreamLost: the connection is gone; PeerUnreachable: it is being replaced.
            RemoteRefused: `busy`, too many calls are in flight on it, or `draining`.
            UnsendableError: the request cannot be sent.
        """
        self._raise_if_lost()
        if self.mux.asking >= self._config.mux.calls_max:
            name = node_id_short(self.peer)
            raise RemoteRefused("busy", f"{self.mux.asking} calls to {name} are in flight", None)
        if self.is_peer_draining:
            raise RemoteRefused(DRAINING, f"{node_id_short(self.peer)} is going down", None)
        if not self.mux.may_open:
            raise PeerUnreachable("the connection is being replaced")
        before_bytes = self.mux.outgoing_bytes
        call = OutgoingCall(self, self.mux.open(header, body))
        call.sent_bytes = self.mux.outgoing_bytes - before_bytes
        self._asked[call.id] = call
        self._wake.set()
        self._owner.statistics.calls_opened += 1
        return call

    def leave(self, call: OutgoingCall) -> None:
        """The caller is done with it: cancel it if the peer is not."""
        if self._asked.pop(call.id, None) is None or self.lost is not None:
            return
        if self.mux.state(call.id) is CallState.ASKING:
            self.mux.cancel(call.id, "the caller left")
            self._wake.set()

    def consumed(self, call: int, size: int) -> None:
        """A chunk was read: the mux may grant credit."""
        if self.lost is None:
            self.mux.consumed(call, size)
            if self.mux.outgoing_bytes:
                self._wake.set()

    async def room(self) -> None:
        """Wait while more is queued than the line takes.

        Yields only when it waits: what a handler sends in one go leaves in one piece, and what it may
        queue without yielding is bounded by `outgoing_bytes_high`.
        """
        while self.mux.outgoing_bytes > self._config.outgoing_bytes_high and self.lost is None:
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    def accept_chunks(self, call: int) -> None:
        """Let the peer, which called, send chunks along. Once a call."""
        self.mux.accept_chunks(call)
        self._wake.set()

    def send_chunk(self, call: int, value: Value) -> int:
        """Queue a part of an answer or of a request; `mux.may_send(call)` holds. Its bytes."""
        before_bytes = self.mux.outgoing_bytes
        self.mux.send_chunk(call, value)
        self._wake.set()
        return self.mux.outgoing_bytes - before_bytes

    # The tasks

    async def _write(self) -> None:
        """Send what gathers in the mux; after the loss, what is left, under `close_deadline_s`.

        Shielded: a write that is cut off leaves TLS in the middle of a record, and then not even the
        reason of the end could be told.
        """
        mux, statistics = self.mux, self._owner.statistics
        with self._write_scope:
            while True:
                if not mux.outgoing_bytes:
                    if self.lost is not None:
                        return
                    if mux.finished and not self._farewell:
                        # Its PONG proves that the peer has read every final frame: closing loses nothing.
                        self._farewell = True
                        mux.ping(_FAREWELL_TOKEN)
                        continue
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                data = mux.take_outgoing()
                if self._room is not None:
                    self._room.set()
                    self._room = None
                try:
                    for at in range(0, len(data), SEND_BYTES):
                        await self._stream.send_all(data[at : at + SEND_BYTES])
                        self._moved_s = trio.current_time()
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self._lose(f"sending failed: {error.__cause__ or error}")
                    return
                statistics.bytes_sent += len(data)

    async def _read(self, nursery: trio.Nursery) -> None:
        statistics = self._owner.statistics
        while self.lost is None:
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.is_tls_fault = isinstance(error.__cause__, ssl.SSLError)
                self._lose(f"receiving failed: {error.__cause__ or error}")
                return
            if not data:
                said = self.mux.goaway_received
                reason = "the peer closed it" if said is None else f"the peer said {said}"
                self._lose(reason, agreed=self.mux.finished)
                return
            self._heard_s = trio.current_time()
            statistics.bytes_received += len(data)
            self.mux.receive(bytes(data))
            try:
                while (event := self.mux.next_event()) is not None:
                    self._handle(event, nursery)
            except ProtocolError as error:
                statistics.protocol_errors += 1
                self.fault = error
                self._lose(f"the peer broke the protocol ({error.code}): {error.message}")
                return
            if self.mux.outgoing_bytes > self._config.outgoing_bytes_max:
                self._lose("the peer does not read what it asks for")
                return
            if self.mux.outgoing_bytes or self.mux.finished:
                self._wake.set()

    def _handle(self, event: Event, nursery: trio.Nursery) -> None:
        match event:
            case ChunkReceived(call):
                # Of a call that is served, the handler may have ended and its frame not be queued yet.
                taker = self._asked.get(call) or self._served.get(call)
                if taker is not None:
                    taker.deliver(event)
            case End(call, _, load) | Refuse(call, _, _, load) | Error(call, _, _, _, load):
                self._asked.pop(call).deliver(event)
                self._owner.load_heard(self.peer, load)
                if isinstance(event, Refuse) and event.code in OUR_FAULT:
                    self._owner.told_off(event.code)
            case Call():
                self._called(event, nursery)
            case Cancel(call):
                self._served[call].cancel()
            case Credit(call):
                sender = self._asked.get(call) or self._served.get(call)
                if sender is not None:
                    sender.credit()
            case CallExcess(call):
                self._refuse(call, "busy", f"{self.mux.serving - 1} calls of this peer are served")
            case Pong(token):
                self._ponged(token)
            case Gossip() if not self.verdict.is_good:
                self._owner.statistics.frames_ignored += 1
            case Gossip(payload):
                self._owner.statistics.gossip_received += 1
                self._owner.gossip_heard(self.peer, self.epoch, payload)
            case Goaway():
                self._owner.connection_leaving(self)
            case Up(hello):
                self.epoch = hello.epoch
                self.up_since_s = trio.current_time()
                self._up_or_lost.set()
                self._owner.connection_up(self, hello.clock_s)
            case _:
                assert_never(event)

    def _called(self, event: Call, nursery: trio.Nursery) -> None:
        if self._owner.draining:
            self._refuse(event.call, DRAINING, "this node is going down")
            return
        header = event.header
        if not may_ask(self.verdict, header.capability_id, header.operation):
            self._refuse(event.call, self.verdict.code, self.verdict.message)
            return
        if self._owner.is_observer and not is_internal(header.capability_id):
            self._refuse(event.call, "observer", "this node is an observer and serves nothing")
            return
        share = self._owner.bodies.share()
        if not share.grow(self.mux.size(event.call)):
            self._refuse(event.call, "busy", "too many large requests are in flight here")
            return
        call = IncomingCall(self, event.call, event.header, event.body)
        # A tunnel is there until one end leaves it, or the connection is gone.
        most_s = inf if header.operation == Operation.TUNNEL else self._config.call_deadline_max_s
        remaining_s = min(header.remaining_s, most_s)
        call.scope.deadline = trio.current_time() + remaining_s
        self._served[event.call] = call
        self._owner.statistics.calls_served += 1
        nursery.start_soon(self._serve, call, share)

    def _ponged(self, token: int) -> None:
        if token == _FAREWELL_TOKEN:
            self._lose("closed by agreement", agreed=True)
        elif token in self._pings:
            self._pings[token].set()

    async def _pulse(self) -> None:
        """Ask a silent peer whether it lives, and give it up if it does not answer."""
        config = self._config
        with trio.move_on_after(config.dial_deadline_s):
            await self._up_or_lost.wait()
        if self.up_since_s is None:
            self._lose(f"no HELLO within {config.dial_deadline_s:g} s")
            return
        while True:
            with self._doubt:
                await trio.sleep_until(self._heard_s + config.ping_interval_s)
            is_doubted, self._doubt = self._doubt.cancel_called, trio.CancelScope()
            asked_s = trio.current_time()
            if asked_s - self._heard_s < config.ping_interval_s and not is_doubted:
                continue
            self.mux.ping(_PULSE_TOKEN)
            self._wake.set()
            await trio.sleep(DOUBT_DEADLINE_S if is_doubted else config.ping_deadline_s)
            # The PING may stand behind a long frame on a slow line; while that moves, somebody takes it.
            if self._moved_s > asked_s and not is_doubted and self.mux.asking:
                continue
            if self._heard_s < asked_s:
                self._lose(f"the peer was silent for {trio.current_time() - self._heard_s:.0f} s")
                return

    async def _serve(self, call: IncomingCall, share: BodyShare) -> None:
        """Run the handler of one call and send its final frame."""
        try:
            with call.scope:
                trailer = await self._owner.handler(call)
                self._finish(lambda load: self.mux.end(call.id, trailer, load))
            if call.scope.cancelled_caught:
                code = "cancelled" if call.cancelled else "deadline_exceeded"
                self._fail(call.id, code, "the caller left" if call.cancelled else "out of time")
        except Exception as error:  # noqa: BLE001 - the handler's boundary: nothing of it may end the connection
            self._answer(call, _only_leaf(error))
        finally:
            self._wake.set()
            del self._served[call.id]
            share.release()

    def _answer(self, call: IncomingCall, error: Exception) -> None:
        match error:
            case Refused():
                self._refuse(call.id, error.code, error.message)
            case BadRequest():
                self._fail(call.id, error.code, error.message, callers_fault=True)
            case Failed():
                self._fail(call.id, error.code, error.message)
            case UnsendableError():
                self._fail(call.id, error.code, f"the answer cannot be sent: {error}")
            case _:
                self._owner.log.error(
                    "call.crashed",
                    request_id=call.header.request_id,
                    capability=call.header.capability_id,
                    peer=node_id_short(call.peer),
                    error=repr(error),
                    exc_info=error,
                )
                self._fail(call.id, "internal", f"{type(error).__name__} while serving the call")

    def _refuse(self, call: int, code: str, message: str) -> None:
        self._owner.statistics.calls_refused += 1
        self._finish(lambda load: self.mux.refuse(call, code, message, load))

    def _fail(self, call: int, code: str, message: str, *, callers_fault: bool = False) -> None:
        self._owner.statistics.calls_failed += 1
        self._finish(
            lambda load: self.mux.fail(call, code, message, load, callers_fault=callers_fault)
        )

    def _finish(self, send: Callable[[Value], None]) -> None:
        """Send a final frame with this node's load; without it rather than not at all."""
        try:
            send(self._owner.load())
        except UnsendableError:
            send(None)

    # The end

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise StreamLost(self.lost)

    def _lose(self, reason: str, *, agreed: bool = False) -> None:
        """Give every waiting task its outcome, at once, and end `run`."""
        if self.lost is not None:
            return
        self.lost = f"the connection to {node_id_short(self.peer)} is lost: {reason}"
        if self.up_since_s is not None and not agreed:
            self._owner.statistics.connections_lost += 1
        for call in self._asked.values():
            call.deliver(StreamLost(self.lost))
        self._asked.clear()
        for answered in self._pings.values():
            answered.set()
        if self._room is not None:
            self._room.set()
            self._room = None
        self._up_or_lost.set()
        self.mux.goaway(CLOSING)
        self._wake.set()
        self._write_scope.deadline = trio.current_time() + self._config.close_deadline_s
        self._scope.cancel()

    async def _close(self) -> None:
        try:
            if not self._write_scope.cancelled_caught:
                await self._stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer is gone already
        finally:
            await trio.aclose_forcefully(self._stream)


def _host_of(stream: trio.SSLStream[trio.SocketStream]) -> str:
    """The address at the other end; "" when it is gone already."""
    try:
        return str(stream.transport_stream.socket.getpeername()[0])
    except OSError:
        return ""


def _only_leaf(error: Exception) -> Exception:
    """What a handler raised through its nurseries, if it was one thing."""
    leaf: Exception = error
    while isinstance(leaf, ExceptionGroup):
        inner = cast("ExceptionGroup[Exception]", leaf).exceptions
        if len(inner) != 1:
            return error
        leaf = inner[0]
    return leaf
