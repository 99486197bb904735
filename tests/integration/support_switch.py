"""An Ethernet switch in user space, whose every path can be made as bad as a radio link.

Each host's `eth0` is a TAP device made inside the host's namespace; one thread reads the frames that come
out of it and writes them to the ports they are for. The kernel's own way (a netem queue) is a module that
many machines lack; this needs /dev/net/tun only.

Invariant: a change takes effect before the call that makes it returns. What was sent before the call meets
the path as it was, what is sent after it the path as it is; and from then on no frame passes that a cut or
a firewall forbids, not even one that was under way.

with Switch() as switch:
    one, two = switch.add_host(), switch.add_host()
    switch.set_path(one, two, Quality(loss=0.25))  # from one to two; the way back is as it was
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from tests.integration.support_namespaces import INTERFACE, Host, Lan, NoNamespacesError, ip

_T = TypeVar("_T")

FRAME_BYTES_MAX = 65_550
FRAMES_PER_TURN_MAX = 1_024  # of one port; more than its queue holds
FRAMES_UNDER_WAY_MAX = 65_536
CLOSE_DEADLINE_S = 5.0
SEED = 1

_CLONE_NEWNET = 0x4000_0000
_TUNSETIFF, _TUNSETCARRIER = 0x4004_54CA, 0x4004_54E2  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_IPV4, _IPV6, _UDP = 0x0800, 0x86DD, 17


@dataclass(frozen=True, slots=True)
class Quality:
    """How frames get from one host to another. Jitter reorders them, as on a real path."""

    delay_s: float = 0.0
    jitter_s: float = 0.0  # the delay is uniform in delay_s +- jitter_s
    loss: float = 0.0  # share of the frames, 0 to 1
    duplication: float = 0.0  # share of the frames that arrive twice, each with its own delay
    is_cut: bool = False
    drops_udp: bool = False  # as a firewall does; everything else passes


@dataclass(slots=True)
class SwitchStatistics:
    """Frames so far; one that goes to several ports counts at each."""

    received: int = 0
    delivered: int = 0
    lost: int = 0  # by `Quality.loss`
    forbidden: int = 0  # by a cut or a firewall
    duplicated: int = 0
    refused: int = 0  # by a host whose interface is down


class Switch(Lan):
    """Hosts on a switch of our own.

    Args:
        seed: of losses, delays and duplicates.
    """

    def __init__(self, seed: int = SEED) -> None:
        super().__init__()
        self._rng = random.Random(seed)
        self._lock = threading.Lock()  # held while frames are moved, and while anything is changed
        self._ports: dict[int, int] = {}  # host number -> TAP
        self._paths: dict[tuple[int, int], Quality] = {}  # those that are not perfect
        self._learnt: dict[bytes, int] = {}  # Ethernet address -> host number
        self._under_way: list[
            tuple[float, int, int, int, bytes]
        ] = []  # due_s, order, from, to, frame
        self._order = itertools.count()
        self._is_open = True
        self.statistics = SwitchStatistics()

    # -- hosts ------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._forward, name="switch", daemon=True)
        self._thread.start()
        self._cleanup.callback(self._close)

    def _close(self) -> None:
        with self._lock:
            self._is_open = False
        os.eventfd_write(self._wake, 1)
        self._thread.join(CLOSE_DEADLINE_S)
        assert not self._thread.is_alive(), "the switch does not stop"
        for tap in self._ports.values():
            os.close(tap)
        self._poll.close()
        os.close(self._wake)

    def _add_interface(self, host: Host) -> None:
        tap = in_namespace(host, _open_tap)
        # Kept over its lives, as an adapter keeps it: what others know of the host stays true.
        ethernet = f"02:77:00:00:00:{host.number:02x}"
        try:
            ip("-n", host.namespace, "link", "set", INTERFACE, "address", ethernet)
        except BaseException:
            os.close(tap)
            raise
        with self._lock:
            self._ports[host.number] = tap
            self._poll.register(tap, select.EPOLLIN)

    def remove_interface(self, host: Host) -> None:
        with self._lock:
            tap = self._ports.pop(host.number)
            self._poll.unregister(tap)
        os.close(tap)  # the kernel removes the interface with its last user

    def unplug(self, host: Host) -> None:
        self._carrier(host, False)

    def plug_back(self, host: Host) -> None:
        self._carrier(host, True)

    def _carrier(self, host: Host, present: bool) -> None:
        with self._lock:
            fcntl.ioctl(self._ports[host.number], _TUNSETCARRIER, struct.pack("i", present))

    # -- faults -----------------------------------------------------------------------------------------

    def set_path(self, source: Host, destination: Host, path: Quality) -> None:
        """One direction between two hosts."""
        with self._changing():
            self._paths[source.number, destination.number] = path

    def set_all(self, path: Quality) -> None:
        """Every direction between all hosts there are; what was set before is forgotten."""
        with self._changing():
            pairs = itertools.permutations(sorted(self._ports), 2)
            self._paths = dict.fromkeys(pairs, path)

    def repair(self) -> None:
        """Every path is perfect again."""
        self.set_all(Quality())

    def cut_one_way(self, source: Host, destination: Host) -> None:
        """What `source` sends does not reach `destination`; the way back is as it was."""
        self._change([(source, destination)], is_cut=True)

    def partition(self, *sides: Iterable[Host]) -> None:
        """Hosts of different sides cannot reach each other; those of one side can."""
        with self._changing():
            side_of = {host.number: index for index, side in enumerate(sides) for host in side}
            for source, destination in itertools.permutations(side_of, 2):
                apart = side_of[source] != side_of[destination]
                self._alter(source, destination, is_cut=apart)

    def cut(self, host: Host) -> None:
        self._around(host, is_cut=True)

    def heal(self, host: Host) -> None:
        self._around(host, is_cut=False)

    def drop_udp(self, host: Host) -> None:
        """A firewall before this host lets no UDP in or out; streams pass."""
        self._around(host, drops_udp=True)

    @contextmanager
    def _changing(self) -> Generator[None]:
        with self._lock:
            self._take_in_all()
            yield

    def _around(self, host: Host, **changes: bool) -> None:
        with self._changing():
            for other in self._ports:
                if other != host.number:
                    self._alter(host.number, other, **changes)
                    self._alter(other, host.number, **changes)

    def _change(self, pairs: Iterable[tuple[Host, Host]], **changes: bool) -> None:
        with self._changing():
            for source, destination in pairs:
                self._alter(source.number, destination.number, **changes)

    def _alter(self, source: int, destination: int, **changes: bool) -> None:
        path = self._paths.get((source, destination), Quality())
        self._paths[source, destination] = replace(path, **changes)

    # -- forwarding -------------------------------------------------------------------------------------

    def _forward(self) -> None:
        while True:
            self._poll.poll(self._wait_s())
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            with self._lock:
                if not self._is_open:
                    return
                self._take_in_all()
                self._deliver_due(time.monotonic())

    def _wait_s(self) -> float | None:
        with self._lock:
            first_s = self._under_way[0][0] if self._under_way else None
        return None if first_s is None else max(0.0, first_s - time.monotonic())

    def _take_in_all(self) -> None:
        for number in tuple(self._ports):
            self._take_in(number)

    def _take_in(self, number: int) -> None:
        for _ in range(FRAMES_PER_TURN_MAX):
            try:
                frame = os.read(self._ports[number], FRAME_BYTES_MAX)
            except OSError:  # nothing more, or the interface is down
                return
            self.statistics.received += 1
            destination, source = frame[0:6], frame[6:12]
            self._learnt[source] = number
            known = None if destination[0] & 1 else self._learnt.get(destination)
            for port in self._ports if known is None else (known,):
                if port != number:
                    self._send(number, port, frame)

    def _send(self, source: int, destination: int, frame: bytes) -> None:
        path = self._paths.get((source, destination))
        if path is None:
            self._deliver(source, destination, frame)
            return
        if self._rng.random() < path.loss:
            self.statistics.lost += 1
            return
        copies = 2 if self._rng.random() < path.duplication else 1
        self.statistics.duplicated += copies - 1
        for _ in range(copies):
            delay_s = path.delay_s + self._rng.uniform(-path.jitter_s, path.jitter_s)
            if delay_s <= 0.0:
                self._deliver(source, destination, frame)
                continue
            assert len(self._under_way) < FRAMES_UNDER_WAY_MAX, "more frames than a test can mean"
            due_s = time.monotonic() + delay_s
            item = (due_s, next(self._order), source, destination, frame)
            heapq.heappush(self._under_way, item)
            if self._under_way[0] is item:  # due before all others
                os.eventfd_write(self._wake, 1)

    def _deliver_due(self, now_s: float) -> None:
        while self._under_way and self._under_way[0][0] <= now_s:
            _, _, source, destination, frame = heapq.heappop(self._under_way)
            self._deliver(source, destination, frame)

    def _deliver(self, source: int, destination: int, frame: bytes) -> None:
        path = self._paths.get((source, destination))
        if path is not None and (path.is_cut or (path.drops_udp and is_udp(frame))):
            self.statistics.forbidden += 1
            return
        try:
            os.write(self._ports[destination], frame)
        except (OSError, KeyError):  # its interface is down, or gone
            self.statistics.refused += 1
        else:
            self.statistics.delivered += 1


def is_udp(frame: bytes) -> bool:
    """Whether an Ethernet frame carries UDP, over IPv4 or over IPv6 without extension headers."""
    (kind,) = struct.unpack_from(">H", frame, 12)
    protocol_at = {_IPV4: 14 + 9, _IPV6: 14 + 6}.get(kind)
    return protocol_at is not None and len(frame) > protocol_at and frame[protocol_at] == _UDP


def in_namespace(host: Host, call: Callable[[], _T]) -> _T:
    """What `call` returns, called on this host: sockets and devices it opens stay there.

    Threads it starts stay there, too: no `trio.run`, whose worker threads serve later runs.

    Raises:
        NoNamespacesError: it was refused.
    """
    results: list[_T] = []
    errors: list[Exception] = []

    def work() -> None:  # a thread of its own, for a namespace is a thread's
        try:
            _enter(host.namespace)
            results.append(call())
        except OSError as error:
            errors.append(NoNamespacesError(f"in {host.namespace}: {error}"))
        except Exception as error:  # noqa: BLE001 - raised again where it belongs
            errors.append(error)

    thread = threading.Thread(target=work, name=f"on {host.namespace}")
    thread.start()
    thread.join()
    for error in errors:
        raise error
    return results[0]


def _enter(namespace: str) -> None:
    """`os.setns`, which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(there, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns: {errno.errorcode.get(code, code)}")
    finally:
        os.close(there)


def _open_tap() -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22s", INTERFACE.encode(), _IFF_TAP | _IFF_NO_PI, b"")
        fcntl.ioctl(tap, _TUNSETIFF, request)
    except BaseException:
        os.close(tap)
        raise
    return tap
