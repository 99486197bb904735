"""What an attacker on the network has: every frame, and sockets on a host of its own.

with Wiretap() as switch:
    outside = Attacker(switch.add_host())
    ...
    assert not switch.capture().find(b"a secret")
"""

from __future__ import annotations

import base64
import socket
import ssl
import struct
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from tests.integration.support_namespaces import Host
from tests.integration.support_switch import Switch, in_namespace

from meshd.core.effects import Address

FRAMES_MAX: Final = 200_000
ANSWER_DEADLINE_S: Final = 15.0
MDNS_PORT: Final = 5_353
_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD
_TCP: Final = 6
_UDP: Final = 17
_ETHERNET_BYTES: Final = 14


@dataclass(frozen=True, slots=True)
class Packet:
    """What one frame carries over UDP or TCP."""

    frame: bytes
    is_udp: bool
    source: Address
    destination: Address
    sequence: int  # of TCP; 0 with UDP
    payload: bytes


def read_packet(frame: bytes) -> Packet | None:
    """What a frame carries; None: neither UDP nor TCP, or a fragment."""
    (kind,) = struct.unpack_from(">H", frame, 12)
    ip = frame[_ETHERNET_BYTES:]
    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    if kind == _IPV4:
        protocol, at = ip[9], (ip[0] & 0x0F) * 4
        source, destination = IPv4Address(ip[12:16]), IPv4Address(ip[16:20])
        end = int.from_bytes(ip[2:4], "big")
    elif kind == _IPV6:
        protocol, at = ip[6], 40
        source, destination = IPv6Address(ip[8:24]), IPv6Address(ip[24:40])
        end = 40 + int.from_bytes(ip[4:6], "big")
    else:
        return None
    if protocol not in (_UDP, _TCP):
        return None
    from_port, to_port, sequence = struct.unpack_from(">HHI", ip, at)
    header = 8 if protocol == _UDP else (ip[at + 12] >> 4) * 4
    return Packet(
        frame,
        protocol == _UDP,
        (str(source), from_port),
        (str(destination), to_port),
        0 if protocol == _UDP else sequence,
        ip[at + header : end],
    )


class Capture:
    """Frames, and what can be read in them."""

    def __init__(self, frames: Iterable[bytes]) -> None:
        self.frames = tuple(frames)
        self.packets = tuple(one for one in map(read_packet, self.frames) if one and one.payload)
        flows: dict[tuple[Address, Address], dict[int, bytes]] = {}
        for packet in self.packets:
            if not packet.is_udp:
                flow = flows.setdefault((packet.source, packet.destination), {})
                flow[packet.sequence] = packet.payload  # what was sent twice counts once
        self.flows = {
            ends: b"".join(payload for _, payload in sorted(parts.items()))
            for ends, parts in flows.items()
        }

    def datagrams(self, port: int) -> list[Packet]:
        """Those to a UDP port, each once, in order."""
        found = {
            one.frame: one for one in self.packets if one.is_udp and one.destination[1] == port
        }
        return list(found.values())

    def streams(self, port: int) -> list[bytes]:
        """What was sent over TCP to a port, connection by connection."""
        return [sent for (_, to), sent in self.flows.items() if to[1] == port]

    def find(self, needle: bytes) -> list[str]:
        """Where it is readable: in a frame, in a connection, or in a usual spelling of bytes as text."""
        forms = spellings(needle)
        found = [
            f"frame {number}: {form!r}"
            for number, frame in enumerate(self.frames)
            for form in forms
            if form in frame or form in frame.lower()
        ]
        return found + [
            f"from {ends[0]} to {ends[1]}: {form!r}"
            for ends, sent in self.flows.items()
            for form in forms
            if form in sent or form in sent.lower()
        ]

    def without(self, port: int) -> Capture:
        """The same without what goes to a UDP port."""
        away = {one.frame for one in self.datagrams(port)}
        return Capture(frame for frame in self.frames if frame not in away)


def spellings(needle: bytes) -> tuple[bytes, ...]:
    """A needle as it is, as hex, as base64 at each of the three offsets, and as UTF-16."""
    forms = [needle, needle.hex().encode()]
    for offset in range(3):
        packed = base64.b64encode(bytes(offset) + needle).rstrip(b"=")
        forms.append(packed[(offset * 8 + 5) // 6 : -1])  # the ends mix with what stands beside
    with suppress(UnicodeDecodeError):
        forms.append(needle.decode().encode("utf-16-le"))
    return tuple(dict.fromkeys(forms))


class Wiretap(Switch):
    """A switch that keeps what passes, and that puts frames on the wire that nobody sent."""

    def __init__(self) -> None:
        super().__init__()
        self._frames: list[bytes] = []

    def capture(self, since: int = 0) -> Capture:
        """What has passed so far; of it, what came after the first `since` frames."""
        with self._changing():
            return Capture(self._frames[since:])

    @property
    def frames_seen(self) -> int:
        """How many were kept so far: where a later capture may begin."""
        with self._changing():
            return len(self._frames)

    def replay(self, frames: Iterable[bytes], to: Host) -> None:
        """Give a host frames as they are, whoever they seem to come from."""
        with self._changing():
            for frame in frames:
                self._deliver(0, to.number, frame)

    def _send(self, source: int, destination: int, frame: bytes) -> None:
        if len(self._frames) < FRAMES_MAX:
            self._frames.append(frame)
        super()._send(source, destination, frame)


class Attacker:
    """A host on the network that has no keys; its sockets are closed by `close`."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._open: list[socket.socket] = []

    def close(self) -> None:
        for one in self._open:
            one.close()

    def datagrams(self, port: int = 0) -> socket.socket:
        """A UDP socket on this host."""
        return self._made(lambda: _bound(socket.SOCK_DGRAM, (self.host.address, port)))

    def listen(self, port: int) -> socket.socket:
        """A TCP socket that takes connections."""

        def made() -> socket.socket:
            listening = _bound(socket.SOCK_STREAM, (self.host.address, port))
            listening.listen()
            return listening

        return self._made(made)

    def throw(self, datagrams: Iterable[bytes], to: Address) -> None:
        """Send datagrams from a port of its own."""
        sender = self.datagrams()
        for datagram in datagrams:
            sender.sendto(datagram, to)

    def dial(self, address: Address) -> socket.socket:
        """A connection. Raises OSError when there is none."""

        def connect() -> socket.socket | OSError:
            try:
                return socket.create_connection(address, timeout=ANSWER_DEADLINE_S)
            except OSError as error:
                return error

        made = in_namespace(self.host, connect)
        if isinstance(made, OSError):
            raise made
        self._open.append(made)
        return made

    def told(self, address: Address, said: bytes) -> bytes:
        """Everything a server answers to some bytes, until it closes."""
        connection = self.dial(address)
        with suppress(OSError):
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
        return heard(connection)

    def told_in_tls(self, address: Address, context: ssl.SSLContext, said: bytes = b"") -> bytes:
        """The same inside TLS. Raises ssl.SSLError when there is no session.

        A client of TLS 1.3 believes that it has a session before the server has looked at its certificate:
        what it is told after that decides.
        """
        with context.wrap_socket(self.dial(address)) as secured:
            if said:
                secured.sendall(said)
            return secured.recv(65_536)

    def _made(self, make: Callable[[], socket.socket]) -> socket.socket:
        made = in_namespace(self.host, make)
        self._open.append(made)
        return made


@contextmanager
def attacking(host: Host) -> Generator[Attacker]:
    """An attacker whose sockets are closed at the end."""
    attacker = Attacker(host)
    try:
        yield attacker
    finally:
        attacker.close()


def heard(connection: socket.socket) -> bytes:
    """What comes until the other end closes, in whatever way."""
    parts: list[bytes] = []
    with suppress(ConnectionError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def _bound(kind: socket.SocketKind, address: Address) -> socket.socket:
    made = socket.socket(socket.AF_INET, kind)
    made.bind(address)
    made.settimeout(ANSWER_DEADLINE_S)
    return made
