"""The load lane: changes at once, renewals in a few bytes, and in large meshes only to who is interested."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.support_core import Bench, address, bench, claim, messages_in, node_id

from meshd.core.config import lan
from meshd.core.effects import Effect, Send
from meshd.core.events import SoftChanged
from meshd.core.messages import Ack, Claim, Heartbeat, Interest, Message, Ping, Soft, SoftStill
from meshd.core.soft_lane import INTEREST_S, INTERESTED_MAX
from meshd_cms.soft import SoftTold
from meshd_cms.types import Version

BEAT = Heartbeat(b"12345678", Version(0))
QUIET = replace(lan(), probe_interval_s=1e6)  # nothing rides in pings of our own
LARGE = replace(QUIET, soft_direct_members_max=2)
LANE = (Soft, SoftStill, Interest)


def _lane(effects: list[tuple[float, Effect]], peer: int = 1) -> list[tuple[float, type[Message]]]:
    """When what of the lane went to a peer by itself, not riding."""
    return [
        (round(at_s, 2), type(one))
        for at_s, effect in effects
        if isinstance(effect, Send) and effect.to == address(peer)
        for one in messages_in([effect])
        if isinstance(one, LANE) and len(messages_in([effect])) == 1
    ]


def _count(node: Bench, name: str) -> int:
    return node.core.statistics().get(name, 0)


def test_what_did_not_change_is_renewed_in_time_and_not_repeated() -> None:
    node = bench(QUIET)
    node.meet(1)
    told = messages_in(node.core.publish("load", {"slots": 1}, 0.0), address(1))
    assert told == [Soft(SoftTold(1, "load", {"slots": 1}, 0.0))]
    node.core.publish("load", {"slots": 1}, 3.0)  # a new sample, and the same
    assert _lane(node.run(30.0)) == [(4.5, SoftStill), (9.0, SoftStill)]  # then it has expired


def test_a_renewal_carries_the_age_of_the_last_sample() -> None:
    node = bench(QUIET)
    node.meet(1)
    node.core.publish("load", 1, 0.0)
    node.core.publish("load", 1, 3.5)
    renewals = [
        one
        for _, effect in node.run(5.0)
        for one in messages_in([effect], address(1))
        if isinstance(one, SoftStill)
    ]
    assert renewals == [SoftStill(1, 1.0)]


def test_who_was_told_by_an_ack_is_not_told_again_so_soon() -> None:
    node = bench(QUIET)
    node.meet(1, 2)
    node.core.publish("load", 1, 0.0)
    node.run(3.0)
    acked = messages_in(node.tell([Ping(1, node.store.owner, BEAT)]), address(1))
    assert [type(one) for one in acked] == [Ack, SoftStill]
    seen = node.run(4.0)
    assert _lane(seen, 1) == []
    assert _lane(seen, 2) == [(4.5, SoftStill)]
    assert _lane(node.run(1.0), 1) == [(7.5, SoftStill)]


def test_the_ack_to_who_does_not_know_the_value_carries_it() -> None:
    node = bench(LARGE)
    node.meet(1, 2, 3, 4)
    assert messages_in(node.core.publish("load", 1, 0.0)) == []  # nobody is interested
    for expected in (Soft, SoftStill):
        acked = messages_in(node.tell([Ping(1, node.store.owner, BEAT)]), address(1))
        assert [type(one) for one in acked if isinstance(one, (Ack, *LANE))] == [Ack, expected]


def test_a_renewal_keeps_a_reading_alive_and_is_no_news_of_another() -> None:
    node = bench(QUIET)
    node.meet(1)
    node.tell([Soft(SoftTold(3, "load", 7, 0.0))])
    node.now_s = 9.0
    effects = node.tell([SoftStill(3, 1.0)])
    assert any(getattr(one, "event", None) == SoftChanged(node_id(1), "load") for one in effects)
    reading = node.core.soft.read(node_id(1), "load", 12.0)
    assert reading is not None
    assert (reading.value, reading.age_s) == (7, 4.0)


def test_who_lacks_the_reading_that_holds_asks_for_it_once_a_second() -> None:
    node = bench(QUIET)
    node.meet(1)
    asked = messages_in(node.tell([SoftStill(3, 0.0)]), address(1))
    assert asked == [Interest(0.0)]
    assert messages_in(node.tell([SoftStill(3, 0.0)]), address(1)) == []
    node.now_s = 1.0
    assert messages_in(node.tell([SoftStill(3, 0.0)]), address(1)) == [Interest(0.0)]


def test_who_asks_is_told_in_full_at_a_bounded_rate_and_strangers_are_not() -> None:
    node = bench(QUIET)
    node.meet(1)
    node.core.publish("load", 1, 0.0)
    node.core.publish("task/1", 2, 0.0)
    told = messages_in(node.tell([Interest(0.0)]), address(1))
    assert {one.told.key for one in told if isinstance(one, Soft)} == {"load", "task/1"}
    assert messages_in(node.tell([Interest(0.0)]), address(1)) == []
    assert not any(isinstance(one, Soft) for one in messages_in(node.tell([Interest(0.0)], peer=9)))
    assert _count(node, "interests_answered") == 1
    assert _count(node, "interests_ignored") == 2


def test_in_a_large_mesh_changes_go_to_the_interested_until_their_interest_ends() -> None:
    node = bench(LARGE)
    node.meet(1, 2, 3, 4)
    node.tell([Interest(10.0)])
    for second in range(20):
        effects = node.core.publish("load", second, float(second))
        told = {effect.to for effect in effects if isinstance(effect, Send)}
        assert told == ({address(1)} if second < 10 else set())


def test_interest_is_repeated_while_it_lasts_and_needless_in_a_small_mesh() -> None:
    small, large = bench(QUIET), bench(LARGE)
    for node in (small, large):
        node.meet(1, 2, 3, 4)
    owners = [node_id(1), node_id(77)]  # the second is nobody
    asked = [
        second
        for second in range(25)
        if messages_in(large.core.interested(owners, float(second)), address(1))
    ]
    assert asked == [0, 10, 20]
    assert messages_in(small.core.interested(owners, 30.0)) == []


def test_the_interested_are_bounded() -> None:
    node = bench(LARGE)
    for number in range(1, INTERESTED_MAX + 51):
        at = (f"10.2.{number // 200}.{number % 200 + 1}", 7946)
        hello = Claim(replace(claim(number), address=at), merged=False)
        node.tell([hello, Interest(INTEREST_S)], peer=number)
    effects = node.core.publish("load", 1, node.now_s)
    assert len([one for one in effects if isinstance(one, Send)]) == INTERESTED_MAX
    assert _count(node, "interest_overflow") == 50
