"""One node asks another about itself, over real streams; and peers that answer nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.shell.support_streams import Peer, identities, peer, trio_test
from tests.unit.support_cms import store

from meshd.orchestrate import inspection
from meshd.orchestrate.inspection import (
    INSPECTION_ID,
    LINES_MAX,
    LINES_PER_CHUNK,
    InspectionServer,
    Inspector,
    SelfDescription,
    is_inspection,
    own_lines,
)
from meshd.shell.streams import CallHeader, Handler, IncomingCall, RemoteFailed, RemoteRefused
from meshd_cms import Delta, Store, Version
from meshd_plugins.api import Failed, Value


def described(clock_s: float = 5_000.0) -> SelfDescription:
    return SelfDescription(
        software="meshd 9.9",
        protocol=1,
        unix_s=lambda: clock_s,
        up_s=lambda: 12.0,
        heard_ago_s=lambda _node: 0.75,
    )


def server(held: Store, clock_s: float = 5_000.0) -> Handler:
    answering = InspectionServer(described(clock_s), held)

    async def handle(call: IncomingCall) -> Value:
        assert is_inspection(call)
        return await answering.serve(call)

    return handle


def saying(chunks: list[Value], trailer: Value) -> Handler:
    async def handle(call: IncomingCall) -> Value:
        for chunk in chunks:
            await call.send(chunk)
        return trailer

    return handle


def inspector(one: Peer, clock_s: float = 5_000.0) -> Inspector:
    return Inspector(one.node, one.streams, lambda: clock_s)


@trio_test
async def test_a_peer_tells_its_clock_release_and_what_it_heard(tmp_path: Path) -> None:
    here, there = identities(tmp_path, 2)
    async with peer(here) as one, peer(there, server(store(1), 5_031.0)) as other:
        answer = await inspector(one).about(other.node, other.address)
    assert answer.error == ""
    assert answer.clock_ahead_s is not None
    assert answer.clock_ahead_s == pytest.approx(31.0, abs=answer.clock_error_s + 1e-9)
    assert (answer.software, answer.protocol) == ("meshd 9.9", 1)
    assert (answer.heard_us_ago_s, answer.up_s) == (0.75, 12.0)


@trio_test
async def test_a_peer_tells_what_it_holds_of_everybody(tmp_path: Path) -> None:
    held = store(1)
    held.set("node", {"name": "other"})
    for number in range(2, LINES_PER_CHUNK + 10):  # more than fits one chunk
        theirs = store(number)
        delta = theirs.set("node", {"name": "x"})
        assert isinstance(delta, Delta)
        held.apply(delta, 1.0)
    here, there = identities(tmp_path, 2)
    async with peer(here) as one, peer(there, server(held)) as other:
        lines = await inspector(one).lines(other.node, other.address)
    assert lines == own_lines(held)
    assert len(lines) > LINES_PER_CHUNK
    assert lines[0].max_version == Version(1)


@trio_test
async def test_nobody_there_is_an_answer_too(tmp_path: Path) -> None:
    here, there = identities(tmp_path, 2)
    async with peer(here) as one:
        asking = inspector(one)
        answer = await asking.about(there.node_id, ("127.0.0.1", 1))
        assert answer.error
        assert answer.clock_ahead_s is None
        with pytest.raises(Failed) as caught:
            await asking.lines(there.node_id, ("127.0.0.1", 1))
        assert caught.value.code == "unreachable"


@trio_test
async def test_a_peer_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async def mute(_call: IncomingCall) -> Value:
        await trio.sleep_forever()

    here, there = identities(tmp_path, 2)
    async with peer(here) as one, peer(there, mute) as other:
        await one.streams.ping(
            other.node, other.address
        )  # so that the deadline is the answer's alone
        asking = Inspector(one.node, one.streams, lambda: 0.0, deadline_s=0.05)
        with pytest.raises(Failed) as caught:
            await asking.lines(other.node, other.address)
    assert caught.value.code == "deadline_exceeded"


LINE: list[Value] = [b"x" * 16, 1, 1, 0]
NONSENSE: dict[str, tuple[list[Value], Value]] = {
    "no count": ([[LINE]], {}),
    "another count": ([[LINE]], {"n": 2}),
    "a text for a line": ([["line"]], {"n": 1}),
    "a short line": ([[LINE[:2]]], {"n": 1}),
    "a short owner": ([[[b"x", 1, 1, 0]]], {"n": 1}),
    "a negative version": ([[[b"x" * 16, 1, -1, 0]]], {"n": 1}),
    "a number for lines": ([7], {"n": 1}),
    "no trailer": ([[LINE]], None),
    "too many lines": ([[LINE] * 1024] * (LINES_MAX // 1024 + 1), {"n": LINES_MAX + 1024}),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_the_peers_fault(tmp_path: Path, case: str) -> None:
    chunks, trailer = NONSENSE[case]

    @trio_test
    async def main() -> None:
        here, there = identities(tmp_path, 2)
        async with peer(here) as one, peer(there, saying(chunks, trailer)) as other:
            with pytest.raises(Failed) as caught:
                await inspector(one).lines(other.node, other.address)
            assert caught.value.code == "peer_fault"
            answer = await inspector(one).about(other.node, other.address)
            assert "malformed" in answer.error or "lines" in answer.error

    main()


@trio_test
async def test_questions_at_once_are_bounded_and_unknown_ones_refused(tmp_path: Path) -> None:
    answering = InspectionServer(described(), store(1))
    answering._running = inspection.SERVED_MAX
    here, there = identities(tmp_path, 2)

    async def ask(one: Peer, other: Peer, question: str) -> None:
        header = CallHeader("request", "", INSPECTION_ID, question)
        async with one.streams.call(other.node, other.address, header, {}) as call:
            await call.receive()

    async with peer(here) as one, peer(there, answering.serve) as other:
        with pytest.raises(RemoteRefused) as refused:
            await ask(one, other, "about")
        assert refused.value.code == "busy"
        answering._running = 0
        with pytest.raises(RemoteFailed) as failed:
            await ask(one, other, "secrets")
        assert failed.value.code == "unknown_inspection"
        await ask(one, other, "about")
