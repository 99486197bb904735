"""The network interfaces of this machine, and when to look at them again.

Invariant: an interface that is made anew, even under its old name and with its old addresses, is not equal to
the one before: multicast groups were joined on the one that is gone.

The kernel says that something changed (rtnetlink); what changed is asked of the interfaces themselves, so
that news lost or told twice do no harm.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil
import trio
import trio.lowlevel

LOOK_INTERVAL_S: Final = 10.0  # a look costs 0.3 ms. Up: later where the kernel tells nothing
SETTLE_S: Final = 0.2  # one change is told in many words. Up: fewer looks, later news
_NEWS_GROUPS: Final = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NEWS_BYTES_MAX: Final = 65_536
_LINK_LOCAL: Final = "fe80:"  # means nothing to another host without the interface it is on


@dataclass(frozen=True, slots=True)
class Interface:
    """An address of an interface that is up and has a link; one with two addresses is listed twice."""

    name: str
    index: int  # the kernel gives every interface another one
    address: str  # literal, of one family; no link-local IPv6

    @property
    def is_loopback(self) -> bool:
        """Whether nobody else can reach it."""
        return is_loopback(self.address)


def is_loopback(address: str) -> bool:
    """Whether an address literal means the machine it is used on."""
    return address == "::1" or address.startswith("127.")


def interfaces_up(family: socket.AddressFamily) -> tuple[Interface, ...]:
    """What other hosts may reach, by name, bridges last; the loopback interface among them.

    The bridge of a container runtime has the same address on every host: a peer told of it finds itself.
    """
    up, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    index_of = {name: index for index, name in socket.if_nameindex()}
    # An interface may go between one question and the next.
    names = sorted(name for name in addresses if name in index_of and name in up and up[name].isup)
    return tuple(
        Interface(name, index_of[name], each.address)
        for name in sorted(names, key=_is_bridge)
        for each in addresses[name]
        if each.family == family and not each.address.startswith(_LINK_LOCAL)
    )


class ChangeNews:
    """Tells when to look at the interfaces again; a context manager.

    The kernel's news may not be allowed to us: then `wait` returns now and then only.
    """

    def __init__(self) -> None:
        self._news = _open_news()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._news.close()

    async def wait(self) -> None:
        """Return after the kernel changed an interface or an address, or after `LOOK_INTERVAL_S`."""
        with trio.move_on_after(LOOK_INTERVAL_S) as quiet:
            await trio.lowlevel.wait_readable(self._news)
        if not quiet.cancelled_caught:
            await trio.sleep(SETTLE_S)
            _forget(self._news)


def _is_bridge(interface: str) -> bool:
    return Path("/sys/class/net", interface, "bridge").exists()


def _open_news() -> socket.socket:
    """Readable when there are news; without the right to hear them, a socket nothing is ever sent to."""
    quiet = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with suppress(OSError):
        news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | quiet, socket.NETLINK_ROUTE)
        try:
            news.bind((0, _NEWS_GROUPS))
        except OSError:
            news.close()
            raise
        return news
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | quiet)


def _forget(news: socket.socket) -> None:
    while True:
        try:
            news.recv(_NEWS_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more of them than it keeps
                raise
