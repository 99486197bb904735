"""One node core, alone on a bench: what it answers, tells and drops."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from tests.unit.support_cms import store
from tests.unit.support_core import (
    ME_ADDRESS,
    Bench,
    address,
    bench,
    claim,
    events_in,
    messages_in,
    node_id,
)

from meshd.core.config import PRESETS, lan, local
from meshd.core.dissemination import sends_for
from meshd.core.effects import Lane, Send
from meshd.core.events import (
    MemberFailed,
    MeshJoined,
    RecordChanged,
    SeedUnreachable,
    SelfEpochRaised,
    SoftChanged,
)
from meshd.core.membership import LocalNode, MemberState
from meshd.core.messages import (
    Claim,
    Heartbeat,
    Join,
    JoinAnswer,
    JoinLater,
    Ping,
    Pull,
    Record,
    Soft,
    SoftStill,
    View,
)
from meshd.core.node import NodeCore
from meshd.core.repair import FIRST_ID, LAST_ID
from meshd.core.soft_lane import is_significant
from meshd.core.wire import encode, payload_of
from meshd_cms.soft import SoftTold
from meshd_cms.types import Epoch, Version

ALIVE, SUSPECT, DEAD, LEFT = MemberState
BEAT = Heartbeat(bytes(8), Version(0))


def about_me(node: Bench, state: MemberState, incarnation: int = 0, epoch: int = 100) -> Claim:
    update = claim(1, state, incarnation, epoch)
    return Claim(
        replace(update, node=node.store.owner, name="me", address=ME_ADDRESS), merged=False
    )


# -- being somebody --------------------------------------------------------------------------------------


def test_nothing_is_due_before_start() -> None:
    own = store(0)
    core = NodeCore(lan(), LocalNode(own.owner, "me", ME_ADDRESS), own, random.Random(1))
    assert core.deadline_s() == math.inf


def test_members_lists_ourselves_and_marks_it() -> None:
    node = bench()
    node.meet(1)
    assert [(view.name, view.is_self) for view in node.core.members() if view.is_self] == [
        ("me", True)
    ]
    assert len(node.core.members()) == 2
    assert node.core.has_peers


@pytest.mark.parametrize("state", [SUSPECT, DEAD])
def test_an_accusation_is_refuted_with_a_higher_incarnation(state: MemberState) -> None:
    node = bench()
    node.meet(1)
    told = messages_in(node.tell([about_me(node, state, 4)]), address(1))
    own = [one.update for one in told if isinstance(one, Claim) and one.update.name == "me"]
    assert [(one.state, one.incarnation) for one in own] == [(ALIVE, 5)]
    assert node.core.statistics()["local_health"] == 1


def test_a_stale_accusation_is_answered_without_a_new_incarnation() -> None:
    node = bench()
    node.meet(1)
    node.tell([about_me(node, SUSPECT, 4)])
    told = messages_in(node.tell([about_me(node, SUSPECT, 3)]), address(1))
    assert [one.update.incarnation for one in told if isinstance(one, Claim)] == [5]
    assert node.core.statistics()["refutations"] == 1


def test_a_later_life_of_ours_is_risen_above() -> None:
    node = bench()
    node.meet(1)
    node.core.set("key", 1, 0.0)
    events = events_in(node.tell([about_me(node, DEAD, 9, epoch=500)]))
    assert events == [SelfEpochRaised(Epoch(501))]
    assert (node.store.epoch, node.store.get(node.store.owner, "key")) == (501, 1)


def test_being_said_to_have_left_takes_a_new_epoch() -> None:
    node = bench()
    node.meet(1)
    events = events_in(node.tell([about_me(node, LEFT)]))
    assert [type(event) for event in events] == [SelfEpochRaised]
    assert node.store.epoch > 100


def test_a_new_address_is_announced_in_a_new_incarnation() -> None:
    node = bench()
    node.meet(1)
    node.core.update_address(("10.0.0.77", 7946), 0.0)
    told = messages_in([effect for _, effect in node.run(0.1)], address(1))
    own = {one.update for one in told if isinstance(one, Claim) and one.update.name == "me"}
    assert {(one.address, one.incarnation) for one in own} == {(("10.0.0.77", 7946), 1)}


# -- records ---------------------------------------------------------------------------------------------


def test_a_write_is_told_to_five_at_once_then_to_five_more_until_all_sends_are_made() -> None:
    node = bench()
    node.meet(*range(1, 31))
    node.run(0.2)
    begin_s = node.now_s
    node.core.set("key", 1, node.now_s)
    seen = [
        (at - begin_s, effect.to)
        for at, effect in node.run(0.3)
        if isinstance(effect, Send) and any(isinstance(m, Record) for m in messages_in([effect]))
    ]
    bursts = [at for at, _ in seen]
    for share, due_s in enumerate((0.0, 0.01)):
        assert bursts[5 * share : 5 * share + 5] == [pytest.approx(due_s, abs=1e-6)] * 5
    sends = sends_for(31, lan().rumour_loss, lan().rumour_sends_per_peer_max)
    assert len(seen) == sends == len({to for _, to in seen})


def test_writes_made_together_travel_together() -> None:
    node = bench()
    node.meet(1)
    node.run(0.2)
    for key in ("a", "b", "c"):
        node.core.set(key, 1, node.now_s)
    first = next(e for _, e in node.run(0.1) if isinstance(e, Send))
    assert len([m for m in messages_in([first]) if isinstance(m, Record)]) == 3


def test_an_unchanged_value_is_not_told() -> None:
    node = bench()
    node.meet(1)
    node.core.set("key", 1, 0.0)
    before = node.core.statistics()["rumours_started"]
    assert node.core.set("key", 1, 0.0) == ()
    assert node.core.statistics()["rumours_started"] == before


def test_a_rumour_across_a_gap_is_pulled_from_who_told_it() -> None:
    node, other = bench(), store(5, epoch=10)
    deltas = [other.set("key", value) for value in range(3)]
    node.meet(1)
    node.run(0.2)
    assert deltas[0] is not None
    assert deltas[2] is not None
    told = node.tell([Record(deltas[0], rumour=True)])
    assert events_in(told) == [RecordChanged(other.owner, ("key",), reset=False)]
    assert events_in(node.tell([Record(deltas[2], rumour=True)])) == []
    pulled = messages_in([effect for _, effect in node.run(0.1)], address(1))
    lines = [line for one in pulled if isinstance(one, Pull) for line in one.lines]
    assert [(line.owner, line.max_version) for line in lines] == [(other.owner, 1)]


# -- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [b"", b"\xc1", b"\x92\x01\x91\x63", b"\x91\x02", bytes(1300)])
def test_noise_is_counted_and_changes_nothing(noise: bytes) -> None:
    node = bench()
    before = (node.core.members(), node.core.state_hash, node.core.deadline_s())
    effects = node.core.receive(noise, node_id(1), 10, address(1), Lane.DATAGRAM, 0.0)
    assert effects == ()
    assert (node.core.members(), node.core.state_hash, node.core.deadline_s()) == before
    assert node.core.statistics()["dropped_malformed"] == 1


def test_a_payload_with_one_malformed_message_is_not_acted_upon_at_all() -> None:
    node = bench()
    payload = payload_of([encode(Claim(claim(1), merged=False)), b"\x91\x63"])
    assert node.core.receive(payload, node_id(1), 10, address(1), Lane.DATAGRAM, 0.0) == ()
    assert node.state(1) is None


# -- joining and leaving ---------------------------------------------------------------------------------


def test_joins_are_retried_with_backoff_for_ever_and_told_of_once() -> None:
    node = bench()
    node.core.join([address(9)], 0.0)
    seen = node.run(120.0)
    joins = [at for at, e in seen if any(isinstance(m, Join) for m in messages_in([e]))]
    gaps = [later - earlier for earlier, later in pairwise(joins)]
    assert joins[0] == 0.0
    assert gaps[0] <= lan().join_retry_min_s * 1.25
    assert 9 <= len(joins) <= 30
    assert max(gaps) <= lan().join_retry_max_s * 1.25 + 1e-9
    told = [e for _, effect in seen for e in events_in([effect])]
    assert told == [SeedUnreachable(address(9), lan().seed_unreachable_attempts)]


def test_an_answered_join_is_told_and_not_repeated_soon() -> None:
    node = bench()
    node.core.join([address(1)], 0.0)
    seen = node.run(0.0)
    join = next(m for _, e in seen for m in messages_in([e]) if isinstance(m, Join))
    events = events_in(node.tell([JoinAnswer(join.token), Claim(claim(1), merged=False)]))
    assert MeshJoined(node_id(1), address(1)) in events
    seen = node.run(5.0)
    assert not any(isinstance(m, Join) for _, e in seen for m in messages_in([e]))


def test_a_join_is_answered_with_members_and_too_many_are_put_off() -> None:
    node = bench(replace(lan(), join_answers_burst=1))
    node.meet(1)
    whole = View(FIRST_ID, LAST_ID, (), answer=True)
    hello = Claim(claim(2), merged=False)
    told = messages_in(node.tell([hello, Join(3), whole], peer=2), address(2))
    assert JoinAnswer(3) in told
    known = {one.update.node for one in told if isinstance(one, Claim)}
    assert {node_id(1), node.store.owner} <= known
    told = messages_in(
        node.tell([Claim(claim(3), merged=False), Join(4), whole], peer=3), address(3)
    )
    assert [type(one) for one in told] == [JoinLater]


def test_a_leave_is_said_several_times_and_then_nothing_more() -> None:
    node = bench()
    node.meet(1, 2)
    node.run(0.2)
    effects = [*node.core.leave(node.now_s)]
    effects += [effect for _, effect in node.run(lan().leave_linger_s)]
    told = messages_in(effects, address(1))
    assert [(m.update.name, m.update.state) for m in told if isinstance(m, Claim)] == [
        ("me", LEFT)
    ] * lan().leave_copies
    assert node.run(60.0) == []
    assert node.tell([Ping(1, node.store.owner, BEAT)]) == ()


# -- soft state ------------------------------------------------------------------------------------------


def _soft_sends(node: Bench, for_s: float) -> list[float]:
    return [
        round(at - node_began, 3)
        for node_began in (node.now_s,)
        for at, effect in node.run(for_s)
        if isinstance(effect, Send)
        and [type(m) for m in messages_in([effect])] in ([Soft], [SoftStill])
        and effect.to == address(1)
    ]


def test_load_is_sent_on_change_at_most_every_gap_and_not_repeated_where_pings_carry_it() -> None:
    node = bench()
    node.meet(1)
    node.run(0.2)
    first = node.core.publish("load", {"slots": 1}, node.now_s)
    assert [type(m) for m in messages_in(first, address(1))] == [Soft]
    for slots in (2, 3, 4):  # all within the gap: one send, of the last
        assert node.core.publish("load", {"slots": slots}, node.now_s) == ()
    assert _soft_sends(node, 4.0) == [0.1]
    assert _soft_sends(node, 4.0) == []


def test_load_is_taken_from_its_owner_only() -> None:
    node = bench()
    node.meet(1, 2)
    item = SoftTold(1, "load", {"slots": 3}, 0.0)
    assert SoftChanged(node_id(1), "load") not in events_in(node.tell([Soft(item)], peer=2))
    assert SoftChanged(node_id(1), "load") in events_in(node.tell([Soft(item)], peer=1))
    reading = node.core.soft.read(node_id(1), "load", 1.5)
    assert reading is not None
    assert (reading.value, reading.age_s) == ({"slots": 3}, 1.5)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1.0}, {"a": 1.05}, False),
        ({"a": 1.0}, {"a": 1.5}, True),
        ({"slots": 1}, {"slots": 2}, True),
        ({"a": 1.0}, {"a": 1.0, "b": 1}, True),
        ([1.0, 2.0], [1.0, 2.01], False),
        ([1.0], [1.0, 2.0], True),
        ("x", "y", True),
        (0.0, 0.0, False),
    ],
)
def test_what_counts_as_a_significant_change(old: object, new: object, expected: bool) -> None:
    assert is_significant(old, new, 0.1) is expected  # type: ignore[arg-type]


# -- presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_consistent(name: str) -> None:
    config = PRESETS[name]()
    assert config.probe_timeout_s < config.probe_interval_s
    assert config.evidence_death_s < config.death_floor_s
    assert config.soft_refresh_s < 10.0  # the expiry of a reading


def test_the_local_preset_notices_a_silent_process_within_four_seconds() -> None:
    node = bench(local())
    node.meet(1)
    seen = node.run(4.0)
    assert MemberFailed in [type(e) for _, effect in seen for e in events_in([effect])]


def test_deleted_keys_do_not_fill_the_record_for_ever() -> None:
    node = bench(replace(lan(), tombstones_kept=4))
    for round_number in range(30):  # 600 keys; a record holds 512
        for number in range(20):
            key = f"cap/{round_number}-{number}"
            node.core.set(key, 1, node.now_s)
            node.core.delete(key, node.now_s)
        node.run(1.5)
    line = node.store.line(node.store.owner)
    assert line is not None
    assert line.floor > 0
    assert node.core.set("cap/one-more", 1, node.now_s) is not None
    assert node.store.get(node.store.owner, "cap/one-more") == 1
