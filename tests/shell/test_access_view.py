"""What is shown of rules, decisions and the trail: over the API, and to another node that asks about itself."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from tests.shell.support_fake_mesh import FakeMesh
from tests.shell.support_log import KeptLog
from tests.shell.support_orchestrate import GENERAL, World, asking, saying
from tests.unit.support_cms import MESH, real_signer, real_verify

from meshd.core.decrees import Decree, DecreeKind
from meshd.core.effects import Address
from meshd.core.frames import CallHeader
from meshd.edge.app import build_app
from meshd.edge.context import UNIX_KEY
from meshd.orchestrate.access_guard import Source
from meshd.orchestrate.access_parts import AccessParts, content_bytes
from meshd.orchestrate.access_view import AccessView
from meshd.orchestrate.audit import Audit, Wanted
from meshd.orchestrate.callers import Caller, Passports
from meshd.orchestrate.host import Departure
from meshd.shell.streams import IncomingCall, PeerStreams, PeerUnreachable
from meshd_cms import NodeId
from meshd_plugins.api import BadRequest, CapabilityError, Operation, Privacy, Request, Value

RULES: list[Mapping[str, Value]] = [
    {"name": GENERAL, "callers": ["key:phone"], "effect": "deny", "comment": "not by phone"},
    {"name": GENERAL, "effect": "allow"},
]


@dataclass
class Answer:
    """Plays the whole answer of a peer."""

    trailer: Value

    async def receive(self) -> None:
        await trio.lowlevel.checkpoint()


@dataclass
class Streams:
    """Stands in for `PeerStreams`."""

    trailer: Value = None
    dial: Exception | None = None
    headers: list[CallHeader] = field(default_factory=list)
    bodies: list[Value] = field(default_factory=list)

    @asynccontextmanager
    async def call(
        self, node: NodeId, address: Address, header: CallHeader, body: Value
    ) -> AsyncIterator[Answer]:
        if self.dial is not None:
            raise self.dial
        self.headers.append(header)
        self.bodies.append(body)
        yield Answer(self.trailer)


class Shown:
    """A node that serves GENERAL, with a peer, and its view over HTTP."""

    def __init__(self, folder: Path, *, role: str = "member") -> None:
        self.world = World(rules=RULES)
        self.world.local(GENERAL, saying("a"))
        self.world.peer("pi", GENERAL, saying("b"))
        me = self.world.node("hub")
        self.audit = Audit(
            folder, size_bytes_max=65_536, keep=True, unix_s=time.time, log=KeptLog()
        )
        signer = real_signer(1)
        passports = Passports(MESH, me, signer, real_verify, lambda _: None, time.time)
        self.streams = Streams({"s": [["rules", False, "no"]]})
        self.parts = AccessParts(self.world.guard.policy, self.world.guard, passports, self.audit)
        self.view = AccessView(
            self.parts,
            self.world.host,
            self.world.catalogue,
            cast("PeerStreams", self.streams),
            default_privacy=Privacy.LAN,
            role=role,
        )
        self.app = build_app(FakeMesh(), access=self.view)

    async def http(self, target: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
        """One request on the Unix socket."""
        sent: list[Mapping[str, Any]] = []
        path, _, query = target.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [],
            UNIX_KEY: True,
        }

        async def receive() -> Mapping[str, Any]:
            await trio.lowlevel.checkpoint()
            return {"type": "http.request"}

        async def send(message: Mapping[str, Any]) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(message)

        await self.app(scope, receive, send)  # type: ignore[arg-type]
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], json.loads(body)


@pytest.fixture
def run_shown(tmp_path: Path) -> Callable[[Callable[[Shown], Any]], None]:
    def run(test: Callable[[Shown], Any]) -> None:
        async def main() -> None:
            with trio.fail_after(20.0):
                await test(Shown(tmp_path / "audit"))

        trio.run(main)

    return run


Run = Callable[[Callable[[Shown], Any]], None]


def test_the_rules_are_shown_with_what_they_are_about_and_how_often_they_decided(
    run_shown: Run,
) -> None:
    async def body(shown: Shown) -> None:
        await shown.world.events(asking(target=GENERAL))
        status, view = await shown.http("/mesh/v1/access")
        assert (status, view["default_privacy"], view["role"]) == (200, "lan", "member")
        assert [(rule["rule"], rule["decided"], rule["about_here"]) for rule in view["rules"]] == [
            (1, 0, [GENERAL]),
            (2, 1, [GENERAL]),
        ]
        assert view["rules"][0]["comment"] == "not by phone"
        assert view["capabilities"] == [{"capability": GENERAL, "privacy": "mesh", "rules": [1, 2]}]

    run_shown(body)


@pytest.mark.parametrize(
    ("query", "allowed", "says"),
    [
        ("", True, "rule 2"),
        ("&caller=key:phone", False, "rule 1"),
        ("&caller=pi", True, "rule 2"),
        ("&caller=key:phone@pi", True, "rule 2"),
        ("&caller=pi&privacy=local", False, "may not travel beyond local"),
        ("&privacy=local", True, "rule 2"),
    ],
)
def test_a_decision_is_explained(run_shown: Run, query: str, allowed: bool, says: str) -> None:
    async def body(shown: Shown) -> None:
        status, told = await shown.http(f"/mesh/v1/access/check?name={GENERAL}{query}")
        assert (status, told["allowed"]) == (200, allowed)
        assert says in told["why"]
        assert {step["at"] for step in told["steps"]} == {"hub"}

    run_shown(body)


def test_another_node_is_asked_how_it_would_decide_about_this_one(run_shown: Run) -> None:
    async def body(shown: Shown) -> None:
        target = f"/mesh/v1/access/check?name={GENERAL}&at=pi"
        status, told = await shown.http(target)
        assert (status, told["allowed"], told["why"]) == (200, False, "no")
        assert [step["at"] for step in told["steps"]] == ["hub", "pi"]
        assert shown.streams.bodies == [{"n": GENERAL, "p": "local", "c": 1}]
        status, told = await shown.http(f"{target}&caller=pi")
        assert (status, told["error"]["code"]) == (400, "other_node")
        for trailer in (None, {"s": []}, {"s": [["rules", "yes", "no"]]}, {"s": [7]}):
            shown.streams.trailer = trailer
            assert (await shown.http(target))[0] == 502
        shown.streams.dial = PeerUnreachable("nobody")
        assert (await shown.http(target))[1]["error"]["code"] == "unreachable"

    run_shown(body)


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("access/check", 400, "invalid_value"),
        ("access/check?name=nonsense", 400, "name_suffix"),
        (f"access/check?name={GENERAL}&privacy=wan", 400, "invalid_value"),
        (f"access/check?name={GENERAL}&caller=role:member", 400, "invalid_value"),
        (f"access/check?name={GENERAL}&caller=nobody", 404, "unknown_node"),
        (f"access/check?name={GENERAL}&at=nobody", 404, "unknown_node"),
        (f"access/check?name={GENERAL}&calller=local", 400, "unsupported_parameter"),
        ("audit?since=yesterday", 400, "invalid_value"),
        ("audit?after=-1", 400, "invalid_value"),
        ("audit?class=wan", 400, "invalid_value"),
        ("audit?to=a&to=b", 400, "invalid_value"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    run_shown: Run, target: str, status: int, code: str
) -> None:
    async def body(shown: Shown) -> None:
        got, told = await shown.http(f"/mesh/v1/{target}")
        assert (got, told["error"]["code"]) == (status, code)

    run_shown(body)


def test_the_trail_is_read_and_who_changes_something_is_in_it(run_shown: Run) -> None:
    async def body(shown: Shown) -> None:
        shown.audit.record("left", to="pi", privacy="mesh")
        assert (await shown.http("/mesh/v1/leave", "POST"))[0] == 200
        assert (await shown.http("/mesh/v1/keys/phone", "DELETE"))[0] != 200
        _, told = await shown.http("/mesh/v1/audit?kind=admin")
        acts = [(line["act"], line["caller"], line["outcome"]) for line in told["audit"]]
        assert acts == [
            ("POST /mesh/v1/leave", "local", "ok"),
            ("DELETE /mesh/v1/keys/phone", "local", "refused"),
        ]
        _, told = await shown.http("/mesh/v1/audit?class=mesh&limit=5")
        assert [line["kind"] for line in told["audit"]] == ["left"]
        _, told = await shown.http("/mesh/v1/audit/verify")
        assert (told["whole"], told["lines"]) == (True, 4)

    run_shown(body)


def test_what_a_capability_takes_out_of_the_mesh_is_noted(run_shown: Run) -> None:
    async def body(shown: Shown) -> None:
        request = Request("r-1", GENERAL, Operation.CHAT, {"messages": [{"content": "Grüße"}]})
        caller = Caller(shown.world.node("hub"))
        shown.parts.departed(Departure(GENERAL, request, Source(caller), "ok"))
        [line] = await shown.audit.read(Wanted(to="cloud"))
        assert (line["kind"], line["bytes"], line["caller"]) == ("left", 7, str(caller))
        assert content_bytes([b"ab", {"x": 1, "y": None}, "c"]) == 3

    run_shown(body)


def test_who_is_let_in_and_what_is_decreed_is_noted(run_shown: Run) -> None:
    async def body(shown: Shown) -> None:
        pi, hub = shown.world.node("pi"), shown.world.node("hub")
        shown.parts.joined(pi, "pi", "member")
        shown.parts.decreed(
            Decree(DecreeKind.REVOCATION, hub, 1, time.time(), b"r", pi, reason="lost")
        )
        shown.parts.decreed(Decree(DecreeKind.KEY_GENERATION, hub, 1, 0.0, b"k", generation=3))
        lines = await shown.audit.read(Wanted())
        joined, revoked, rotated = lines
        assert (joined["kind"], joined["to_name"], joined["role"]) == (
            "join_granted",
            "pi",
            "member",
        )
        assert (revoked["decree"], revoked["to"], revoked["reason"]) == (
            "revocation",
            joined["to"],
            "lost",
        )
        assert (rotated["decree"], rotated["generation"]) == ("key_generation", 3)

    run_shown(body)


@dataclass
class Question:
    """A call of a peer that asks how this node would decide."""

    body: Value
    peer: NodeId
    operation: str = "check"

    @property
    def header(self) -> CallHeader:
        return CallHeader("r-1", "meshd/access", "meshd/access", self.operation)


def test_a_node_that_asks_is_told_about_itself(run_shown: Run) -> None:
    async def body(shown: Shown) -> None:
        peer = shown.world.node("pi")
        question = Question({"n": GENERAL, "p": "key:phone", "c": 2}, peer)
        told = await shown.view.serve(cast("IncomingCall", question))
        assert isinstance(told, Mapping)
        steps = told["s"]
        assert isinstance(steps, list)
        assert steps[-1] == ["rules", True, f"rule 2 ({GENERAL}) allows it"]
        for wrong in (
            Question({"n": "x", "p": "local", "c": 2}, peer),
            Question({"n": GENERAL, "p": "root", "c": 2}, peer),
            Question({"n": GENERAL, "p": "local", "c": 4}, peer),
            Question([], peer),
            Question({"n": GENERAL, "p": "local", "c": 2}, peer, "dance"),
        ):
            with pytest.raises((BadRequest, CapabilityError)):
                await shown.view.serve(cast("IncomingCall", wrong))

    run_shown(body)
