"""The door of a node: distances, classes, hops; and that each refusal has its own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import MESH, real_signer, real_verify
from tests.unit.support_naming import offer

from meshd.core.frames import CallHeader
from meshd.orchestrate.access import AccessPolicy, Standing
from meshd.orchestrate.access_guard import Guard, Source, check_departure
from meshd.orchestrate.callers import Caller, Passports
from meshd.orchestrate.distance import reach_of_host
from meshd_cms import NodeId
from meshd_cms.types import node_id_of
from meshd_plugins.api import Descriptor, Operation, Privacy, Refused, Request

NAME = "knowledge.gpt/math"
NODES = [node_id_of(real_signer(number).public_key) for number in range(1, 6)]
KEYS = {node: real_signer(number).public_key for number, node in enumerate(NODES, 1)}
ME, PEER, ORIGIN = NODES[:3]
HOSTS = {Privacy.LOCAL: "", Privacy.LAN: "10.0.0.7", Privacy.MESH: "192.0.3.7"}


def guard(reach: Privacy = Privacy.LAN, me: NodeId = ME, *, is_observer: bool = False) -> Guard:
    policy = AccessPolicy((), me, lambda _node: Standing())
    return Guard(me, policy, lambda _node: reach, is_observer=is_observer)


def capability(privacy: Privacy, name: str = NAME) -> Descriptor:
    return Descriptor(name, (Operation.CHAT,), "a test", 1, privacy)


def code(door: Guard, offered: Privacy, privacy: Privacy, source: Source, asked: str = NAME) -> str:
    """ "" when it is let in."""
    try:
        door.admit(capability(offered), asked, privacy, source)
    except Refused as refused:
        return refused.code
    return ""


LEVELS = st.sampled_from(Privacy)
AWAY = st.sampled_from([Privacy.LAN, Privacy.MESH])


@given(offered=LEVELS, privacy=LEVELS, away=AWAY, reach=AWAY, relayed=st.booleans())
@settings(max_examples=100, deadline=None)
def test_who_serves_judges_the_way_by_its_farther_end(
    offered: Privacy, privacy: Privacy, away: Privacy, reach: Privacy, relayed: bool
) -> None:
    origin = ORIGIN if relayed else PEER
    source = Source(Caller(origin), PEER, away)
    way = max(away, reach) if relayed else away
    goes = Privacy.CLOUD if offered is Privacy.CLOUD else way
    fits = goes <= privacy and way <= offered
    assert code(guard(reach), offered, privacy, source) == ("" if fits else "privacy")


@given(offered=LEVELS, privacy=LEVELS)
@settings(max_examples=20, deadline=None)
def test_what_is_asked_here_stays_here_but_for_the_cloud(
    offered: Privacy, privacy: Privacy
) -> None:
    leaves = offered is Privacy.CLOUD
    fits = not leaves or privacy is Privacy.CLOUD
    assert code(guard(), offered, privacy, Source(Caller(ME))) == ("" if fits else "privacy")


@given(offered=LEVELS, privacy=LEVELS, reach=AWAY, local=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_tried_is_what_the_other_end_would_let_in(
    offered: Privacy, privacy: Privacy, reach: Privacy, local: bool
) -> None:
    owner = 0 if local else 1
    door = guard(reach, me=offer(0, NAME).owner)
    tried = door.may_send(offer(owner, NAME, privacy=offered), Caller(door.me), privacy).allowed
    there = guard(reach, me=offer(owner, NAME).owner)
    source = Source(Caller(door.me)) if local else Source(Caller(door.me), door.me, reach)
    assert tried is (code(there, offered, privacy, source) == "")


def test_an_observer_serves_nobody_else() -> None:
    door = guard(is_observer=True)
    source = Source(Caller(PEER), PEER, Privacy.LAN)
    assert code(door, Privacy.MESH, Privacy.MESH, source) == "observer"
    assert code(door, Privacy.MESH, Privacy.MESH, Source(Caller(ME))) == ""


@pytest.mark.parametrize(
    ("asked", "served", "fits"),
    [
        (NAME, NAME, True),
        ("knowledge.gpt/math/algebra?context>=8k", NAME, True),
        ("knowledge.gpt/math", "knowledge.gpt/general", True),
        ("knowledge.gpt/*", NAME, True),
        ("knowledge.gpt/**?model=SmolLM2", NAME, True),
        ("knowledge.gpt/maths", NAME, False),
        (NAME, "knowledge.gpt/math/algebra", False),
        (NAME, "data.gpt/diary", False),
        ("data.gpt/diary/today", "data.gpt/diary", False),
        ("data.gpt/diary", "data.gpt/diary", True),
        ("no name at all", NAME, False),
    ],
)
def test_a_relay_gets_what_was_asked_for_and_nothing_else(
    asked: str, served: str, fits: bool
) -> None:
    def outcome(source: Source) -> str:
        try:
            guard().admit(capability(Privacy.MESH, served), asked, Privacy.MESH, source)
        except Refused as refused:
            return refused.code
        return ""

    assert outcome(Source(Caller(ORIGIN), PEER, Privacy.LAN)) == ("" if fits else "caller")
    assert outcome(Source(Caller(PEER), PEER, Privacy.LAN)) == ""


class Hop:
    """One node on the way of a request: it lets in, and passes on."""

    def __init__(self, number: int) -> None:
        self.node = NODES[number]
        signer = real_signer(number + 1)
        self.passports = Passports(
            MESH, self.node, signer, real_verify, KEYS.get, lambda: 1_800_000_000.0
        )


@given(
    privacy=LEVELS,
    ways=st.lists(st.sampled_from([Privacy.LAN, Privacy.MESH]), min_size=1, max_size=4),
    claims=st.lists(LEVELS, min_size=4, max_size=4),
    offered=LEVELS,
)
@settings(max_examples=100, deadline=None)
def test_over_any_hops_a_request_goes_no_further_than_where_it_was_asked_said(
    privacy: Privacy, ways: list[Privacy], claims: list[Privacy], offered: Privacy
) -> None:
    """The first node is honest; the ones between may say any class; what each way crossed is kept."""
    request = Request("r-1", NAME, Operation.CHAT, {}, privacy=privacy)
    caller, carried = Caller(NODES[0]), privacy
    crossed: list[Privacy] = []
    refusals: list[str] = []
    served = False
    try:
        for number, way in enumerate(ways, 1):
            before, here = Hop(number - 1), Hop(number)
            check_departure(carried, HOSTS[way])  # every node looks before it sends
            header = CallHeader(
                "r-1",
                NAME,
                NAME,
                "chat",
                caller=caller.node,
                principal=caller.principal,
                passport=before.passports.of(caller, replace(request, privacy=carried)),
                privacy=int(carried),
            )
            caller = here.passports.read(header, before.node)
            crossed.append(reach_of_host(HOSTS[way]))
            last = number == len(ways)
            if last:
                door = guard(max(crossed), me=here.node)
                source = Source(caller, before.node, way)
                door.admit(capability(offered), NAME, carried, source)
                served = True
            else:
                carried = claims[number - 1]  # what this one makes of it
    except Refused as refused:
        refusals.append(refused.code)
    assert set(refusals) <= {"privacy", "caller"}
    # A liar may carry it further itself; who is behind the liar does not serve it.
    if served:
        assert max(crossed) <= privacy
        assert offered is not Privacy.CLOUD or privacy is Privacy.CLOUD
