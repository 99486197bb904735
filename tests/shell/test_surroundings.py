"""The multicast self-test, on this machine's own interfaces."""

from __future__ import annotations

import socket

import pytest
import trio
from tests.shell.support_streams import trio_test

from meshd.health import InterfaceFact
from meshd.shell.multicast import multicast_works
from meshd.shell.surroundings import (
    MDNS_GROUP,
    MDNS_PORT,
    hear_multicast,
    interface_facts,
    machine_facts,
)

LOOPBACK = InterfaceFact("lo", "127.0.0.1", "127.0.0.0/8", True, False, False)
LISTEN_S = 0.3


async def _needs_multicast() -> None:
    if not await multicast_works(LOOPBACK.address):
        pytest.skip("no multicast on loopback here")


@trio_test
async def test_the_own_question_is_heard_where_multicast_works() -> None:
    await _needs_multicast()
    fact = await hear_multicast(LOOPBACK, LISTEN_S)
    assert (fact.error, fact.own_heard) == ("", True)


@trio_test
async def test_two_tests_at_once_do_not_take_each_others_answers() -> None:
    await _needs_multicast()
    facts = []

    async def test() -> None:
        facts.append(await hear_multicast(LOOPBACK, LISTEN_S))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(test)
    assert [fact.own_heard for fact in facts] == [True] * 3


@trio_test
async def test_others_that_speak_are_told_by_address() -> None:
    await _needs_multicast()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.2", 0))
        other.setsockopt(
            socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK.address)
        )
        other.setblocking(False)
        facts = []

        async def listen() -> None:
            facts.append(await hear_multicast(LOOPBACK, LISTEN_S))
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            while True:  # until somebody listens, and then has
                other.sendto(b"anything", (MDNS_GROUP, MDNS_PORT))
                await trio.lowlevel.checkpoint()
                with trio.move_on_after(0.02):
                    await trio.sleep_forever()
    assert facts[0].others == ("127.0.0.2",)


@trio_test
async def test_an_address_that_is_not_there_is_an_error_and_no_exception() -> None:
    fact = await hear_multicast(
        InterfaceFact("gone", "203.0.113.77", "203.0.113.0/24", False, False, True), LISTEN_S
    )
    assert fact.error
    assert not fact.own_heard


def test_interfaces_are_told_with_their_network_and_flags() -> None:
    [loopback] = [each for each in interface_facts(()) if each.address == "127.0.0.1"]
    assert (loopback.network, loopback.is_loopback, loopback.is_bridge) == (
        "127.0.0.0/8",
        True,
        False,
    )
    assert not loopback.for_mdns
    assert any(each.for_mdns for each in interface_facts(("127.0.0.1",)))


@trio_test
async def test_only_the_interfaces_that_discovery_uses_are_tested() -> None:
    facts = await machine_facts("127.0.0.1", (), mdns=True, listen_s=LISTEN_S)
    assert facts.multicast is not None
    assert [each.address for each in facts.multicast] == ["127.0.0.1"]
    assert not facts.listens_everywhere
    off = await machine_facts("0.0.0.0", (), mdns=False, listen_s=LISTEN_S)
    assert off.multicast is None
    assert off.listens_everywhere
    unknown = await machine_facts("0.0.0.0", ("nope0",), mdns=True, listen_s=LISTEN_S)
    assert unknown.multicast == ()


@trio_test
async def test_a_node_on_ipv6_is_told_nothing_of_ipv4() -> None:
    facts = await machine_facts("::", (), mdns=True, listen_s=LISTEN_S)
    assert facts.multicast is None
    assert not facts.listens_everywhere
