"""What `meshd doctor` says of a firewall that lets one lane through, in a network namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support_daemons import Daemon, Mesh

pytestmark = pytest.mark.namespaces
MESHD = [sys.executable, "-m", "meshd"]
NAMESPACE = f"meshd-fw-{os.getpid()}"


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def inside() -> Iterator[Sequence[str]]:
    """Words that run a command in a namespace with loopback, where packets can be dropped."""
    prefix = ("ip", "netns", "exec", NAMESPACE)
    for tool in ("ip", "iptables"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    made = subprocess.run(
        ["ip", "netns", "add", NAMESPACE], capture_output=True, text=True, timeout=30, check=False
    )
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        command(*prefix, "ip", "link", "set", "lo", "up")
        tried = subprocess.run(
            [*prefix, "iptables", "-L"], capture_output=True, text=True, timeout=30, check=False
        )
        if tried.returncode:
            pytest.skip(f"no packet filter here: {tried.stderr.strip()}")
        yield prefix
    finally:
        command("ip", "netns", "del", NAMESPACE)


@contextmanager
def dropping(inside: Sequence[str], *rules: str) -> Iterator[None]:
    for rule in rules:
        command(*inside, "iptables", "-A", "INPUT", *rule.split(), "-j", "DROP")
    try:
        yield
    finally:
        command(*inside, "iptables", "-F", "INPUT")


def found(daemon: Daemon) -> dict[str, str]:
    done = subprocess.run(
        [*MESHD, "--socket", str(daemon.socket), "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return {row["code"]: row["says"] for row in json.loads(done.stdout)["findings"]}


def test_a_lane_that_is_blocked_is_named_with_its_direction(
    tmp_path: Path, inside: Sequence[str]
) -> None:
    with Mesh(tmp_path, command=[*inside, *MESHD]) as mesh:
        alpha = mesh.start("alpha")
        beta = mesh.start("beta")
        mesh.wait_for_members(alpha, 2)
        mesh.wait_for_members(beta, 2)
        with dropping(inside, f"-p udp --dport {alpha.port}"):
            mesh.wait("it to be found", alpha, lambda: "udp_blocked" in found(alpha), 90, 1)
            assert "from beta arrived here" in found(alpha)["udp_blocked"]
            mesh.wait("it to be found", beta, lambda: "udp_blocked" in found(beta), 90, 1)
            assert "to alpha arrived there" in found(beta)["udp_blocked"]
        mesh.wait(
            "datagrams to pass again", alpha, lambda: "udp_blocked" not in found(alpha), 60, 1
        )
        with dropping(inside, f"-p tcp --dport {beta.port}", f"-p tcp --sport {beta.port}"):
            mesh.wait("it to be found", alpha, lambda: "tcp_blocked" in found(alpha), 90, 1)
            assert "beta" in found(alpha)["tcp_blocked"]


def without_daemon(inside: Sequence[str], config: Path) -> dict[str, str]:
    done = subprocess.run(
        [*inside, *MESHD, "--config", str(config), "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = json.loads(done.stdout)
    return {row["code"]: row["says"] for row in told["findings"]}


def test_an_interface_without_multicast_is_named(tmp_path: Path, inside: Sequence[str]) -> None:
    config = tmp_path / "meshd.toml"
    config.write_text(f'[node]\nstate_dir = "{tmp_path / "state"}"\n')
    assert "no_network" in without_daemon(inside, config)
    command(*inside, "ip", "link", "add", "wire0", "type", "veth", "peer", "name", "far0")
    command(*inside, "ip", "address", "add", "192.0.2.7/24", "dev", "wire0")
    for end in ("far0", "wire0"):
        command(*inside, "ip", "link", "set", end, "up")
    about_the_network = {"no_network", "multicast_off", "multicast_blocked", "multicast_silent"}
    assert not without_daemon(inside, config).keys() & about_the_network
    command(*inside, "iptables", "-A", "INPUT", "-p", "udp", "--dport", "5353", "-j", "DROP")
    assert "wire0 (192.0.2.7)" in without_daemon(inside, config)["multicast_blocked"]
    command(*inside, "iptables", "-F", "INPUT")
    command(*inside, "ip", "link", "set", "wire0", "multicast", "off")
    assert "wire0 (192.0.2.7)" in without_daemon(inside, config)["multicast_off"]
