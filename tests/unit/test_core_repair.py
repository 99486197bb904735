"""Repair: equal nodes spend a datagram, differences are found by hash and mended, answers are bounded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.machine import SimNode
from tests.sim.world import World
from tests.unit.support_cms import rumour, store
from tests.unit.support_core import Bench, address, bench, claim, messages_in, node_id
from tests.unit.support_repair import known, pair

from meshd.core.answers import PEER_ANSWERS_BURST
from meshd.core.buckets import (
    BUCKETS_MAX,
    FIRST_ID,
    LAST_ID,
    Tokens,
    bucket_of,
    buckets_for,
    ranges_of,
)
from meshd.core.config import lan
from meshd.core.effects import Lane, Send
from meshd.core.messages import Ack, Claim, Heartbeat, Ping, Record, Summary, View
from meshd.core.wire import encode, payload_of
from meshd_cms.store import Store
from meshd_cms.types import NodeId, Version

OTHER_HASH = b"87654321"


def _heartbeat(node: Bench, state_hash: bytes = OTHER_HASH) -> Ping:
    return Ping(1, node.store.owner, Heartbeat(state_hash, Version(0)))


def _rest(node: Bench) -> None:
    """Let the state hash come to rest."""
    assert node.core.state_hash
    node.run(lan().hash_settle_s)


def _summaries(node: Bench, for_s: float) -> list[float]:
    began_s = node.now_s
    return [
        round(at_s - began_s, 3)
        for at_s, effect in node.run(for_s)
        if any(isinstance(one, Summary) for one in messages_in([effect]))
    ]


# -- the hash --------------------------------------------------------------------------------------------


def test_a_difference_at_rest_begins_an_exchange_a_moment_later() -> None:
    node = bench()
    node.meet(1)
    _rest(node)
    node.tell([_heartbeat(node)])
    (at_s,) = _summaries(node, 1.0)
    assert 0.1 <= at_s <= 0.15
    assert node.core.statistics()["hash_repairs"] == 1


def test_a_difference_that_news_explain_begins_none() -> None:
    node = bench()
    node.meet(1)
    _rest(node)
    node.tell([_heartbeat(node)])
    node.tell([Claim(claim(2), merged=False)])  # the rumour was under way
    assert _summaries(node, 0.3) == []
    assert node.core.statistics()["hash_mismatches_passed"] == 1
    assert "hash_repairs" not in node.core.statistics()


def test_a_difference_while_our_own_hash_moves_is_none() -> None:
    node = bench()
    node.meet(1)
    node.run(lan().hash_settle_s / 2)
    node.tell([_heartbeat(node)])
    assert _summaries(node, 0.5) == []
    assert "hash_mismatches" not in node.core.statistics()


def test_who_agrees_again_is_not_asked() -> None:
    node = bench()
    node.meet(1)
    _rest(node)
    node.tell([_heartbeat(node)])
    node.tell([_heartbeat(node, node.core.state_hash)])
    assert _summaries(node, 0.5) == []


def test_an_ack_without_a_hash_agrees() -> None:
    node = bench()
    node.meet(1)
    _rest(node)
    node.tell([Ack(1, None, Heartbeat(None, Version(0)))])
    assert _summaries(node, 0.5) == []


# -- missed rumours, in a mesh of real cores -------------------------------------------------------------


def _loses_the_rumour(victim: int) -> Callable[[Send, SimNode], bool]:
    """Whatever brings the write to this node unasked is lost."""

    def loses(effect: Send, target: SimNode) -> bool:
        return target.number == victim and any(
            isinstance(one, Record) and one.rumour for one in messages_in([effect])
        )

    return loses


def _holds(one: Store, owner: NodeId) -> bool:
    return one.get(owner, "cap/missed") is not None


@pytest.mark.parametrize(("nodes", "seeds"), [(3, 30), (10, 20), (30, 5)])
def test_a_missed_rumour_is_repaired_within_two_seconds(nodes: int, seeds: int) -> None:
    took_s: list[float] = []
    for seed in range(seeds):
        world = World(seed, lan())
        world.add(nodes)
        world.settle(10.0)
        world.run(2.0 + world.rng.random())
        victim, owner = world.rng.randrange(1, nodes), world.store(0).owner
        world.loses = _loses_the_rumour(victim)
        world.write(0, "cap/missed", seed)
        is_held = partial(_holds, world.store(victim), owner)
        took_s.append(world.run_until(is_held, 5.0, "it is repaired"))
    assert max(took_s) < 2.0
    assert sorted(took_s)[seeds // 2] < 1.2


def test_news_that_reach_everybody_begin_hardly_any_exchange() -> None:
    world = World(3, lan())
    world.add(10)
    world.settle(10.0)
    world.run(1.0)

    def count(name: str) -> int:
        return sum(world.core(number).statistics().get(name, 0) for number in range(10))

    before = count("hash_repairs")
    for turn in range(40):
        world.write(turn % 10, "cap/moving", turn)
        world.run(0.7)
    assert count("hash_repairs") - before <= 2


# -- buckets ---------------------------------------------------------------------------------------------

ids = st.binary(min_size=16, max_size=16).map(NodeId)
particulars = st.tuples(*[st.integers(0, 2**48 - 1)] * 4)


@given(ids, st.integers(0, 8))
@settings(deadline=None, max_examples=100)
def test_a_node_lies_in_the_range_of_its_bucket(node: NodeId, bits: int) -> None:
    buckets = 1 << bits
    ((low, high),) = ranges_of([bucket_of(node, buckets)], buckets)
    assert low <= node <= high


@given(st.integers(0, 8), st.data())
@settings(deadline=None, max_examples=60)
def test_ranges_cover_their_buckets_and_no_others(bits: int, data: st.DataObject) -> None:
    buckets = 1 << bits
    chosen = sorted(data.draw(st.sets(st.integers(0, buckets - 1))))
    ranges = ranges_of(chosen, buckets)
    for (_, high), (low, _) in itertools.pairwise(ranges):
        assert int.from_bytes(high, "big") + 1 < int.from_bytes(low, "big")  # joined if adjoining
    node = data.draw(ids)
    assert any(low <= node <= high for low, high in ranges) == (bucket_of(node, buckets) in chosen)


def test_all_buckets_are_all_ids() -> None:
    assert ranges_of(range(64), 64) == [(FIRST_ID, LAST_ID)]


@given(st.dictionaries(ids, particulars, max_size=40), st.integers(0, 8), st.data())
@settings(deadline=None, max_examples=60)
def test_equal_knowledge_has_equal_hashes_and_one_change_shows_in_its_bucket(
    lives: dict[NodeId, tuple[int, int, int, int]], bits: int, data: st.DataObject
) -> None:
    buckets, tokens = 1 << bits, Tokens()
    table = tokens.table(lives.items(), buckets)
    assert Tokens().table(reversed(list(lives.items())), buckets) == table
    assert tokens.table(lives.items(), buckets) == table  # remembered
    if lives:
        node = data.draw(st.sampled_from(sorted(lives)))
        changed = lives | {node: (*lives[node][:3], lives[node][3] + 1)}
        other = tokens.table(changed.items(), buckets)
        differs = [index for index in range(buckets) if other[index] != table[index]]
        assert differs == [bucket_of(node, buckets)]


@pytest.mark.parametrize(("nodes", "buckets"), [(1, 1), (2, 1), (10, 4), (30, 8), (100, 32)])
def test_there_are_about_two_nodes_a_bucket(nodes: int, buckets: int) -> None:
    assert buckets_for(nodes) == buckets
    assert buckets_for(10**6) == BUCKETS_MAX


# -- exchanges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [10, 100, 1000])
def test_an_exchange_between_equals_is_one_datagram(others: int) -> None:
    both = pair(others)
    assert both.one.core.state_hash == both.two.core.state_hash
    both.exchange()
    assert len(both.datagrams) == 1
    assert both.datagrams[0] <= {10: 100, 100: 200, 1000: 1100}[others]


@pytest.mark.parametrize("others", [10, 100, 1000])
def test_a_member_that_one_lacks_costs_about_two_datagrams_each_way(others: int) -> None:
    both = pair(others)
    both.two.tell([Claim(known(5000), merged=True)])
    both.two.run(1.0)
    both.exchange()
    assert both.one.core.state_hash == both.two.core.state_hash
    assert len(both.datagrams) <= 4
    assert sum(both.datagrams) <= 2500


@pytest.mark.parametrize("others", [10, 100])
def test_a_record_that_one_lacks_is_mended(others: int) -> None:
    both, late = pair(others), store(3, 10)
    about = replace(known(3), node=late.owner, accuser=late.owner)
    both.one.tell([Claim(about, merged=True)])
    both.two.tell([Claim(about, merged=True), Record(rumour(late.set("key", 1)), rumour=False)])
    both.one.run(1.0)
    both.two.run(1.0)
    both.exchange()
    assert both.one.store.get(late.owner, "key") == 1
    assert both.one.core.state_hash == both.two.core.state_hash
    assert len(both.datagrams) <= 5


@given(
    ours=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), max_size=12),
    theirs=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), max_size=12),
)
@settings(deadline=None, max_examples=40)
def test_any_two_converge(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> None:
    """Each side is told of some members, and of some versions of their records, in any order."""
    owners = [store(number, 10) for number in range(8)]
    deltas = [[rumour(owner.set("key", version)) for version in range(4)] for owner in owners]
    both = pair(4)
    for side, told in ((both.one, ours), (both.two, theirs)):
        for number, version in told:
            owner = owners[number].owner
            about = replace(known(20 + number), node=owner, accuser=owner)
            side.tell([Claim(about, merged=True)])
            for delta in deltas[number][:version]:
                side.tell([Record(delta, rumour=False)])
        side.run(1.0)
    differed = both.one.core.state_hash != both.two.core.state_hash
    both.exchange()
    assert both.one.core.state_hash == both.two.core.state_hash
    assert (len(both.datagrams) > 1) == differed
    assert both.one.store.digest() == both.two.store.digest()


# -- bounds ----------------------------------------------------------------------------------------------


def test_what_a_peer_asks_for_is_answered_within_a_bound() -> None:
    node = bench()
    node.meet(*range(1, 101))
    node.run(1.0)
    sent = 0
    for _ in range(100):
        whole = View(FIRST_ID, LAST_ID, (), answer=True)
        effects = node.tell([whole] * 5)
        sent += sum(isinstance(effect, Send) and effect.to == address(1) for effect in effects)
    assert sent <= PEER_ANSWERS_BURST
    assert node.core.statistics()["answers_excess"] > 0


def test_long_answers_go_to_the_listed_address_of_who_asks() -> None:
    node = bench()
    node.meet(*range(1, 31))
    whole = payload_of([encode(View(FIRST_ID, LAST_ID, (), answer=True))])
    source = ("10.9.9.9", 1)  # whoever recorded the question, and sends it again
    effects = node.core.receive(whole, node_id(1), 10, source, Lane.DATAGRAM, node.now_s)
    sent = [effect for effect in effects if isinstance(effect, Send)]
    assert sent
    assert {effect.to for effect in sent} == {address(1)}


def test_who_sends_records_that_nobody_signed_is_named() -> None:
    node, late = bench(), store(3, 10)
    node.meet(1)
    delta = rumour(late.set("key", 1))
    forged = replace(delta, head=replace(delta.head, signature=bytes(64)))
    node.tell([Record(forged, rumour=True)])
    assert node.core.offences()[node_id(1)] == {"record_rejected": 1}


def test_who_announces_a_version_that_it_does_not_have_is_named() -> None:
    node = bench()
    node.meet(1)
    for _ in range(20):
        node.tell([Ping(1, node.store.owner, Heartbeat(node.core.state_hash, Version(7)))])
        node.run(0.1)
    assert node.core.offences()[node_id(1)]["version_unfounded"] > 0
