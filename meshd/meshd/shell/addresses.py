"""Which addresses this node has, and which of them it tells others.

A node speaks one family, that of the address it listens on: IPv4 by default, IPv6 when told to listen on
`::` or an IPv6 address. All nodes of a mesh speak the same.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from meshd.core.effects import Address
from meshd.shell.driver import open_datagram_socket
from meshd.shell.interfaces import ChangeNews, interfaces_up, is_loopback

ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not bound
PORT_TRIES = 16  # a free TCP port may be taken for UDP
STREAM_BACKLOG = 128
LOOPBACK = "127.0.0.1"
LOOPBACK_V6 = "::1"


class ListenError(Exception):
    """The node cannot listen where it was told to. The message says what to do; nothing is left open."""

    code = "listen"


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a node listens: UDP and TCP on one port."""

    datagrams: socket.socket
    streams: socket.socket
    host: str
    port: int

    def close(self) -> None:
        """Close both; may be called again."""
        self.datagrams.close()
        self.streams.close()


def listen(host: str, port: int) -> Listening:
    """Bind UDP and TCP on the same port; 0 takes one that is free for both.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
    """
    family = family_of(host)
    for attempt in range(PORT_TRIES):
        streams = socket.socket(family, socket.SOCK_STREAM)
        try:
            streams.setblocking(False)
            streams.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            streams.bind((host, port))
            streams.listen(STREAM_BACKLOG)
            chosen = streams.getsockname()[1]
            datagrams = open_datagram_socket(host, chosen)
        except OSError as error:
            streams.close()
            if port == 0 and error.errno == errno.EADDRINUSE and attempt < PORT_TRIES - 1:
                continue
            raise ListenError(_what_to_do(error, host, port)) from error
        except OverflowError as error:
            streams.close()
            raise ListenError(f"{port} is not a port (0 to 65535)") from error
        return Listening(datagrams, streams, host, chosen)
    raise ListenError(f"no port on {host} is free for both UDP and TCP")


def family_of(host: str) -> socket.AddressFamily:
    """The family of an address literal."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def advertised_host(host: str, advertise: str, held: str = "") -> str:
    """The address that others are told: as configured, else where we listen, else the best we have.

    The best is the one that the default route would use; without a route, `held` while an interface
    that is up has it, else the first address of such an interface; without one, `held` or loopback: a
    cable that is pulled moves nobody.
    """
    if advertise:
        return advertise
    if host not in ANY:
        return host
    family = family_of(host)
    routed = _routed_address(family)
    if routed is not None:
        return routed
    others = outward_addresses(family)
    if not others:
        return held or (LOOPBACK_V6 if family == socket.AF_INET6 else LOOPBACK)
    return held if held in others else others[0]


class Whereabouts:
    """Where this node is reached, now and when the network changes under it.

    A board that boots before its network is there has the loopback address only, and one that gets a
    new lease has another than it said: what was true at the start is no base for the rest of a life.

    Args:
        host: where we listen.
        advertise: the configured address; it wins.
        port: the same for UDP and TCP.
    """

    def __init__(self, host: str, advertise: str, port: int) -> None:
        self._host = host
        self._advertise = advertise
        self.address: Address = (advertised_host(host, advertise), port)
        self._interfaces = interfaces_up(family_of(host))

    def announced(self) -> tuple[str, ...]:
        """What mDNS tells: all addresses that we listen on, for a peer shares some of our networks only."""
        outward = tuple(each.address for each in self._interfaces if not each.is_loopback)
        return (outward if self._host in ANY else ()) or (self.address[0],)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` after an interface or our address changed, until cancelled."""
        with ChangeNews() as news:
            while True:
                await news.wait()
                moved = False
                with suppress(OSError):  # an interface that goes while we look: the next look tells
                    moved = self._look()
                if moved:
                    changed()

    def _look(self) -> bool:
        interfaces = interfaces_up(family_of(self._host))
        held, port = self.address
        address = (advertised_host(self._host, self._advertise, held), port)
        same = (interfaces, address) == (self._interfaces, self.address)
        self._interfaces, self.address = interfaces, address
        return not same


def interface_addresses(family: socket.AddressFamily = socket.AF_INET) -> tuple[str, ...]:
    """Addresses of all interfaces that are up, loopback last."""
    found = [interface.address for interface in interfaces_up(family)]
    return tuple(sorted(found, key=is_loopback))


def all_addresses() -> tuple[str, ...]:
    """Addresses of both families of all interfaces that are up, loopback among them."""
    return (*interface_addresses(socket.AF_INET), *interface_addresses(socket.AF_INET6))


def outward_addresses(family: socket.AddressFamily = socket.AF_INET) -> tuple[str, ...]:
    """Addresses of all interfaces that are up, without loopback."""
    return tuple(address for address in interface_addresses(family) if not is_loopback(address))


def multicast_interfaces(host: str, interfaces: Sequence[str]) -> tuple[str, ...]:
    """Addresses, of our family, of the interfaces that mDNS uses now; () when none of them has one.

    Args:
        host: where we listen; one address means that interface only.
        interfaces: names or addresses from the configuration; they win.

    Raises:
        ListenError: an interface is not there, with those that are.
    """
    family = family_of(host)
    if not interfaces:
        return interface_addresses(family) if host in ANY else (host,)
    addresses = psutil.net_if_addrs()
    up = interfaces_up(family)
    found: list[str] = []
    for interface in interfaces:
        if interface in addresses:
            found += [each.address for each in up if each.name == interface]
        elif any(each.address == interface for each in up):
            found.append(interface)
        else:
            known = ", ".join(sorted(addresses))
            raise ListenError(
                f"discovery.interfaces: there is no interface or address {interface!r} here"
                f" (interfaces: {known})"
            )
    return tuple(found)


def parse_seed(text: str, listening: str = LOOPBACK) -> Address:
    """`host:port` with the host resolved to its first address; blocks on DNS for a name.

    A node that listens on one family reaches nobody by the other, whichever resolvers tell first.

    Raises:
        ListenError: it does not resolve.
    """
    host, _, port = text.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), family_of(listening), socket.SOCK_DGRAM
        )
    except (OSError, ValueError) as error:
        raise ListenError(f"discovery.seeds: cannot resolve {text!r}: {error}") from error
    address = found[0][4]
    return str(address[0]), int(address[1])


def _routed_address(family: socket.AddressFamily) -> str | None:
    # RFC 3849 and 5737; connecting a datagram socket sends nothing.
    nobody = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((nobody, 9))
        return str(probe.getsockname()[0])
    return None


def _what_to_do(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {port} on {host} is in use, perhaps by another meshd; stop that one, or set"
                " [listen] port to another port (0 takes any free one)"
            )
        case errno.EADDRNOTAVAIL:
            known = ", ".join(interface_addresses(family_of(host)))
            return f"{host} is not an address of this machine; set [listen] host to one of: {known}"
        case errno.EACCES:
            return f"port {port} needs privileges; set [listen] port to one above 1023"
        case _:
            return f"cannot listen on {host} port {port}: {error.strerror or error}"
