"""Both ends of a call between peers: what is refused, what is told, and what the errors become."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
import trio
from tests.shell.support_log import KeptLog
from tests.shell.support_orchestrate import (
    GENERAL,
    ME,
    Script,
    Scripted,
    descriptor,
    hanging,
    open_guard,
    raising,
    run,
    saying,
)
from tests.unit.support_cms import MESH, hash_verify, real_signer, real_verify, signer

from meshd.core.effects import Address
from meshd.core.frames import UnsendableError
from meshd.orchestrate.audit import Audit
from meshd.orchestrate.callers import Caller, Passports
from meshd.orchestrate.host import CapabilityHost
from meshd.orchestrate.remote import CallServer, PeerCapabilities
from meshd.orchestrate.router import Target
from meshd.shell.streams import (
    CallHeader,
    FrameTooLarge,
    IncomingCall,
    PeerRejected,
    PeerStreams,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamLost,
)
from meshd_cms import NodeId, node_id_text
from meshd_cms.types import node_id_of
from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Chunk,
    Descriptor,
    Done,
    Failed,
    Operation,
    Privacy,
    Refused,
    Request,
    Usage,
    Value,
)

PEER = NodeId(b"p" * 16)
CLOCK_S = 1_800_000_000.0
REQUEST = Request(
    "r-1",
    GENERAL,
    Operation.CHAT,
    {"messages": []},
    caller=str(Caller(ME)),
    trace="00-1-2-01",
    idempotency_id="r-1/t1",
    hops=1,
    deadline_s=30.0,
)


@dataclass
class FakeCall:
    """Plays the answer of a peer."""

    answer: list[Value | Exception]
    trailer: Value = None
    sent_bytes: int = 40

    async def receive(self) -> Value | None:
        await trio.lowlevel.checkpoint()
        if not self.answer:
            return None
        value = self.answer.pop(0)
        if isinstance(value, Exception):
            raise value
        return value


@dataclass
class FakeStreams:
    """Stands in for `PeerStreams`: one call."""

    answer: list[Value | Exception] = field(default_factory=list)
    trailer: Value = None
    dial: Exception | None = None
    headers: list[CallHeader] = field(default_factory=list)
    bodies: list[Value] = field(default_factory=list)
    host: str = "10.0.0.2"  # where the connection really leads

    @asynccontextmanager
    async def call(
        self,
        node: NodeId,
        address: Address,
        header: CallHeader,
        body: Value,
        *,
        check: Callable[[str], None],
    ) -> AsyncIterator[FakeCall]:
        self.headers.append(header)
        self.bodies.append(body)
        if self.dial is not None:
            raise self.dial
        check(self.host)
        yield FakeCall(self.answer, self.trailer)


class KeptAudit(Audit):
    """A trail that only remembers."""

    def __init__(self) -> None:
        super().__init__(
            Path(), size_bytes_max=0, keep=False, unix_s=lambda: CLOCK_S, log=KeptLog()
        )
        self.lines: list[dict[str, Value]] = []

    def record(self, kind: str, **fields: Value) -> None:
        self.lines.append({"kind": kind, **fields})


def passports_of(
    number: int, members: Mapping[NodeId, bytes] | None = None, clock_s: float = CLOCK_S
) -> Passports:
    """Of the node with this number; `members` are those it knows, with their keys."""
    own = real_signer(number)
    return Passports(
        MESH,
        node_id_of(own.public_key),
        own,
        real_verify,
        (members or {}).get,
        lambda: clock_s,
    )


def own_passports() -> Passports:
    """Of ME, who signs like a hash."""
    return Passports(MESH, ME, signer(1), hash_verify, lambda _node: None, lambda: CLOCK_S)


async def invoke(
    streams: FakeStreams, request: Request = REQUEST, audit: KeptAudit | None = None
) -> tuple[list[Chunk], Done]:
    chunks: list[Chunk] = []

    async def emit(chunk: Chunk) -> None:
        chunks.append(chunk)

    remote = PeerCapabilities(
        cast("PeerStreams", streams), own_passports(), audit or KeptAudit(), lambda _node: "pi"
    )
    target = Target(PEER, ("10.0.0.2", 7946), GENERAL)
    return chunks, await remote.invoke(target, request, Caller(ME), emit)


def test_a_call_carries_the_request_and_brings_back_its_events() -> None:
    async def body() -> None:
        streams = FakeStreams([{"t": "a"}, {"t": "b", "p": 1}], {"r": "length", "v": 2})
        assert await invoke(streams) == (
            [Chunk("a"), Chunk("b", position=1)],
            Done("length", Usage(0, 2)),
        )
        assert streams.bodies == [REQUEST.body]
        [sent] = streams.headers
        assert replace(sent, passport=b"") == CallHeader(
            "r-1", GENERAL, GENERAL, "chat", ME, "local", b"", 2, "00-1-2-01", 30.0, 1, "r-1/t1"
        )
        assert len(sent.passport) == 73

    run(body)


@pytest.mark.parametrize(
    ("streams", "kind", "code"),
    [
        (FakeStreams([RemoteRefused("busy", "full", None)]), Refused, "busy"),
        (
            FakeStreams([RemoteFailed("worker_died", "it", None, callers_fault=False)]),
            Failed,
            "worker_died",
        ),
        (
            FakeStreams([RemoteFailed("not_arithmetic", "it", None, callers_fault=True)]),
            BadRequest,
            "not_arithmetic",
        ),
        (FakeStreams([{"t": "a"}, StreamLost("cut")]), Failed, "stream_lost"),
        (FakeStreams(dial=PeerUnreachable("nobody")), Failed, "unreachable"),
        (FakeStreams(dial=PeerRejected("not it", code="other_node")), Failed, "unreachable"),
        (FakeStreams(dial=FrameTooLarge(2**21, 2**20)), Refused, "too_large"),
        (FakeStreams(dial=UnsendableError("2**70")), BadRequest, "unsendable"),
        (FakeStreams([{"t": 7}]), Failed, "peer_fault"),
        (FakeStreams([{"t": "a"}], None), Failed, "peer_fault"),
        (FakeStreams([], {"u": 3}), Failed, "peer_fault"),
    ],
)
def test_each_way_in_which_it_can_end_badly_keeps_its_class(
    streams: FakeStreams, kind: type[CapabilityError], code: str
) -> None:
    async def body() -> None:
        with pytest.raises(CapabilityError) as caught:
            await invoke(streams)
        assert type(caught.value) is kind
        assert caught.value.code == code

    run(body)


class FakeIncoming:
    """A call of a peer."""

    def __init__(self, body: Value, **header: object) -> None:
        whole = CallHeader(
            "r-1", GENERAL, GENERAL, "chat", PEER, "local", b"", 2, "00-1-2-01", 30.0, 1, "r-1/t1"
        )
        self.header = replace(whole, **header)  # type: ignore[arg-type]
        self.body = body
        self.peer = PEER
        self.host = "10.0.0.2"
        self.sent_bytes = 0
        self.sent: list[Value] = []
        self.refuses: Exception | None = None

    async def send(self, value: Value) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.sent.append(value)
        self.sent_bytes += 10


class Server:
    """A call server over one scripted capability."""

    def __init__(
        self,
        script: Script,
        shown: Descriptor | None = None,
        *,
        rules: Sequence[Mapping[str, Value]] = (),
        members: Mapping[NodeId, bytes] | None = None,
        clock_s: float = CLOCK_S,
    ) -> None:
        self.log = KeptLog()
        self.audit = KeptAudit()
        self.capability = Scripted(shown or descriptor(GENERAL), script)
        host = CapabilityHost(
            guard=open_guard(reach_of=lambda _: Privacy.LAN, rules=rules),
            queue_max=1,
            changed=lambda _: None,
            load_changed=lambda: None,
            log=self.log,
        )
        host.add(self.capability)
        self.server = CallServer(
            host,
            hops_max=2,
            log=self.log,
            passports=passports_of(9, members, clock_s),
            audit=self.audit,
        )

    async def serve(self, call: FakeIncoming) -> Value:
        return await self.server.serve(cast("IncomingCall", call))

    async def error(self, call: FakeIncoming) -> CapabilityError:
        with pytest.raises(CapabilityError) as caught:
            await self.serve(call)
        return caught.value

    def outcomes(self) -> list[object]:
        return [fields["outcome"] for _, event, fields in self.log.lines if event == "call.served"]


def test_a_call_of_a_peer_is_served_as_it_was_sent() -> None:
    async def body() -> None:
        server = Server(saying("a", "b"))
        call = FakeIncoming(REQUEST.body)
        assert await server.serve(call) == {"r": "stop"}
        assert call.sent == [{"t": "a"}, {"t": "b"}]
        assert server.capability.requests == [replace(REQUEST, caller=str(Caller(PEER)))]
        [(_, _, line)] = server.log.lines
        assert (line["outcome"], line["peer"], line["hops"]) == ("ok", node_id_text(PEER), 1)

    run(body)


@pytest.mark.parametrize(
    ("call", "kind", "code"),
    [
        (FakeIncoming({}, hops=3), Refused, "hop_limit"),
        (FakeIncoming({}, capability_id="knowledge.gpt/other"), Refused, "not_here"),
        (FakeIncoming({}, operation="embed"), Refused, "unsupported"),
        (FakeIncoming({}, operation="dance"), BadRequest, "malformed_call"),
        (FakeIncoming({}, privacy=9), BadRequest, "malformed_call"),
        (FakeIncoming([]), BadRequest, "malformed_call"),
        (FakeIncoming({1: 2}), BadRequest, "malformed_call"),
        (FakeIncoming({}, remaining_s=0.0), Refused, "busy"),
    ],
)
def test_what_cannot_be_served_is_told(
    call: FakeIncoming, kind: type[CapabilityError], code: str
) -> None:
    async def body() -> None:
        server = Server(saying("a"))
        error = await server.error(call)
        assert (type(error), error.code) == (kind, code)
        assert server.outcomes() == [code]
        assert not server.capability.requests

    run(body)


@pytest.mark.parametrize(
    ("allowed", "host", "served"),
    [
        (Privacy.LOCAL, "10.0.0.2", False),
        (Privacy.LAN, "10.0.0.2", True),
        (Privacy.LAN, "192.0.3.7", False),
        (Privacy.LAN, "", False),
        (Privacy.MESH, "192.0.3.7", True),
    ],
)
def test_a_capability_is_served_as_far_as_it_allows(
    allowed: Privacy, host: str, served: bool
) -> None:
    async def body() -> None:
        server = Server(saying("a"), descriptor(GENERAL, privacy=allowed))
        call = FakeIncoming({})
        call.host = host
        if served:
            await server.serve(call)
        else:
            assert (await server.error(call)).code == "privacy"

    run(body)


def test_the_callers_time_bounds_the_work() -> None:
    async def body() -> None:
        server = Server(hanging("a"))
        error = await server.error(FakeIncoming({}, remaining_s=4.0))
        assert error.code == "deadline_exceeded"
        assert trio.current_time() == pytest.approx(4.0)

    run(body)


def test_a_caller_that_left_is_logged_as_that() -> None:
    async def body() -> None:
        server = Server(hanging("a"))
        with trio.move_on_after(1.0):
            await server.serve(FakeIncoming({}))
        assert server.outcomes() == ["cancelled"]
        assert server.capability.running == 0

    run(body)


def test_errors_of_the_capability_and_of_the_line_keep_their_class() -> None:
    async def body() -> None:
        server = Server(raising(BadRequest("the secret prompt", code="undefined"), "a"))
        assert type(await server.error(FakeIncoming({}))) is BadRequest
        assert "secret" not in repr(server.log.lines)
        call = FakeIncoming({})
        call.refuses = UnsendableError("too long")
        with pytest.raises(UnsendableError):
            await server.serve(call)
        assert server.outcomes() == ["undefined", "unsendable"]

    run(body)


def test_who_names_no_entry_node_takes_turns_as_itself() -> None:
    async def body() -> None:
        server = Server(saying("a"))
        await server.serve(FakeIncoming({}, caller=b""))
        assert server.capability.requests[0].caller == str(Caller(PEER))

    run(body)


def relayed(passport_of: Caller, request: Request, **changes: object) -> FakeIncoming:
    """A call that PEER passes on for a node whose number is 3."""
    passport = passports_of(3).of(passport_of, request)
    fields: dict[str, object] = {
        "caller": passport_of.node,
        "principal": passport_of.principal,
        "passport": passport,
        "privacy": int(request.privacy),
    }
    return FakeIncoming({}, **{**fields, **changes})


ORIGIN = node_id_of(real_signer(3).public_key)
MEMBERS = {ORIGIN: real_signer(3).public_key}


def test_a_call_that_was_passed_on_is_served_for_whom_its_origin_says() -> None:
    async def body() -> None:
        phone = Caller(ORIGIN, "key:phone")
        rules = [
            {"name": GENERAL, "callers": [f"key:phone@{node_id_text(ORIGIN)}"], "effect": "allow"}
        ]
        server = Server(saying("a"), rules=rules, members=MEMBERS)
        await server.serve(relayed(phone, REQUEST))
        assert server.capability.requests[0].caller == str(phone)
        assert (await server.error(FakeIncoming({}))).code == "access"  # PEER for itself
        for change in ({"principal": "key:tablet"}, {"passport": b""}, {"name": "data.gpt/x"}):
            assert (await server.error(relayed(phone, REQUEST, **change))).code == "caller"
        assert len(server.capability.requests) == 1
        assert [line["outcome"] for line in server.audit.lines] == ["ok", "access", *["caller"] * 3]
        assert server.audit.lines[2]["caller"] == "unproven"

    run(body)


@pytest.mark.parametrize("privacy", [Privacy.LOCAL, Privacy.LAN])
def test_a_request_that_came_too_far_already_is_not_worked_on(privacy: Privacy) -> None:
    async def body() -> None:
        server = Server(saying("a"))
        call = FakeIncoming({}, privacy=int(privacy))
        call.host = "192.0.3.7"
        assert (await server.error(call)).code == "privacy"
        assert not server.capability.requests

    run(body)


def test_a_capability_of_the_cloud_serves_requests_of_that_class_only() -> None:
    async def body() -> None:
        server = Server(saying("a"), descriptor(GENERAL, privacy=Privacy.CLOUD))
        assert (await server.error(FakeIncoming({}, privacy=int(Privacy.MESH)))).code == "privacy"
        await server.serve(FakeIncoming({}, privacy=int(Privacy.CLOUD)))
        assert len(server.capability.requests) == 1

    run(body)


@pytest.mark.parametrize("host", ["192.0.3.7", "", "nowhere"])
def test_where_the_connection_really_leads_decides_and_nothing_is_sent(host: str) -> None:
    async def body() -> None:
        audit, streams = KeptAudit(), FakeStreams([], {"r": "stop"}, host=host)
        with pytest.raises(Refused) as caught:
            await invoke(streams, replace(REQUEST, privacy=Privacy.LAN), audit)
        assert caught.value.code == "privacy"
        assert audit.lines == []
        streams.host = "192.168.1.7"
        await invoke(streams, replace(REQUEST, privacy=Privacy.LAN), audit)

    run(body)


def test_what_left_and_what_was_served_is_noted_and_none_of_its_content() -> None:
    async def body() -> None:
        audit = KeptAudit()
        secret = replace(REQUEST, body={"messages": ["the secret prompt"]})
        await invoke(FakeStreams([{"t": "a"}], {"r": "stop"}), secret, audit)
        with pytest.raises(Failed):
            await invoke(FakeStreams([{"t": "a"}, StreamLost("cut")]), secret, audit)
        with pytest.raises(Failed):
            await invoke(FakeStreams(dial=PeerUnreachable("nobody")), secret, audit)
        whole: dict[str, Value] = {
            "kind": "left",
            "to": node_id_text(PEER),
            "to_name": "pi",
            "capability": GENERAL,
            "privacy": "mesh",
            "caller": str(Caller(ME)),
            "request": "r-1",
            "bytes": 40,
            "pieces": 1,
            "outcome": "ok",
        }
        assert audit.lines == [whole, {**whole, "outcome": "stream_lost"}]
        server = Server(saying("the secret ", "answer"))
        await server.serve(FakeIncoming(secret.body))
        assert server.audit.lines == [
            {
                **whole,
                "kind": "served",
                "to_name": "",
                "caller": str(Caller(PEER)),
                "bytes": 20,
                "pieces": 2,
            }
        ]
        assert "secret" not in repr((audit.lines, server.audit.lines))

    run(body)


def test_a_peer_that_leaves_in_the_middle_is_noted_with_what_it_had() -> None:
    async def body() -> None:
        server = Server(hanging("a"))
        with trio.move_on_after(1.0):
            await server.serve(FakeIncoming({}))
        [line] = server.audit.lines
        assert (line["outcome"], line["pieces"]) == ("cancelled", 1)

    run(body)
