"""The messages of the join channel: what goes in comes out, and no bytes do anything but be refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.trust.certificates import CHAIN_MAX, Role
from meshd.trust.join_errors import MalformedMessage, Refusal
from meshd.trust.join_messages import (
    LENGTH_BYTES,
    MESSAGE_BYTES_MAX,
    ClientWelcome,
    FromInviter,
    FromJoiner,
    Hello,
    Offer,
    PinAccepted,
    PinConfirm,
    PinReply,
    Proof,
    Refused,
    Welcome,
    body_length,
    decode_from_inviter,
    decode_from_joiner,
    encode_message,
)

CHECKED = settings(max_examples=100, deadline=None)


def exactly(count: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=count, max_size=count)


texts = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=60)
chains = st.lists(st.binary(min_size=1, max_size=600), min_size=1, max_size=CHAIN_MAX).map(tuple)
offers = st.builds(Offer, exactly(32), chains, st.binary(min_size=1, max_size=600))
from_joiners: st.SearchStrategy[FromJoiner] = st.one_of(
    st.builds(Hello, st.integers(0, 255), st.just(b"") | exactly(33)),
    st.builds(PinConfirm, exactly(32)),
    st.builds(
        Proof,
        exactly(5) | st.just(b""),
        exactly(32),
        exactly(32),
        texts,
        exactly(64),
        exactly(32),
    ),
)
from_inviters: st.SearchStrategy[FromInviter] = st.one_of(
    offers,
    st.builds(PinReply, exactly(33)),
    st.builds(PinAccepted, exactly(32), st.sampled_from(Role), offers),
    st.builds(Refused, st.sampled_from(Refusal)),
    st.builds(ClientWelcome, exactly(32), texts, texts, texts, texts),
    st.builds(
        Welcome,
        mac=exactly(32),
        mesh_name=texts,
        role=st.sampled_from(Role),
        chain=chains,
        authority=chains | st.just(()),
        key_generation=st.integers(0, 2**32 - 1),
        datagram_key=exactly(32),
        decrees=st.lists(st.binary(min_size=1, max_size=50), max_size=5).map(tuple),
        members=st.lists(st.tuples(texts, st.integers(1, 65_535)), max_size=5).map(tuple),
    ),
)


@CHECKED
@given(from_joiners)
def test_what_a_joiner_says_comes_back(message: FromJoiner) -> None:
    data = encode_message(message)
    assert body_length(data[:LENGTH_BYTES]) == len(data) - LENGTH_BYTES
    assert decode_from_joiner(data[LENGTH_BYTES:]) == message
    with pytest.raises(MalformedMessage):
        decode_from_inviter(data[LENGTH_BYTES:])


@CHECKED
@given(from_inviters)
def test_what_an_inviter_says_comes_back(message: FromInviter) -> None:
    body = encode_message(message)[LENGTH_BYTES:]
    assert decode_from_inviter(body) == message
    with pytest.raises(MalformedMessage):
        decode_from_joiner(body)


@CHECKED
@given(from_joiners, from_inviters, st.data())
def test_changed_bytes_are_another_message_or_none(
    one: FromJoiner, other: FromInviter, data: st.DataObject
) -> None:
    for message in (one, other):
        body = bytearray(encode_message(message)[LENGTH_BYTES:])
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] ^= data.draw(st.integers(1, 255))
        cut = bytes(body[: data.draw(st.integers(0, len(body)))])
        for spoilt in (bytes(body), cut):
            for decode in (decode_from_joiner, decode_from_inviter):
                try:
                    found = decode(spoilt)
                except MalformedMessage:
                    continue
                assert encode_message(found)


@CHECKED
@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    for decode in (decode_from_joiner, decode_from_inviter):
        try:
            decode(body)
        except MalformedMessage:
            continue


def test_a_length_is_bounded() -> None:
    for length in (0, MESSAGE_BYTES_MAX + 1, 2**32 - 1):
        with pytest.raises(MalformedMessage):
            body_length(length.to_bytes(LENGTH_BYTES, "big"))
    assert body_length(MESSAGE_BYTES_MAX.to_bytes(LENGTH_BYTES, "big")) == MESSAGE_BYTES_MAX


def test_text_that_a_terminal_would_act_on_is_refused() -> None:
    evil = Proof(b"", bytes(32), bytes(32), "a\x1b[2J", bytes(64), bytes(32))
    with pytest.raises(MalformedMessage):
        decode_from_joiner(encode_message(evil)[LENGTH_BYTES:])


def test_secrets_are_not_printed() -> None:
    key = b"K" * 32
    welcome = Welcome(bytes(32), "home", Role.MEMBER, (b"c",), (), 0, key, (), ())
    assert "KKK" not in repr(welcome)
    assert "sesame" not in repr(ClientWelcome(bytes(32), "home", "https://x", "sesame", "pin"))
