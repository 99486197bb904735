"""The machine's network as facts: its interfaces, and whether multicast DNS gets out and back.

The test of an interface is real mDNS (RFC 6762): it joins 224.0.0.251 there, asks port 5353 for
`_meshd._tcp.local`, and listens for a moment. Hearing the own question needs the interface, the kernel's
route and the local firewall to be in order; hearing others needs the switch or access point too.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil
import trio

from meshd.health import InterfaceFact, MachineFacts, MulticastFact
from meshd.shell.addresses import ANY, ListenError, multicast_interfaces

MDNS_GROUP: Final = "224.0.0.251"
MDNS_PORT: Final = 5353
MDNS_TTL: Final = 255
LISTEN_S: Final = 1.5  # responders wait up to 0.12 s, and repeat an answer once a second at most
OTHERS_MAX: Final = 16
INTERFACES_MAX: Final = 16  # tested; a machine with more has virtual ones
_IP_MULTICAST_ALL: Final = 49  # linux/in.h: off, a socket hears only what it joined itself
_QUESTION: Final = (
    b"\x06_meshd\x04_tcp\x05local\x00\x00\x0c\x00\x01"  # PTR, IN, answered to the group
)


def interface_facts(for_mdns: Sequence[str]) -> tuple[InterfaceFact, ...]:
    """The interfaces that are up and have an IPv4 address, by name.

    Args:
        for_mdns: the addresses that discovery uses.
    """
    up, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    return tuple(
        InterfaceFact(
            name=name,
            address=each.address,
            network=_network(each.address, each.netmask),
            is_loopback=each.address.startswith("127."),
            is_bridge=Path("/sys/class/net", name, "bridge").exists(),
            has_multicast="multicast" in up[name].flags.split(","),
            for_mdns=each.address in for_mdns,
        )
        for name in sorted(addresses)
        if name in up and up[name].isup
        for each in addresses[name]
        if each.family == socket.AF_INET
    )


async def machine_facts(
    host: str, interfaces: Sequence[str], *, mdns: bool, listen_s: float = LISTEN_S
) -> MachineFacts:
    """Look at the interfaces and test multicast on those that discovery uses.

    Args:
        host: where the node listens.
        interfaces: of the configuration; an unknown one is tested nowhere, the daemon tells of it.
        mdns: whether discovery uses multicast at all; without it nothing is tested.
        listen_s: how long is listened; responders need about a second.
    """
    ipv4 = ":" not in host  # nothing is looked for, nor missed, where a node listens on IPv6
    mdns = mdns and ipv4
    try:
        used = multicast_interfaces(host, interfaces) if mdns else ()
    except ListenError:
        used = ()
    found = interface_facts(used)
    # Loopback carries multicast without being marked for it, and says nothing where there is a network.
    tested = [each for each in found if each.for_mdns and not each.is_loopback]
    tested = tested or [each for each in found if each.for_mdns]
    results: list[MulticastFact] = []

    async def test(interface: InterfaceFact) -> None:
        results.append(await hear_multicast(interface, listen_s))

    async with trio.open_nursery() as nursery:
        for interface in tested[:INTERFACES_MAX]:
            nursery.start_soon(test, interface)
    results.sort(key=lambda result: (result.interface, result.address))
    return MachineFacts(found, tuple(results) if mdns else None, ipv4 and host in ANY)


async def hear_multicast(interface: InterfaceFact, listen_s: float = LISTEN_S) -> MulticastFact:
    """Ask by mDNS on one interface and listen. Never raises for a network reason."""
    name, address = interface.name, interface.address
    question = struct.pack(">HHHHHH", secrets.randbits(16), 0, 1, 0, 0, 0) + _QUESTION
    own_heard = False
    others: dict[str, None] = {}
    try:
        with _group_socket(address) as raw:
            heard = trio.socket.from_stdlib_socket(raw)
            with trio.move_on_after(listen_s):
                await heard.sendto(question, (MDNS_GROUP, MDNS_PORT))
                while True:
                    data, source = await heard.recvfrom(9000)
                    if source[0] == address:
                        own_heard = own_heard or data == question
                    elif len(others) < OTHERS_MAX:
                        others[source[0]] = None
    except OSError as error:
        return MulticastFact(name, address, error=error.strerror or str(error))
    return MulticastFact(name, address, own_heard=own_heard, others=tuple(others))


def _group_socket(address: str) -> socket.socket:
    """A socket that speaks and hears mDNS on the interface with this address, beside other programs.

    Bound to the group: one bound to the port alone would take its share of the unicast datagrams that
    are meant for the daemons on this machine.
    """
    raw = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        raw.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        raw.bind((MDNS_GROUP, MDNS_PORT))
        local = socket.inet_aton(address)
        group = socket.inet_aton(MDNS_GROUP)
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + local)
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, local)
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, MDNS_TTL)
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    except OSError:
        raw.close()
        raise
    return raw


def _network(address: str, netmask: str | None) -> str:
    try:
        return str(ipaddress.ip_interface(f"{address}/{netmask or 32}").network)
    except ValueError:
        return f"{address}/32"
