"""The switch itself: what a frame meets on its way. Sockets on two or three hosts, no daemons."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest
from tests.integration.support_namespaces import Host, why_unavailable
from tests.integration.support_switch import Quality, Switch, in_namespace

pytestmark = pytest.mark.namespaces

PORT = 4_000
GROUP = "239.255.77.78"
HEARD_DEADLINE_S = 10.0
SENT = 200


@pytest.fixture(scope="module")
def _allowed() -> None:
    reason = why_unavailable(Switch)
    if reason is not None:
        pytest.skip(reason)


class Wire:
    """Two hosts, and a UDP socket on each; what arrives is read until the mark that is sent last."""

    def __init__(self, switch: Switch, stack: ExitStack) -> None:
        self.switch = switch
        self.one, self.two = switch.add_host(), switch.add_host()
        self.sockets = {
            host: stack.enter_context(in_namespace(host, partial(datagram_socket, host)))
            for host in (self.one, self.two)
        }
        self.heard(self.one, self.two)  # each knows where the other is
        self.heard(self.two, self.one)

    def send(self, source: Host, destination: Host, *texts: bytes) -> None:
        for text in texts:
            self.sockets[source].sendto(text, (destination.address, PORT))

    def heard(self, source: Host, destination: Host) -> list[bytes]:
        """All that came by now; the path must be a good one again."""
        self.send(source, destination, b"mark")
        texts: list[bytes] = []
        while (text := self.sockets[destination].recv(100)) != b"mark":
            texts.append(text)
        return texts


def datagram_socket(host: Host) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    made.bind(("", PORT))
    made.settimeout(HEARD_DEADLINE_S)
    group = socket.inet_aton(GROUP) + socket.inet_aton(host.address)
    made.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    made.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host.address))
    made.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
    return made


@pytest.fixture
def wire(_allowed: None) -> Iterator[Wire]:
    with Switch() as switch, ExitStack() as stack:
        yield Wire(switch, stack)


def numbered() -> list[bytes]:
    return [struct.pack(">H", number) for number in range(SENT)]


def test_a_perfect_path_keeps_the_order_and_loses_nothing(wire: Wire) -> None:
    wire.send(wire.one, wire.two, *numbered())
    assert wire.heard(wire.one, wire.two) == numbered()


def test_one_direction_is_cut_and_the_other_is_not(wire: Wire) -> None:
    wire.switch.cut_one_way(wire.one, wire.two)
    wire.send(wire.one, wire.two, b"there")
    wire.send(wire.two, wire.one, b"back")
    assert wire.heard(wire.two, wire.one) == [b"back"]
    wire.switch.repair()
    assert wire.heard(wire.one, wire.two) == []


def test_loss_and_duplication_are_shares_of_the_frames(wire: Wire) -> None:
    wire.switch.set_path(wire.one, wire.two, Quality(loss=0.25))
    wire.send(wire.one, wire.two, *numbered())
    wire.send(wire.two, wire.one, *numbered())
    assert wire.heard(wire.two, wire.one) == numbered()
    wire.switch.repair()
    kept = wire.heard(wire.one, wire.two)
    assert kept == sorted(set(kept))
    assert 0.6 < len(kept) / SENT < 0.9
    wire.switch.set_path(wire.one, wire.two, Quality(duplication=0.5))
    wire.send(wire.one, wire.two, *numbered())
    wire.switch.repair()
    doubled = wire.heard(wire.one, wire.two)
    assert sorted(set(doubled)) == numbered()
    assert 1.3 < len(doubled) / SENT < 1.7


def test_a_delay_holds_frames_back_and_jitter_reorders_them(wire: Wire) -> None:
    wire.switch.set_path(wire.one, wire.two, Quality(delay_s=0.05, jitter_s=0.04))
    wire.send(wire.one, wire.two, *numbered())
    wire.switch.repair()
    assert wire.heard(wire.one, wire.two) == []  # the mark overtakes them all
    late = [wire.sockets[wire.two].recv(100) for _ in range(SENT)]
    assert late != numbered()
    assert sorted(late) == numbered()


def test_a_cut_stops_frames_that_are_under_way(wire: Wire) -> None:
    wire.switch.set_path(wire.one, wire.two, Quality(delay_s=0.3))
    wire.send(wire.one, wire.two, b"late")
    wire.send(wire.two, wire.one, b"on time")
    assert wire.heard(wire.two, wire.one) == [b"on time"]  # the switch has taken in both by now
    wire.switch.cut(wire.one)
    wire.switch.set_path(wire.two, wire.one, Quality(delay_s=0.4))
    assert wire.heard(wire.two, wire.one) == []  # later than the frame was due
    assert wire.switch.statistics.forbidden > 0
    wire.switch.repair()
    assert wire.heard(wire.one, wire.two) == []


def test_a_partition_leaves_each_side_whole(wire: Wire) -> None:
    third = wire.switch.add_host()
    with in_namespace(third, partial(datagram_socket, third)) as three:
        wire.switch.partition([wire.one, third], [wire.two])
        before = wire.switch.statistics.forbidden
        three.sendto(b"same side", (wire.one.address, PORT))
        assert wire.sockets[wire.one].recv(100) == b"same side"
        wire.send(wire.two, wire.one, b"other side")
        wire.switch.partition([wire.one, wire.two, third])
        assert wire.heard(wire.two, wire.one) == []
        assert wire.switch.statistics.forbidden > before


def test_a_firewall_drops_udp_and_passes_streams(wire: Wire) -> None:
    wire.switch.drop_udp(wire.two)
    wire.send(wire.one, wire.two, b"datagram")
    with ExitStack() as stack:
        listener = in_namespace(wire.two, lambda: socket.create_server(("", PORT)))
        stack.enter_context(listener)
        where = (wire.two.address, PORT)
        caller = in_namespace(
            wire.one, lambda: socket.create_connection(where, timeout=HEARD_DEADLINE_S)
        )
        stack.enter_context(caller)
        accepted = stack.enter_context(listener.accept()[0])
        caller.sendall(b"stream")
        assert accepted.recv(100) == b"stream"
    wire.switch.repair()
    assert wire.heard(wire.one, wire.two) == []


def test_multicast_reaches_every_other_port(wire: Wire) -> None:
    third = wire.switch.add_host()
    with in_namespace(third, partial(datagram_socket, third)) as three:
        wire.sockets[wire.one].sendto(b"all", (GROUP, PORT))
        assert three.recv(100) == b"all"
        assert wire.sockets[wire.two].recv(100) == b"all"


def test_an_interface_goes_and_comes_back_with_its_addresses(wire: Wire) -> None:
    wire.switch.remove_interface(wire.two)
    assert in_namespace(wire.two, socket.if_nameindex) == [(1, "lo")]
    wire.switch.plug_in(wire.two)
    wire.send(wire.one, wire.two, b"again")
    assert wire.heard(wire.one, wire.two) == [b"again"]
