"""Real daemons, each its own process, on the loopback interface: what a person relies on, and bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support_daemons import HOST, Daemon, Mesh, UnixConnection, free_port

MESHD = [sys.executable, "-m", "meshd"]
ECHO = "computation.gpt/echo"
ECHO_TABLE = "[plugins.echo]\nslots = 4\n"
LOCAL = '[gossip]\npreset = "local"\n'


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, command=MESHD) as running:
        yield running


def meshd(*arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MESHD, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def ask(daemon: Daemon, target: str, prompt: str, *more: str) -> subprocess.CompletedProcess[str]:
    return meshd("--socket", str(daemon.socket), "ask", *more, target, prompt)


def events(daemon: Daemon, target: str, prompt: str) -> list[dict[str, Any]]:
    done = ask(daemon, target, prompt, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def peer_states(daemon: Daemon) -> dict[str, str]:
    return {row["name"]: row["state"] for row in daemon.get("/mesh/v1/peers")["peers"]}


def test_a_question_is_answered_by_the_peer_that_can(mesh: Mesh) -> None:
    entry = mesh.start("entry")
    peer = mesh.start("peer", plugins=["arithmetic", "hardware"])
    mesh.wait_for_capability(entry, "computation.gpt/arithmetic")
    told = events(entry, "knowledge.gpt/arithmetic", "What is 17 + 25?")
    kinds = [event["event"] for event in told]
    assert kinds[0] == "planned"
    assert kinds[-1] == "answered"
    routed = next(event for event in told if event["event"] == "routed")
    assert routed["node_name"] == peer.name
    assert routed["reason"]
    assert "42" in "".join(event.get("text", "") for event in told if event["event"] == "piece")


def test_daemons_find_each_other_by_mdns_alone(mesh: Mesh) -> None:
    one = mesh.start("one", mdns=True)
    two = mesh.start("two", mdns=True)
    mesh.wait_for_members(one, 2)
    mesh.wait_for_members(two, 2)
    for daemon in (one, two):
        status = daemon.get("/mesh/v1/status")
        assert status["discovery"]["seeds"] == []
        assert status["discovery"]["remembered"] == []


def test_a_killed_daemon_is_noticed_and_another_holder_answers(mesh: Mesh) -> None:
    entry = mesh.start("entry", sections=LOCAL)
    holders = [
        mesh.start(name, plugins=["echo"], tables=ECHO_TABLE, sections=LOCAL)
        for name in ("one", "two")
    ]
    mesh.wait_for_capability(entry, ECHO, holders=2)
    victim = holders[0]
    victim.process.kill()
    victim.process.wait()
    mesh.wait("the kill to be noticed", entry, lambda: peer_states(entry)["one"] != "alive")
    told = events(entry, ECHO, "still there?")
    assert [e["node_name"] for e in told if e["event"] == "routed"] == ["two"]


def test_a_request_in_flight_to_a_killed_peer_goes_to_another_before_its_first_piece(
    mesh: Mesh,
) -> None:
    entry = mesh.start("entry", sections=LOCAL)
    slow = "[plugins.echo]\nslots = 1\ndelay_s = 3.0\n"
    peers = {
        name: mesh.start(name, plugins=["echo"], tables=slow, sections=LOCAL)
        for name in ("one", "two")
    }
    mesh.wait_for_capability(entry, ECHO, holders=2)
    command = [*MESHD, "--socket", str(entry.socket), "ask", "--json", ECHO, "hello"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        told: list[dict[str, Any]] = []
        for line in asking.stdout:
            told.append(json.loads(line))
            if told[-1]["event"] == "routed" and told[-1]["attempt"] == 1:
                peers[told[-1]["node_name"]].process.kill()
    routed = [event for event in told if event["event"] == "routed"]
    assert len({event["node_name"] for event in routed}) == 2
    assert told[-1]["event"] == "answered"


def test_a_daemon_that_leaves_has_left_and_not_failed(mesh: Mesh) -> None:
    entry = mesh.start("entry")
    peer = mesh.start("peer")
    mesh.wait_for_members(entry, 2)
    assert meshd("--socket", str(peer.socket), "leave").returncode == 0
    assert peer.process.wait(15) == 0
    mesh.wait("the leave to be known", entry, lambda: peer_states(entry)["peer"] == "left")


def test_sigterm_ends_a_daemon_cleanly_and_it_comes_back_with_its_identity(mesh: Mesh) -> None:
    entry = mesh.start("entry")
    peer = mesh.start("peer", plugins=["echo"], tables=ECHO_TABLE)
    mesh.wait_for_capability(entry, ECHO)
    before = peer.get("/mesh/v1/status")
    peer.process.send_signal(signal.SIGTERM)
    assert peer.process.wait(15) == 0
    assert not peer.socket.exists()
    mesh.wait("the leave", entry, lambda: peer_states(entry)["peer"] == "left")
    again = mesh.launch("peer", peer.port, peer.http_port)
    mesh.wait_for_capability(entry, ECHO)
    after = again.get("/mesh/v1/status")
    assert after["node"] == before["node"]
    assert after["epoch"] > before["epoch"]


def test_sigterm_lets_a_running_request_finish(mesh: Mesh) -> None:
    peer = mesh.start("peer", plugins=["echo"], tables="[plugins.echo]\nslots = 1\ndelay_s = 1.0\n")
    command = [*MESHD, "--socket", str(peer.socket), "ask", "--json", ECHO, "finish me"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert json.loads(asking.stdout.readline())["event"] == "planned"
        peer.process.send_signal(signal.SIGTERM)
        told = [json.loads(line) for line in asking.stdout]
    assert told[-1]["event"] == "answered"
    assert peer.process.wait(15) == 0


def test_a_restart_remembers_its_peers_without_seeds_or_mdns(mesh: Mesh) -> None:
    first = mesh.start("first")
    second = mesh.start("second")
    mesh.wait_for_members(second, 2)
    second.process.send_signal(signal.SIGTERM)
    second.process.wait(15)
    config = second.folder / "meshd.toml"
    config.write_text(config.read_text().replace(f'seeds = ["{HOST}:{first.port}"]', "seeds = []"))
    again = mesh.launch("second", second.port, second.http_port)
    mesh.wait_for_members(again, 2)


# -- bad input ---------------------------------------------------------------------------------------------


def test_without_a_mesh_the_daemon_does_not_start(tmp_path: Path) -> None:
    done = meshd("run", "--state-dir", str(tmp_path / "nothing"))
    assert done.returncode == 78
    assert "meshd init" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_configuration_key_names_the_nearest(mesh: Mesh) -> None:
    folder = mesh.init("node")
    config = folder / "bad.toml"
    config.write_text(f'[node]\nstate_dir = "{folder / "state"}"\n[listen]\nprot = 1\n')
    done = meshd("--config", str(config), "run")
    assert done.returncode != 0
    assert "prot" in done.stderr
    assert "port" in done.stderr.replace("prot", "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["udp", "tcp", "http"])
def test_a_port_in_use_is_named_with_what_to_do(mesh: Mesh, kind: str) -> None:
    folder = mesh.init("node")
    port = free_port()
    taken = socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
    )
    with taken:
        taken.bind((HOST, port))
        if kind != "udp":
            taken.listen()
        ports = (0, port) if kind == "http" else (port, 0)
        config = folder / "meshd.toml"
        config.write_text(
            f'[node]\nstate_dir = "{folder / "state"}"\n[listen]\nhost = "{HOST}"\n'
            f"port = {ports[0]}\n[http]\nport = {ports[1]}\n"
        )
        done = meshd("--config", str(config), "run")
    assert done.returncode == 78
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_noise_on_the_gossip_port_is_counted_and_harmless(mesh: Mesh) -> None:
    daemon = mesh.start("node")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
        for size in (0, 1, 30, 57, 58, 400, 1400, 1401, 9000):
            noise.sendto(os.urandom(size), (HOST, daemon.port))

    def counted() -> bool:
        dropped = daemon.get("/mesh/v1/status")["counters"]["dropped"]
        return sum(count for reason, count in dropped.items() if reason != "opened") >= 9

    mesh.wait("the noise to be counted", daemon, counted)
    assert peer_states(daemon) == {"node": "alive"}


def test_noise_on_the_stream_port_is_harmless(mesh: Mesh) -> None:
    entry = mesh.start("entry")
    peer = mesh.start("peer", plugins=["echo"], tables=ECHO_TABLE)
    mesh.wait_for_capability(entry, ECHO)
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
        # Who hangs up with some of it unread resets the connection, at any point of this.
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection((HOST, peer.port), timeout=10) as noise,
        ):
            noise.sendall(data)
            noise.shutdown(socket.SHUT_WR)
            while noise.recv(4096):
                pass
    assert events(entry, ECHO, "still fine")[-1]["event"] == "answered"


def test_a_peer_of_another_mesh_is_kept_out_and_counted(tmp_path: Path) -> None:
    with Mesh(tmp_path / "ours", command=MESHD) as ours, Mesh(tmp_path / "theirs") as theirs:
        mine = ours.start("mine")
        stranger = theirs.start("stranger", sections="")
        config = stranger.folder / "meshd.toml"
        stranger.process.send_signal(signal.SIGTERM)
        stranger.process.wait(15)
        config.write_text(
            config.read_text().replace("seeds = []", f'seeds = ["{HOST}:{mine.port}"]')
        )
        again = theirs.launch("stranger", stranger.port, stranger.http_port)

        def counted() -> bool:
            return bool(mine.get("/mesh/v1/status")["counters"]["dropped"]["other_mesh"])

        ours.wait("the stranger to be counted", mine, counted)
        assert peer_states(mine) == {"mine": "alive"}
        assert peer_states(again) == {"stranger": "alive"}


def test_malformed_and_unknown_names_say_what_is_near(mesh: Mesh) -> None:
    daemon = mesh.start("node", plugins=["arithmetic"])
    mesh.wait_for_capability(daemon, "computation.gpt/arithmetic")
    malformed = ask(daemon, "computaton.gpt/arithmetic", "1 + 1")
    assert malformed.returncode == 2
    assert "column 1" in malformed.stderr
    assert "computation" in malformed.stderr
    unknown = ask(daemon, "computation.gpt/arithmetik", "1 + 1")
    assert unknown.returncode == 4
    assert "computation.gpt/arithmetic" in unknown.stderr


def test_a_request_over_the_limit_is_refused_and_the_node_goes_on(mesh: Mesh) -> None:
    daemon = mesh.start("node", plugins=["echo"], tables=ECHO_TABLE)
    mesh.wait_for_capability(daemon, ECHO)
    body = json.dumps({"model": ECHO, "messages": [{"role": "user", "content": "x" * 9_000_000}]})
    connection = UnixConnection(daemon.socket)
    try:
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read())["error"]["code"]
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before the body was read: the status may not be seen by such a client
    finally:
        connection.close()
    assert events(daemon, ECHO, "small")[-1]["event"] == "answered"


def test_a_client_that_goes_away_frees_its_slot_on_the_peer(mesh: Mesh) -> None:
    entry = mesh.start("entry")
    table = "[plugins.echo]\nslots = 1\nchunk_count = 200\ndelay_s = 0.1\n"
    peer = mesh.start("peer", plugins=["echo"], tables=table)
    mesh.wait_for_capability(entry, ECHO)
    command = [*MESHD, "--socket", str(entry.socket), "ask", "--json", ECHO, "long answer " * 50]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        for line in asking.stdout:
            if json.loads(line)["event"] == "piece":
                asking.kill()
                break

    def freed() -> bool:
        return ECHO not in peer.get("/mesh/v1/status")["load"]["capabilities"]

    mesh.wait("the slot to be free", peer, freed, deadline_s=5.0)


def test_a_damaged_snapshot_is_set_aside_and_rebuilt_from_peers(mesh: Mesh) -> None:
    first = mesh.start("first", plugins=["echo"], tables=ECHO_TABLE)
    second = mesh.start("second")
    mesh.wait_for_capability(second, ECHO)
    second.process.send_signal(signal.SIGTERM)
    second.process.wait(15)
    snapshot = next((second.folder / "state").rglob("store.snapshot"))
    snapshot.write_bytes(snapshot.read_bytes()[:-7])
    again = mesh.launch("second", second.port, second.http_port)
    mesh.wait_for_capability(again, ECHO)
    assert list(snapshot.parent.glob("store.snapshot.damaged-*"))
    assert first.process.poll() is None
