"""Joining on a network with real multicast: a PIN finds its inviter, and a token needs no seed and no mDNS."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.integration.support_namespaces import Bridge, Host, LanMesh, why_unavailable
from tests.integration.support_town import sees
from tests.support_daemons import Daemon

from meshd.cli import cli

pytestmark = pytest.mark.namespaces

DEADLINE_S = 60.0
QUIET = "[discovery]\nmdns = false\n"


@pytest.fixture(scope="module")
def lan() -> Iterator[Bridge]:
    reason = why_unavailable(Bridge)
    if reason is not None:
        pytest.skip(reason)
    with Bridge() as made:
        yield made


@pytest.fixture(scope="module")
def mesh(lan: Bridge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanMesh]:
    with LanMesh(tmp_path_factory.mktemp("join") / "mesh") as running:
        yield running


@pytest.fixture(scope="module")
def founder(lan: Bridge, mesh: LanMesh) -> Daemon:
    return mesh.start_on(lan.add_host(), "founder")


def invite(daemon: Daemon, *options: str) -> str:
    done = CliRunner().invoke(cli, ["--socket", str(daemon.socket), "invite", *options])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def join(mesh: LanMesh, host: Host, name: str, *arguments: str, sections: str = "") -> None:
    """`meshd join` on that host, for a node of this name; it runs there afterwards."""
    folder: Path = mesh.folder / name
    folder.mkdir()
    (folder / "meshd.toml").write_text(
        f'[node]\nname = "{name}"\nstate_dir = "{folder / "state"}"\n'
        f'[http]\nsocket = "{folder / "meshd.sock"}"\n[plugins]\nenable = ["hardware"]\n{sections}'
    )
    done = subprocess.run(
        host.command(
            *mesh.command, "--config", str(folder / "meshd.toml"), "join", *arguments, "--json"
        ),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["mesh"] == "bench"


def test_a_pin_finds_its_inviter_by_mdns(lan: Bridge, mesh: LanMesh, founder: Daemon) -> None:
    other = lan.add_host()
    join(mesh, other, "typed", "--pin", invite(founder, "--pin"))
    both = sees(founder="alive", typed="alive")
    typed = mesh.boot(other, "typed")
    mesh.wait("both to see each other", typed, lambda: both(typed) and both(founder))


def test_a_token_finds_the_mesh_without_mdns(lan: Bridge, mesh: LanMesh, founder: Daemon) -> None:
    other = lan.add_host()
    join(mesh, other, "pasted", invite(founder), sections=QUIET)
    both = sees(founder="alive", pasted="alive")
    pasted = mesh.boot(other, "pasted")
    mesh.wait("both to see each other", pasted, lambda: both(pasted) and both(founder))
