"""Hosts that go and come back: asleep, without an interface, under an address that another has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.support_namespaces import LISTEN_PORT, LanMesh, freeze, thaw
from tests.integration.support_switch import Switch
from tests.integration.support_town import (
    DEAD,
    Net,
    answered_by,
    heard,
    peers,
    sees,
    start_all,
    status,
)
from tests.support_daemons import Daemon

pytestmark = pytest.mark.namespaces

SLEPT_S = 10.0


@pytest.fixture
def switch(switches: None) -> Iterator[Switch]:
    with Switch() as made:
        yield made


@pytest.fixture
def mesh(switch: Switch, tmp_path: Path) -> Iterator[LanMesh]:
    with LanMesh(tmp_path / "mesh") as running:
        yield running


def test_a_machine_that_slept_rejoins_by_itself_and_leaves_no_ghost(net: Net) -> None:
    town, switch = net.town, net.switch
    sleeper, others = town["three"], town.others("three")
    epoch = status(sleeper)["epoch"]
    assert answered_by(town.mesh, sleeper, "good night") == "two"
    slept_s = time.monotonic()
    switch.unplug(town.hosts["three"])
    freeze(sleeper)
    try:
        town.wait("the sleeper to be dead", sees(three=DEAD), others)
        town.wait("time to pass", lambda _: time.monotonic() - slept_s > SLEPT_S, others)
    finally:
        switch.plug_back(town.hosts["three"])
        thaw(sleeper)
    town.wait_until_whole()
    assert status(sleeper)["epoch"] == epoch
    assert town.told("member.failed", "three") == set()
    town.mark()
    town.wait_for_probes(3)  # a ghost would be accused again by now
    town.wait_until_whole()
    assert town.deaths() == set()
    town.all_answered("good morning")


def test_an_interface_that_goes_and_comes_back_finds_new_peers(
    switch: Switch, mesh: LanMesh
) -> None:
    host = switch.add_host()
    one = mesh.start_on(host, "one", plugins=["echo"])
    mesh.wait("one to be announced", one, lambda: is_announced(one))
    switch.remove_interface(host)
    mesh.wait("the loss to be noticed", one, lambda: len(heard(one, "network.changed")) >= 1)
    switch.plug_in(host)
    mesh.wait("the return to be noticed", one, lambda: len(heard(one, "network.changed")) >= 2)
    mesh.wait("one to be announced again", one, lambda: is_announced(one))
    switch.remove_interface(host)
    switch.plug_in(host)  # gone for some milliseconds: only its number is another one
    switch.take_down(host)
    switch.bring_up(host)  # "network is unreachable" for a moment, with the same interface
    two = mesh.start_on(switch.add_host(), "two")
    for daemon in (one, two):
        mesh.wait_for_members(daemon, 2)
    assert peers(two)["one"]["address"] == f"{host.address}:{LISTEN_PORT}"


def is_announced(daemon: Daemon) -> bool:
    return bool(status(daemon)["discovery"]["mdns_registered"])


def test_an_address_that_two_hosts_have_is_told_and_harms_nobody_else(net: Net) -> None:
    town, switch = net.town, net.switch
    two, three = net.host("two"), net.host("three")
    switch.change_address(three, two.address)
    town.wait(
        "the address to be contested",
        lambda _: town.count("address.contested") > 0,
        [town["one"]],
    )
    town.wait_for_probes(3, [town["one"]])
    assert {about for _, about in town.deaths()} <= {"two", "three"}
    switch.change_address(three, three.address)
    town.wait_until_whole()


def test_hosts_that_have_ipv6_only_find_each_other(switch: Switch, mesh: LanMesh) -> None:
    hosts = [switch.add_host() for _ in range(2)]
    for host in hosts:
        switch.use_ipv6_only(host)
    _, (one, two) = start_all(
        switch, mesh, ("one", "two"), sections='[listen]\nhost = "::"\n', hosts=hosts
    )
    for daemon in (one, two):
        for name, host in zip(("one", "two"), hosts, strict=True):
            assert host.address_v6 in peers(daemon)[name]["address"]
    assert answered_by(mesh, one, "over IPv6") == "two"
