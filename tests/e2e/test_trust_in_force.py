"""Three daemons: certificates renew, the datagram key changes under load, and a revoked node is out for good.

The tests share the daemons and run in order: each begins with the mesh as the one before it left it.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from tests.support_daemons import Daemon, Mesh, UnixConnection

from meshd.trust.identity import admit, load_identity

MESHD = [sys.executable, "-m", "meshd"]
SHORT = "[trust]\ncertificate_days = 0.00005\n"  # 4.3 s: renewed after 3
DEADLINE_S = 60.0
STOPPED_FOR_GOOD = 78


@dataclass
class Three:
    """The founder, a member that was off for a month, and one to be revoked."""

    mesh: Mesh
    alpha: Daemon
    beta: Daemon
    gamma: Daemon


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    folder = tmp_path_factory.mktemp("trust")
    with Mesh(folder, command=MESHD) as mesh:
        alpha = mesh.start("alpha", sections=SHORT, wait=False)
        mesh.wait("alpha", alpha, lambda: bool(alpha.get("/mesh/v1/status")))
        founder = load_identity(folder / "alpha" / "state")
        (folder / "beta").mkdir()
        admit(founder, folder / "beta" / "state", now_s=time.time() - 30 * 86_400.0)
        beta = mesh.start("beta", plugins=["echo"])
        gamma = mesh.start("gamma", plugins=["echo"])
        for each in (alpha, beta, gamma):
            mesh.wait_for_members(each, 3)
        yield Three(mesh, alpha, beta, gamma)


def meshd(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*MESHD, "--socket", str(daemon.socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def trust(daemon: Daemon) -> dict[str, Any]:
    view: dict[str, Any] = daemon.get("/mesh/v1/trust")
    return view


def events(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    lines = [line for line in daemon.log().splitlines() if line.startswith("{")]
    return [each for each in map(json.loads, lines) if each["event"] == event]


def names(daemon: Daemon) -> set[str]:
    return {row["name"] for row in daemon.get("/mesh/v1/peers")["peers"]}


def in_force(daemon: Daemon) -> int:
    [generation] = [k["generation"] for k in trust(daemon)["keys"] if k["state"] == "in force"]
    return int(generation)


class Asking:
    """Asks a capability through a daemon, again and again, in a thread."""

    def __init__(self, daemon: Daemon, target: str) -> None:
        self._daemon = daemon
        self._target = target
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: list[int] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._enough.set()
        self._thread.join(DEADLINE_S)

    def _run(self) -> None:
        body = json.dumps({"target": self._target, "operation": "run", "prompt": "x"})
        while not self._enough.is_set():
            connection = UnixConnection(self._daemon.socket)
            try:
                connection.request("POST", "/mesh/v1/ask", body)
                answer = connection.getresponse()
                last = answer.read().splitlines()[-1]
                done = answer.status == 200 and json.loads(last)["event"] == "answered"
                self.answers.append(200 if done else answer.status or 599)
            except (OSError, http.client.HTTPException):
                self.answers.append(0)
            finally:
                connection.close()


def test_an_expired_node_gets_in_and_certificates_are_renewed_again_and_again(
    three: Three,
) -> None:
    mesh, beta = three.mesh, three.beta
    mesh.wait_for_capability(three.alpha, "computation.gpt/echo", holders=2)
    before = len(events(beta, "certificate.renewed"))
    assert before >= 1
    with Asking(three.alpha, "computation.gpt/echo@beta") as asking:
        mesh.wait("a renewal", beta, lambda: len(events(beta, "certificate.renewed")) > before)
        mesh.wait("an answer", beta, lambda: len(asking.answers) > 1)
    assert set(asking.answers) == {200}
    view = trust(beta)
    assert view["certificate"]["standing"] == "good"
    assert view["certificate"]["renewed_by"] == "alpha"
    assert view["issuers"] == ["alpha"]
    assert view["role"] == "member"


def test_the_key_changes_under_load_and_nothing_is_lost(three: Three) -> None:
    mesh = three.mesh
    with Asking(three.alpha, "computation.gpt/echo@beta") as asking:
        rotated = meshd(three.alpha, "keys", "rotate", "--json")
        assert json.loads(rotated.stdout) == {"key_generation": 1}
        for each in (three.alpha, three.beta, three.gamma):
            mesh.wait("generation 1", each, lambda each=each: in_force(each) == 1)
    assert set(asking.answers) == {200}
    for each in (three.alpha, three.beta, three.gamma):
        assert names(each) == {"alpha", "beta", "gamma"}
        assert events(each, "member.suspected") == []
        status = each.get("/mesh/v1/status")
        assert status["counters"]["dropped"]["bad_seal"] == 0
        assert status["trust"]["key_generation"] == 1
    mesh.wait(
        "who uses it to be known",
        three.alpha,
        lambda: trust(three.alpha)["keys"][0]["used_by"] == ["beta", "gamma"],
    )
    assert "1" in meshd(three.beta, "keys", "list").stdout


def test_a_member_cannot_revoke_and_is_told_who_can(three: Three) -> None:
    refused = meshd(three.beta, "revoke", "gamma", "--yes")
    assert refused.returncode == 5
    assert "do it on alpha" in refused.stderr
    assert "gamma" in names(three.alpha)


def test_what_makes_no_sense_is_refused_with_a_reason(three: Three) -> None:
    own = meshd(three.alpha, "revoke", "alpha", "--yes")
    assert own.returncode == 2
    assert "this node itself and the last issuer" in own.stderr
    unknown = meshd(three.alpha, "revoke", "nobody", "--yes")
    assert unknown.returncode == 4
    assert "`meshd peers` lists them" in unknown.stderr
    asked = meshd(three.alpha, "revoke", "gamma")  # nobody is there to say yes
    assert asked.returncode == 1
    assert "cannot come back" in asked.stderr
    assert names(three.alpha) == {"alpha", "beta", "gamma"}


def test_a_revoked_node_is_out_everywhere_and_stops(three: Three) -> None:
    mesh, gamma = three.mesh, three.gamma
    revoked = meshd(three.alpha, "revoke", "gamma", "--reason", "left on a bus", "--yes")
    assert revoked.returncode == 0, revoked.stderr
    assert "is revoked; datagram key generation 2 is in force" in revoked.stdout
    for each in (three.alpha, three.beta):
        mesh.wait("gamma to be gone", each, lambda each=each: names(each) == {"alpha", "beta"})
        [told] = events(each, "node.revoked")
        assert (told["name"], told["reason"]) == ("gamma", "left on a bus")
        rows = trust(each)["revoked"]
        assert [(row["name"], row["by"], row["reason"]) for row in rows] == [
            ("gamma", "alpha", "left on a bus")
        ]
    assert gamma.process.wait(DEADLINE_S) == STOPPED_FOR_GOOD
    assert "left on a bus. It stops now" in gamma.log()
    shown = meshd(three.beta, "trust").stdout
    assert "left on a bus" in shown


def test_it_cannot_come_back_after_restarts_of_others_and_of_itself(three: Three) -> None:
    mesh, beta, gamma = three.mesh, three.beta, three.gamma
    mesh.wait("the key to be on disk", beta, lambda: in_force(beta) == 2)
    beta.process.kill()
    beta.process.wait(DEADLINE_S)
    beta = mesh.launch("beta", beta.port, beta.http_port)
    mesh.wait_for_members(beta, 2)
    assert names(beta) == {"alpha", "beta"}
    assert trust(beta)["revoked"][0]["name"] == "gamma"
    again = mesh.launch("gamma", gamma.port, gamma.http_port, wait=False)
    assert again.process.wait(DEADLINE_S) == STOPPED_FOR_GOOD
    # And with what it was told deleted: it asks its old peers, who tell it again.
    shutil.rmtree(Path(gamma.folder) / "state" / "trust")
    again = mesh.launch("gamma", gamma.port, gamma.http_port, wait=False)
    assert again.process.wait(DEADLINE_S) == STOPPED_FOR_GOOD
    assert names(three.alpha) == names(beta) == {"alpha", "beta"}
