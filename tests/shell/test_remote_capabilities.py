"""Both ends of a call between peers: what is refused, what is told, and what the errors become."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import trio
from tests.shell.support_log import KeptLog
from tests.shell.support_orchestrate import (
    GENERAL,
    Script,
    Scripted,
    descriptor,
    hanging,
    raising,
    run,
    saying,
)

from meshd.core.effects import Address
from meshd.core.frames import UnsendableError
from meshd.orchestrate.host import CapabilityHost
from meshd.orchestrate.remote import CallServer, PeerCapabilities
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

ME, PEER = NodeId(b"m" * 16), NodeId(b"p" * 16)
REQUEST = Request(
    "r-1",
    GENERAL,
    Operation.CHAT,
    {"messages": []},
    caller=ME.hex(),
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

    @asynccontextmanager
    async def call(
        self, node: NodeId, address: Address, header: CallHeader, body: Value
    ) -> AsyncIterator[FakeCall]:
        self.headers.append(header)
        self.bodies.append(body)
        if self.dial is not None:
            raise self.dial
        yield FakeCall(self.answer, self.trailer)


async def invoke(streams: FakeStreams) -> tuple[list[Chunk], Done]:
    chunks: list[Chunk] = []

    async def emit(chunk: Chunk) -> None:
        chunks.append(chunk)

    remote = PeerCapabilities(cast("PeerStreams", streams))
    return chunks, await remote.invoke(PEER, ("10.0.0.2", 7946), GENERAL, REQUEST, emit)


def test_a_call_carries_the_request_and_brings_back_its_events() -> None:
    async def body() -> None:
        streams = FakeStreams([{"t": "a"}, {"t": "b", "p": 1}], {"r": "length", "v": 2})
        assert await invoke(streams) == (
            [Chunk("a"), Chunk("b", position=1)],
            Done("length", Usage(0, 2)),
        )
        assert streams.bodies == [REQUEST.body]
        assert streams.headers == [
            CallHeader("r-1", GENERAL, GENERAL, "chat", ME, 2, "00-1-2-01", 30.0, 1, "r-1/t1")
        ]

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
        whole = CallHeader("r-1", GENERAL, GENERAL, "chat", ME, 2, "00-1-2-01", 30.0, 1, "r-1/t1")
        self.header = replace(whole, **header)  # type: ignore[arg-type]
        self.body = body
        self.peer = PEER
        self.sent: list[Value] = []
        self.refuses: Exception | None = None

    async def send(self, value: Value) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.sent.append(value)


class Server:
    """A call server over one scripted capability."""

    def __init__(
        self, script: Script, shown: Descriptor | None = None, reach: Privacy = Privacy.LAN
    ) -> None:
        self.log = KeptLog()
        self.capability = Scripted(shown or descriptor(GENERAL), script)
        host = CapabilityHost(
            queue_max=1, changed=lambda _: None, load_changed=lambda: None, log=self.log
        )
        host.add(self.capability)
        self.server = CallServer(host, hops_max=2, log=self.log, reach_of=lambda _: reach)

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
        assert server.capability.requests == [REQUEST]
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
    ("allowed", "reach", "served"),
    [
        (Privacy.LOCAL, Privacy.LAN, False),
        (Privacy.LAN, Privacy.LAN, True),
        (Privacy.LAN, Privacy.MESH, False),
        (Privacy.MESH, Privacy.MESH, True),
    ],
)
def test_a_capability_is_served_as_far_as_it_allows(
    allowed: Privacy, reach: Privacy, served: bool
) -> None:
    async def body() -> None:
        server = Server(saying("a"), descriptor(GENERAL, privacy=allowed), reach)
        if served:
            await server.serve(FakeIncoming({}))
        else:
            assert (await server.error(FakeIncoming({}))).code == "privacy"

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
        assert server.capability.requests[0].caller == PEER.hex()

    run(body)
