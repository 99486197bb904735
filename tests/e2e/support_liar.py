"""A member by hand: true keys of the mesh, real sealing, and nothing that holds it to the truth."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support_daemons import HOST, Daemon, free_port

from meshd.core.effects import Address
from meshd.core.membership import MemberState, Update
from meshd.core.sealing import Opened, Opener, Sealer
from meshd.core.wire import (
    Ack,
    Claim,
    Heartbeat,
    Message,
    Ping,
    Record,
    View,
    decode,
    encode,
    payload_of,
)
from meshd.trust.identity import Identity, load_identity
from meshd_cms.errors import CodecError
from meshd_cms.store import Store
from meshd_cms.types import Delta, Epoch, NodeId, StoreConfig, Version

RECORDED_MAX = 2_000


class Liar:
    """Answers pings, so that it is a member, and keeps what it hears.

    Args:
        state: the state folder of an enrolled node that no daemon runs for.
        targets: the daemons of the mesh.
    """

    def __init__(self, state: Path, targets: Sequence[Daemon]) -> None:
        self.identity: Identity = load_identity(state)
        self.me: NodeId = self.identity.node_id
        self.address: Address = (HOST, free_port())
        self.targets: list[Address] = [(HOST, daemon.port) for daemon in targets]
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
        self._sealer = Sealer(identity.datagram_key, identity.mesh_id, self.me, self.epoch)
        self._opener = Opener([identity.datagram_key], identity.mesh_id, self.me)
        self._sealing = threading.Lock()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(0.1)
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
            datagram = self._sealer.seal(payload)
        self.throw(target, datagram)

    def throw(self, target: Address, datagram: bytes) -> None:
        """Send bytes as they are."""
        try:
            self._socket.sendto(datagram, target)
        except OSError:  # a full buffer: lies may be lost like the truth
            return
        self.sent_bytes += len(datagram)

    def lie(self, make: Callable[[int], list[Message]], count: int, per_s: float) -> None:
        """Say `make(number)` to every daemon, for that many numbers, at that pace."""
        began_s = time.monotonic()
        for number in range(count):
            messages = make(number)
            for target in self.targets:
                if messages:
                    self.say(target, messages)
            self._ended.wait(max(0.0, began_s + (number + 1) / per_s - time.monotonic()))

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
