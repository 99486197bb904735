"""Does multicast work on an interface? Asked once before a person is told to look for a firewall.

The test sends one datagram to an administratively scoped group on the interface and waits to hear it,
which needs the interface, the kernel's multicast route and the local firewall to be in order. It says
nothing about the switch or the access point beyond the interface.
"""

from __future__ import annotations

import secrets
import socket

import trio

GROUP = "239.255.77.77"  # RFC 2365 administratively scoped; not mDNS's own, so nobody else answers
ANSWER_DEADLINE_S = 1.0


async def multicast_works(interface: str) -> bool:
    """Whether a datagram sent to a group through the interface with this IPv4 address is heard there.

    Never raises for a network reason: a socket error is a no. Takes at most `ANSWER_DEADLINE_S`.
    """
    token = secrets.token_bytes(16)
    address = socket.inet_aton(interface)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.bind(("", 0))
            raw.setsockopt(
                socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + address
            )
            raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, address)
            raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
            raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            heard = trio.socket.from_stdlib_socket(raw)
            with trio.move_on_after(ANSWER_DEADLINE_S):
                await heard.sendto(token, (GROUP, raw.getsockname()[1]))
                while await heard.recv(64) != token:
                    pass
                return True
    except OSError:
        return False
    return False
