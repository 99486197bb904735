"""mDNS / DNS-SD: a way to find a first peer, and nothing more.

Invariant: what is heard here is a *hint*. It becomes an address to contact, never a member; losing every
announcement loses no member; a registration that fails or takes its time delays nothing (probing for a
free name takes over a second by the RFC's design).

A zeroconf instance uses the interfaces that were there when it was made. When they change, it is closed
and a new one is made.

zeroconf runs its own asyncio loop in its own thread. Its callbacks touch nothing of ours: they post a
hint through the trio token into a bounded channel; hints that do not fit are counted and lost, since mDNS
repeats itself. Service: `_meshd._tcp` (RFC 6763), TXT keys `v` protocol version, `mesh` the opaque tag,
`id` the node, and with `announce_models` also `names` and `load`.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio
import trio.lowlevel
from zeroconf import (
    Error as ZeroconfError,
)
from zeroconf import (
    IPVersion,
    ServiceBrowser,
    ServiceInfo,
    ServiceListener,
    Zeroconf,
)

from meshd.core.effects import Address
from meshd.shell.addresses import ListenError, interface_addresses
from meshd_plugins.api import Logger

_T = TypeVar("_T")

SERVICE_TYPE = "_meshd._tcp.local."
PROTOCOL_VERSION = "1"
HINTS_MAX = 256  # bound of the channel from zeroconf's thread
RESOLVE_DEADLINE_MS = 1_000
"""For one name. They are resolved one after the other, so names made up by others cost so much each."""
_INSTANCE = re.compile(r"[A-Za-z0-9-]{1,63}\._meshd\._tcp\.local\.")
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0
TXT_VALUE_BYTES_MAX = 200  # one TXT string holds 255 bytes with its key
CLOSE_DEADLINE_S = 2.0
JOINABLE_KEY, JOINABLE = "join", "pin"  # TXT of a node that shows a PIN
INVITERS_MAX = 16  # nodes that show a PIN, of those that were found
STRANGERS_MAX = 32  # addresses of other meshes that are kept for a person to look for


@dataclass(frozen=True, slots=True)
class Announcement:
    """What this node says of itself over mDNS."""

    instance: str  # unique on the link: the node id's text
    port: int
    addresses: tuple[str, ...]  # literals, IPv4 or IPv6
    mesh_tag: str  # opaque to strangers, equal for nodes of one mesh
    text: Mapping[str, str]  # further TXT keys

    def properties(self) -> dict[str, str]:
        """The TXT record."""
        own = {"v": PROTOCOL_VERSION, "mesh": self.mesh_tag, "id": self.instance}
        return {**{k: v[:TXT_VALUE_BYTES_MAX] for k, v in self.text.items()}, **own}


@dataclass(slots=True)
class DiscoveryStatistics:
    """What mDNS did so far."""

    registered: bool = False
    hints: int = 0
    hints_lost: int = 0
    other_mesh: int = 0
    other_protocol: int = 0
    restarts: int = 0
    last_error: str = ""


class _Listener(ServiceListener):
    """Runs in zeroconf's thread; posts what it resolved and forgets it."""

    def __init__(self, post: Callable[[ServiceInfo], None]) -> None:
        self._post = post

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """What a name stands for; anybody can announce any name, and what is raised here ends the browsing."""
        if not _INSTANCE.fullmatch(name):
            return
        try:
            info = ServiceInfo(type_, name)
            is_resolved = info.request(zc, RESOLVE_DEADLINE_MS)
        except (ZeroconfError, ValueError, OSError):
            return
        if is_resolved:
            self._post(info)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Not liveness: membership decides who is there."""


class MdnsDiscovery:
    """Announces this node and hands addresses of others to `found`.

    Args:
        announcement: what is registered; change it with `announce`.
        interfaces: gives the addresses of the interfaces to use, all of one family, as of now; asked
            again by each `restart` and retry. It may raise ListenError.
        found: called in the trio thread with an address that answered for this mesh.
        log: bound logger.
    """

    def __init__(
        self,
        announcement: Announcement,
        *,
        interfaces: Callable[[], Sequence[str]],
        found: Callable[[Address], None],
        log: Logger,
    ) -> None:
        self._announcement = announcement
        self._interfaces = interfaces
        self._found = found
        self._log = log
        self._changed = trio.Event()
        self._outdated = False  # the zeroconf instance uses interfaces of the past
        self._limiter = trio.CapacityLimiter(2)  # a call in flight, and close
        self.statistics = DiscoveryStatistics()
        self.strangers: dict[str, None] = {}  # where other meshes announce nodes, the latest last

    def announce(self, announcement: Announcement) -> None:
        """Announce something else from now on; the record is updated in the background."""
        if announcement != self._announcement:
            self._announcement = announcement
            self._changed.set()

    def restart(self, announcement: Announcement) -> None:
        """The network is another one: announce and browse on the interfaces that are there now."""
        self._announcement = announcement
        self._outdated = True
        self._changed.set()

    async def run(self) -> None:
        """Announce and browse until cancelled; a failing network is retried with backoff for ever."""
        send, receive = trio.open_memory_channel[ServiceInfo](HINTS_MAX)
        token = trio.lowlevel.current_trio_token()

        def deliver(info: ServiceInfo) -> None:
            try:
                send.send_nowait(info)
            except trio.WouldBlock:
                self.statistics.hints_lost += 1
            except trio.BrokenResourceError:
                pass  # shutting down

        def post(info: ServiceInfo) -> None:
            # The daemon may end while zeroconf's thread is still at work.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(deliver, info)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_hints, receive)
            backoff_s = RETRY_FIRST_S
            while True:
                self._changed, self._outdated = trio.Event(), False
                try:
                    await self._announce_and_browse(_Listener(post))
                    backoff_s = RETRY_FIRST_S
                except (OSError, ZeroconfError, ListenError) as error:
                    self.statistics.last_error = str(error)
                    self._log.warning("mdns.failed", error=str(error), retry_s=backoff_s)
                    with trio.move_on_after(backoff_s):
                        await self._changed.wait()  # another network: try at once
                    backoff_s = min(backoff_s * 2, RETRY_MAX_S)
                self.statistics.registered = False
                self.statistics.restarts += 1

    async def _take_hints(self, receive: trio.MemoryReceiveChannel[ServiceInfo]) -> None:
        async for info in receive:
            self._take_hint(info)

    def _take_hint(self, info: ServiceInfo) -> None:
        properties = info.decoded_properties
        if properties.get("mesh") != self._announcement.mesh_tag:
            self.statistics.other_mesh += 1
            self._remember_stranger(info)
            return
        if properties.get("v") != PROTOCOL_VERSION:
            self.statistics.other_protocol += 1
            return
        if properties.get("id") == self._announcement.instance or not info.port:
            return
        self.statistics.hints += 1
        ours = self._announcement
        for address in info.parsed_addresses(self._family()):
            # The bridge of a container runtime: what the peer calls its own is also an address of ours.
            is_own = (address, info.port) in {(own, ours.port) for own in ours.addresses}
            if not is_own and _is_a_host(address):
                self._found((address, info.port))

    def _family(self) -> IPVersion:
        """Of what we announce: that is what we listen on, and can contact."""
        speaks_v6 = any(":" in address for address in self._announcement.addresses)
        return IPVersion.V6Only if speaks_v6 else IPVersion.V4Only

    def _remember_stranger(self, info: ServiceInfo) -> None:
        for host in info.parsed_addresses(self._family())[:1]:
            address = f"{host}:{info.port}"
            self.strangers.pop(address, None)
            self.strangers[address] = None
            if len(self.strangers) > STRANGERS_MAX:
                del self.strangers[next(iter(self.strangers))]

    async def _announce_and_browse(self, listener: ServiceListener) -> None:
        """One life of a zeroconf instance: until `restart`.

        Raises:
            OSError, zeroconf.Error: the network refused; everything of this life is closed.
            ListenError: an interface to use is not there.
        """
        interfaces = list(self._interfaces())
        there = {*interface_addresses(socket.AF_INET), *interface_addresses(socket.AF_INET6)}
        missing = sorted(set(interfaces) - there)
        if missing:  # asked first: zeroconf leaks the sockets it had opened when one fails
            raise OSError(errno.EADDRNOTAVAIL, f"no interface has the address {missing[0]}")
        if not interfaces:
            raise OSError(errno.EADDRNOTAVAIL, "no interface to use has an address")
        zeroconf = await self._in_thread(
            partial(Zeroconf, interfaces=interfaces, ip_version=self._family())
        )
        try:
            # The constructor starts a thread and returns; the first query goes out at once.
            ServiceBrowser(zeroconf, SERVICE_TYPE, listener)
            registered = self._service_info()
            await self._in_thread(
                partial(zeroconf.register_service, registered, allow_name_change=True)
            )
            self.statistics.registered = True
            self._log.info("mdns.registered", instance=registered.name)
            while True:
                await self._changed.wait()
                if self._outdated:
                    return
                self._changed = trio.Event()
                await self._in_thread(partial(zeroconf.update_service, self._service_info()))
        finally:
            with trio.move_on_after(CLOSE_DEADLINE_S, shield=True):
                await self._in_thread(zeroconf.close)

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)

    def _service_info(self) -> ServiceInfo:
        announcement = self._announcement
        return ServiceInfo(
            SERVICE_TYPE,
            f"{announcement.instance}.{SERVICE_TYPE}",
            port=announcement.port,
            parsed_addresses=list(announcement.addresses),
            properties=announcement.properties(),
            server=f"meshd-{announcement.instance}.local.",
        )


def _is_a_host(address: str) -> bool:
    """Whether it is the address of one machine: anybody on the link can announce any."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return not (ip.is_unspecified or ip.is_multicast or ip.is_reserved)


async def find_inviters(
    interfaces: Sequence[str], *, longest_s: float, settle_s: float
) -> tuple[tuple[Address, ...], ...]:
    """The addresses of each node on these interfaces (all of one family) that shows a PIN now.

    Returns `settle_s` after the first was found, or after `longest_s`; nothing is announced.

    Raises:
        OSError, zeroconf.Error: the network refused.
    """
    send, receive = trio.open_memory_channel[ServiceInfo](HINTS_MAX)
    token = trio.lowlevel.current_trio_token()

    def deliver(info: ServiceInfo) -> None:
        with suppress(trio.WouldBlock, trio.BrokenResourceError):
            send.send_nowait(info)

    def post(info: ServiceInfo) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(deliver, info)

    family = IPVersion.V6Only if any(":" in each for each in interfaces) else IPVersion.V4Only
    found: dict[str, tuple[Address, ...]] = {}
    zeroconf = await trio.to_thread.run_sync(
        partial(Zeroconf, interfaces=list(interfaces), ip_version=family)
    )
    try:
        ServiceBrowser(zeroconf, SERVICE_TYPE, _Listener(post))
        with trio.move_on_after(longest_s) as limit:
            async for info in receive:
                properties = info.decoded_properties
                addresses = tuple(
                    (address, info.port)
                    for address in info.parsed_addresses(family)
                    if info.port and _is_a_host(address)
                )
                shows_pin = properties.get(JOINABLE_KEY) == JOINABLE
                if shows_pin and addresses and len(found) < INVITERS_MAX:
                    limit.deadline = min(limit.deadline, trio.current_time() + settle_s)
                    found[info.name] = addresses
    finally:
        with trio.move_on_after(CLOSE_DEADLINE_S, shield=True):
            await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)
    return tuple(found.values())
