"""Nothing ever goes further than its class: over plans, retries, fallbacks, and hops, wherever peers are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shell.support_orchestrate import (
    ARITHMETIC,
    GENERAL,
    HANDBOOK,
    NothingToSee,
    Scripted,
    World,
    asking,
    raising,
    run,
    saying,
)
from tests.shell.support_streams import header, identities, peer, trio_test

from meshd.orchestrate.access_guard import check_departure
from meshd.orchestrate.distance import reach_of_host
from meshd.orchestrate.events import AskEvent
from meshd.orchestrate.mesh import Faces, Mesh
from meshd.shell.streams import IncomingCall
from meshd_naming import NamingError
from meshd_plugins.api import BadRequest, CapabilityError, Failed, Privacy, Refused, Value

NEAR = ("10.0.0.7", "192.168.1.20", "172.16.3.3", "fd00::7", "fe80::1%eth0", "127.0.0.9")
FAR = ("192.0.3.7", "8.8.8.8", "2001:4860::8", "100.64.0.1", "somewhere.example", "0.0.0.0", "")
QUESTIONS = (
    "Tell me about the sea.",
    "What is 37 * 43?",
    "Write a line about the sea, and compute 37 * 43.",
)
NAMES = (GENERAL, ARITHMETIC, HANDBOOK, "computation.gpt/arithmetic", "knowledge.gpt/sea")
ENDS = (
    saying("a", "b"),
    raising(Refused("full", code="busy")),
    raising(Failed("gone", code="worker_died")),
    raising(BadRequest("no sum", code="not_arithmetic")),
)


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Place:
    """Where a capability is, and what it says of itself."""

    name: str
    host: str  # "": on this node
    privacy: Privacy
    end: int


places = st.builds(
    Place,
    st.sampled_from(NAMES),
    st.sampled_from(("", *NEAR, *FAR[:-1])),
    st.sampled_from(Privacy),
    st.integers(0, len(ENDS) - 1),
)


@given(
    drawn=st.lists(places, min_size=1, max_size=6),
    target=st.sampled_from(("auto", *NAMES)),
    question=st.sampled_from(QUESTIONS),
    asked=st.none() | st.sampled_from(Privacy),
    most=st.sampled_from(Privacy),
)
@settings(max_examples=100, deadline=None)
def test_whatever_the_plan_and_whoever_fails_nothing_leaves_further_than_its_class(
    drawn: list[Place], target: str, question: str, asked: Privacy | None, most: Privacy
) -> None:
    reached: list[tuple[Place, Scripted]] = []

    async def body() -> None:
        world = World()
        for number, place in enumerate(drawn):
            script = ENDS[place.end]
            if place.host:
                reached.append(
                    (
                        place,
                        world.peer(
                            f"p{number}", place.name, script, privacy=place.privacy, host=place.host
                        ),
                    )
                )
            elif world.host.descriptor(place.name) is None:
                reached.append((place, world.local(place.name, script, privacy=place.privacy)))
        ask = replace(asking(question, target), privacy=asked, privacy_max=most)
        with suppress(CapabilityError, NamingError):
            await world.events(ask)
        if asked is not None and asked > most:
            assert not any(scripted.requests for _, scripted in reached)

    run(body)
    bound = min(Privacy.MESH, most) if asked is None else asked
    for place, scripted in reached:
        away = Privacy.LOCAL
        if place.host:
            away = Privacy.LAN if place.host in NEAR else Privacy.MESH
        for request in scripted.requests:
            assert request.privacy == bound <= most
            assert away <= bound
            assert away <= place.privacy
            assert place.privacy is not Privacy.CLOUD or bound is Privacy.CLOUD


def test_a_class_beyond_what_the_principal_may_is_refused_and_none_is_cut_to_it() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("a"), host="8.8.8.8")
        here = world.local(GENERAL, saying("b"))
        ask = replace(asking(target=GENERAL), principal="key:phone", privacy_max=Privacy.LAN)
        with pytest.raises(Refused, match="key:phone may send requests no further than lan"):
            await world.events(replace(ask, privacy=Privacy.MESH))
        await world.events(replace(ask, privacy=None))
        assert (here.requests[0].privacy, world.remote.called) == (Privacy.LAN, [])

    run(body)


@pytest.mark.parametrize("host", NEAR)
def test_addresses_that_no_router_of_the_internet_forwards_are_near(host: str) -> None:
    assert reach_of_host(host) is Privacy.LAN
    check_departure(Privacy.LAN, host)
    with pytest.raises(Refused):
        check_departure(Privacy.LOCAL, host)


@pytest.mark.parametrize("host", FAR)
def test_all_others_are_far_and_so_is_what_is_no_address(host: str) -> None:
    assert reach_of_host(host) is Privacy.MESH
    check_departure(Privacy.MESH, host)
    with pytest.raises(Refused) as caught:
        check_departure(Privacy.LAN, host)
    assert caught.value.code == "privacy"


def test_rules_of_this_node_hold_for_what_it_asks_of_others() -> None:
    async def body() -> None:
        rules = [{"name": GENERAL, "callers": ["key:phone"], "effect": "deny"}]
        world = World(rules=[*rules, {"name": GENERAL, "effect": "allow"}])
        world.peer("pi", GENERAL, saying("a"))
        await world.events(asking(target=GENERAL))
        with pytest.raises(Refused) as caught:
            await world.events(replace(asking(target=GENERAL), principal="key:phone"))
        assert (caught.value.code, world.remote.called) == ("access", ["pi"])
        assert "rule 1" in caught.value.message
        assert world.router.statistics.not_allowed == 1

    run(body)


def test_a_rule_that_is_about_one_holder_leaves_the_others() -> None:
    async def body() -> None:
        world = World(rules=[{"name": "knowledge.gpt/**", "callers": ["mesh"], "effect": "allow"}])
        world.local(GENERAL, saying("here"))  # for other nodes, says the rule
        world.peer("pi", GENERAL, saying("there"))
        await world.events(asking(target=GENERAL))
        assert world.remote.called == ["pi"]
        assert world.remote.callers[0].principal == "local"

    run(body)


@trio_test
async def test_a_connection_is_looked_at_before_anything_goes_out_on_it(tmp_path: Path) -> None:
    came: list[str] = []

    async def serve(call: IncomingCall) -> Value:
        await call.send("a")
        came.append(call.host)
        assert call.sent_bytes > 0
        return None

    def refuse(host: str) -> None:
        check_departure(Privacy.LOCAL, host)

    here, there = identities(tmp_path, 2)
    async with peer(here) as asking_one, peer(there, serve) as serving:
        with pytest.raises(Refused):
            async with asking_one.streams.call(
                serving.node, serving.address, header(), "the secret", check=refuse
            ):
                raise AssertionError("it was sent")
        async with asking_one.streams.call(
            serving.node, serving.address, header(), "not so secret", check=lambda _host: None
        ) as call:
            while await call.receive() is not None:
                pass
        assert call.sent_bytes > len("not so secret")
    assert came == ["127.0.0.1"]


def test_what_is_answered_to_the_holder_of_an_api_key_is_noted() -> None:
    async def body() -> None:
        world, lines = World(), list[dict[str, Value]]()
        world.local(GENERAL, saying("the secret ", "answer"))

        def record(kind: str, /, **fields: Value) -> None:
            lines.append({"kind": kind, **fields})

        mesh = Mesh(
            world.catalogue,
            world.executor,
            Faces(NothingToSee(), list[Mapping[str, Value]], list[Mapping[str, Value]], _nothing),
            requests_max=4,
            log=world.log,
            record=record,
        )

        async def take(_event: AskEvent) -> None:
            await trio.lowlevel.checkpoint()

        await mesh.ask(asking(target=GENERAL), take)
        assert lines == []  # it stayed on this machine
        phone = replace(asking(target=GENERAL), principal="key:phone")
        await mesh.ask(phone, take)
        with pytest.raises(NamingError):
            await mesh.ask(replace(phone, target="data.gpt/nothing"), take)
        assert [(line["to"], line["bytes"], line["outcome"]) for line in lines] == [
            ("key:phone", 17, "ok"),
            ("key:phone", 0, "name_not_served"),
        ]
        assert "secret" not in repr(lines)

    run(body)
