"""Encoders and decoders: what goes in comes out, and arbitrary bytes give CodecError or a message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import over_the_wire, rumour, store

from meshd_cms.codec import (
    AGE_MS_MAX,
    DIGEST_LINES_MAX,
    pack_delta,
    pack_digest,
    pack_soft,
    unpack_delta,
    unpack_digest,
    unpack_soft,
)
from meshd_cms.entries import pack_value, unpack_value
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.soft import SOFT_VALUE_BYTES_MAX, SoftTold
from meshd_cms.types import (
    COUNTER_MAX,
    ENTRIES_MAX,
    EPOCH_MAX,
    VALUE_DEPTH_MAX,
    Delta,
    DigestLine,
    Entry,
    Epoch,
    Head,
    NodeId,
    Version,
    node_id_of,
)

counters = st.integers(0, COUNTER_MAX)
versions = st.integers(1, COUNTER_MAX).map(Version)
epochs = st.integers(1, EPOCH_MAX).map(Epoch)
node_ids = st.binary(min_size=16, max_size=16).map(NodeId)
signatures = st.binary(min_size=64, max_size=64)
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=10)
    | st.binary(max_size=10)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
entries = st.builds(Entry, keys, st.none() | st.binary(max_size=40), versions, signatures)


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    key = draw(st.binary(min_size=32, max_size=32))
    owner, epoch = node_id_of(key), draw(epochs)
    head = Head(
        owner,
        epoch,
        draw(versions),
        Version(draw(counters)),
        draw(st.binary(min_size=16, max_size=16)),
        key,
        draw(signatures),
    )
    some = tuple(draw(st.lists(entries, max_size=4)))
    return Delta(owner, epoch, Version(draw(counters)), draw(versions), some, head)


@settings(deadline=None, max_examples=80)
@given(deltas())
def test_deltas_come_out_as_they_went_in(delta: Delta) -> None:
    assert over_the_wire(delta) == delta


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.builds(DigestLine, node_ids, epochs, counters.map(Version), counters.map(Version)),
        max_size=8,
        unique_by=lambda line: line.owner,
    )
)
def test_digests_come_out_as_they_went_in(lines: list[DigestLine]) -> None:
    assert unpack_digest(unpack(pack(pack_digest(lines)))) == tuple(lines)


@settings(deadline=None, max_examples=80)
@given(
    st.builds(
        SoftTold,
        st.integers(1, COUNTER_MAX),
        keys,
        values,
        st.integers(0, AGE_MS_MAX).map(lambda age_ms: age_ms / 1000),
    )
)
def test_soft_readings_come_out_as_they_went_in(told: SoftTold) -> None:
    if len(pack_value(told.value)) <= SOFT_VALUE_BYTES_MAX:
        assert unpack_soft(unpack(pack(pack_soft(told)))) == told


@settings(deadline=None, max_examples=80)
@given(values)
def test_values_come_out_as_they_went_in_and_the_order_of_maps_does_not_count(
    value: object,
) -> None:
    data = pack_value(value)  # type: ignore[arg-type]
    assert unpack_value(data) == value
    if isinstance(value, dict):
        assert pack_value(dict(reversed(list(value.items())))) == data


anything = st.recursive(
    scalars | st.integers() | st.floats() | st.text() | st.just(object()) | st.just({1, 2}),
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)
DECODERS: list[Callable[[object], object]] = [unpack_delta, unpack_digest, unpack_soft]


@settings(deadline=None, max_examples=100)
@given(anything, st.sampled_from(DECODERS))
def test_decoders_raise_codec_error_and_nothing_else(
    obj: object, decode: Callable[[object], object]
) -> None:
    try:
        decode(obj)
    except CodecError:
        return
    assert obj in ([], ())  # of these, only the empty digest is a message


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_delta_with_any_field_replaced_decodes_or_raises_codec_error(data: st.DataObject) -> None:
    delta = rumour(store(0).set("k", 1))
    wire = list(pack_delta(delta))
    entry = list(wire[8][0])  # type: ignore[index]
    if data.draw(st.booleans()):
        wire[data.draw(st.integers(0, 8))] = data.draw(anything)
    else:
        entry[data.draw(st.integers(0, 3))] = data.draw(anything)
        wire[8] = [entry]
    try:
        again = unpack_delta(wire)
    except CodecError:
        return
    assert unpack_delta(pack_delta(again)) == again


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_a_value_or_a_codec_error(data: bytes) -> None:
    try:
        value = unpack_value(data)
    except CodecError:
        return
    assert unpack_value(pack_value(value)) == value or b"\xca" in data or b"\xcb" in data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used
        b"\x01\x01",  # two objects
        b"\xdd\xff\xff\xff\xff",  # a list of 4 G items that are not there
        b"\x91" * (VALUE_DEPTH_MAX + 1) + b"\x01",
        b"\x91" * 100_000,
        b"\x81\x01\x01",  # a map with a number as key
        b"\x81\xc4\x01a\x01",  # ... with bytes as key
        b"\x81\x90\x01",  # ... with a list as key
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xd4\x05\x00",  # an extension
        b"\xa1\xff",  # text that is not UTF-8
    ],
)
def test_bytes_that_are_no_value(data: bytes) -> None:
    with pytest.raises(CodecError):
        unpack_value(data)


def test_lists_are_bounded() -> None:
    wire = list(pack_delta(rumour(store(0).set("k", 1))))
    wire[8] = list(wire[8]) * (ENTRIES_MAX + 1)  # type: ignore[call-overload]
    with pytest.raises(CodecError, match="513 entries"):
        unpack_delta(wire)
    lines = [(number.to_bytes(16, "big"), 1, 1, 0) for number in range(DIGEST_LINES_MAX + 1)]
    assert len(unpack_digest(lines[1:])) == DIGEST_LINES_MAX
    with pytest.raises(CodecError, match="4097 digest lines"):
        unpack_digest(lines)
    with pytest.raises(CodecError, match="twice"):
        unpack_digest([lines[0], lines[0]])


@pytest.mark.parametrize(
    ("value", "age_ms"),
    [
        (1, -1),
        (1, float("nan")),
        (1, 1.5),
        (1, True),
        (1, AGE_MS_MAX + 1),
        ("x" * SOFT_VALUE_BYTES_MAX, 0),
        (2**70, 0),
    ],
)
def test_soft_readings_out_of_bounds(value: object, age_ms: object) -> None:
    with pytest.raises(CodecError):
        unpack_soft((1, "load", value, age_ms))
    assert unpack_soft((1, "load", 1, 250)) == SoftTold(1, "load", 1, 0.25)


@pytest.mark.parametrize(
    "data",
    [b"\xdc\x10\x01" + b"\xc0" * 4097, b"\xdc\xff\xff" * 400, b"\xc7\x01\x05x", b"\xd4\x05x"],
)
def test_arrays_too_long_and_extensions_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        unpack(data)
    assert unpack(b"\xdc\x10\x00" + b"\xc0" * 4096) == [None] * 4096
