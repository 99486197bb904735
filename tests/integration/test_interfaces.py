"""What a host knows of its interfaces, and when it hears that they changed."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
from tests.integration.support_namespaces import Host, why_unavailable
from tests.integration.support_switch import Switch, in_namespace

from meshd.shell.addresses import advertised_host, multicast_interfaces
from meshd.shell.interfaces import LOOK_INTERVAL_S, ChangeNews, Interface, interfaces_up

pytestmark = pytest.mark.namespaces

HEARD_DEADLINE_S = LOOK_INTERVAL_S / 2  # sooner than a look without a reason


@pytest.fixture(scope="module")
def switch() -> Iterator[Switch]:
    reason = why_unavailable(Switch)
    if reason is not None:
        pytest.skip(reason)
    with Switch() as made:
        yield made


def outward(host: Host, family: socket.AddressFamily = socket.AF_INET) -> list[Interface]:
    found = in_namespace(host, lambda: interfaces_up(family))
    return [interface for interface in found if not interface.is_loopback]


def test_an_interface_that_is_made_anew_is_another_one(switch: Switch) -> None:
    host = switch.add_host()
    (before,) = outward(host)
    assert before.address == host.address
    switch.remove_interface(host)
    assert outward(host) == []
    switch.plug_in(host)
    (after,) = outward(host)
    assert (after.name, after.address) == (before.name, before.address)
    assert after != before


@pytest.mark.parametrize("change", ["link", "address", "cable"])
def test_the_kernel_tells_of_a_change_and_the_interfaces_say_which(
    switch: Switch, change: str
) -> None:
    host = switch.add_host()

    def make_it() -> None:
        match change:
            case "link":
                switch.remove_interface(host)
            case "address":
                switch.change_address(host, "10.77.0.98")
            case _:
                switch.unplug(host)

    async def main() -> None:
        with in_namespace(host, ChangeNews) as news, trio.fail_after(HEARD_DEADLINE_S):
            await trio.to_thread.run_sync(make_it)
            while outward(host) == before:  # a cable is noticed some time after it was pulled
                await news.wait()

    before = outward(host)
    trio.run(main)


def test_a_host_speaks_the_family_that_it_listens_on(switch: Switch) -> None:
    host = switch.add_host()
    assert in_namespace(host, lambda: advertised_host("0.0.0.0", "")) == host.address
    switch.use_ipv6_only(host)
    assert in_namespace(host, lambda: advertised_host("::", "")) == host.address_v6
    assert in_namespace(host, lambda: advertised_host("0.0.0.0", "")) == "127.0.0.1"
    used = in_namespace(host, lambda: multicast_interfaces("::", ()))
    assert used == (host.address_v6, "::1")
    assert in_namespace(host, lambda: multicast_interfaces("::", ("eth0",))) == (host.address_v6,)
