"""Who may use what, how far it goes, and what is written down about it: three real daemons and one relay."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.shell.support_streams import peer, trio_test
from tests.support_daemons import HOST, Daemon, Mesh

from meshd.core.frames import CallHeader
from meshd.orchestrate.callers import Caller, Passports
from meshd.shell.streams import RemoteRefused
from meshd.trust.certificates import Role
from meshd.trust.identity import Identity, load_identity
from meshd.trust.keys import verify
from meshd_cms import node_id_text
from meshd_plugins.api import Operation, Privacy, Request, Value

MESHD = [sys.executable, "-m", "meshd"]
ECHO = "computation.gpt/echo"
RULES = """
[access]
default_privacy = "lan"
[[access.rules]]
name = "computation.gpt/*"
callers = ["alpha"]
effect = "allow"
comment = "alpha asks for all of us"
"""


class Trio:
    """alpha may use the echo of beta, gamma may not; alpha and gamma have no rules."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.alpha = mesh.start("alpha")
        self.beta = mesh.start("beta", plugins=["echo"], sections=RULES)
        self.gamma = mesh.start("gamma")
        for daemon in (self.alpha, self.gamma):
            mesh.wait_for_capability(daemon, ECHO)
        mesh.wait_for_members(self.beta, 3)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with Mesh(tmp_path_factory.mktemp("access"), command=MESHD) as mesh:
        yield Trio(mesh)


def meshd(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*MESHD, "--socket", str(daemon.socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def trail(daemon: Daemon, **wanted: str) -> list[dict[str, Any]]:
    query = "&".join(f"{key}={value}" for key, value in wanted.items())
    lines: list[dict[str, Any]] = daemon.get(f"/mesh/v1/audit?{query}")["audit"]
    return lines


def last(daemon: Daemon) -> str:
    """The number of the last line."""
    return str(max((line["n"] for line in trail(daemon)), default=0))


def identity(daemon: Daemon) -> Identity:
    return load_identity(daemon.folder / "state")


def test_who_serves_refuses_although_the_askers_own_rules_allow(three: Trio) -> None:
    assert meshd(three.alpha, "ask", ECHO, "hello").stdout == "hello\n"
    refused = meshd(three.gamma, "ask", ECHO, "hello")
    assert refused.returncode == 5
    assert "of the rules about it (1) none allows" in refused.stderr
    assert meshd(three.gamma, "acl", "check", ECHO).returncode == 0  # as far as gamma knows


def test_the_decision_is_explained_where_it_is_made(three: Trio) -> None:
    there = meshd(three.gamma, "acl", "check", ECHO, "--at", "beta", "--json")
    told = json.loads(there.stdout)
    assert (there.returncode, told["allowed"], told["served_by"]) == (5, False, "beta")
    assert [(step["at"], step["allowed"]) for step in told["steps"]] == [
        ("gamma", True),
        ("beta", True),
        ("beta", True),
        ("beta", False),
    ]
    here = meshd(three.beta, "acl", "check", ECHO, "--caller", "alpha", "--privacy", "lan")
    assert here.returncode == 0
    assert "rule 1 (computation.gpt/*) allows it" in here.stdout
    assert meshd(three.beta, "acl", "check", ECHO, "--caller", "key:phone").returncode == 5
    listed = meshd(three.beta, "acl", "list")
    assert "alpha asks for all of us" in listed.stdout
    assert "names no class is lan" in listed.stderr


def test_what_is_local_never_leaves_and_what_left_is_in_both_trails(three: Trio) -> None:
    alpha, beta = three.alpha, three.beta
    before = last(alpha), last(beta)
    served_before = beta.get("/mesh/v1/status")["counters"]["streams"]["calls_served"]
    for name in (ECHO, "auto", "computation.gpt/*"):
        kept = meshd(alpha, "ask", "--privacy", "local", name, "the secret prompt 37 * 43")
        assert kept.returncode == 4
    assert trail(alpha, after=before[0]) == []
    assert trail(beta, after=before[1]) == []
    assert beta.get("/mesh/v1/status")["counters"]["streams"]["calls_served"] == served_before
    assert meshd(alpha, "ask", "--privacy", "lan", ECHO, "the secret prompt").returncode == 0
    [left] = trail(alpha, after=before[0])
    [served] = trail(beta, after=before[1])
    caller = str(Caller(identity(alpha).node_id))
    common = {"capability": ECHO, "privacy": "lan", "caller": caller, "outcome": "ok"}
    assert left == {
        **common,
        **{key: left[key] for key in ("n", "at", "bytes", "request")},
        "kind": "left",
        "to": node_id_text(identity(beta).node_id),
        "to_name": "beta",
        "pieces": 1,
    }
    assert served == {
        **common,
        **{key: served[key] for key in ("n", "at", "bytes", "pieces")},
        "kind": "served",
        "request": left["request"],
        "to": node_id_text(identity(alpha).node_id),
        "to_name": "alpha",
    }
    assert left["bytes"] > len("the secret prompt") < served["bytes"]
    for daemon in (alpha, beta):
        kept_files = b"".join(
            path.read_bytes() for path in (daemon.folder / "state" / "audit").iterdir()
        )
        assert left["request"].encode() in kept_files
        assert b"secret" not in kept_files


def test_the_trail_is_read_and_checked_by_the_command(three: Trio) -> None:
    assert meshd(three.alpha, "ask", ECHO, "hello").returncode == 0
    shown = meshd(three.alpha, "audit", "--since", "10m", "--to", "beta", "--class", "lan")
    assert "left" in shown.stdout
    assert "local@" in shown.stdout
    lines = meshd(three.alpha, "audit", "--json", "--kind", "left").stdout.splitlines()
    assert all(json.loads(line)["to_name"] == "beta" for line in lines)
    assert "whole" in meshd(three.alpha, "audit", "verify").stdout
    assert trail(three.gamma, kind="left")[-1]["outcome"] == "access"
    path = next((three.gamma.folder / "state" / "audit").glob("*.jsonl"))
    text = path.read_text()
    path.write_text(text.replace('"outcome":"access"', '"outcome":"ok"', 1))
    changed = meshd(three.gamma, "audit", "verify")
    path.write_text(text)
    assert changed.returncode == 1
    assert "not as it was written" in changed.stderr
    folder = str(three.gamma.folder / "state" / "audit")
    assert meshd(three.gamma, "audit", "verify", "--folder", folder).returncode == 0


def word_of(origin: Identity, request: Request, principal: str = "local") -> CallHeader:
    """A call as the origin sends it, in whoever's hands it is."""
    passports = Passports(
        origin.mesh_id, origin.node_id, origin.signer, verify, lambda _: None, time.time
    )
    caller = Caller(origin.node_id, principal)
    return CallHeader(
        request.request_id,
        request.name,
        ECHO,
        "run",
        caller=origin.node_id,
        principal=principal,
        passport=passports.of(caller, request),
        privacy=int(request.privacy),
        remaining_s=10.0,
        hops=1,
    )


def test_a_relay_can_pass_on_what_alpha_asked_and_nothing_of_its_own(three: Trio) -> None:
    alpha, beta = identity(three.alpha), identity(three.beta)
    relay = three.mesh.admit(three.mesh.folder / "relay" / "state")
    request = Request("relayed-1", ECHO, Operation.RUN, {}, privacy=Privacy.LAN, deadline_s=30.0)
    true = word_of(alpha, request)
    forged: Mapping[str, CallHeader] = {
        "its own wish": replace(true, caller=b"", principal="", passport=b""),
        "no passport": replace(true, passport=b""),
        "another principal": replace(true, principal="key:phone"),
        "another name": replace(true, name="computation.gpt/*"),
        "a wider class": replace(true, privacy=int(Privacy.MESH)),
        "another origin": replace(true, caller=beta.node_id),
        "signed by itself": replace(word_of(relay, request), caller=alpha.node_id),
    }

    @trio_test
    async def body() -> None:
        async with peer(relay) as here:

            async def call(header: CallHeader) -> list[Value]:
                said: list[Value] = []
                streams, body = here.streams, {"input": "hello"}
                address = (HOST, three.beta.port)
                async with streams.call(beta.node_id, address, header, body) as asked:
                    while (value := await asked.receive()) is not None:
                        said.append(value)
                return said

            assert await call(true) == [{"t": "hello"}]
            for what, header in forged.items():
                with pytest.raises(RemoteRefused) as caught:
                    await call(header)
                expected = "access" if what == "its own wish" else "caller"
                assert caught.value.code == expected, what

    before = last(three.beta)
    body()
    lines = trail(three.beta, after=before)
    assert [line["outcome"] for line in lines] == ["ok", "access", *["caller"] * 6]
    assert lines[0]["caller"] == str(Caller(alpha.node_id))
    assert {line["to"] for line in lines} == {node_id_text(relay.node_id)}


def test_an_observer_offers_nothing_and_serves_nothing(three: Trio) -> None:
    state = three.mesh.folder / "delta" / "state"
    three.mesh.admit(state, Role.OBSERVER)
    delta = three.mesh.start("delta", plugins=["echo"])
    three.mesh.wait_for_members(three.alpha, 4)
    three.mesh.wait_for_capability(delta, ECHO)  # it sees
    rows = three.alpha.get("/mesh/v1/capabilities")["capabilities"]
    assert {row["node_name"] for row in rows if row["name"] == ECHO} == {"beta"}
    view = delta.get("/mesh/v1/access")
    assert view["role"] == "observer"
    there = meshd(three.alpha, "acl", "check", ECHO, "--at", "delta")
    assert there.returncode == 5
    assert "observer" in there.stdout


def test_a_rule_that_is_misspelt_keeps_the_daemon_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "meshd.toml"
    path.write_text('[[access.rules]]\nname = "data.gpt/x"\neffect = "dney"\n')
    command = [*MESHD, "--config", str(path), "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert f"{path}, line 3: rule 1: effect = 'dney': did you mean \"deny\"?" in done.stderr
