"""A laptop that is no node of the mesh asks a node over the network: keys, TLS, and nothing without them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.support_namespaces import (
    HTTP_PORT,
    Bridge,
    Host,
    LanMesh,
    why_unavailable,
)
from tests.support_daemons import Daemon

from meshd.cli.failures import Exit

pytestmark = pytest.mark.namespaces

MESHD = [sys.executable, "-m", "meshd"]
ECHO = "computation.gpt/echo"
DEADLINE_S = 30.0

# What a program of somebody's does on the laptop; it prints what it found.
PROGRAM = """
import http.client, json, ssl, sys
from openai import AuthenticationError, DefaultHttpxClient, OpenAI
host, port, key, certificate = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
trust = ssl.create_default_context(cafile=certificate)
def client(key):
    return OpenAI(base_url=f"https://{host}:{port}/v1", api_key=key, max_retries=0,
                  http_client=DefaultHttpxClient(verify=trust))
found = {}
with client(key) as good:
    answer = good.chat.completions.create(model="computation.gpt/echo", messages=[{"role": "user", "content": "Hi"}])
    found["answer"] = answer.choices[0].message.content
with client("none") as bad:
    try:
        bad.models.list()
    except AuthenticationError as error:
        found["refused"] = error.body["code"]
def raw(connection, headers):
    connection.request("GET", "/mesh/v1/status", headers=headers)
    answer = connection.getresponse()
    return [answer.status, json.loads(answer.read()).get("error", {}).get("code")]
secure = lambda: http.client.HTTPSConnection(host, port, context=trust, timeout=10)
found["plain"] = raw(http.client.HTTPConnection(host, port, timeout=10), {})
found["rebound"] = raw(secure(), {"Host": "evil.example", "Authorization": "Bearer " + key})
found["page"] = raw(secure(), {"Origin": "https://evil.example", "Authorization": "Bearer " + key})
found["read"] = raw(secure(), {"Authorization": "Bearer " + key})
found["leave"] = raw(secure(), {})
print(json.dumps(found))
"""


@dataclass(slots=True)
class Scene:
    """A node that listens for everybody, a key of it, and a laptop."""

    node: Daemon
    node_host: Host
    laptop: Host
    key: str
    pin: str
    home: Path  # on the laptop
    refused: str  # what the node said when there was no key

    @property
    def url(self) -> str:
        return f"https://{self.node_host.address}:{HTTP_PORT}"

    def on_laptop(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop, which knows of the node what its client.toml says."""
        environment = {**os.environ, "XDG_CONFIG_HOME": str(self.home), "HOME": str(self.home)}
        return subprocess.run(
            self.laptop.command(*command),
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def on_node(self, *arguments: str) -> str:
        """What a `meshd` command says on the node."""
        return command_of(self.node.folder, *arguments).stdout


def command_of(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MESHD, "--config", str(folder / "meshd.toml"), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    reason = why_unavailable(Bridge)
    if reason is not None:
        pytest.skip(reason)
    tmp_path = tmp_path_factory.mktemp("laptop")
    with Bridge() as lan, LanMesh(tmp_path / "mesh") as mesh:
        host, laptop = lan.add_host(), lan.add_host()
        folder = mesh.init("board")
        (folder / "meshd.toml").write_text(
            f"""[node]
name = "board"
state_dir = "{folder / "state"}"
[discovery]
mdns = false
[http]
host = "0.0.0.0"
socket = "{folder / "meshd.sock"}"
[plugins]
enable = ["echo"]
"""
        )
        refused = command_of(folder, "run")
        assert refused.returncode == 78
        made = command_of(folder, "key", "create", "laptop", "--scope", "ask,read")
        assert made.returncode == 0, made.stderr
        node = mesh.boot(host, "board")
        mesh.wait_for_capability(node, ECHO)
        home = tmp_path / "home"
        (home / "meshd").mkdir(parents=True)
        pin = node.get("/mesh/v1/status")["http_pin"]
        yield Scene(node, host, laptop, made.stdout.strip(), pin, home, refused.stderr)


def write_client(scene: Scene, **fields: str) -> None:
    path = scene.home / "meshd" / "client.toml"
    path.write_text("".join(f'{name} = "{value}"\n' for name, value in fields.items()))
    path.chmod(0o600)


def test_without_a_key_the_node_does_not_start(scene: Scene) -> None:
    assert "there is no API key: make one with `meshd key create NAME`" in scene.refused
    assert len(scene.refused.splitlines()) == 1


def test_the_command_line_asks_from_a_laptop(scene: Scene) -> None:
    write_client(scene, url=scene.url, key=scene.key, fingerprint=scene.pin)
    asked = scene.on_laptop(*MESHD, "ask", ECHO, "hello", "there")
    assert (asked.returncode, asked.stdout) == (0, "hello there\n"), asked.stderr
    refused = scene.on_laptop(*MESHD, "leave")
    assert refused.returncode == Exit.REFUSED
    assert "takes a key with the scope admin" in refused.stderr
    other_pin = scene.pin[:10] + ("A" if scene.pin[10] != "A" else "B") + scene.pin[11:]
    write_client(scene, url=scene.url, key=scene.key, fingerprint=other_pin)
    in_between = scene.on_laptop(*MESHD, "ask", ECHO, "hello")
    assert in_between.returncode == Exit.UNREACHABLE
    assert "is not the daemon that is known" in in_between.stderr
    assert scene.key not in in_between.stderr


def test_programs_on_a_laptop(scene: Scene) -> None:
    certificate = scene.node.folder / "state" / "edge" / "certificate.pem"
    arguments = [scene.node_host.address, str(HTTP_PORT), scene.key, str(certificate)]
    done = scene.on_laptop(sys.executable, "-c", PROGRAM, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "answer": "Hi",
        "refused": "invalid_api_key",
        "plain": [400, "https_required"],
        "rebound": [403, "host_not_allowed"],
        "page": [403, "origin_not_allowed"],
        "read": [200, None],
        "leave": [401, "missing_api_key"],
    }


def test_the_key_is_seen_and_can_be_taken_back(scene: Scene) -> None:
    """Last: what comes before needs the key."""
    write_client(scene, url=scene.url, key=scene.key, fingerprint=scene.pin)
    assert scene.on_laptop(*MESHD, "caps").returncode == 0
    (listed,) = scene.node.get("/mesh/v1/keys")["keys"]
    assert (listed["name"], listed["scopes"]) == ("laptop", ["ask", "read"])
    assert listed["uses"] >= 1
    assert listed["last_used_s"]
    assert re.search(r"laptop +ask, read", scene.on_node("key", "list"))
    assert scene.on_node("key", "revoke", "laptop") == "revoked laptop\n"
    refused = scene.on_laptop(*MESHD, "caps")
    assert refused.returncode == Exit.REFUSED
    assert "was revoked" in refused.stderr
    assert scene.key not in scene.node.log()
