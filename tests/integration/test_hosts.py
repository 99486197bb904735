"""Daemons on hosts of their own: default settings, an Ethernet bridge, real multicast, links that fail."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.integration.support_namespaces import Host, Lan, LanMesh, why_unavailable
from tests.support_daemons import Daemon

pytestmark = pytest.mark.namespaces

ECHO = "computation.gpt/echo"
LOCAL = '[gossip]\npreset = "local"\n'
NOTICED_DEADLINE_S = (
    5.0  # a kill is told by the kernel of the host; a probe alone would take half of it
)
STOPPED_S = 2.0
SUSPECTED_DEADLINE_S = 5.0  # less than the six seconds before which no suspect is declared dead


@pytest.fixture(scope="module")
def _allowed() -> None:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def lan(_allowed: None) -> Iterator[Lan]:
    with Lan() as made:
        yield made


@pytest.fixture
def mesh(lan: Lan, tmp_path: Path) -> Iterator[LanMesh]:
    with LanMesh(tmp_path / "mesh") as running:
        yield running


def start_three(
    lan: Lan, mesh: LanMesh, sections: str = "", hosts: Sequence[Host] = ()
) -> tuple[Sequence[Host], list[Daemon]]:
    """One, two and three on hosts of their own, each knowing the others; two has the echo."""
    hosts = hosts or [lan.add_host() for _ in range(3)]
    daemons = [
        mesh.start_on(
            host,
            name,
            plugins=["echo"] if name == "two" else ["hardware"],
            sections=sections,
            wait=False,
        )
        for host, name in zip(hosts, ("one", "two", "three"), strict=True)
    ]
    for daemon in daemons:
        mesh.wait_for_members(daemon, 3)
        mesh.wait_for_capability(daemon, ECHO)
    return hosts, daemons


def peers(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in daemon.get("/mesh/v1/peers")["peers"]}


def states(daemon: Daemon) -> dict[str, str]:
    return {name: row["state"] for name, row in peers(daemon).items()}


def sees(daemon: Daemon, **expected: str) -> Callable[[], bool]:
    return lambda: expected.items() <= states(daemon).items()


def misses(daemon: Daemon, *names: str) -> bool:
    """Whether it would send nothing to any of these now."""
    held = states(daemon)
    return all(held[name] in {"suspect", "dead"} for name in names)


def answered_by(mesh: LanMesh, daemon: Daemon, prompt: str) -> str:
    """Ask the echo through this daemon; the name of the node that answered, correctly."""
    done = subprocess.run(
        [*mesh.command, "--socket", str(daemon.socket), "ask", "--json", ECHO, prompt],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr + daemon.log()[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(event.get("text", "") for event in told if event["event"] == "piece") == prompt
    return str(told[-1]["parts"][0]["node"])


def test_hosts_with_default_settings_find_each_other_and_answer_for_each_other(
    lan: Lan, mesh: LanMesh
) -> None:
    hosts = [lan.add_host() for _ in range(3)]
    for host in hosts[:2]:
        lan.add_containers(host)  # no reason to tell peers an address that they have themselves
    _, daemons = start_three(lan, mesh, hosts=hosts)
    for host, daemon in zip(hosts, daemons, strict=True):
        status = daemon.get("/mesh/v1/status")
        assert status["address"] == f"{host.address}:7946"
        assert status["discovery"]["seeds"] == status["discovery"]["remembered"] == []
        assert peers(daemon)["two"]["address"] == f"{hosts[1].address}:7946"
    assert [answered_by(mesh, daemon, f"from {daemon.name}") for daemon in daemons] == ["two"] * 3


def test_two_meshes_on_one_network_never_mix_and_count_each_other(
    lan: Lan, mesh: LanMesh, tmp_path: Path
) -> None:
    hosts = [lan.add_host() for _ in range(4)]
    ours = [mesh.start_on(hosts[0], "one", wait=False), mesh.start_on(hosts[1], "two", wait=False)]
    wrong_seed = f'[discovery]\nseeds = ["{hosts[0].address}:7946"]\n'
    with LanMesh(tmp_path / "other") as other:
        theirs = [
            other.start_on(hosts[2], "red", plugins=["echo"], wait=False),
            other.start_on(hosts[3], "blue", sections=wrong_seed, wait=False),
        ]
        for which, daemons, names in ((mesh, ours, "one two"), (other, theirs, "blue red")):
            for daemon in daemons:
                which.wait_for_members(daemon, 2)
                which.wait("strangers to be counted", daemon, lambda d=daemon: counts_strangers(d))
                assert sorted(states(daemon)) == names.split()
        mesh.wait("the datagrams of strangers to be dropped", ours[0], lambda: drops(ours[0]))
        strangers = {f"{host.address}:7946" for host in hosts[2:]}
        for daemon in ours:
            found = daemon.get("/mesh/v1/status")["discovery"]["mdns_found"]
            assert strangers.isdisjoint(found)
        assert ours[0].get("/mesh/v1/capabilities")["capabilities"] == []


def counts_strangers(daemon: Daemon) -> bool:
    return int(daemon.get("/mesh/v1/status")["discovery"]["other_mesh"]) > 0


def drops(daemon: Daemon) -> bool:
    return int(daemon.get("/mesh/v1/status")["counters"]["dropped"]["other_mesh"]) > 0


def test_a_killed_daemon_is_noticed_by_the_other_hosts(lan: Lan, mesh: LanMesh) -> None:
    _, (one, two, three) = start_three(lan, mesh, LOCAL)
    three.process.kill()
    three.process.wait()
    for daemon in (one, two):
        mesh.wait(
            "the kill to be noticed",
            daemon,
            lambda d=daemon: states(d)["three"] == "dead",
            NOTICED_DEADLINE_S,
        )
    assert answered_by(mesh, one, "still there?") == "two"


def test_a_daemon_that_is_stopped_for_two_seconds_does_not_die(lan: Lan, mesh: LanMesh) -> None:
    _, (one, two, three) = start_three(lan, mesh)
    seen: set[str] = set()

    def suspected_for_long_enough() -> bool:
        seen.update(states(daemon)["three"] for daemon in (one, two))
        return "suspect" in seen and time.monotonic() - stopped_s >= STOPPED_S

    stopped_s = time.monotonic()
    three.process.send_signal(signal.SIGSTOP)
    try:
        mesh.wait("a suspicion", one, suspected_for_long_enough, SUSPECTED_DEADLINE_S)
    finally:
        three.process.send_signal(signal.SIGCONT)
    for daemon in (one, two):
        mesh.wait("it to be alive again", daemon, sees(daemon, three="alive", one="alive"))
        assert "member.failed" not in daemon.log()
    assert "dead" not in seen
    mesh.wait("nobody to be accused by it", three, sees(three, one="alive", two="alive"))


@pytest.mark.parametrize("fault", ["switch", "cable"])
def test_a_partition_is_noticed_on_both_sides_and_heals_by_itself(
    lan: Lan, mesh: LanMesh, fault: str
) -> None:
    (host, *_), (one, two, three) = start_three(lan, mesh, LOCAL)
    epochs = [daemon.get("/mesh/v1/status")["epoch"] for daemon in (one, two, three)]
    (lan.cut if fault == "switch" else lan.unplug)(host)
    mesh.wait("both others to be missed", one, lambda: misses(one, "two", "three"))
    for daemon in (two, three):
        mesh.wait("the one to be missed", daemon, lambda d=daemon: misses(d, "one"))
    if fault == "switch":  # long enough to bury each other; the cable is back before that
        mesh.wait("a death on this side", one, lambda: "dead" in states(one).values())
        mesh.wait("a death on that side", two, sees(two, one="dead"))
    assert states(two)["three"] == states(three)["two"] == "alive"
    (lan.heal if fault == "switch" else lan.plug_back)(host)
    for daemon in (one, two, three):
        mesh.wait_for_members(daemon, 3)
    assert answered_by(mesh, one, "are we one again?") == "two"
    assert epochs == [daemon.get("/mesh/v1/status")["epoch"] for daemon in (one, two, three)]
    assert one.get("/mesh/v1/status")["address"] == f"{host.address}:7946"


def test_a_host_whose_network_comes_up_after_its_daemon_is_found(lan: Lan, mesh: LanMesh) -> None:
    early, late = lan.add_host(), lan.add_host(plugged_in=False)
    one = mesh.start_on(early, "one", plugins=["echo"])
    two = mesh.start_on(late, "two")
    mesh.wait("mDNS on loopback", two, lambda: registered(two))
    assert states(two) == {"two": "alive"}
    lan.plug_in(late)
    mesh.wait_for_members(two, 2)
    mesh.wait_for_members(one, 2)
    mesh.wait_for_capability(two, ECHO)
    assert peers(one)["two"]["address"] == f"{late.address}:7946"
    assert answered_by(mesh, two, "found at last") == "one"


def test_a_host_that_gets_another_address_stays_in_the_mesh(lan: Lan, mesh: LanMesh) -> None:
    hosts, (one, two, three) = start_three(lan, mesh)
    moved = lan.change_address(hosts[1], "10.77.0.99")
    for daemon in (one, two, three):
        mesh.wait(
            "the new address to be known",
            daemon,
            lambda d=daemon: peers(d)["two"]["address"] == f"{moved.address}:7946",
        )
        mesh.wait_for_members(daemon, 3)
    assert "member.failed" not in one.log() + three.log()
    assert answered_by(mesh, one, "at the new address") == "two"


def registered(daemon: Daemon) -> bool:
    return bool(daemon.get("/mesh/v1/status")["discovery"]["mdns_registered"])
