"""mDNS with real multicast on the loopback interface, and a hint for each of our own kind only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from tests.shell.support_log import KeptLog

from meshd.core.effects import Address
from meshd.shell.discovery import Announcement, MdnsDiscovery
from meshd.shell.multicast import multicast_works

LOOPBACK = "127.0.0.1"
DEADLINE_S = 20.0


def announcement(instance: str, port: int, tag: str = "feedc0de") -> Announcement:
    return Announcement(instance, port, (LOOPBACK,), tag, {"node": instance})


class Found:
    """Addresses as they are found, and a way to wait for one."""

    def __init__(self) -> None:
        self.addresses: set[Address] = set()
        self._changed = trio.Event()

    def __call__(self, address: Address) -> None:
        self.addresses.add(address)
        self._changed.set()

    async def wait_for(self, address: Address) -> None:
        while address not in self.addresses:
            self._changed = trio.Event()
            await self._changed.wait()


def discovery(which: Announcement, found: Found) -> MdnsDiscovery:
    return MdnsDiscovery(which, interfaces=lambda: [LOOPBACK], found=found, log=KeptLog())


async def need_multicast() -> None:
    if not await multicast_works(LOOPBACK):
        pytest.skip("multicast does not pass on the loopback interface here")


def test_two_nodes_of_one_mesh_find_each_other_and_nobody_else() -> None:
    async def main() -> None:
        await need_multicast()
        ours, theirs, strangers = Found(), Found(), Found()
        one = discovery(announcement("node-one", 40_001), ours)
        two = discovery(announcement("node-two", 40_002), theirs)
        other = discovery(announcement("node-three", 40_003, "0badc0de"), strangers)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for each in (one, two, other):
                    nursery.start_soon(each.run)
                await ours.wait_for((LOOPBACK, 40_002))
                await theirs.wait_for((LOOPBACK, 40_001))
                while not (one.statistics.other_mesh and other.statistics.other_mesh):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert ours.addresses == {(LOOPBACK, 40_002)}
        assert theirs.addresses == {(LOOPBACK, 40_001)}
        assert strangers.addresses == set()

    trio.run(main)


def test_an_address_that_changes_is_announced_again() -> None:
    async def main() -> None:
        await need_multicast()
        found, nothing = Found(), Found()
        first = announcement("node-mover", 40_011)
        mover = discovery(first, nothing)
        watcher = discovery(announcement("node-watcher", 40_012), found)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mover.run)
                nursery.start_soon(watcher.run)
                await found.wait_for((LOOPBACK, 40_011))
                mover.announce(replace(first, port=40_013))
                await found.wait_for((LOOPBACK, 40_013))
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_network_that_refuses_is_told_and_does_not_end_the_node() -> None:
    async def main() -> None:
        log = KeptLog()
        nowhere = MdnsDiscovery(
            announcement("node-nowhere", 40_021),
            interfaces=lambda: ["203.0.113.77"],  # RFC 5737: no interface of this machine has it
            found=Found(),
            log=log,
        )
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nowhere.run)
                while not nowhere.statistics.last_error:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert "mdns.failed" in log.events()
        assert not nowhere.statistics.registered

    trio.run(main)


def test_a_network_that_comes_later_is_used_at_once() -> None:
    async def main() -> None:
        await need_multicast()
        found, nothing = Found(), Found()
        there: list[str] = []
        first = announcement("node-late", 40_031)
        log = KeptLog()
        late = MdnsDiscovery(first, interfaces=lambda: there, found=nothing, log=log)
        watcher = discovery(announcement("node-early", 40_032), found)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watcher.run)
                nursery.start_soon(late.run)
                while not late.statistics.last_error:
                    await trio.lowlevel.checkpoint()
                there.append(LOOPBACK)
                late.restart(first)
                await found.wait_for((LOOPBACK, 40_031))
                late.restart(replace(first, port=40_033))
                await found.wait_for((LOOPBACK, 40_033))
                nursery.cancel_scope.cancel()
        assert log.events().count("mdns.failed") == 1

    trio.run(main)


def test_long_values_are_cut_to_what_a_txt_string_holds() -> None:
    text = replace(announcement("n", 1), text={"names": "x" * 1_000}).properties()
    assert all(len(key) + 1 + len(value) <= 255 for key, value in text.items())
