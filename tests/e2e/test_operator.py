"""What an operator sees of real daemons: watching, the store beside a peer's, and the doctor's findings."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

import pytest
from tests.support_daemons import HOST, Daemon, Mesh, UnixConnection, free_port

MESHD = [sys.executable, "-m", "meshd"]
DEADLINE_S = 60.0


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, command=MESHD) as running:
        yield running


def meshd(socket_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*MESHD, "--socket", str(socket_path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def doctor(daemon: Daemon) -> dict[str, str]:
    """What is found, by code; a code found twice has both sentences."""
    told: dict[str, str] = {}
    for finding in json.loads(meshd(daemon.socket, "doctor", "--json").stdout)["findings"]:
        told[finding["code"]] = told.get(finding["code"], "") + finding["says"]
    return told


class Watching:
    """`meshd peers --watch` beside the test; lines come by threads, so that waiting for one is bounded."""

    def __init__(self, daemon: Daemon, *options: str) -> None:
        command = [*MESHD, "--socket", str(daemon.socket), "peers", "--watch", "--interval", "0.2"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._said = threading.Condition()
        sides = ((self.process.stdout, self.out), (self.process.stderr, self.err))
        self._readers = [threading.Thread(target=self._read, args=side) for side in sides]

    def __enter__(self) -> Self:
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        with self.process:  # closes its pipes, once the readers are through
            for reader in self._readers:
                reader.join()

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        for line in stream:
            with self._said:
                lines.append(line)
                self._said.notify_all()

    def wait(self, what: str, lines: list[str]) -> str:
        """The first line that has a text in it."""

        def found() -> list[str]:
            return [line for line in lines if what in line]

        with self._said:
            assert self._said.wait_for(found, DEADLINE_S), (what, self.out, self.err)
            return found()[0]

    def end(self) -> int:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE_S)


def test_watching_tells_of_joins_deaths_and_a_daemon_that_restarts(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    with Watching(alpha) as watching:
        watching.wait("alpha  alive", watching.out)
        beta = mesh.start("beta", plugins=["echo"])
        watching.wait("beta  alive", watching.out)
        mesh.wait_for_capability(alpha, "computation.gpt/echo")
        beta.process.kill()
        beta.process.wait()
        watching.wait("beta  dead", watching.out)
        alpha.process.send_signal(signal.SIGTERM)
        alpha.process.wait(20)
        waiting = watching.wait("waiting for the daemon", watching.err)
        assert "not running" in waiting
        mesh.launch("alpha", alpha.port, alpha.http_port)
        watching.wait("the daemon is back", watching.err)
        watching.wait("alpha  restarted", watching.out)
        assert watching.end() == 0
        assert len(watching.err) == 2


def test_watching_as_json_gives_an_object_a_change(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    with Watching(alpha, "--json") as watching:
        mesh.start("beta")
        told = json.loads(watching.wait('"beta"', watching.out))
        assert (told["change"], told["peer"]["state"]) == ("appeared", "alive")
        assert watching.end() == 0


def test_watching_without_a_daemon_ends_at_once(tmp_path: Path) -> None:
    done = meshd(tmp_path / "none.sock", "peers", "--watch")
    assert done.returncode == 3
    assert "not running" in done.stderr


def test_on_a_terminal_the_table_is_drawn_over_itself_and_left_clean(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [*MESHD, "--socket", str(alpha.socket), "peers", "--watch", "--interval", "0.2"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    drawn = b""
    while drawn.count(b"\x1b[H") < 3:
        drawn += os.read(master, 65_536)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(master, 65_536):
            drawn += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    assert process.wait(DEADLINE_S) == 0
    text = drawn.decode()
    assert text.startswith("\x1b[?1049h")
    assert "1 members: 1 alive" in text
    assert "alpha" in text
    assert text.endswith("\x1b[?1049l")
    assert "Traceback" not in text


def test_stores_in_step_and_what_is_held_of_a_peer(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    beta = mesh.start("beta", plugins=["echo"])
    mesh.wait_for_capability(alpha, "computation.gpt/echo")

    def in_step() -> bool:
        return meshd(alpha.socket, "store", "diff", "beta").returncode == 0

    mesh.wait("the stores to be in step", alpha, in_step)
    view = json.loads(meshd(alpha.socket, "store", "show", "beta", "--json").stdout)
    assert "node" in [entry["key"] for entry in view["entries"]]
    assert view["version"] == max(entry["version"] for entry in view["entries"])
    own = json.loads(meshd(beta.socket, "store", "show", "--json").stdout)
    assert {row["name"]: row["version"] for row in own}["beta"] == view["version"]
    refused = meshd(alpha.socket, "store", "diff", "alpha")
    assert (refused.returncode, "this node" in refused.stderr) == (2, True)


def test_a_peer_that_stopped_is_no_answer_and_no_hang(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    beta = mesh.start("beta")
    mesh.wait_for_members(alpha, 2)
    beta.process.send_signal(signal.SIGSTOP)
    try:
        done = meshd(alpha.socket, "store", "diff", "beta")
    finally:
        beta.process.send_signal(signal.SIGCONT)
    assert done.returncode == 6
    assert "no answer within" in done.stderr


def test_a_well_mesh_is_well(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    mesh.start("beta")
    mesh.wait_for_members(alpha, 2)
    found = doctor(alpha)
    # A busy machine may be slow, which is for the doctor to say; anything else would be made up.
    assert not found.keys() - {"overloaded", "health_low"}


def test_a_copied_state_folder_is_found_by_everybody(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    beta = mesh.start("beta")
    mesh.wait_for_members(alpha, 2)
    shutil.copytree(beta.folder / "state", mesh.folder / "copy" / "state")
    config = (beta.folder / "meshd.toml").read_text()
    port, http_port = free_port(), free_port()
    for old, new in (
        (f"port = {beta.port}", f"port = {port}"),
        (f"port = {beta.http_port}", f"port = {http_port}"),
        (str(beta.folder), str(mesh.folder / "copy")),
    ):
        config = config.replace(old, new)
    (mesh.folder / "copy" / "meshd.toml").write_text(config)
    copy = mesh.launch("copy", port, http_port)
    for daemon in (beta, copy, alpha):
        mesh.wait(
            "the double to be found", daemon, lambda one=daemon: "identity_duplicate" in doctor(one)
        )
    assert str(port) in doctor(alpha)["identity_duplicate"]
    assert meshd(beta.socket, "doctor").returncode == 2
    assert "run `meshd doctor`" in meshd(beta.socket, "status").stdout


def test_strangers_and_doubles_of_names_are_told_with_their_addresses(tmp_path: Path) -> None:
    with Mesh(tmp_path / "ours", command=MESHD) as ours, Mesh(tmp_path / "theirs") as theirs:
        alpha = ours.start("alpha")
        ours.init("second")
        second = ours.start("second")
        config = second.folder / "meshd.toml"
        second.process.send_signal(signal.SIGTERM)
        second.process.wait(20)
        config.write_text(config.read_text().replace('name = "second"', 'name = "alpha"'))
        ours.launch("second", second.port, second.http_port)
        stranger = theirs.start("stranger")
        other = stranger.folder / "meshd.toml"
        stranger.process.send_signal(signal.SIGTERM)
        stranger.process.wait(20)
        other.write_text(
            other.read_text().replace("seeds = []", f'seeds = ["{HOST}:{alpha.port}"]')
        )
        again = theirs.launch("stranger", stranger.port, stranger.http_port)

        def told() -> bool:
            return {"other_mesh", "name_duplicate"} <= doctor(alpha).keys()

        ours.wait("the stranger and the double name", alpha, told)
        found = doctor(alpha)
        assert f"{HOST}:{stranger.port}" in found["other_mesh"]
        assert f"{HOST}:{second.port}" in found["name_duplicate"]
        theirs.wait("the seed to be given up", again, lambda: "seed_silent" in doctor(again))
        lonely = doctor(again)
        assert f"{HOST}:{alpha.port}" in lonely["seed_silent"]
        assert meshd(alpha.socket, "doctor").returncode == 1


def test_metrics_of_a_real_daemon_have_one_line_a_sample(mesh: Mesh) -> None:
    alpha = mesh.start("alpha")
    connection = UnixConnection(alpha.socket)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    samples = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    names = [name for name, _ in samples]
    assert len(set(names)) == len(names)
    assert all(float(value) >= 0 for _, value in samples)
    assert 'meshd_datagrams_dropped_total{reason="other_mesh"}' in names
    assert "meshd_storage_writes_total" in names


# -- without a daemon --------------------------------------------------------------------------------------


def findings(config: Path) -> tuple[int, dict[str, str]]:
    done = subprocess.run(
        [*MESHD, "--config", str(config), "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    told = json.loads(done.stdout)
    assert told["daemon"] is False
    return done.returncode, {row["code"]: row["says"] for row in told["findings"]}


def written(folder: Path, port: int, http_port: int, more: str = "") -> Path:
    config = folder / "meshd.toml"
    config.write_text(
        f'[node]\nstate_dir = "{folder / "state"}"\n[listen]\nhost = "{HOST}"\nport = {port}\n'
        f'[http]\nport = {http_port}\nsocket = "{folder / "meshd.sock"}"\n{more}'
    )
    return config


def test_without_keys_it_says_so(tmp_path: Path) -> None:
    status, found = findings(written(tmp_path, 0, 0))
    assert status == 2
    assert {"daemon_down", "no_identity"} <= found.keys()
    assert "port_taken" not in found


def test_a_wrong_configuration_is_a_finding(tmp_path: Path) -> None:
    status, found = findings(written(tmp_path, 0, 0, "[gossip]\npreste = 'lan'\n"))
    assert status == 2
    assert "preset" in found["config_wrong"]


def test_taken_ports_are_named_and_free_ones_are_left_free(mesh: Mesh) -> None:
    folder = mesh.init("node")
    port, http_port = free_port(), free_port()
    config = written(folder, port, http_port)
    _, found = findings(config)
    assert found.keys() & {"port_taken", "no_identity", "disk_refuses"} == set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((HOST, port))
        _, found = findings(config)
    assert str(port) in found["port_taken"]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind((HOST, http_port))
        taken.listen()
        _, found = findings(config)
    assert str(http_port) in found["port_taken"]
    assert list((folder / "state").glob(".doctor.*")) == []
