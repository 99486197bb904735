"""Frames: what is encoded decodes to itself; whatever else comes is a ProtocolError and nothing worse."""

from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.core.frame_codec import DEPTH_MAX, decode, encode
from meshd.core.frames import (
    FRAME_BYTES_MIN,
    Call,
    CallHeader,
    Cancel,
    Chunk,
    Credit,
    End,
    Error,
    Fault,
    Frame,
    FrameTooLarge,
    FrameType,
    Goaway,
    Gossip,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    Refuse,
    UnsendableError,
    VersionMismatch,
    WarmHint,
)
from meshd_cms.types import Epoch, MeshId, NodeId, Value

calls = st.integers(1, 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=30)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
numbers = st.integers(0, 2**63 - 1)
ids = st.binary(min_size=16, max_size=16)
headers = st.builds(
    CallHeader,
    request_id=texts,
    name=texts,
    capability_id=texts,
    operation=texts,
    caller=st.binary(max_size=16),
    principal=texts,
    passport=st.binary(max_size=80),
    privacy=st.integers(0, 3),
    trace=texts,
    remaining_s=st.floats(0, 1e9),
    hops=st.integers(0, 255),
    idempotency_id=texts,
    tags=st.lists(st.binary(min_size=8, max_size=8), max_size=8).map(tuple),
    hint=st.none()
    | st.builds(WarmHint, ids.map(NodeId), st.binary(min_size=8, max_size=8), numbers),
)
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(
        Hello,
        ids.map(MeshId),
        ids.map(NodeId),
        st.integers(1, 2**63 - 1).map(Epoch),
        st.integers(FRAME_BYTES_MIN, 2**30),
        st.integers(1, 2**30),
    ),
    st.builds(Call, calls, headers, values),
    st.builds(Chunk, calls, values),
    st.builds(End, calls, values, values),
    st.builds(Refuse, calls, texts, texts, values),
    st.builds(Error, calls, texts, texts, st.booleans(), values),
    st.builds(Cancel, calls, texts),
    st.builds(Credit, calls, numbers),
    st.builds(Ping, numbers),
    st.builds(Pong, numbers),
    st.builds(Gossip, st.binary(max_size=100)),
    st.builds(Goaway, texts),
)


def packed(*fields: object) -> bytes:
    data = msgpack.packb(fields)
    assert isinstance(data, bytes)
    return data


def nested(depth: int) -> Value:
    value: Value = 1
    for _ in range(depth):
        value = [value]
    return value


@given(frame=frames)
@settings(max_examples=100, deadline=None)
def test_every_frame_survives_the_wire(frame: Frame) -> None:
    data = encode(frame)
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert decode(data[4:]) == frame


@given(noise=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_is_a_protocol_error_or_a_frame(noise: bytes) -> None:
    try:
        frame = decode(noise)
    except ProtocolError:
        return
    assert decode(encode(frame)[4:]) == frame


@given(frame=frames, position=st.integers(0, 10_000), bits=st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_a_mutated_frame_is_a_protocol_error_or_a_frame(
    frame: Frame, position: int, bits: int
) -> None:
    data = bytearray(encode(frame)[4:])
    data[position % len(data)] ^= bits
    fault = None
    try:
        decode(bytes(data))
    except ProtocolError as error:
        fault = error.fault
    assert fault in (None, Fault.BAD_FRAME, Fault.VERSION_MISMATCH)


HEADER = ["r", "n", "c", "o", b"", 2, "", 1.0, 0, ""]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        packed(),
        packed(2),
        packed("CHUNK", 1, None),
        packed(True, 1, None),
        packed(99, 1, None),
        packed(FrameType.CHUNK, 1),
        packed(FrameType.CHUNK, 1, None, None),
        packed(FrameType.CHUNK, 0, None),
        packed(FrameType.CHUNK, -1, None),
        packed(FrameType.CHUNK, 2**63, None),
        packed(FrameType.PING, 1, 5),
        packed(FrameType.PING, 0, -5),
        packed(FrameType.CHUNK, 1, None) + b"\x00",
        packed(FrameType.CHUNK, 1, msgpack.Timestamp(1)),
        packed(FrameType.CHUNK, 1, [{"a": msgpack.ExtType(5, b"")}]),
        packed(FrameType.CHUNK, 1, {b"key": 1}),
        packed(FrameType.CHUNK, 1, nested(DEPTH_MAX + 1)),
        b"\x93\x02\x01" + b"\x91" * 100_000 + b"\xc0",
        b"\x93\x02\x01\xdd\xff\xff\xff\xff",
        b"\x93\x02\x01\xa1\xff",
        packed(FrameType.CALL, 1, HEADER[:9], None),
        packed(FrameType.CALL, 1, [*HEADER[:7], math.nan, 0, ""], None),
        packed(FrameType.CALL, 1, [*HEADER[:7], math.inf, 0, ""], None),
        packed(FrameType.CALL, 1, [*HEADER[:7], -1, 0, ""], None),
        packed(FrameType.CALL, 1, [*HEADER[:8], 256, ""], None),
        packed(FrameType.CALL, 1, ["r" * 2000, *HEADER[1:]], None),
        packed(FrameType.ERROR, 1, "failed", "message", 1, None),
        packed(FrameType.GOSSIP, 0, "text"),
        packed(FrameType.HELLO, 0),
        packed(FrameType.HELLO, 0, 1, b"short", b"n" * 16, 1, 2**20, 2**18, 0.0),
        packed(FrameType.HELLO, 0, 1, b"m" * 16, b"n" * 16, 0, 2**20, 2**18, 0.0),
        packed(FrameType.HELLO, 0, 1, b"m" * 16, b"n" * 16, 1, 10, 2**18, 0.0),
        packed(FrameType.HELLO, 0, 1, b"m" * 16, b"n" * 16, 1, 2**20, 2**18),
        packed(FrameType.HELLO, 0, 1, b"m" * 16, b"n" * 16, 1, 2**20, 2**18, 0),
        packed(FrameType.HELLO, 0, 1, b"m" * 16, b"n" * 16, 1, 2**20, 2**18, -1.0),
        packed(FrameType.HELLO, 0, 1, b"m" * 16, b"n" * 16, 1, 2**20, 2**18, float("nan")),
        packed(FrameType.HELLO, 0, 1, b"m" * 16, b"n" * 16, 1, 2**20, 2**18, 2.0**41),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert caught.value.code == "bad_frame"


def test_another_version_is_named_whatever_its_hello_looks_like() -> None:
    with pytest.raises(VersionMismatch, match=r"version 7 .*this node version 1") as caught:
        decode(packed(FrameType.HELLO, 0, 7, {"a": "future", "shape": True}))
    assert (caught.value.ours, caught.value.theirs) == (1, 7)
    assert caught.value.code == "version_mismatch"


@pytest.mark.parametrize(
    "frame",
    [
        Chunk(1, {1: "a key that is no text"}),  # type: ignore[dict-item]
        Chunk(1, [object()]),  # type: ignore[list-item]
        Chunk(1, 2**70),
        Chunk(1, "\ud800"),
        Chunk(1, nested(DEPTH_MAX + 1)),
        Chunk(1, [0] * 70_000),
        Call(1, CallHeader("r", "n" * 2000, "c", "chat"), None),
        Call(1, CallHeader("r", "n", "c", "chat", remaining_s=math.nan), None),
        Call(1, CallHeader("r", "n", "c", "chat", hops=300), None),
        Call(1, CallHeader("r", "n", "c", "chat", tags=(bytes(7), bytes(9))), None),
        Call(1, CallHeader("r", "n", "c", "chat", tags=(bytes(8),) * 9), None),
        Call(1, CallHeader("r", "n", "c", "chat", hint=WarmHint(NodeId(b"n"), bytes(8), 1)), None),
        Call(1, CallHeader("r", "n", "c", "chat", hint=WarmHint(NodeId(bytes(16)), b"", 1)), None),
    ],
)
def test_what_the_peer_would_refuse_is_not_sent(frame: Frame) -> None:
    with pytest.raises(UnsendableError):
        encode(frame)


def test_a_frame_over_the_bound_is_not_sent() -> None:
    with pytest.raises(FrameTooLarge) as caught:
        encode(Chunk(1, b"x" * 5000), 4096)
    assert caught.value.code == "too_large"


def test_long_messages_are_cut_rather_than_refused() -> None:
    frame = decode(encode(Refuse(1, "busy", "é" * 5000, None))[4:])
    assert isinstance(frame, Refuse)
    assert frame.message == "é" * 512
