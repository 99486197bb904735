"""Messages built by grammar: every kind with extreme numbers, lengths, nesting and encodings, byte by byte.

The bytes are written here and not by msgpack, so that they may be what no encoder makes: numbers longer than
they need be, keys that stand twice, lengths that lie, timestamps, NaN.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.run import TARGETS
from tests.fuzz.support_scene import traffic
from tests.fuzz.support_targets import Target

from meshd.core.frames import FrameType

EXAMPLES = 60
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
MESSAGE_KINDS = 18
"""More than there are: some are unknown."""

Bytes = st.SearchStrategy[bytes]


def number(value: int) -> Bytes:
    """A number in one of the encodings that can hold it; what holds none is cut."""
    forms: list[bytes] = []
    if 0 <= value < 128:
        forms.append(bytes((value,)))
    for code, form in (
        (0xCC, ">B"),
        (0xCD, ">H"),
        (0xCE, ">I"),
        (0xCF, ">Q"),
        (0xD0, ">b"),
        (0xD3, ">q"),
    ):
        try:
            forms.append(bytes((code,)) + struct.pack(form, value))
        except struct.error:
            continue
    return st.sampled_from(forms or [b"\xcf" + b"\xff" * 8])


def head(codes: tuple[int, ...], length: int, lie: int, short: int | None = None) -> Bytes:
    """The header of something of this length, in any size; or of another length."""
    told = max(0, length + lie)
    sizes = (1, 2, 4)[3 - len(codes) :]
    forms = [
        bytes((code,)) + told.to_bytes(size, "big")
        for code, size in zip(codes, sizes, strict=True)
        if told < 256**size
    ]
    return st.sampled_from(
        forms if short is None or told > 15 else [*forms, bytes((short | told,))]
    )


LIES = st.sampled_from([0] * 30 + [1, -1, 2**31])
EXTREME = st.sampled_from(
    [
        0,
        1,
        2,
        15,
        16,
        127,
        128,
        255,
        256,
        65_535,
        65_536,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
        -1,
        -(2**63),
    ]
)
NUMBERS = EXTREME.flatmap(number) | st.integers(0, 300).flatmap(number)
FLOATS = st.sampled_from([0.0, -0.0, 1.5, 1e308, float("nan"), float("inf"), -1.0, 3600.0]).map(
    lambda value: b"\xcb" + struct.pack(">d", value)
)
CONSTANTS = st.sampled_from(
    [b"\xc0", b"\xc2", b"\xc3", b"\xc1", b"\xd6\xff\x00\x00\x00\x01", b"\xc7\x00\x05"]
)


def octets(data: bytes) -> Bytes:
    heads = LIES.flatmap(lambda lie: head((0xC4, 0xC5, 0xC6), len(data), lie))
    return heads.map(lambda start: start + data)


def text(data: bytes) -> Bytes:
    heads = LIES.flatmap(lambda lie: head((0xD9, 0xDA, 0xDB), len(data), lie, 0xA0))
    return heads.map(lambda start: start + data)


def array(items: list[bytes]) -> Bytes:
    heads = LIES.flatmap(lambda lie: head((0xDC, 0xDD), len(items), lie, 0x90))
    return heads.map(lambda start: start + b"".join(items))


def mapping(items: list[bytes]) -> Bytes:
    """Pairs; some of the keys stand there twice."""
    pairs = len(items) // 2
    heads = LIES.flatmap(lambda lie: head((0xDE, 0xDF), pairs, lie, 0x80))
    return heads.map(lambda start: start + b"".join(items[: 2 * pairs]))


@cache
def ids() -> list[bytes]:
    return [*(one.node for one in traffic().nodes), bytes(16), b"\xff" * 16]


OCTETS = st.deferred(
    lambda: st.one_of(
        st.sampled_from(ids()),
        st.sampled_from(
            [b"", b"x" * 4, b"h" * 8, b"d" * 16, b"k" * 32, b"s" * 64, b"\xa1v", b"b" * 1024]
        ),
        st.binary(max_size=40),
    ).flatmap(octets)
)
TEXTS = st.one_of(
    st.sampled_from(
        [
            b"",
            b"node-1",
            b"10.0.0.3",
            b"::1",
            b"load",
            b"x" * 64,
            b"x" * 129,
            b"\x00",
            b"\xff\xfe",
            b"\xed\xa0\x80",
            "ä".encode() * 40,
        ]
    ),
    st.text(max_size=20).map(str.encode),
).flatmap(text)
LEAVES = st.one_of(NUMBERS, OCTETS, TEXTS, FLOATS, CONSTANTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=9).flatmap(array), st.lists(inner, max_size=8).flatmap(mapping)
    ),
    max_leaves=25,
)
NESTED = st.integers(1, 600).map(lambda depth: b"\x91" * depth + b"\xc0")
MESSAGES = st.tuples(
    st.integers(0, MESSAGE_KINDS).flatmap(number), st.lists(VALUES | NESTED, max_size=9)
).flatmap(lambda parts: array([parts[0], *parts[1]]))
PAYLOADS = st.lists(MESSAGES, max_size=4).flatmap(lambda messages: array([b"\x01", *messages]))
FRAMES = st.tuples(
    st.integers(0, len(FrameType)).flatmap(number), NUMBERS, st.lists(VALUES | NESTED, max_size=7)
).flatmap(lambda parts: array([parts[0], parts[1], *parts[2]]))
DELTAS = st.lists(VALUES | NESTED, min_size=8, max_size=10).flatmap(array)


def _packets(frames: list[bytes]) -> bytes:
    return b"\x00" + b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def _sent(payload: bytes) -> bytes:
    return b"\x02" + payload


@pytest.fixture(scope="module")
def target() -> Callable[[str], Target]:
    made: dict[str, Target] = {}

    def find(name: str) -> Target:
        if name not in made:
            made[name] = TARGETS[name](random.Random(0))
        return made[name]

    return find


@SETTINGS
@given(payload=PAYLOADS.map(_sent))
def test_payloads_by_grammar(target: Callable[[str], Target], payload: bytes) -> None:
    target("member").feed(payload)
    target("stranger").feed(payload)


@SETTINGS
@given(packets=st.lists(FRAMES, max_size=4).map(_packets))
def test_frames_by_grammar(target: Callable[[str], Target], packets: bytes) -> None:
    target("stream").feed(packets)


@SETTINGS
@given(delta=DELTAS)
def test_deltas_by_grammar(target: Callable[[str], Target], delta: bytes) -> None:
    target("record").feed(delta)


# Every kind in its own shape: with the right number of fields, so that each field is looked at.
SHAPES = {
    "ping": (1, "n o4 o8 n"),
    "ack": (2, "n o o8 n"),
    "ping_request": (3, "n i t n"),
    "nack": (4, "n"),
    "claim": (5, "i n n n t t n i n"),
    "record": (6, "d f"),
    "digest": (7, "l h a f"),
    "view": (8, "l h a f"),
    "join": (9, "n"),
    "join_answer": (10, "n f"),
    "join_later": (11, "n s"),
    "soft": (12, "v"),
    "pull": (13, "a"),
}
FIELDS: dict[str, Bytes] = {
    "n": NUMBERS,
    "i": st.deferred(lambda: st.sampled_from(ids()).map(lambda one: b"\xc4\x10" + one)),
    "o": OCTETS | st.just(b"\xc0"),
    "o4": st.binary(min_size=4, max_size=4).map(lambda data: b"\xc4\x04" + data),
    "o8": st.just(b"\xc0") | st.binary(min_size=8, max_size=8).map(lambda data: b"\xc4\x08" + data),
    "t": TEXTS,
    "f": CONSTANTS | NUMBERS,
    "s": FLOATS | NUMBERS,
    "d": DELTAS,
    "l": st.just(b"\xc4\x10" + bytes(16)),
    "h": st.just(b"\xc4\x10" + b"\xff" * 16),
    "a": st.lists(
        st.tuples(
            st.deferred(lambda: st.sampled_from(ids()).map(lambda one: b"\xc4\x10" + one)),
            NUMBERS,
            NUMBERS,
            NUMBERS,
        ).map(lambda parts: b"\x94" + b"".join(parts)),
        max_size=8,
    ).flatmap(array),
    "v": st.lists(VALUES, min_size=4, max_size=6).flatmap(array),
}


@pytest.mark.parametrize("kind", sorted(SHAPES))
@settings(SETTINGS, max_examples=25)
@given(data=st.data())
def test_every_kind_in_its_own_shape(
    target: Callable[[str], Target], kind: str, data: st.DataObject
) -> None:
    code, shape = SHAPES[kind]
    fields = [
        data.draw(FIELDS[name] if data.draw(st.integers(0, 9)) else VALUES)
        for name in shape.split()
    ]
    message = bytes((0x90 | (len(fields) + 1), code)) + b"".join(fields)
    target("member").feed(_sent(b"\x92\x01" + message))


def test_after_all_of_this_every_target_still_works(target: Callable[[str], Target]) -> None:
    for name in ("member", "stranger", "stream", "record"):
        one = target(name)
        one.feed(one.case())
        one.finish()
