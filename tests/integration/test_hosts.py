"""Daemons on hosts of their own: default settings, the kernel's Ethernet bridge, real multicast, cables.

What a bridge cannot do (losses, delays, one direction only) is in `test_links`, on a switch of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.integration.support_namespaces import LISTEN_PORT, Bridge, LanMesh, why_unavailable
from tests.integration.support_town import (
    ALIVE,
    DEAD,
    ECHO,
    LOCAL,
    answered_by,
    misses,
    peers,
    sees,
    start_all,
    states,
    status,
)
from tests.support_daemons import Daemon

pytestmark = pytest.mark.namespaces


@pytest.fixture(scope="module")
def _allowed() -> None:
    reason = why_unavailable(Bridge)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def lan(_allowed: None) -> Iterator[Bridge]:
    with Bridge() as made:
        yield made


@pytest.fixture
def mesh(lan: Bridge, tmp_path: Path) -> Iterator[LanMesh]:
    with LanMesh(tmp_path / "mesh") as running:
        yield running


def test_hosts_with_default_settings_find_answer_and_miss_each_other(
    lan: Bridge, mesh: LanMesh
) -> None:
    hosts = [lan.add_host() for _ in range(3)]
    for host in hosts[:2]:
        lan.add_containers(host)  # no reason to tell peers an address that they have themselves
    _, (one, two, three) = start_all(lan, mesh, hosts=hosts)
    for host, daemon in zip(hosts, (one, two, three), strict=True):
        told = status(daemon)
        assert told["address"] == f"{host.address}:{LISTEN_PORT}"
        assert told["discovery"]["seeds"] == told["discovery"]["remembered"] == []
        assert peers(daemon)["two"]["address"] == f"{hosts[1].address}:{LISTEN_PORT}"
        assert answered_by(mesh, daemon, f"from {daemon.name}") == "two"
    for daemon in (one, two):
        assert not any("172.17." in found for found in status(daemon)["discovery"]["mdns_found"])
    three.process.kill()
    three.process.wait()
    for daemon in (one, two):
        mesh.wait("the kill to be known", daemon, partial(sees(three=DEAD), daemon))
    assert answered_by(mesh, one, "still there?") == "two"


def test_two_meshes_on_one_network_never_mix_and_count_each_other(
    lan: Bridge, mesh: LanMesh, tmp_path: Path
) -> None:
    hosts = [lan.add_host() for _ in range(4)]
    addresses = [f"{host.address}:{LISTEN_PORT}" for host in hosts]
    ours = [mesh.start_on(hosts[0], "one", wait=False), mesh.start_on(hosts[1], "two", wait=False)]
    wrong_seed = f'[discovery]\nseeds = ["{addresses[0]}"]\n'
    with LanMesh(tmp_path / "other") as other:
        theirs = [  # names are a person's choice: the same ones twice
            other.start_on(hosts[2], "one", plugins=["echo"], wait=False),
            other.start_on(hosts[3], "two", sections=wrong_seed, wait=False),
        ]
        sides = ((mesh, ours, addresses[:2]), (other, theirs, addresses[2:]))
        for which, daemons, own in sides:
            for daemon in daemons:
                which.wait_for_members(daemon, 2)
                which.wait("strangers to be counted", daemon, partial(counts_strangers, daemon))
                assert sorted(row["address"] for row in peers(daemon).values()) == own
        mesh.wait("the datagrams of strangers to be dropped", ours[0], lambda: drops(ours[0]))
        for daemon in ours:
            found = status(daemon)["discovery"]["mdns_found"]
            assert set(addresses[2:]).isdisjoint(found)
        assert ours[0].get("/mesh/v1/capabilities")["capabilities"] == []


def counts_strangers(daemon: Daemon) -> bool:
    return int(status(daemon)["discovery"]["other_mesh"]) > 0


def drops(daemon: Daemon) -> bool:
    return int(status(daemon)["counters"]["dropped"]["other_mesh"]) > 0


def test_a_host_without_its_cable_and_a_network_that_falls_apart_heal_by_themselves(
    lan: Bridge, mesh: LanMesh
) -> None:
    (host, *_), (one, two, three) = start_all(lan, mesh, sections=LOCAL)
    epochs = [status(daemon)["epoch"] for daemon in (one, two, three)]
    for undo, fault in ((lan.plug_back, lan.unplug), (lan.heal, lan.cut)):
        fault(host)
        mesh.wait("both others to be missed", one, partial(misses("two", "three"), one))
        for daemon in (two, three):
            mesh.wait("the one to be missed", daemon, partial(misses("one"), daemon))
        if fault == lan.cut:  # long enough to bury each other; the cable is back before that
            mesh.wait("a death on this side", one, lambda: DEAD in states(one).values())
            mesh.wait("a death on that side", two, partial(sees(one=DEAD), two))
        assert states(two)["three"] == states(three)["two"] == ALIVE
        undo(host)
        for daemon in (one, two, three):
            mesh.wait_for_members(daemon, 3)
        assert answered_by(mesh, one, "are we one again?") == "two"
    assert epochs == [status(daemon)["epoch"] for daemon in (one, two, three)]
    assert status(one)["address"] == f"{host.address}:{LISTEN_PORT}"


def test_a_host_whose_network_comes_up_after_its_daemon_is_found(
    lan: Bridge, mesh: LanMesh
) -> None:
    early, late = lan.add_host(), lan.add_host(plugged_in=False)
    one = mesh.start_on(early, "one", plugins=["echo"])
    two = mesh.start_on(late, "two")
    mesh.wait("mDNS on loopback", two, lambda: registered(two))
    assert states(two) == {"two": ALIVE}
    lan.plug_in(late)
    mesh.wait_for_members(two, 2)
    mesh.wait_for_members(one, 2)
    mesh.wait_for_capability(two, ECHO)
    assert peers(one)["two"]["address"] == f"{late.address}:{LISTEN_PORT}"
    assert answered_by(mesh, two, "found at last") == "one"


def registered(daemon: Daemon) -> bool:
    return bool(status(daemon)["discovery"]["mdns_registered"])
