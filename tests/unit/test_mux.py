"""The multiplexer: two real machines against each other, and one machine against a peer that breaks rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.core.frame_codec import decode, encode
from meshd.core.frames import (
    Call,
    CallHeader,
    Cancel,
    Chunk,
    Credit,
    End,
    Error,
    Frame,
    Goaway,
    Gossip,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    Refuse,
)
from meshd.core.mux import (
    ALONE_BYTES,
    CallExcess,
    CallState,
    ChunkReceived,
    Event,
    Mux,
    MuxConfig,
    MuxMisuse,
    Phase,
    Up,
)
from meshd_cms.types import Epoch, MeshId, NodeId, Value

MESH = MeshId(b"m" * 16)
ALICE, BOB = NodeId(b"a" * 16), NodeId(b"b" * 16)
HEADER = CallHeader("request", "computation.gpt/echo", "echo", "run")
WINDOW = 1000
SMALL = MuxConfig(frame_bytes_max=4096, window_bytes=WINDOW, calls_max=3)


def alice(config: MuxConfig = SMALL) -> Mux:
    return Mux(config, MESH, ALICE, Epoch(1), BOB, dialer=True)


def bob(config: MuxConfig = SMALL) -> Mux:
    return Mux(config, MESH, BOB, Epoch(2), ALICE, dialer=False)


def events(mux: Mux) -> list[Event]:
    found: list[Event] = []
    while (event := mux.next_event()) is not None:
        found.append(event)
    return found


def carry(source: Mux, target: Mux) -> list[Event]:
    target.receive(source.take_outgoing())
    return events(target)


def pair(config: MuxConfig = SMALL) -> tuple[Mux, Mux]:
    a, b = alice(config), bob(config)
    assert carry(a, b) == [
        Up(Hello(MESH, ALICE, Epoch(1), config.frame_bytes_max, config.window_bytes))
    ]
    assert carry(b, a) == [
        Up(Hello(MESH, BOB, Epoch(2), config.frame_bytes_max, config.window_bytes))
    ]
    return a, b


def sent(mux: Mux) -> list[Frame]:
    data, found = mux.take_outgoing(), list[Frame]()
    while data:
        length = int.from_bytes(data[:4], "big")
        found.append(decode(data[4 : 4 + length]))
        data = data[4 + length :]
    return found


def fault_of(mux: Mux, *frames: Frame) -> str:
    """The fault that these frames of the peer are, and that nothing can be done afterwards."""
    mux.take_outgoing()
    mux.receive(b"".join(encode(frame, 2**21) for frame in frames))
    with pytest.raises(ProtocolError) as caught:
        events(mux)
    assert mux.phase is Phase.FAILED
    assert sent(mux)[-1] == Goaway(caught.value.code)
    mux.receive(encode(Ping(1)))
    assert events(mux) == []
    return caught.value.code


def test_a_call_from_request_to_end() -> None:
    a, b = pair()
    call = a.open(HEADER, {"input": "hello"})
    assert call % 2 == 1
    assert carry(a, b) == [Call(call, HEADER, {"input": "hello"})]
    b.send_chunk(call, "hel")
    b.send_chunk(call, "lo")
    b.end(call, {"finish_reason": "stop"}, {"busy": 0})
    first, second, end = carry(b, a)
    assert isinstance(first, ChunkReceived)
    assert isinstance(second, ChunkReceived)
    assert (first.value, second.value) == ("hel", "lo")
    assert end == End(call, {"finish_reason": "stop"}, {"busy": 0})
    assert (a.asking, b.serving) == (0, 0)
    assert (a.state(call), b.state(call)) == (CallState.ENDED, CallState.ENDED)


def test_ids_of_dialer_and_acceptor_never_meet() -> None:
    a, b = pair()
    assert [a.open(HEADER, None), a.open(HEADER, None)] == [1, 3]
    assert [b.open(HEADER, None), b.open(HEADER, None)] == [2, 4]
    assert len(carry(a, b)) == 2
    assert len(carry(b, a)) == 2


def test_refusal_and_error_carry_code_message_and_load() -> None:
    a, b = pair()
    refused, failed = a.open(HEADER, None), a.open(HEADER, None)
    carry(a, b)
    b.refuse(refused, "busy", "all slots are taken", {"queue": 3})
    b.fail(failed, "bad_request", "no input", {"queue": 3}, callers_fault=True)
    assert carry(b, a) == [
        Refuse(refused, "busy", "all slots are taken", {"queue": 3}),
        Error(failed, "bad_request", "no input", True, {"queue": 3}),
    ]


def test_what_crosses_a_cancel_is_thrown_away_up_to_the_final_frame() -> None:
    a, b = pair()
    call = a.open(HEADER, None)
    carry(a, b)
    b.send_chunk(call, "on its way")
    a.cancel(call, "enough")
    assert carry(a, b) == [Cancel(call, "enough")]
    assert not b.may_send(call)
    with pytest.raises(MuxMisuse):
        b.send_chunk(call, "too late")
    b.fail(call, "cancelled", "enough", None)
    assert carry(b, a) == []
    assert (a.asking, b.serving) == (0, 0)


def test_a_cancel_that_crosses_the_end_is_ignored() -> None:
    a, b = pair()
    call = a.open(HEADER, None)
    carry(a, b)
    b.end(call, None, None)
    a.cancel(call, "enough")
    assert carry(a, b) == []
    assert carry(b, a) == []
    assert (a.asking, b.serving) == (0, 0)


def test_credit_bounds_what_is_unread_and_reading_grants_it_again() -> None:
    a, b = pair()
    call = a.open(HEADER, None)
    carry(a, b)
    chunks = 0
    while b.may_send(call):
        b.send_chunk(call, "x" * 300)
        chunks += 1
    assert chunks == 4  # the fourth begins within the window and ends beyond it
    with pytest.raises(MuxMisuse):
        b.send_chunk(call, "x")
    received = [event for event in carry(b, a) if isinstance(event, ChunkReceived)]
    a.consumed(call, received[0].size)
    assert a.outgoing_bytes == 0  # less than half a window
    a.consumed(call, received[1].size)
    granted = received[0].size + received[1].size
    assert carry(a, b) == [Credit(call, granted)]
    assert b.may_send(call)


def test_a_large_chunk_passes_a_small_window() -> None:
    a, b = pair(MuxConfig(window_bytes=10))
    call = a.open(HEADER, None)
    carry(a, b)
    b.send_chunk(call, "x" * 100_000)
    assert not b.may_send(call)
    (event,) = carry(b, a)
    assert isinstance(event, ChunkReceived)
    a.consumed(call, event.size)
    carry(a, b)
    assert b.may_send(call)


def test_a_long_frame_goes_out_alone_and_in_its_order() -> None:
    a, b = pair(MuxConfig(frame_bytes_max=2**20))
    bodies: list[Value] = ["x", "y" * ALONE_BYTES, "z" * ALONE_BYTES, "x", "x"]
    for body in bodies:
        a.open(HEADER, body)
    waiting, pieces = a.outgoing_bytes, list[bytes]()
    while a.outgoing_bytes:
        pieces.append(a.take_outgoing())
        assert a.outgoing_bytes == waiting - sum(map(len, pieces))
    assert [len(piece) > ALONE_BYTES for piece in pieces] == [False, True, True, False]
    assert a.take_outgoing() == b""
    found: list[Value] = []
    for piece in pieces:
        b.receive(piece)
        found += [event.body for event in events(b) if isinstance(event, Call)]
    assert found == bodies


def test_each_end_keeps_to_the_bounds_of_the_other() -> None:
    generous = MuxConfig(frame_bytes_max=2**20, window_bytes=2**20)
    a = Mux(generous, MESH, ALICE, Epoch(1), BOB, dialer=True)
    b = bob()
    carry(a, b)
    carry(b, a)
    with pytest.raises(ValueError, match="at most 4096"):
        a.open(HEADER, "x" * 5000)
    call = b.open(HEADER, None)
    carry(b, a)
    a.send_chunk(call, "x" * (WINDOW + 1))
    assert not a.may_send(call)
    assert len(carry(a, b)) == 1


def test_a_call_above_the_bound_is_excess_and_its_refusal_makes_room() -> None:
    a, b = pair()
    opened = [a.open(HEADER, None) for _ in range(4)]
    found = carry(a, b)
    assert [type(event) for event in found] == [Call, Call, Call, CallExcess]
    b.refuse(opened[3], "busy", "", None)
    b.end(opened[0], None, None)
    carry(b, a)
    assert (a.asking, b.serving) == (2, 2)
    a.open(HEADER, None)
    assert [type(event) for event in carry(a, b)] == [Call]


def test_a_final_frame_that_cannot_be_sent_leaves_the_call_open() -> None:
    a, b = pair()
    call = a.open(HEADER, None)
    carry(a, b)
    with pytest.raises(ValueError, match="at most"):
        b.end(call, "x" * 5000, None)
    assert b.state(call) is CallState.SERVING
    b.fail(call, "too_large", "", None)
    assert carry(b, a) == [Error(call, "too_large", "", False, None)]


def test_ping_is_answered_and_gossip_delivered() -> None:
    a, b = pair()
    a.ping(7)
    a.gossip(b"rumour")
    assert carry(a, b) == [Gossip(b"rumour")]
    assert carry(b, a) == [Pong(7)]


def test_goaway_lets_calls_finish_and_then_both_ends_know() -> None:
    a, b = pair()
    call = a.open(HEADER, None)
    carry(a, b)
    b.goaway("draining")
    b.goaway("again")  # said once
    assert not b.may_open
    assert carry(b, a) == [Goaway("draining")]
    assert not a.may_open
    with pytest.raises(MuxMisuse):
        a.open(HEADER, None)
    assert carry(a, b) == [Goaway("acknowledged")]
    assert not a.finished
    b.end(call, None, None)
    assert not b.finished  # the end waits to be sent
    assert carry(b, a) == [End(call, None, None)]
    assert (a.finished, b.finished) == (True, True)


def test_a_call_that_crosses_goaway_is_served() -> None:
    a, b = pair()
    b.goaway("duplicate")
    call = a.open(HEADER, None)
    assert carry(a, b) == [Call(call, HEADER, None)]
    carry(b, a)
    b.end(call, "served", None)
    assert carry(b, a) == [End(call, "served", None)]


def test_nothing_may_come_before_hello() -> None:
    assert fault_of(bob(), Ping(1)) == "unexpected_frame"


def test_hello_must_agree_with_certificate_mesh_and_version() -> None:
    assert fault_of(bob(), Hello(MeshId(b"n" * 16), ALICE, Epoch(1))) == "other_mesh"
    assert fault_of(bob(), Hello(MESH, NodeId(b"c" * 16), Epoch(1))) == "other_node"
    assert fault_of(bob(), Hello(MESH, ALICE, Epoch(1), version=2)) == "version_mismatch"


def up(*, dialer: bool = False) -> Mux:
    mux = alice() if dialer else bob()
    mux.receive(encode(Hello(MESH, BOB if dialer else ALICE, Epoch(1))))
    assert len(events(mux)) == 1
    return mux


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        ([Hello(MESH, ALICE, Epoch(1))], "unexpected_frame"),
        ([Call(2, HEADER, None)], "bad_call_id"),  # of the acceptor's parity
        ([Call(3, HEADER, None), Call(1, HEADER, None)], "bad_call_id"),
        ([Call(1, HEADER, None), Call(1, HEADER, None)], "bad_call_id"),
        ([Goaway("x"), Call(1, HEADER, None)], "unexpected_frame"),
        ([Chunk(1, None)], "unexpected_frame"),
        ([End(2, None, None)], "unexpected_frame"),
        ([Refuse(2, "", "", None)], "unexpected_frame"),
        ([Error(2, "", "", False, None)], "unexpected_frame"),
        ([Cancel(1, "")], "unexpected_frame"),
        ([Credit(1, 5)], "unexpected_frame"),
        ([Call(1, HEADER, None), Chunk(1, None)], "credit_exceeded"),
        ([Call(1, HEADER, None), Cancel(1, ""), Chunk(1, None)], "unexpected_frame"),
        ([Call(1, HEADER, None), End(1, None, None)], "unexpected_frame"),
        ([Call(1, HEADER, None), Cancel(1, ""), Cancel(1, "")], "unexpected_frame"),
        ([Call(1, HEADER, None), Credit(1, 1)], "credit_exceeded"),
        ([Call(1, HEADER, None), Credit(1, 0)], "credit_exceeded"),
        ([Chunk(1, "x" * 5000)], "too_large"),
        ([Call(number, HEADER, None) for number in range(1, 20, 2)], "unexpected_frame"),
    ],
)
def test_a_peer_that_breaks_the_rules_ends_the_connection(frames: list[Frame], fault: str) -> None:
    mux = up()
    mux.receive(b"")
    assert fault_of(mux, *frames) == fault


def test_chunks_beyond_the_credit_end_the_connection() -> None:
    mux = up(dialer=True)
    call = mux.open(HEADER, None)
    assert fault_of(mux, *(Chunk(call, "x" * 600) for _ in range(3))) == "credit_exceeded"


def test_chunks_after_the_final_frame_end_the_connection() -> None:
    mux = up(dialer=True)
    call = mux.open(HEADER, None)
    assert fault_of(mux, End(call, None, None), Chunk(call, None)) == "unexpected_frame"


def test_a_caller_sends_along_what_the_callee_grants_and_no_more() -> None:
    a, b = pair()
    call = a.open(HEADER, None)
    carry(a, b)
    assert not a.may_send(call)
    with pytest.raises(MuxMisuse):
        a.send_chunk(call, "unasked")
    b.accept_chunks(call)
    assert carry(b, a) == [Credit(call, WINDOW)]
    a.send_chunk(call, "x" * 600)
    a.send_chunk(call, "y" * 600)
    assert not a.may_send(call)
    first, second = carry(a, b)
    assert isinstance(first, ChunkReceived)
    assert isinstance(second, ChunkReceived)
    assert first.value == "x" * 600
    b.consumed(call, first.size)
    assert carry(b, a) == [Credit(call, first.size)]
    assert a.may_send(call)
    b.send_chunk(call, "and back")
    assert isinstance(carry(b, a)[0], ChunkReceived)


def test_what_a_caller_sends_may_cross_the_end() -> None:
    a, b = pair()
    call = a.open(HEADER, None)
    carry(a, b)
    b.accept_chunks(call)
    carry(b, a)
    a.send_chunk(call, "on its way")
    b.end(call, None, None)
    assert carry(a, b) == []
    assert carry(b, a) == [End(call, None, None)]
    with pytest.raises(MuxMisuse):
        a.send_chunk(call, "too late")


def test_a_caller_that_sends_more_than_it_was_granted_ends_the_connection() -> None:
    mux = up()
    mux.receive(encode(Call(1, HEADER, None)))
    events(mux)
    mux.accept_chunks(1)
    assert fault_of(mux, *(Chunk(1, "x" * 600) for _ in range(3))) == "credit_exceeded"


def test_events_before_a_fault_are_given_out() -> None:
    mux = up()
    mux.receive(encode(Gossip(b"good")) + encode(Chunk(9, None)))
    assert mux.next_event() == Gossip(b"good")
    with pytest.raises(ProtocolError):
        mux.next_event()


def test_our_own_misuse_sends_nothing() -> None:
    a = alice()
    with pytest.raises(MuxMisuse):
        a.open(HEADER, None)  # before HELLO
    a, _ = pair()
    with pytest.raises(MuxMisuse):
        a.send_chunk(1, None)
    with pytest.raises(MuxMisuse):
        a.end(1, None, None)
    with pytest.raises(MuxMisuse):
        a.cancel(1, "")
    assert a.outgoing_bytes == 0


@dataclass
class Party:
    """One party of the property test: what it did, and what it saw of it."""

    mux: Mux
    opened: list[int] = field(default_factory=list)
    serving: list[int] = field(default_factory=list)
    chunks_sent: Counter[int] = field(default_factory=Counter)
    chunks_seen: Counter[int] = field(default_factory=Counter)
    unread: list[ChunkReceived] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)
    granted: set[int] = field(default_factory=set)

    def act(self, action: int, choice: int) -> None:
        mux = self.mux
        match action:
            case 0 if mux.may_open and mux.asking < 3:
                self.opened.append(mux.open(HEADER, "body"))
            case 1 if self.serving and mux.may_send(
                call := self.serving[choice % len(self.serving)]
            ):
                mux.send_chunk(call, "x" * (choice * 7 % 700))
                self.chunks_sent[call] += 1
            case 2 if self.serving:
                mux.end(self.serving.pop(choice % len(self.serving)), "end", None)
            case 3 if self.serving:
                mux.refuse(self.serving.pop(choice % len(self.serving)), "busy", "", None)
            case 4 if self.opened:
                call = self.opened[choice % len(self.opened)]
                if mux.state(call) is CallState.ASKING:
                    mux.cancel(call, "")
                    self.abandoned.add(call)
            case 5 if self.unread:
                chunk = self.unread.pop(0)
                mux.consumed(chunk.call, chunk.size)
            case 6 if self.serving:
                call = self.serving[choice % len(self.serving)]
                if mux.state(call) is CallState.SERVING and call not in self.granted:
                    mux.accept_chunks(call)
                    self.granted.add(call)
            case 7 if self.opened:
                call = self.opened[choice % len(self.opened)]
                if mux.may_send(call):
                    mux.send_chunk(call, "x" * (choice * 7 % 700))
                    self.chunks_sent[call] += 1
            case _:
                mux.ping(choice)

    def take(self, data: bytes) -> None:
        self.mux.receive(data)
        for event in events(self.mux):
            match event:
                case Call(call):
                    self.serving.append(call)
                case ChunkReceived(call):
                    assert call not in self.abandoned
                    self.chunks_seen[call] += 1
                    self.unread.append(event)
                case End(call) | Refuse(call):
                    assert call not in self.outcomes
                    assert call not in self.abandoned
                    self.outcomes[call] = type(event).__name__
                case _:
                    pass


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, 10), st.integers(0, 99)), min_size=1, max_size=150
    )
)
@settings(max_examples=100, deadline=None)
def test_any_interleaving_and_fragmentation_ends_in_agreement(
    steps: list[tuple[bool, int, int]],
) -> None:
    """Steps act on either end or deliver a few bytes; then all is delivered and every call settled."""
    a, b = Party(alice()), Party(bob())
    lines = {True: bytearray(), False: bytearray()}  # towards a, towards b
    for to_a, action, choice in steps:
        lines[True] += b.mux.take_outgoing()
        lines[False] += a.mux.take_outgoing()
        end, line = (a, lines[True]) if to_a else (b, lines[False])
        if action >= 8:
            cut = choice * 5
            end.take(bytes(line[:cut]))
            del line[:cut]
        else:
            end.act(action, choice)
    for _ in range(4):
        for end, other, line in ((a, b, lines[True]), (b, a, lines[False])):
            line += other.mux.take_outgoing()
            end.take(bytes(line))
            line.clear()
            while end.serving:
                end.mux.end(end.serving.pop(), "end", None)
    for end, other in ((a, b), (b, a)):
        assert (end.mux.asking, end.mux.serving) == (0, 0)
        assert set(end.outcomes) == set(end.opened) - end.abandoned
        for call in set(end.opened) - end.abandoned:
            assert end.chunks_seen[call] == other.chunks_sent[call]
        for call in end.opened:  # what crossed the final frame is thrown away
            assert other.chunks_seen[call] <= end.chunks_sent[call]
            assert call in other.granted or not end.chunks_sent[call]
