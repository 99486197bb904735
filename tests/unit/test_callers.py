"""Passports: what another node passes on is as its origin said, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import MESH, real_signer, real_verify

from meshd.core.frames import CallHeader
from meshd.orchestrate.callers import ISSUED_KEPT, LIFE_S_MAX, SHARED_S, Caller, Passports
from meshd_cms import MeshId, NodeId
from meshd_cms.types import node_id_of
from meshd_plugins.api import Operation, Privacy, Refused, Request

NOW_S = 1_800_000_000.0
KEYS = {node_id_of(real_signer(n).public_key): real_signer(n).public_key for n in (1, 2, 3)}
ORIGIN, RELAY, SERVER = KEYS
REQUEST = Request(
    "r-1", "data.gpt/diary", Operation.FETCH, {}, privacy=Privacy.LAN, deadline_s=30.0
)


def passports(
    number: int,
    *,
    mesh: MeshId = MESH,
    members: Mapping[NodeId, bytes] = KEYS,
    clock: Callable[[], float] = lambda: NOW_S,
) -> Passports:
    signer = real_signer(number)
    return Passports(mesh, node_id_of(signer.public_key), signer, real_verify, members.get, clock)


def header(principal: str = "key:phone", request: Request = REQUEST) -> CallHeader:
    """As the origin sends it."""
    caller = Caller(ORIGIN, principal)
    return CallHeader(
        request.request_id,
        request.name,
        "data.gpt/diary",
        "fetch",
        caller=ORIGIN,
        principal=principal,
        passport=passports(1).of(caller, request),
        privacy=int(request.privacy),
    )


def refusal(server: Passports, sent: CallHeader, peer: NodeId = RELAY) -> str:
    with pytest.raises(Refused) as caught:
        server.read(sent, peer)
    assert caught.value.code == "caller"
    return caught.value.message


def test_straight_from_the_origin_its_certificate_is_enough() -> None:
    server = passports(3, members={})
    assert str(server.read(header(), ORIGIN)).endswith("/key:phone")
    bare = replace(header(), caller=b"", principal="", passport=b"")
    assert server.read(bare, ORIGIN) == Caller(ORIGIN, "local")


def test_what_a_relay_passes_on_is_believed_by_the_origins_word() -> None:
    sent = header()
    read = passports(3).read(sent, RELAY)
    assert (read.node, read.principal) == (ORIGIN, "key:phone")
    forwarded = passports(3).of(read, REQUEST)
    assert forwarded == sent.passport  # a further hop gets the very same word
    assert passports(2).read(replace(sent, passport=forwarded), SERVER) == read


def test_a_relay_may_narrow_the_class_and_not_widen_it() -> None:
    sent = header()
    assert passports(3).read(replace(sent, privacy=0), RELAY).node == ORIGIN
    assert "widened" in refusal(passports(3), replace(sent, privacy=2))


@pytest.mark.parametrize(
    "change",
    [
        {"principal": "local"},
        {"principal": "key:tablet"},
        {"principal": "root"},
        {"principal": "key:phone\n"},
        {"name": "data.gpt/other"},
        {"caller": SERVER},
        {"caller": b"short"},
        {"passport": b""},
        {"passport": bytes(73)},
    ],
)
def test_a_relay_can_change_neither_who_asks_nor_what_for(change: dict[str, object]) -> None:
    refusal(passports(3), replace(header(), **change))  # type: ignore[arg-type]


@given(place=st.integers(0, 72), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_passport_that_differs_in_one_bit_is_none(place: int, bit: int) -> None:
    sent = header()
    broken = bytearray(sent.passport)
    broken[place] ^= 1 << bit
    refusal(passports(3), replace(sent, passport=bytes(broken)))


def test_it_is_for_one_mesh_and_for_members_in_good_standing() -> None:
    refusal(passports(3, mesh=MeshId(b"another mesh 16!")), header())
    others = {node: key for node, key in KEYS.items() if node != ORIGIN}
    assert "no member in good standing" in refusal(passports(3, members=others), header())


def test_it_ends_soon_after_its_request() -> None:
    sent = header()
    passports(3, clock=lambda: NOW_S + 119.0).read(sent, RELAY)
    assert "time is over" in refusal(passports(3, clock=lambda: NOW_S + 122.0), sent)
    long_ago = passports(3, clock=lambda: NOW_S - LIFE_S_MAX)
    assert "clock" in refusal(long_ago, sent)


def test_requests_for_the_same_share_a_signature_for_a_while() -> None:
    now_s = [NOW_S]
    origin, caller = passports(1, clock=lambda: now_s[0]), Caller(ORIGIN)
    first = origin.of(caller, REQUEST)
    now_s[0] += SHARED_S / 2
    assert origin.of(caller, replace(REQUEST, request_id="r-2")) is first
    for other in (
        replace(REQUEST, privacy=Privacy.MESH),
        replace(REQUEST, name="data.gpt/other"),
        replace(REQUEST, deadline_s=REQUEST.deadline_s + SHARED_S),  # it would not last
        replace(REQUEST, deadline_s=1.0),
    ):
        assert origin.of(caller, other) is not first
    assert origin.of(Caller(ORIGIN, "key:phone"), REQUEST) != first
    again = origin.of(caller, REQUEST)
    now_s[0] += 2 * SHARED_S
    assert origin.of(caller, REQUEST) != again
    now_s[0] -= 86_400.0  # the clock was set
    passports(3, clock=lambda: now_s[0]).read(
        replace(header(), passport=origin.of(caller, REQUEST), principal="local"), RELAY
    )


def test_those_used_longest_ago_are_forgotten() -> None:
    origin, caller = passports(1), Caller(ORIGIN)
    first = origin.of(caller, REQUEST)
    for number in range(ISSUED_KEPT):
        origin.of(caller, replace(REQUEST, name=f"data.gpt/{number}"))
    assert origin.of(caller, REQUEST) is not first


texts = st.text(max_size=20)


@given(
    request_id=texts, name=texts, privacy=st.sampled_from(Privacy), left_s=st.floats(0.0, 86_400.0)
)
@settings(max_examples=50, deadline=None)
def test_whatever_was_asked_arrives_as_it_was_asked(
    request_id: str, name: str, privacy: Privacy, left_s: float
) -> None:
    request = replace(REQUEST, request_id=request_id, name=name, privacy=privacy, deadline_s=left_s)
    assert passports(3).read(header(request=request), RELAY).node == ORIGIN
