"""Floods of records that their owners did not sign, or signed too fast: how much of them is checked, and whose."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tests.unit.support_cms import hash_verify, over_the_wire, store
from tests.unit.support_core import ME_ADDRESS, Bench, address, node_id

from meshd.core.config import lan
from meshd.core.effects import Lane
from meshd.core.membership import LocalNode
from meshd.core.messages import Record
from meshd.core.node import NodeCore
from meshd.core.wire import encode, payload_of
from meshd_cms.types import Delta, NodeId, Version

ENTRIES = 7


class Counting:
    """Checks, and counts."""

    def __init__(self) -> None:
        self.checks = 0

    def __call__(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        self.checks += 1
        return hash_verify(public_key, message, signature)


class Attacked(Bench):
    """A bench that counts checks."""

    verify: Counting

    def flood(self, count: int, senders: list[NodeId], lane: Lane = Lane.DATAGRAM) -> int:
        """The same bad record again and again; how many checks that cost."""
        before = self.verify.checks
        payload = payload_of([encode(Record(bad_record(), rumour=True))])
        for number in range(count):
            sender = senders[number % len(senders)]
            self.core.receive(payload, sender, 10, address(1), lane, self.now_s)
        return self.verify.checks - before


def attacked() -> Attacked:
    verify = Counting()
    own = store(0, epoch=100, verify=verify)
    core = NodeCore(lan(), LocalNode(own.owner, "me", ME_ADDRESS), own, random.Random(1))
    core.start(0.0)
    node = Attacked(core, own)
    node.verify = verify
    return node


def bad_record(owner: int = 5) -> Delta:
    """A record of some entries; all but the signature of the last one is good."""
    liar = store(owner)
    for number in range(ENTRIES):
        liar.set(f"key-{number}", number)
    delta = liar.delta_since(liar.owner, Version(0), 1 << 20)
    assert delta is not None
    *entries, last = delta.entries
    return replace(delta, entries=(*entries, replace(last, signature=bytes(64))))


def good_record(owner: int, writes: int = 1) -> Delta:
    one = store(owner)
    delta: Delta | None = None
    for number in range(writes):
        delta = one.set("key", number)
    assert delta is not None
    whole = one.delta_since(one.owner, Version(0), 1 << 20)
    assert whole is not None
    return over_the_wire(whole)


def test_a_flood_from_one_member_costs_a_burst_and_no_more() -> None:
    node = attacked()
    node.meet(1)
    assert node.flood(2_000, [node_id(1)]) < 700
    node.now_s += 60.0
    assert node.flood(2_000, [node_id(1)]) < 700
    counted = node.core.statistics()
    assert counted["record_unverified"] > 3_500
    assert node.core.offences()[node_id(1)]["record_rejected"] > 50


@pytest.mark.parametrize("known", [True, False])
def test_made_up_senders_of_datagrams_share_a_bound(known: bool) -> None:
    node = attacked()
    if known:
        node.meet(*range(100))
    assert node.flood(20_000, [node_id(number) for number in range(100)]) < 1_300


def test_what_is_owed_is_paid_before_anything_is_looked_at() -> None:
    node = attacked()
    node.meet(1)
    node.flood(2_000, [node_id(1)])
    node.now_s += 0.011  # one check's worth
    assert node.flood(10, [node_id(1)]) <= ENTRIES + 1
    node.now_s += 0.011
    assert node.flood(10, [node_id(1)]) == 0


def test_others_are_heard_while_one_floods_and_streams_are_apart() -> None:
    node = attacked()
    node.meet(1, 2)
    node.flood(2_000, [node_id(1)])
    node.tell([Record(good_record(6), rumour=True)], peer=2)
    node.tell([Record(good_record(7), rumour=True)], peer=1)
    assert node.core.statistics()["records_applied"] == 1
    node.tell([Record(good_record(7), rumour=True)], peer=1, lane=Lane.STREAM)
    assert node.core.statistics()["records_applied"] == 2


def test_after_a_bad_record_the_rest_of_a_payload_is_left_alone() -> None:
    node = attacked()
    node.meet(1)
    before = node.verify.checks
    records = [Record(bad_record(owner), rumour=False) for owner in range(5, 15)]
    node.tell(records, lane=Lane.STREAM)
    assert node.verify.checks - before == ENTRIES + 1


def test_an_owner_that_writes_too_fast_is_heard_at_a_bounded_rate() -> None:
    node = attacked()
    node.meet(1)
    hot = store(5)
    for number in range(2_000):
        delta = hot.set("key", number)
        assert delta is not None
        node.tell([Record(over_the_wire(delta), rumour=True)])
    counted = node.core.statistics()
    assert 400 <= counted["records_applied"] <= 600
    assert counted["record_excess"] >= 1_400
    node.now_s += 60.0
    last = hot.delta_since(hot.owner, Version(0), 1 << 20)
    assert last is not None
    node.tell([Record(over_the_wire(last), rumour=False)])
    assert node.store.get(hot.owner, "key") == 1_999


def test_what_only_the_digest_shows_to_be_wrong_is_paid_for_too() -> None:
    node = attacked()
    node.meet(1)
    liar = store(5)
    for number in range(ENTRIES):
        liar.set(f"key-{number}", number)
    delta = liar.delta_since(liar.owner, Version(0), 1 << 20)
    assert delta is not None
    left_out = Record(replace(delta, entries=delta.entries[1:]), rumour=True)
    before = node.verify.checks
    for _ in range(2_000):
        node.tell([left_out])
    assert node.core.statistics()["record_rejected_bad_live_digest"] > 10
    assert node.verify.checks - before < 700


def test_records_that_wait_for_others_are_paid_for() -> None:
    node = attacked()
    node.meet(1)
    hot = store(5)
    hot.set("key", 0)
    before = node.verify.checks
    for number in range(1, 2_000):
        delta = hot.set("key", number)
        assert delta is not None
        if number > 1:  # one is missing, so all others wait
            node.tell([Record(over_the_wire(delta), rumour=True)])
    assert node.verify.checks - before < 700


def test_copies_of_what_is_known_are_heard_from_who_owes_and_cost_nothing() -> None:
    node = attacked()
    node.meet(1, 2)
    good = Record(good_record(6), rumour=True)
    node.tell([good], peer=2)
    node.flood(2_000, [node_id(1)])
    before = node.verify.checks
    node.tell([good], peer=1)
    assert node.verify.checks == before
    assert node.core.statistics()["record_unverified"] == 2_000 - 600 // (ENTRIES + 1)
