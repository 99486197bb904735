"""A mesh of real commands: init, run, invite, join, run, and each sees the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support_daemons import HOST, Daemon, Mesh, free_port

from meshd.cli import cli
from meshd.trust.api_keys import ApiKeys
from meshd.trust.identity import init_mesh

MESHD = [sys.executable, "-m", "meshd"]
DEADLINE_S = 60.0


def command(*arguments: str, told: str = "") -> tuple[str, str]:
    """What the real command says, on either stream."""
    done = subprocess.run(
        [*MESHD, *arguments],
        input=told,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def meshd(*arguments: str, status: int = 0) -> str:
    """The same without a process of its own, which takes half a second; what it says."""
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == status, done.output
    return done.output if status else done.stdout


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh"), command=MESHD) as running:
        yield running


@pytest.fixture(scope="module")
def founder(mesh: Mesh) -> Daemon:
    state = mesh.folder / "founder" / "state"
    init, _ = command("init", "home", "--state-dir", str(state), "--json")
    assert json.loads(init)["mesh"] == "home"
    return mesh.start("founder")


def configured(mesh: Mesh, name: str, http: str = HOST) -> tuple[Path, int, int]:
    """A device with a configuration and without a mesh; it knows no seed, and mDNS is off."""
    folder, port, http_port = mesh.folder / name, free_port(), free_port()
    folder.mkdir()
    config = folder / "meshd.toml"
    config.write_text(
        f'[node]\nname = "{name}"\nstate_dir = "{folder / "state"}"\n'
        f'[listen]\nhost = "{HOST}"\nport = {port}\n[discovery]\nmdns = false\n'
        f'[http]\nhost = "{http}"\nport = {http_port}\nsocket = "{folder / "meshd.sock"}"\n'
        '[plugins]\nenable = ["hardware", "arithmetic"]\n'
    )
    return config, port, http_port


def alive(daemon: Daemon) -> set[str]:
    peers = daemon.get("/mesh/v1/peers")["peers"]
    return {peer["name"] for peer in peers if peer["state"] == "alive"}


def test_a_device_joins_with_a_token_and_both_see_each_other(mesh: Mesh, founder: Daemon) -> None:
    at = ("--socket", str(founder.socket))
    printed, more = command(*at, "invite")
    token = printed.strip()
    assert "\n" not in token
    assert len(token) <= 90
    assert "meshd invite revoke" in more
    config, port, http_port = configured(mesh, "second")
    said, _ = command("--config", str(config), "join", "-", "--json", told=token)
    joined = json.loads(said)
    assert (joined["mesh"], joined["role"], joined["started"]) == ("home", "member", False)
    second = mesh.launch("second", port, http_port)
    both = {"founder", "second"}
    mesh.wait("the founder to see it", founder, lambda: alive(founder) == both)
    mesh.wait("it to see the founder", second, lambda: alive(second) == both)
    rows = json.loads(meshd(*at, "invite", "list", "--json"))["invites"]
    assert [(row["state"], [use["name"] for use in row["uses"]]) for row in rows] == [
        ("used", ["second"])
    ]
    again, _, _ = configured(mesh, "again")
    refused = meshd("--config", str(again), "join", token, status=5)
    assert "used already" in refused
    assert not (mesh.folder / "again" / "state" / "identity").exists()
    spent = meshd("--config", str(config), "join", token, status=1)
    assert "belongs to a mesh already" in spent
    denied = meshd("--socket", str(second.socket), "invite", status=5)
    assert "may let nobody in" in denied
    assert token.encode() not in (founder.folder / "log").read_bytes()


def test_a_device_joins_with_a_pin(mesh: Mesh, founder: Daemon) -> None:
    at = ("--socket", str(founder.socket))
    config, _, _ = configured(mesh, "third")
    join = ("--config", str(config), "join", "--at", f"{HOST}:{founder.port}", "--pin")
    none = meshd(*join, "000-000", status=5)
    assert "shows no PIN" in none
    pin = meshd(*at, "invite", "--pin", "--role", "observer").strip()
    wrong = f"{(int(pin.replace('-', '')) + 1) % 1_000_000:06d}"
    assert "PIN is wrong" in meshd(*join, wrong, status=5)
    assert "observer of mesh home" in meshd(*join, pin)


def test_what_was_given_out_is_taken_back(mesh: Mesh, founder: Daemon) -> None:
    at = ("--socket", str(founder.socket))
    made = json.loads(meshd(*at, "invite", "--uses", "3", "--ttl", "2h", "--json"))
    meshd(*at, "invite", "revoke", made["id"])
    config, _, _ = configured(mesh, "fourth")
    assert "revoked" in meshd("--config", str(config), "join", made["token"], status=5)
    assert "meshd invite list" in meshd(*at, "invite", "revoke", "nonsense", status=4)
    closed = meshd(*at, "invite", "--role", "client", status=5)
    assert "[http] host" in closed


def test_a_client_asks_over_https_with_a_key_of_its_own(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port, http_port = configured(mesh, "edge", http="0.0.0.0")
    init_mesh(mesh.folder / "edge" / "state", "other")
    ApiKeys(mesh.folder / "edge" / "state").create("first")
    edge = mesh.launch("edge", port, http_port)
    token = meshd("--socket", str(edge.socket), "invite", "--role", "client").strip()
    laptop, _, _ = configured(mesh, "laptop")
    monkeypatch.setenv("MESHD_CONFIG", str(laptop))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(mesh.folder / "laptop"))
    assert "client of mesh other" in meshd("join", token)
    settings = mesh.folder / "laptop" / "meshd" / "client.toml"
    assert settings.stat().st_mode & 0o777 == 0o600
    assert not (mesh.folder / "laptop" / "state").exists()
    assert meshd("ask", "computation.gpt/arithmetic", "2 + 3") == "2 + 3 = 5\n"
