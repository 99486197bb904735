"""The codec: what is encoded is decoded, and nothing else is; noise never raises anything but CodecError."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import store
from tests.unit.support_core import address, claim, node_id

from meshd.core.membership import MemberState
from meshd.core.messages import (
    TARGET_BYTES,
    Ack,
    Claim,
    DecreesHeld,
    Digest,
    Heartbeat,
    Interest,
    Join,
    JoinAnswer,
    JoinLater,
    Message,
    Nack,
    Ping,
    PingRequest,
    Proclaim,
    Pull,
    Record,
    Soft,
    SoftStill,
    Summary,
    View,
    ViewLine,
)
from meshd.core.wire import decode, encode, payload_bytes, payload_of, payloads_of
from meshd_cms.errors import CodecError
from meshd_cms.soft import SoftTold
from meshd_cms.types import DigestLine, Epoch, NodeId, Version

BEAT = Heartbeat(b"12345678", Version(3))
LINE = DigestLine(node_id(1), Epoch(3), Version(4), Version(1))
FIRST, LAST = NodeId(bytes(16)), NodeId(b"\xff" * 16)
DELTA = store(1).set("key", {"a": [1, 2.5, None, "x", b"y"]})
assert DELTA is not None

EXAMPLES: list[Message] = [
    Ping(1, node_id(1)[:TARGET_BYTES], BEAT),
    Ack(2**63 - 1, node_id(1), BEAT),
    PingRequest(3, node_id(1), address(1)),
    Nack(4),
    Claim(claim(1, MemberState.LEFT, 9), merged=True),
    Record(DELTA, rumour=True),
    Digest(FIRST, LAST, (LINE,), answer=True),
    View(FIRST, LAST, (ViewLine(node_id(1), MemberState.DEAD, Epoch(3), 4),), answer=False),
    Join(5),
    JoinAnswer(6, is_whole=True),
    JoinLater(7, 1.5),
    Soft(SoftTold(1, "load", {"slots": 2}, 0.25)),
    SoftStill(7, 3.999),
    Interest(30.0),
    Summary((1, 2**32 - 1)),
    Proclaim(b"a decree", rumour=True),
    DecreesHeld(bytes(8), b"\xff" * 8, (b"12345678", b"abcdefgh"), answer=True),
    Pull((LINE,)),
]


def test_every_kind_has_an_example() -> None:
    assert {type(message) for message in EXAMPLES} == set(Message.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Message) -> None:
    assert decode(payload_of([encode(message)])) == (message,)


def test_many_messages_travel_in_one_payload_in_order() -> None:
    many = EXAMPLES * 5  # more than a short array header counts
    encoded = [encode(message) for message in many]
    payload = payload_of(encoded)
    assert decode(payload) == tuple(many)
    assert len(payload) <= payload_bytes(encoded)


def test_messages_are_distributed_over_datagrams_in_order() -> None:
    encoded = [encode(message) for message in EXAMPLES * 20]
    payloads = payloads_of(encoded, 700)
    assert len(payloads) > 1
    assert all(len(payload) <= 700 for payload in payloads)
    assert [one for payload in payloads for one in decode(payload)] == EXAMPLES * 20


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_truncation_and_every_added_byte_is_refused(message: Message) -> None:
    payload = payload_of([encode(message)])
    for end in range(len(payload)):
        with pytest.raises(CodecError):
            decode(payload[:end])
    with pytest.raises(CodecError):
        decode(payload + b"\x00")


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_field_of_another_kind_is_refused(message: Message) -> None:
    fields = msgpack.unpackb(encode(message))
    for place in range(len(fields)):
        for wrong in ("text", -1, 2**64 - 1, {"a": 1}, [[]]):
            if fields[place] == wrong or (isinstance(fields[place], str) and wrong == "text"):
                continue
            if isinstance(message, Soft) and place == 3:
                continue  # its value: any will do
            changed = [*fields[:place], wrong, *fields[place + 1 :]]
            with pytest.raises(CodecError):
                decode(msgpack.packb([1, changed]))
    for length in (fields[:-1], [*fields, 0]):
        with pytest.raises(CodecError):
            decode(msgpack.packb([1, length]))


@pytest.mark.parametrize("envelope", [[], [2], [True], {}, 1, "x", [1, 5], [1, [99]], [1, []]])
def test_a_wrong_envelope_is_refused(envelope: object) -> None:
    with pytest.raises(CodecError):
        decode(msgpack.packb(envelope))


def test_lines_outside_of_their_range_are_refused() -> None:
    wrong = Digest(LAST, LAST, (LINE,), answer=True)
    with pytest.raises(CodecError, match="outside"):
        decode(payload_of([encode(wrong)]))


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_noise_raises_codec_errors_only(noise: bytes) -> None:
    for payload in (noise, b"\x92\x01" + noise):
        try:
            decode(payload)
        except CodecError:
            continue


@given(st.sampled_from(EXAMPLES), st.data())
@settings(deadline=None, max_examples=100)
def test_a_flipped_byte_is_refused_or_is_another_message(
    message: Message, data: st.DataObject
) -> None:
    payload = bytearray(payload_of([encode(message)]))
    place = data.draw(st.integers(0, len(payload) - 1))
    payload[place] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(payload))
    except CodecError:
        return
    assert found != (message,)


def test_what_the_seal_says_already_does_not_travel() -> None:
    """The messages of an idle mesh, in bytes: with the headers they are what an idle node costs."""
    beat = Heartbeat(b"12345678", Version(300))
    epoch = Epoch(1_800_000_000_000)
    ping = Ping(2**16, node_id(1), beat)
    sizes = {
        "ping": len(payload_of([encode(ping)])),
        "ack": len(payload_of([encode(Ack(2**16, None, beat.answering(beat)))])),
        "renewal": len(payload_of([encode(SoftStill(1000, 3.9))])),
        "claim": len(encode(Claim(replace(claim(1), epoch=epoch), merged=False))),
    }
    assert sizes == {"ping": 28, "ack": 14, "renewal": 10, "claim": 52}


def test_an_ack_repeats_the_hash_of_its_ping_only_when_it_differs() -> None:
    ours = Heartbeat(b"12345678", Version(3))
    assert ours.answering(Heartbeat(b"12345678", Version(9))) == Heartbeat(None, Version(3))
    assert ours.answering(Heartbeat(b"87654321", Version(3))) == ours
    assert decode(payload_of([encode(Ack(1, None, Heartbeat(None, Version(3))))])) == (
        Ack(1, None, Heartbeat(None, Version(3))),
    )


def test_a_ping_is_for_the_node_whose_id_begins_so() -> None:
    (ping,) = decode(payload_of([encode(Ping(1, node_id(1), BEAT))]))
    assert isinstance(ping, Ping)
    assert ping.is_for(node_id(1))
    assert not ping.is_for(node_id(2))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("evidence", [False, True])
def test_flags_and_accuser_of_a_claim_travel(merged: bool, evidence: bool) -> None:
    accused = replace(claim(1, MemberState.SUSPECT, 4, accuser=2), evidence=evidence)
    message = Claim(accused, merged)
    assert decode(payload_of([encode(message)])) == (message,)


@pytest.mark.parametrize("count", [0, 3, 5, 512])
def test_a_summary_has_a_power_of_two_of_buckets(count: int) -> None:
    with pytest.raises(CodecError, match="power of two"):
        decode(payload_of([encode(Summary((7,) * count))]))


def test_an_epoch_that_no_seal_can_carry_is_refused() -> None:
    late = View(FIRST, LAST, (ViewLine(node_id(1), MemberState.ALIVE, Epoch(2**48), 0),), True)
    with pytest.raises(CodecError, match="epoch"):
        decode(payload_of([encode(late)]))
