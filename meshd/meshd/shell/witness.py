"""Witness streams: idle TCP connections whose end tells that a process is gone.

Invariant: a stream is *up* once both ends have said who they are, sealed with the mesh's key; only the end of
a stream that was up, without a goodbye, by EOF or a reset, is told as evidence. Everything else (a dial
that fails, a peer that is somebody else, a goodbye, a network that went away) is told as an end and no more.

The kernel closes the sockets of a process that is killed, so the other end hears of it within milliseconds.
Nothing travels on an idle stream. It shares the port of the TLS streams and is told from them by its
first byte: TLS begins with 0x16. It is not TLS itself because nothing is said on it but who is there, and
the seal of a datagram says that at a hundredth of the cost (decision 0018).

    dialer   -> 'W'  length (2 bytes)  sealed("meshd watch v2" + id of the acceptor + clock)
    acceptor -> 'W'  length (2 bytes)  sealed("meshd watch v2" + id of the dialer + clock)
    either   -> 'G'  goodbye: what comes now is no accident

The clock is what the speaker's wall clock shows, seconds since 1970 as a 64-bit float. It is believed of the
acceptor only: any member could dial in many names, and so outvote the clocks of the mesh; to answer at the
addresses of many it would have to have them.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import trio

from meshd.core.effects import Address
from meshd.core.frames import CLOCK_MAX_S
from meshd.core.sealing import Dropped, Opener, Sealer
from meshd.shell.gate import Gate
from meshd_cms.types import Epoch, NodeId

WITNESS_BYTE: Final = b"W"
GOODBYE: Final = b"G"
STREAMS_MAX: Final = 128  # both ways; a node has a handful
DIALS_MAX: Final = 64  # waiting to be begun
DEADLINE_S: Final = 3.0  # to connect, and again to say who is there
KNOCK_DEADLINE_S: Final = 1.0
GOODBYE_DEADLINE_S: Final = 0.5
_HELLO: Final = b"meshd watch v2"
_CLOCK: Final = struct.Struct(">d")
_KEEPALIVE_S: Final = 120  # so that the end of a silent peer is found some day


@dataclass(slots=True)
class WitnessStatistics:
    """What the witness streams did so far."""

    up: int = 0  # now
    dialled: int = 0
    accepted: int = 0
    refused: int = 0  # somebody else, or no member, or one too many
    broken: int = 0  # ended without a goodbye
    knocks: int = 0  # by us


@dataclass(slots=True, eq=False)
class _Stream:
    node: NodeId
    epoch: Epoch
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    says_goodbye: bool = False


class _NoWitnessError(Exception):
    """The other end is not who was meant, or did not say who it is."""


class WitnessStreams:
    """All witness streams of this node.

    Args:
        me: this node.
        sealer: seals what we say of ourselves.
        opener: opens and judges what the other end says.
        ended: called with node, epoch and whether it is evidence; must not block.
        gate: who is out, and what time it is.
    """

    def __init__(
        self,
        me: NodeId,
        sealer: Sealer,
        opener: Opener,
        ended: Callable[[NodeId, int, bool], None],
        gate: Gate | None = None,
    ) -> None:
        self.statistics = WitnessStatistics()
        self._me = me
        self._sealer = sealer
        self._opener = opener
        self._ended = ended
        self._gate = Gate() if gate is None else gate
        self._streams: dict[_Stream, None] = {}
        self._send, self._requests = trio.open_memory_channel[tuple[NodeId, Address]](DIALS_MAX)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dial what is asked for, until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for node, address in self._requests:
                nursery.start_soon(self._dial, node, address)

    def watch(self, node: NodeId, address: Address) -> None:
        """Have a stream with this node; one that it dialled serves as well."""
        if any(stream.node == node for stream in self._streams):
            return
        try:
            self._send.send_nowait((node, address))
        except trio.WouldBlock:
            self._ended(node, 0, False)

    def unwatch(self, node: NodeId) -> None:
        """End the streams with this node, with a goodbye."""
        for stream in self._streams:
            if stream.node == node:
                stream.says_goodbye = True
                stream.scope.cancel()

    def cut(self, node: NodeId) -> None:
        """A node is out: end the streams with it without a word."""
        for stream in self._streams:
            if stream.node == node:
                stream.scope.cancel()

    def renew(self) -> None:
        """This node's epoch was raised: end all streams that said the old one."""
        for stream in self._streams:
            stream.says_goodbye = True
            stream.scope.cancel()

    async def knock(self, address: Address) -> bool:
        """Whether the host of this address says that nobody listens there; False when it says nothing."""
        self.statistics.knocks += 1
        with trio.move_on_after(KNOCK_DEADLINE_S):
            try:
                (await _connect(address)).close()
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
        return False

    async def accept(self, stream: trio.SocketStream) -> None:
        """Carry an accepted connection whose first byte is ours, to its end; closes it."""
        async with stream:
            try:
                with trio.fail_after(DEADLINE_S):
                    node, epoch, _ = await self._hear(stream)
                    await self._say(stream, node)
            except (_NoWitnessError, trio.TooSlowError, OSError, trio.BrokenResourceError):
                self.statistics.refused += 1
                return
            self.statistics.accepted += 1
            await self._carry(stream, _Stream(node, epoch))

    # -- inside -----------------------------------------------------------------------------------------

    async def _dial(self, node: NodeId, address: Address) -> None:
        try:
            with trio.fail_after(DEADLINE_S):
                stream = trio.SocketStream(await _connect(address))
        except (OSError, trio.TooSlowError):
            self._ended(node, 0, False)
            return
        async with stream:
            try:
                with trio.fail_after(DEADLINE_S):
                    await self._say(stream, node)
                    there, epoch, clock_s = await self._hear(stream)
                if there != node:
                    raise _NoWitnessError
                self._gate.heard_clock(node, clock_s)
            except (_NoWitnessError, trio.TooSlowError, OSError, trio.BrokenResourceError):
                self.statistics.refused += 1
                self._ended(node, 0, False)
                return
            self.statistics.dialled += 1
            await self._carry(stream, _Stream(node, epoch))

    async def _carry(self, stream: trio.SocketStream, one: _Stream) -> None:
        if len(self._streams) >= STREAMS_MAX:
            self.statistics.refused += 1
            one.says_goodbye = True
            one.scope.cancel()
        self._streams[one] = None
        self.statistics.up += 1
        evident = False
        try:
            with one.scope:
                evident = await _is_broken(stream)
        finally:
            del self._streams[one]
            self.statistics.up -= 1
            with trio.move_on_after(GOODBYE_DEADLINE_S, shield=True):
                if one.says_goodbye:
                    await _say_goodbye(stream)
        self.statistics.broken += evident
        self._ended(one.node, one.epoch, evident)

    async def _say(self, stream: trio.SocketStream, to: NodeId) -> None:
        sealed = self._sealer.seal(_HELLO + to + _CLOCK.pack(self._gate.wall_s()), to)
        await stream.send_all(WITNESS_BYTE + len(sealed).to_bytes(2, "big") + sealed)

    async def _hear(self, stream: trio.SocketStream) -> tuple[NodeId, Epoch, float]:
        """Who is at the other end, in which life, and its clock. Raises _NoWitnessError, or what trio raises."""
        head = await _exactly(stream, 3)
        if head[:1] != WITNESS_BYTE:
            raise _NoWitnessError
        opened = self._opener.open(await _exactly(stream, int.from_bytes(head[1:], "big")))
        hello = _HELLO + self._me
        if isinstance(opened, Dropped) or len(opened.payload) != len(hello) + _CLOCK.size:
            raise _NoWitnessError
        (clock_s,) = _CLOCK.unpack(opened.payload[-_CLOCK.size :])
        believable = 0.0 <= clock_s <= CLOCK_MAX_S  # not so for NaN either
        if not opened.payload.startswith(hello) or not believable:
            raise _NoWitnessError
        if self._gate.is_revoked(opened.sender):
            raise _NoWitnessError
        return opened.sender, opened.epoch, clock_s


async def first_byte(stream: trio.SocketStream) -> bytes:
    """The first byte that the peer sent, left where it is; empty when it closed without a word."""
    try:
        return await stream.socket.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""


async def _connect(address: Address) -> trio.socket.SocketType:
    """A TCP connection to an IP literal. Raises OSError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    raw = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await raw.connect(address)
    except BaseException:
        raw.close()
        raise
    return raw


async def _is_broken(stream: trio.SocketStream) -> bool:
    """Wait for the end; True when it came without a goodbye and by the hand of the other host."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    try:
        said = await stream.receive_some(1)
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        return isinstance(cause, OSError) and cause.errno == errno.ECONNRESET
    return not said


async def _say_goodbye(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(GOODBYE)


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        some = await stream.receive_some(count - len(received))
        if not some:
            raise _NoWitnessError
        received += some
    return bytes(received)
