"""The token's text: what goes in comes out, and whatever is wrong with it is told as what it is."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.trust.certificates import Role
from meshd.trust.join_errors import TokenWrong
from meshd.trust.join_token import (
    EXPIRY_MAX_S,
    PREFIX,
    V4_MAX,
    JoinToken,
    decode_token,
    encode_token,
    reachable,
)
from meshd_cms import MeshId

CHECKED = settings(max_examples=100, deadline=None)
BASE64URL = string.ascii_letters + string.digits + "-_"

ports = st.integers(1, 65_535)
v4 = st.lists(st.ip_addresses(v=4).map(str), min_size=1, max_size=V4_MAX, unique=True)
v6 = st.ip_addresses(v=6).map(lambda ip: [ip.compressed])


@st.composite
def tokens(draw: st.DrawFn) -> JoinToken:
    port = draw(ports)
    hosts = draw(v4 | v6)
    return JoinToken(
        mesh_id=MeshId(draw(st.binary(min_size=16, max_size=16))),
        secret=draw(st.binary(min_size=16, max_size=16)),
        role=draw(st.sampled_from(Role)),
        expires_at_s=draw(st.integers(0, EXPIRY_MAX_S)),
        addresses=tuple((host, port) for host in hosts),
    )


@CHECKED
@given(tokens())
def test_a_token_comes_back_and_is_short(token: JoinToken) -> None:
    text = encode_token(token)
    assert decode_token(text) == token
    assert len(text) <= 90
    assert set(text) <= set(BASE64URL)


@CHECKED
@given(tokens(), st.data())
def test_a_changed_character_is_a_typo(token: JoinToken, data: st.DataObject) -> None:
    text = encode_token(token)
    at = data.draw(st.integers(len(PREFIX), len(text) - 1))
    other = data.draw(st.sampled_from(BASE64URL.replace(text[at], "")))
    with pytest.raises(TokenWrong, match=r"typo|cut short|longer"):
        decode_token(text[:at] + other + text[at + 1 :])


@CHECKED
@given(tokens(), st.data())
def test_a_token_that_is_cut_says_so(token: JoinToken, data: st.DataObject) -> None:
    text = encode_token(token)
    kept = data.draw(st.integers(len(PREFIX), len(text) - 2))
    with pytest.raises(TokenWrong, match="cut short"):
        decode_token(text[:kept])


@CHECKED
@given(st.text(max_size=200) | st.text(BASE64URL, max_size=120).map(PREFIX.__add__))
def test_any_text_is_a_token_or_is_told_why_not(text: str) -> None:
    try:
        token = decode_token(text)
    except TokenWrong:
        return
    assert encode_token(token) == "".join(text.split())


@CHECKED
@given(tokens())
def test_white_space_does_no_harm_and_more_does(token: JoinToken) -> None:
    text = encode_token(token)
    assert decode_token(f"  {text[:30]}\r\n{text[30:]}\n") == token
    with pytest.raises(TokenWrong, match=r"longer|typo"):
        decode_token(text + "AAAA")
    with pytest.raises(TokenWrong, match="contains '!'"):
        decode_token(text[:20] + "!" + text[21:])
    with pytest.raises(TokenWrong, match="another release"):
        decode_token(text.replace("meshd1", "meshd2"))


def test_the_secret_is_not_printed() -> None:
    token = JoinToken(MeshId(bytes(16)), b"S" * 16, Role.MEMBER, 0, (("192.0.2.1", 1),))
    assert "SSS" not in repr(token)


def test_which_addresses_go_into_a_token() -> None:
    lan, other, docker, fourth = "192.168.1.5", "10.0.0.1", "172.17.0.1", "10.0.0.2"
    v6, local = "2001:db8::1", "fe80::1"
    at = [(host, 7946) for host in (lan, v6, other, docker, fourth, lan)]
    assert reachable(at) == ((lan, 7946), (other, 7946), (docker, 7946))
    assert reachable([(local, 1), (v6, 1), ("2001:db8::2", 1)]) == ((v6, 1),)
    assert reachable([(lan, 1), (other, 2)]) == ((lan, 1),)
    assert reachable([("board.local", 1), ("fe80::1%eth0", 1)]) == ()
