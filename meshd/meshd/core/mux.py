"""The stream multiplexer: bytes in, events out; commands in, bytes out. Pure, in the manner of h11.

Invariant: every call that is opened ends with exactly one final frame of the callee (END, REFUSE or
ERROR), also after CANCEL, or with the connection. So both ends agree, in order, on which calls live,
and a frame for a call that is not in the table is the peer's fault, but for those of a caller that may
cross a final frame on the way: CANCEL, CREDIT and CHUNK.

Flow control: an end may send a CHUNK while its credit for the call is above zero; the frame's bytes are
then taken off, so at most `window_bytes` and one frame are under way unread. The other end grants back
what its reader consumed, in steps of half a window. The callee has a window of credit when the call
begins. The caller has none: most calls are one request, and only a callee that grants a window
(`accept_chunks`) is sent more.

`TRANSITIONS` is the whole state machine of a call. What a peer does outside it raises `ProtocolError`
from `next_event` and ends the connection; what we do outside it raises `MuxMisuse`: a bug.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from meshd.core.frame_codec import LENGTH_BYTES, decode, encode
from meshd.core.frames import (
    FRAME_BYTES_MAX,
    Call,
    CallHeader,
    Cancel,
    Chunk,
    Credit,
    End,
    Error,
    Fault,
    Frame,
    FrameType,
    Goaway,
    Gossip,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    Refuse,
)
from meshd_cms.types import Epoch, MeshId, NodeId, Value

ALONE_BYTES: Final = 256 * 1024
"""A longer frame is not joined with others to be sent."""
ACKNOWLEDGED: Final = "acknowledged"
"""The reason of a GOAWAY that only answers the peer's."""


class MuxMisuse(Exception):
    """Our own bug: a command that the state does not allow. State: nothing was sent."""


@dataclass(frozen=True, slots=True)
class MuxConfig:
    """What this end takes on one connection; HELLO tells the peer."""

    frame_bytes_max: int = FRAME_BYTES_MAX  # larger: larger bodies, more memory a connection
    window_bytes: int = (
        256 * 1024
    )  # unread CHUNK bytes a call; larger: more memory, faster far links
    calls_max: int = 256  # calls of the peer served at once; above it they are refused as `busy`


class Phase(Enum):
    """The life of a connection."""

    GREETING = "greeting"  # the peer's HELLO has not come
    UP = "up"
    FAILED = "failed"  # the peer broke the protocol


class CallState(Enum):
    """Where a call stands, as this end sees it."""

    ASKING = "asking"  # we called; chunks and a final frame come
    ABANDONED = "abandoned"  # we called and cancelled; all but the final frame is thrown away
    SERVING = "serving"  # the peer called; we owe a final frame
    STOPPING = "stopping"  # the peer called and cancelled; we owe a final frame
    ENDED = "ended"  # leaves the table


class _Way(Enum):
    SENT = "sent"
    RECEIVED = "received"


_S, _R = _Way.SENT, _Way.RECEIVED
_A, _B, _V, _P, _E = (
    CallState.ASKING,
    CallState.ABANDONED,
    CallState.SERVING,
    CallState.STOPPING,
    CallState.ENDED,
)
TRANSITIONS: Final[Mapping[tuple[CallState, _Way, FrameType], CallState]] = {
    # the caller's end
    (_A, _R, FrameType.CHUNK): _A,
    (_A, _S, FrameType.CREDIT): _A,
    (_A, _S, FrameType.CHUNK): _A,
    (_A, _R, FrameType.CREDIT): _A,
    (_A, _R, FrameType.END): _E,
    (_A, _R, FrameType.REFUSE): _E,
    (_A, _R, FrameType.ERROR): _E,
    (_A, _S, FrameType.CANCEL): _B,
    (_B, _R, FrameType.CHUNK): _B,  # sent before the CANCEL arrived
    (_B, _R, FrameType.CREDIT): _B,  # likewise
    (_B, _R, FrameType.END): _E,
    (_B, _R, FrameType.REFUSE): _E,
    (_B, _R, FrameType.ERROR): _E,
    # the callee's end
    (_V, _S, FrameType.CHUNK): _V,
    (_V, _R, FrameType.CREDIT): _V,
    (_V, _R, FrameType.CHUNK): _V,
    (_V, _S, FrameType.CREDIT): _V,
    (_V, _S, FrameType.END): _E,
    (_V, _S, FrameType.REFUSE): _E,
    (_V, _S, FrameType.ERROR): _E,
    (_V, _R, FrameType.CANCEL): _P,
    (_P, _R, FrameType.CREDIT): _P,  # sent before the CANCEL
    (_P, _S, FrameType.END): _E,  # it was done by then
    (_P, _S, FrameType.REFUSE): _E,
    (_P, _S, FrameType.ERROR): _E,
}


@dataclass(slots=True)
class _Call:
    state: CallState
    sendable: int  # bytes of credit that we have
    receivable: int  # bytes of credit that the peer has
    consumed: int = 0  # bytes read here since the last CREDIT
    size: int = 0  # bytes of its CALL, where the peer called


@dataclass(frozen=True, slots=True)
class Up:
    """The peer said who it is: the stream may be used."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class CallExcess:
    """A call beyond `calls_max`: to be refused as `busy`."""

    call: int


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """A part of an answer, or of what a caller sends along; report it with `consumed` once it was read."""

    call: int
    value: Value
    size: int  # bytes it took off the window


Event: TypeAlias = (
    Up
    | Call
    | CallExcess
    | ChunkReceived
    | End
    | Refuse
    | Error
    | Cancel
    | Credit
    | Pong
    | Gossip
    | Goaway
)


class Mux:
    """One end of one connection.

    `peer` is the node the certificate named: HELLO must agree. The dialer's call ids are odd, the
    acceptor's even. HELLO is queued at once, with our wall clock (`clock_s`); take it with `take_outgoing`.
    """

    def __init__(
        self,
        config: MuxConfig,
        mesh: MeshId,
        me: NodeId,
        epoch: Epoch,
        peer: NodeId,
        *,
        dialer: bool,
        clock_s: float = 0.0,
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._peer = peer
        self._send_bytes_max = config.frame_bytes_max  # and no more than the peer takes, once known
        self._send_window_bytes = 0
        self._incoming = bytearray()
        self._outgoing: list[bytes] = []
        self._outgoing_bytes = 0
        self._calls: dict[int, _Call] = {}
        self._next_call = 1 if dialer else 2
        self._peers_parity = 0 if dialer else 1
        self._peers_last_call = 0
        self._serving = 0
        self.phase = Phase.GREETING
        self.goaway_sent = False
        self.goaway_received: str | None = None
        self._send(Hello(mesh, me, epoch, config.frame_bytes_max, config.window_bytes, clock_s))

    # What there is to know

    @property
    def outgoing_bytes(self) -> int:
        """Bytes that wait for `take_outgoing`."""
        return self._outgoing_bytes

    @property
    def serving(self) -> int:
        """Calls of the peer that have no final frame yet."""
        return self._serving

    @property
    def asking(self) -> int:
        """Our calls that have no final frame yet, abandoned ones included."""
        return len(self._calls) - self._serving

    @property
    def may_open(self) -> bool:
        """Whether `open` is allowed: up, and neither end said GOAWAY."""
        return self.phase is Phase.UP and not self.goaway_sent and self.goaway_received is None

    @property
    def finished(self) -> bool:
        """Both ends said GOAWAY, no call lives and nothing waits: the connection can be closed."""
        said = self.goaway_sent and self.goaway_received is not None
        return said and not self._calls and not self._outgoing

    def may_send(self, call: int) -> bool:
        """Whether the peer's credit for this call allows a chunk now."""
        entry = self._calls.get(call)
        if entry is None or entry.state not in (CallState.ASKING, CallState.SERVING):
            return False
        return entry.sendable > 0

    def state(self, call: int) -> CallState:
        """The state of a call; `ENDED` for one that is not in the table."""
        entry = self._calls.get(call)
        return entry.state if entry is not None else CallState.ENDED

    def size(self, call: int) -> int:
        """Bytes of the CALL of a call that the peer made; 0 for one that is not in the table."""
        entry = self._calls.get(call)
        return entry.size if entry is not None else 0

    # Bytes in

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer, in any pieces; then ask `next_event` until it gives None."""
        self._incoming += data

    def next_event(self) -> Event | None:
        """The next event, or None when more bytes are needed.

        Raises:
            ProtocolError: the peer's fault. Events before it were given out, nothing after it will
                be, and what is left to send ends with a GOAWAY that names the fault.
        """
        if self.phase is Phase.FAILED:
            return None
        try:
            while (size := self._next_size()) is not None:
                frame = self._next_frame(size)
                event = (
                    self._greet(frame)
                    if self.phase is Phase.GREETING
                    else self._accept(frame, size)
                )
                if event is not None:
                    return event
        except ProtocolError as error:
            self.phase = Phase.FAILED
            self._incoming.clear()
            self._send(Goaway(error.code))
            raise
        return None

    def _next_size(self) -> int | None:
        """Bytes of the next frame, if it is whole."""
        incoming = self._incoming
        if len(incoming) < LENGTH_BYTES:
            return None
        length = int.from_bytes(incoming[:LENGTH_BYTES], "big")
        if length > self._config.frame_bytes_max:
            most = self._config.frame_bytes_max
            raise ProtocolError(
                Fault.TOO_LARGE, f"a frame of {length} bytes; at most {most} are taken"
            )
        return length if len(incoming) >= LENGTH_BYTES + length else None

    def _next_frame(self, size: int) -> Frame:
        """Take it from what came. It is read where it is: a photo is not copied before."""
        end = LENGTH_BYTES + size
        with memoryview(self._incoming) as whole, whole[LENGTH_BYTES:end] as packed:
            frame = decode(packed)
        del self._incoming[:end]
        return frame

    def _greet(self, frame: Frame) -> Event:
        if not isinstance(frame, Hello):
            raise ProtocolError(Fault.UNEXPECTED_FRAME, f"{type(frame).__name__} before HELLO")
        if frame.mesh != self._mesh:
            raise ProtocolError(Fault.OTHER_MESH, "HELLO of another mesh")
        if frame.node != self._peer:
            raise ProtocolError(Fault.OTHER_NODE, "HELLO names another node than the certificate")
        self._send_bytes_max = min(self._send_bytes_max, frame.frame_bytes_max)
        self._send_window_bytes = frame.window_bytes
        self.phase = Phase.UP
        return Up(frame)

    def _accept(self, frame: Frame, size: int) -> Event | None:
        match frame:
            case Call():
                return self._call_received(frame, size)
            case Chunk(call, value):
                return self._chunk_received(call, value, size)
            case End(call):
                return self._final_received(frame, call, FrameType.END)
            case Refuse(call):
                return self._final_received(frame, call, FrameType.REFUSE)
            case Error(call):
                return self._final_received(frame, call, FrameType.ERROR)
            case Cancel(call):
                return (
                    frame if self._crossing_received(call, FrameType.CANCEL) is not None else None
                )
            case Credit(call, count):
                entry = self._crossing_received(call, FrameType.CREDIT)
                return self._credit(entry, frame, count) if entry is not None else None
            case Ping(token):
                self._send(Pong(token))
                return None
            case Goaway(reason):
                if self.goaway_received is not None:
                    return None
                self.goaway_received = reason
                self.goaway(ACKNOWLEDGED)
                return frame
            case Pong() | Gossip():
                return frame
            case Hello():
                raise ProtocolError(Fault.UNEXPECTED_FRAME, "a second HELLO")

    def _call_received(self, frame: Call, size: int) -> Event:
        call = frame.call
        if call % 2 != self._peers_parity or call <= self._peers_last_call:
            raise ProtocolError(Fault.BAD_CALL_ID, f"CALL {call} after {self._peers_last_call}")
        if self.goaway_received is not None:
            raise ProtocolError(Fault.UNEXPECTED_FRAME, "CALL after GOAWAY")
        if self._serving >= 2 * self._config.calls_max:  # it does not even wait for its refusals
            raise ProtocolError(Fault.UNEXPECTED_FRAME, f"{self._serving} calls at once")
        self._peers_last_call = call
        self._calls[call] = _Call(CallState.SERVING, self._send_window_bytes, 0, size=size)
        self._serving += 1
        return frame if self._serving <= self._config.calls_max else CallExcess(call)

    def _chunk_received(self, call: int, value: Value, size: int) -> Event | None:
        entry = self._crossing_received(call, FrameType.CHUNK)
        if entry is None:
            return None
        if entry.receivable <= 0:
            raise ProtocolError(Fault.CREDIT_EXCEEDED, f"CHUNK of call {call} without credit")
        entry.receivable -= size
        if entry.state is CallState.ABANDONED:
            return None
        return ChunkReceived(call, value, size)

    def _final_received(
        self, frame: End | Refuse | Error, call: int, kind: FrameType
    ) -> Event | None:
        entry = self._calls.get(call)
        abandoned = entry is not None and entry.state is CallState.ABANDONED
        self._step(call, _Way.RECEIVED, kind)
        return None if abandoned else frame

    def _crossing_received(self, call: int, kind: FrameType) -> _Call | None:
        """What a caller sends may cross our final frame: then the call was there, and is gone."""
        if (
            call not in self._calls
            and call % 2 == self._peers_parity
            and call <= self._peers_last_call
        ):
            return None
        return self._step(call, _Way.RECEIVED, kind)

    def _credit(self, entry: _Call, frame: Credit, count: int) -> Event | None:
        most = self._send_window_bytes
        if count == 0 or entry.sendable + count > most:
            raise ProtocolError(Fault.CREDIT_EXCEEDED, f"CREDIT beyond the window of {most} bytes")
        entry.sendable += count
        return None if entry.state is CallState.ABANDONED else frame

    def _step(self, call: int, way: _Way, kind: FrameType) -> _Call:
        """Move the call along `TRANSITIONS`."""
        entry = self._calls.get(call)
        state = entry.state if entry is not None else CallState.ENDED
        after = TRANSITIONS.get((state, way, kind))
        if entry is None or after is None:
            message = f"{kind.name} {way.value} for call {call}, which is {state.value}"
            if way is _Way.SENT:
                raise MuxMisuse(message)
            raise ProtocolError(Fault.UNEXPECTED_FRAME, message)
        entry.state = after
        if after is CallState.ENDED:
            del self._calls[call]
            if state in (CallState.SERVING, CallState.STOPPING):
                self._serving -= 1
        return entry

    # Commands

    def open(self, header: CallHeader, body: Value) -> int:
        """Send CALL; returns the call's id.

        Raises:
            UnsendableError: the request is too large or not data; no call was opened.
        """
        if not self.may_open:
            raise MuxMisuse("open after GOAWAY or before HELLO")
        call = self._next_call
        self._send(Call(call, header, body))
        self._next_call += 2
        self._calls[call] = _Call(CallState.ASKING, 0, self._config.window_bytes)
        return call

    def accept_chunks(self, call: int) -> None:
        """Let the caller send chunks along, a window of them ahead of the reader. Once a call."""
        self._grant(call, self._config.window_bytes)

    def consumed(self, call: int, size: int) -> None:
        """The reader took a chunk of `size` bytes: grant them again, in steps of half a window."""
        entry = self._calls.get(call)
        if entry is None or entry.state not in (CallState.ASKING, CallState.SERVING):
            return  # the rest of an answer that is complete already
        entry.consumed += size
        if entry.consumed * 2 >= self._config.window_bytes:
            self._grant(call, entry.consumed)
            entry.consumed = 0

    def _grant(self, call: int, count: int) -> None:
        entry = self._step(call, _Way.SENT, FrameType.CREDIT)
        self._send(Credit(call, count))
        entry.receivable += count

    def cancel(self, call: int, reason: str) -> None:
        """Send CANCEL for a call of ours; nothing of it will come out any more."""
        self._step(call, _Way.SENT, FrameType.CANCEL)
        self._send(Cancel(call, reason))

    def send_chunk(self, call: int, value: Value) -> None:
        """Send a part of an answer, or of what goes along with a call of ours. Allowed while `may_send(call)`.

        Raises:
            UnsendableError: too large or not data; nothing was sent.
        """
        if not self.may_send(call):
            raise MuxMisuse(f"chunk of call {call} without credit")
        size = self._send(Chunk(call, value))
        self._calls[call].sendable -= size

    def end(self, call: int, trailer: Value, load: Value) -> None:
        """Send END. Raises UnsendableError as `send_chunk`; the call then still needs a final frame."""
        self._finish(End(call, trailer, load), FrameType.END)

    def refuse(self, call: int, code: str, message: str, load: Value) -> None:
        """Send REFUSE. Raises UnsendableError as `end`."""
        self._finish(Refuse(call, code, message, load), FrameType.REFUSE)

    def fail(
        self, call: int, code: str, message: str, load: Value, *, callers_fault: bool = False
    ) -> None:
        """Send ERROR. Raises UnsendableError as `end`."""
        self._finish(Error(call, code, message, callers_fault, load), FrameType.ERROR)

    def _finish(self, frame: End | Refuse | Error, kind: FrameType) -> None:
        packed = encode(frame, self._send_bytes_max)
        self._step(frame.call, _Way.SENT, kind)
        self._queue(packed)

    def ping(self, token: int) -> None:
        """Send PING; a `Pong` with the token follows."""
        self._send(Ping(token))

    def gossip(self, payload: bytes) -> None:
        """Send a message of the node core. Raises FrameTooLarge."""
        self._send(Gossip(payload))

    def goaway(self, reason: str) -> None:
        """Open no more calls and ask the peer for the same; repeated calls do nothing."""
        if self.goaway_sent or self.phase is Phase.FAILED:
            return
        self.goaway_sent = True
        self._send(Goaway(reason))

    # Bytes out

    def take_outgoing(self) -> bytes:
        """What is to be sent next, in one piece; empty if nothing is.

        All that waits, or what stands before a frame of more than `ALONE_BYTES`, or such a frame: a photo is
        not copied only to go out together with others.
        """
        waiting = self._outgoing
        long = (at for at, packed in enumerate(waiting) if len(packed) > ALONE_BYTES)
        count = max(1, next(long, len(waiting)))
        data = b"".join(waiting[:count])  # of one alone: itself
        del waiting[:count]
        self._outgoing_bytes -= len(data)
        return data

    def _send(self, frame: Frame) -> int:
        packed = encode(frame, self._send_bytes_max)
        self._queue(packed)
        return len(packed) - LENGTH_BYTES

    def _queue(self, packed: bytes) -> None:
        self._outgoing.append(packed)
        self._outgoing_bytes += len(packed)
