"""The trio driver of the node core: one task, one UDP socket, one timer.

Invariant: only the task in `GossipDriver.run` calls the core. Others post commands into a bounded queue
and wake it. Before any timer fires, everything that has already arrived is taken in: a loop that was
busy or stopped for seconds would otherwise suspect peers whose acks lie in the socket's buffer.

A datagram that cannot be sent is counted and never charged to its destination: with IP_RECVERR the
kernel reports an ICMP refusal for one peer on the next send to *another*. The error queue, which names
the peer that refused, is drained instead and given to the core as evidence.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, assert_never

import trio
import trio.lowlevel

from meshd.core.allowance import Allowance
from meshd.core.effects import (
    Address,
    Effect,
    Knock,
    Lane,
    Notify,
    Send,
    StreamPing,
    Unwatch,
    Watch,
)
from meshd.core.events import Event
from meshd.core.frames import FrameTooLarge
from meshd.core.node import NodeCore
from meshd.core.sealing import Dropped, DropReason, Opener, Sealer
from meshd.shell.contacts import Contacts
from meshd.shell.stream_errors import StreamError
from meshd_cms import NodeId
from meshd_plugins.api import Logger

COMMANDS_MAX = 1_024
DATAGRAMS_PER_TURN_MAX = 512  # then timers and commands get their turn, whatever still arrives
TURNS_BEHIND_MAX = 8  # a flood may delay timers by this many turns, not stop them
STREAM_TASKS_MAX = 64
STREAM_DEADLINE_S = 5.0
UNSEALED_PER_S = 4.0  # sources of datagrams under unknown keys that are told of
RECEIVE_BUFFER_BYTES = 1 << 20
_IP_RECVERR = 11  # linux/in.h; Python 3.11's socket module lacks it
_IPV6_RECVERR = 25  # linux/in6.h
_REFUSALS = ((socket.IPPROTO_IP, _IP_RECVERR), (socket.IPPROTO_IPV6, _IPV6_RECVERR))
_MSG_ERRQUEUE = 0x2000
_ECONNREFUSED = 111

Command = Callable[[NodeCore, float], tuple[Effect, ...]]


class GossipStreams(Protocol):
    """The stream lane, as the driver needs it."""

    async def send_gossip(self, node: NodeId | None, address: Address, payload: bytes) -> None:
        """Deliver one message reliably; raises OSError, FrameTooLarge or a stream error."""
        ...

    async def ping(self, node: NodeId, address: Address) -> float:
        """Round trip in seconds; raises OSError or a stream error."""
        ...


class Witnessing(Protocol):
    """The witness streams, as the driver needs them."""

    def watch(self, node: NodeId, address: Address) -> None:
        """Have a stream with this node."""
        ...

    def unwatch(self, node: NodeId) -> None:
        """End the streams with this node, with a goodbye."""
        ...

    async def knock(self, address: Address) -> bool:
        """Whether the host of this address says that nobody listens there."""
        ...


@dataclass(slots=True)
class DriverStatistics:
    """What the driver did so far."""

    datagrams_received: int = 0
    datagrams_sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    send_errors: int = 0
    refusals: int = 0
    commands_lost: int = 0
    stream_tasks_lost: int = 0
    stream_failures: int = 0


def open_datagram_socket(host: str, port: int) -> socket.socket:
    """A bound, non-blocking UDP socket that reports refusals.

    Raises:
        OSError: the port is taken or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    raw = socket.socket(family, socket.SOCK_DGRAM)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        level, option = _REFUSALS[family == socket.AF_INET6]
        raw.setsockopt(level, option, 1)
        raw.bind((host, port))
    except OSError:
        raw.close()
        raise
    return raw


class GossipDriver:
    """Runs a `NodeCore` on real sockets.

    Args:
        core: not yet started; this driver starts and owns it.
        raw: from `open_datagram_socket`; closed when `run` ends.
        sealer: seals what we send.
        opener: opens and judges what we receive.
        streams: the stream lane.
        witness: the witness streams.
        notify: called in the driver's task for each event; it must not block.
        unsealed: called with the source of a datagram of our mesh that opens under none of our keys, a few
            times a second at most: one of us two may have missed a new key. It must not block.
        log: bound logger.
    """

    def __init__(
        self,
        core: NodeCore,
        raw: socket.socket,
        *,
        sealer: Sealer,
        opener: Opener,
        streams: GossipStreams,
        witness: Witnessing,
        notify: Callable[[Event], None],
        log: Logger,
        unsealed: Callable[[Address], None] = lambda _source: None,
    ) -> None:
        self.core = core
        self._raw = raw
        self._sealer = sealer
        self._opener = opener
        self._streams = streams
        self._witness = witness
        self._notify = notify
        self._unsealed = unsealed
        self._unsealed_left = Allowance(UNSEALED_PER_S, UNSEALED_PER_S)
        self._log = log
        self._commands: deque[Command] = deque()
        self._wake: trio.CancelScope | None = None
        self._stream_tasks = 0
        self._turns_behind = 0
        self._has_errors = False
        self.statistics = DriverStatistics()
        self.contacts = Contacts()

    def post(self, command: Command) -> bool:
        """Have the owning task run `command(core, now_s)`; False when the queue is full (counted)."""
        if len(self._commands) >= COMMANDS_MAX:
            self.statistics.commands_lost += 1
            return False
        self._commands.append(command)
        if self._wake is not None:
            self._wake.cancel()
        return True

    def stream_message(self, sender: NodeId, epoch: int, source: Address, payload: bytes) -> None:
        """A gossip message that came over an authenticated stream."""
        self.post(
            lambda core, now_s: core.receive(payload, sender, epoch, source, Lane.STREAM, now_s)
        )

    def watch_ended(self, node: NodeId, epoch: int, evident: bool) -> None:
        """A witness stream ended: see `NodeCore.watch_ended`."""
        self.post(lambda core, now_s: core.watch_ended(node, epoch, evident, now_s))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the core until cancelled."""
        with self._raw:
            async with trio.open_nursery() as nursery:
                self._execute(self.core.start(trio.current_time()), nursery)
                task_status.started()
                while True:
                    await self._until_woken(nursery)
                    self._turn(nursery)

    async def _until_woken(self, nursery: trio.Nursery) -> None:
        """Take in what arrives until a timer is due or a command was posted.

        One cancel scope serves many datagrams: to make one for each costs as much as to read it.
        """
        with trio.CancelScope(deadline=self.core.deadline_s()) as scope:
            self._wake = scope
            if self._commands:
                await trio.lowlevel.checkpoint()
            while not self._commands:
                await trio.lowlevel.wait_readable(self._raw)
                self._turn(nursery)
                due_s = self.core.deadline_s()
                if due_s != scope.deadline:
                    scope.deadline = due_s
        self._wake = None

    def _turn(self, nursery: trio.Nursery) -> None:
        drained = self._drain_socket(nursery)
        for _ in range(len(self._commands)):
            command = self._commands.popleft()
            self._execute(command(self.core, trio.current_time()), nursery)
        now_s = trio.current_time()
        self._turns_behind = 0 if drained else self._turns_behind + 1
        late = self._turns_behind >= TURNS_BEHIND_MAX
        if (drained or late) and self.core.deadline_s() <= now_s:
            self._turns_behind = 0
            self._execute(self.core.advance(now_s), nursery)

    def _drain_socket(self, nursery: trio.Nursery) -> bool:
        """Take in what has arrived; True when nothing is left, so that timers may fire."""
        if self._has_errors:
            self._drain_errors(nursery)
        for _ in range(DATAGRAMS_PER_TURN_MAX):
            try:
                datagram, source = self._raw.recvfrom(65_535)
            except BlockingIOError:
                return True
            except OSError:
                self._drain_errors(nursery)
                continue
            self.statistics.datagrams_received += 1
            self.statistics.bytes_received += len(datagram)
            now_s = trio.current_time()
            opened = self._opener.open(datagram, now_s)
            if isinstance(opened, Dropped):
                self._dropped(opened.reason, (source[0], source[1]), now_s)
                continue  # the opener counts it by reason
            if opened.is_old_epoch:
                told = self.core.old_epoch(
                    opened.sender, opened.epoch, (source[0], source[1]), now_s
                )
                self._execute(told, nursery)
                continue
            self.contacts.heard(opened.sender, now_s)
            effects = self.core.receive(
                opened.payload,
                opened.sender,
                opened.epoch,
                (source[0], source[1]),
                Lane.DATAGRAM,
                now_s,
            )
            self._execute(effects, nursery)
        return False

    def _dropped(self, reason: DropReason, source: Address, now_s: float) -> None:
        self.contacts.dropped(reason, source, now_s)
        if reason is DropReason.BAD_SEAL and self._unsealed_left.take(now_s):
            self._unsealed(source)

    def _drain_errors(self, nursery: trio.Nursery) -> None:
        self._has_errors = False
        for _ in range(DATAGRAMS_PER_TURN_MAX):
            try:
                _, ancillary, _, destination = self._raw.recvmsg(512, 512, _MSG_ERRQUEUE)
            except OSError:
                return
            for level, kind, data in ancillary:
                if (level, kind) in _REFUSALS and len(data) >= 4:
                    (code,) = struct.unpack_from("=I", data)  # sock_extended_err.ee_errno
                    if code == _ECONNREFUSED:
                        self.statistics.refusals += 1
                        address = (destination[0], destination[1])
                        now_s = trio.current_time()
                        self._execute(self.core.evidence_refused(address, now_s), nursery)

    def _execute(self, effects: tuple[Effect, ...], nursery: trio.Nursery) -> None:
        for effect in effects:
            match effect:
                case Send(lane=Lane.DATAGRAM):
                    self._send_datagram(effect)
                case Send():
                    self._spawn(nursery, partial(self._send, effect))
                case StreamPing():
                    self._spawn(nursery, partial(self._ping, effect))
                case Watch(node=node, to=address):
                    self._witness.watch(node, address)
                case Unwatch(node=node):
                    self._witness.unwatch(node)
                case Knock():
                    self._spawn(nursery, partial(self._knock, effect))
                case Notify(event=event):
                    self._notify(event)
                case _:
                    assert_never(effect)

    def _send_datagram(self, effect: Send) -> None:
        datagram = self._sealer.seal(effect.payload, effect.node)
        try:
            self._raw.sendto(datagram, effect.to)
        except OSError:
            self.statistics.send_errors += 1
            self._has_errors = True  # perhaps of another destination: the queue says whose
            return
        self.statistics.datagrams_sent += 1
        self.statistics.bytes_sent += len(datagram)

    def _spawn(self, nursery: trio.Nursery, work: Callable[[], Awaitable[None]]) -> None:
        if self._stream_tasks >= STREAM_TASKS_MAX:
            self.statistics.stream_tasks_lost += 1
            return
        self._stream_tasks += 1
        nursery.start_soon(self._on_stream, work)

    async def _on_stream(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            with trio.move_on_after(STREAM_DEADLINE_S):
                await work()
        except (OSError, StreamError, FrameTooLarge):  # the peer bounds what it takes in a frame
            self.statistics.stream_failures += 1
        finally:
            self._stream_tasks -= 1

    async def _send(self, effect: Send) -> None:
        await self._streams.send_gossip(effect.node, effect.to, effect.payload)

    async def _ping(self, effect: StreamPing) -> None:
        answered = False
        try:
            await self._streams.ping(effect.node, effect.to)
            answered = True
        finally:
            self.post(lambda core, now_s: core.stream_pinged(effect.token, answered, now_s))

    async def _knock(self, effect: Knock) -> None:
        refused = False
        try:
            refused = await self._witness.knock(effect.to)
        finally:
            self.post(lambda core, now_s: core.knocked(effect.token, refused, now_s))
