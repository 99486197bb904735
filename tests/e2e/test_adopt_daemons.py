"""Real daemons adopt a server that runs beside them, and never one another."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from tests.shell.support_adopt_servers import FakeServer, llama_server, running
from tests.support_daemons import Daemon, Mesh, free_port

NAME = "knowledge.gpt/general"
MESHD = [sys.executable, "-m", "meshd"]
LOCAL = '[gossip]\npreset = "local"\n'


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, command=MESHD) as daemons:
        yield daemons


@contextmanager
def in_thread(server: FakeServer, port: int = 0) -> Iterator[FakeServer]:
    """Serve beside the test, which blocks."""
    ready, tokens = threading.Event(), list[trio.lowlevel.TrioToken]()
    leave: list[trio.Event] = []

    async def main() -> None:
        async with running(server, port):
            tokens.append(trio.lowlevel.current_trio_token())
            leave.append(trio.Event())
            ready.set()
            await leave[0].wait()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(20)
        yield server
    finally:
        tokens[0].run_sync_soon(leave[0].set)
        thread.join()


def adopting(url: str) -> str:
    return f'[[plugins.adopt.servers]]\nurl = "{url}"\npoll_s = 0.2\nmeasure = false\n'


def ask(daemon: Daemon, prompt: str) -> subprocess.CompletedProcess[str]:
    target = f"{NAME}?x_engine=llama-server"
    command = [*MESHD, "--socket", str(daemon.socket), "ask", target, prompt]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def findings(daemon: Daemon) -> dict[str, str]:
    rows = daemon.get("/mesh/v1/doctor")["findings"]
    return {row["code"]: row["says"] for row in rows}


def capabilities(daemon: Daemon) -> list[str]:
    rows = daemon.get("/mesh/v1/capabilities")["capabilities"]
    return [row["name"] for row in rows if row["state"] == "alive"]


def test_an_adopted_model_answers_the_whole_mesh_until_it_dies(mesh: Mesh) -> None:
    entry = mesh.start("entry", sections=LOCAL)
    with in_thread(llama_server()) as server:
        board = mesh.start("board", plugins=["adopt"], tables=adopting(server.url), sections=LOCAL)
        mesh.wait_for_capability(entry, NAME)
        answer = ask(entry, "Hi")
        assert answer.returncode == 0, answer.stderr
        assert "Hello" in answer.stdout
        assert "plugin_complains" not in findings(board)
        port = server.port
    mesh.wait("its withdrawal", entry, lambda: NAME not in capabilities(entry))
    assert f"127.0.0.1:{port}" in findings(board)["plugin_complains"]
    with in_thread(llama_server(), port):
        mesh.wait_for_capability(entry, NAME)


def test_a_server_on_a_well_known_port_is_found(mesh: Mesh) -> None:
    with in_thread(llama_server()) as server:
        silent = free_port()
        tables = f"[plugins.adopt]\nports = [{silent}, {server.port}]\n"
        board = mesh.start("board", plugins=["adopt"], tables=tables, sections=LOCAL)
        mesh.wait_for_capability(board, NAME)
        assert "plugin_complains" not in findings(board)
        assert not [line for line in board.log().splitlines() if "adopt.server_lost" in line]


def test_a_daemon_does_not_adopt_another(mesh: Mesh) -> None:
    first = mesh.start("first", plugins=["echo"], sections=LOCAL)
    tables = adopting(f"http://127.0.0.1:{first.http_port}")
    second = mesh.start("second", plugins=["adopt"], tables=tables, sections=LOCAL)
    mesh.wait("the refusal", second, lambda: "would be a loop" in json.dumps(findings(second)))
    assert NAME not in capabilities(second)
