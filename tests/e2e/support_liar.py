"""A member by hand: true keys of the mesh, real sealing, and nothing that holds it to the truth."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support_daemons import HOST, Daemon, free_port

from meshd.core.effects import Address
from meshd.core.frame_codec import decode as decode_frame
from meshd.core.frame_codec import encode as encode_frame
from meshd.core.frames import LENGTH_BYTES, Frame, Hello
from meshd.core.membership import MemberState, Update
from meshd.core.messages import Ack, Claim, Heartbeat, Message, Ping, Pull, Record, View
from meshd.core.newcomers import nothing_of
from meshd.core.sealing import Opened, Opener, Sealer
from meshd.core.wire import decode, encode, payload_of
from meshd.trust.identity import Identity, load_identity
from meshd_cms.errors import CodecError
from meshd_cms.store import Store
from meshd_cms.types import Delta, Epoch, NodeId, StoreConfig, Version

RECORDED_MAX = 2_000
ANSWER_DEADLINE_S = 15.0


def addresses(daemons: Sequence[Daemon]) -> list[Address]:
    """Where daemons on loopback are."""
    return [(HOST, daemon.port) for daemon in daemons]


def _speaking() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((HOST, free_port()))
    return made


def _connected(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=ANSWER_DEADLINE_S)


class Liar:
    """Answers pings, so that it is a member, and keeps what it hears.

    Args:
        state: the state folder of a node of the mesh that no daemon runs for.
        targets: where the daemons of the mesh are.
        speaking: a bound UDP socket, which is closed at the end; without one, a port of loopback.
        dial: makes a TCP connection.
    """

    def __init__(
        self,
        state: Path,
        targets: Sequence[Address],
        speaking: socket.socket | None = None,
        dial: Callable[[Address], socket.socket] = _connected,
    ) -> None:
        self.identity: Identity = load_identity(state)
        self.me: NodeId = self.identity.node_id
        self._socket = _speaking() if speaking is None else speaking
        self._socket.settimeout(0.1)
        self._dial = dial
        self.address: Address = self._socket.getsockname()
        self.targets: list[Address] = list(targets)
        self.epoch = Epoch(time.time_ns() // 1_000_000)
        self.incarnation = 0
        self.known: dict[NodeId, Update] = {}
        self.records: dict[NodeId, Delta] = {}
        self.heard: list[tuple[bytes, Address]] = []  # sealed datagrams, as they came
        self.sent_bytes = 0
        self.heard_bytes = 0
        identity = self.identity
        self.store = Store(
            StoreConfig(), identity.mesh_id, identity.signer, self.epoch, identity.verify
        )
        self.sealer = Sealer(identity.datagram_key, identity.mesh_id, self.me, self.epoch)
        self._opener = Opener([identity.datagram_key], identity.mesh_id, self.me)
        self._sealing = threading.Lock()
        self._ended = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._listener.start()
        self.introduce()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._listener.join()
        self._socket.close()

    # -- what it says -----------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Say who it is, and ask who is there."""
        low, high = NodeId(bytes(16)), NodeId(b"\xff" * 16)
        for target in self.targets:
            self.say(target, [self._own(), View(low, high, (), answer=False)])

    def _own(self) -> Claim:
        me, state = self.me, MemberState.ALIVE
        update = Update(me, state, self.epoch, self.incarnation, "liar", self.address, me)
        return Claim(update, merged=False)

    def say(self, target: Address, messages: Sequence[Message]) -> None:
        """Seal and send."""
        payload = payload_of([encode(message) for message in messages])
        with self._sealing:
            datagram = self.sealer.seal(payload)
        self.throw(target, datagram)

    def throw(self, target: Address, datagram: bytes) -> None:
        """Send bytes as they are."""
        try:
            self._socket.sendto(datagram, target)
        except OSError:  # a full buffer: lies may be lost like the truth
            return
        self.sent_bytes += len(datagram)

    def rest(self, seconds: float) -> None:
        """Keep a pace."""
        self._ended.wait(seconds)

    def lie(self, make: Callable[[int], list[Message]], count: int, per_s: float) -> None:
        """Say `make(number)` to every daemon, for that many numbers, at that pace."""
        began_s = time.monotonic()
        for number in range(count):
            messages = make(number)
            for target in self.targets:
                if messages:
                    self.say(target, messages)
            self.rest(max(0.0, began_s + (number + 1) / per_s - time.monotonic()))

    def about(
        self,
        one: Update,
        state: MemberState,
        accuser: NodeId,
        *,
        epoch: int | None = None,
        incarnation: int | None = None,
        evidence: bool = False,
    ) -> Claim:
        """Something about a node, by default in the life it lives."""
        update = Update(
            one.node,
            state,
            one.epoch if epoch is None else Epoch(epoch),
            one.incarnation if incarnation is None else incarnation,
            one.name,
            one.address,
            accuser,
            evidence,
        )
        return Claim(update, merged=False)

    def others(self) -> list[Update]:
        """What the honest nodes last said of each other."""
        return [update for node, update in sorted(self.known.items()) if node != self.me]

    def ask_for_records(self) -> None:
        """Pull what is held of everybody it knows."""
        wanted = tuple(nothing_of(update.node) for update in self.others())
        for target in self.targets:
            self.say(target, [Pull(wanted)])

    @contextmanager
    def stream(self, target: Address, *, hello: Hello | None = None) -> Generator[Stream]:
        """A stream to a daemon, up as far as this end can tell; `hello` in place of a true one."""
        context = self.identity.client_context
        with context.wrap_socket(self._dial(target)) as secured:
            opened = Stream(secured)
            opened.send(self.hello() if hello is None else hello)
            yield opened

    def hello(self) -> Hello:
        """What it would say if it was honest."""
        mesh, me = self.identity.mesh_id, self.me
        return Hello(mesh, me, self.epoch, clock_s=time.time())

    # -- what it hears ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                datagram, source = self._socket.recvfrom(65_535)
            except TimeoutError:
                continue
            except OSError:
                continue
            self.heard_bytes += len(datagram)
            if len(self.heard) < RECORDED_MAX:
                self.heard.append((datagram, (source[0], source[1])))
            opened = self._opener.open(datagram)
            if isinstance(opened, Opened):
                self._take(opened.payload, (source[0], source[1]))

    def _take(self, payload: bytes, source: Address) -> None:
        try:
            messages = decode(payload)
        except CodecError:
            return
        for message in messages:
            match message:
                case Ping(sequence) if message.is_for(self.me):
                    line = self.store.line(self.me)
                    version = Version(0) if line is None else line.max_version
                    self.say(source, [Ack(sequence, None, Heartbeat(None, version))])
                case Claim(update) if update.node == self.me:
                    if update.state is not MemberState.ALIVE:
                        self.incarnation = max(self.incarnation, update.incarnation + 1)
                        self.say(source, [self._own()])
                case Claim(update):
                    before = self.known.get(update.node)
                    alive = update.state is MemberState.ALIVE
                    if alive and (before is None or update.precedence > before.precedence):
                        self.known[update.node] = update
                case Record(delta):
                    self.records[delta.owner] = delta
                case View(node, other) if node == other == self.me:
                    self.say(source, [self._own()])
                case _:
                    pass


class Stream:
    """A peer stream, frame by frame."""

    def __init__(self, secured: ssl.SSLSocket) -> None:
        self._secured = secured

    def send(self, frame: Frame) -> None:
        """Say something. Raises OSError when the other end has closed."""
        self._secured.sendall(encode_frame(frame))

    def throw(self, data: bytes) -> None:
        """Say bytes as they are."""
        self._secured.sendall(data)

    def frames(self) -> Iterator[Frame]:
        """What comes, until the other end closes, in whatever way."""
        received = bytearray()
        while True:
            while len(received) >= LENGTH_BYTES:
                end = LENGTH_BYTES + int.from_bytes(received[:LENGTH_BYTES], "big")
                if len(received) < end:
                    break
                yield decode_frame(bytes(received[LENGTH_BYTES:end]))
                del received[:end]
            try:
                more = self._secured.recv(65_536)
            except (ConnectionError, ssl.SSLError):
                return
            if not more:
                return
            received += more
