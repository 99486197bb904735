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
from meshd.core.effects import Knock, Lane, Send, StreamPing, Unwatch, Watch
from meshd.core.events import (
    AddressContested,
    MemberAlive,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberSuspected,
    MeshJoined,
    NameContested,
    RecordChanged,
    SeedUnreachable,
    SelfEpochRaised,
    SoftChanged,
)
from meshd.core.membership import LocalNode, MemberState, Update
from meshd.core.node import NodeCore
from meshd.core.repair import FIRST_ID, LAST_ID
from meshd.core.soft_lane import is_significant
from meshd.core.wire import (
    Ack,
    Claim,
    Heartbeat,
    Join,
    JoinAnswer,
    JoinLater,
    Nack,
    Ping,
    PingRequest,
    Pull,
    Record,
    Soft,
    SoftStill,
    Summary,
    View,
    encode,
    payload_of,
)
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


# -- hearing of others -----------------------------------------------------------------------------------


def test_the_life_of_a_member_as_events() -> None:
    node = bench()
    node.meet(61, 62)
    seen: list[type[object]] = []
    for state, incarnation, speakers in (
        (ALIVE, 0, (1,)),
        (SUSPECT, 0, (61, 62)),
        (ALIVE, 1, (1,)),
        (SUSPECT, 1, (61, 62)),
        (DEAD, 1, (61,)),
        (ALIVE, 2, (1,)),
        (LEFT, 2, (2,)),
    ):
        for speaker in speakers:
            one = claim(2, state, incarnation, accuser=speaker)
            seen += [
                type(event)
                for event in events_in(node.tell([Claim(one, merged=False)], peer=speaker))
                if getattr(event, "node", None) == node_id(2)
            ]
    assert seen == [
        MemberJoined,
        MemberSuspected,
        MemberAlive,
        MemberSuspected,
        MemberFailed,
        MemberJoined,
        MemberLeft,
    ]


def test_a_death_out_of_a_table_is_only_a_suspicion_and_confirms_none() -> None:
    node = bench()
    node.meet(1, 2, 3)
    node.tell([Claim(claim(3, DEAD, accuser=1), merged=True)], peer=1)
    assert node.state(3) is SUSPECT
    node.tell([Claim(claim(3, DEAD, accuser=2), merged=True)], peer=2)
    assert "claims_confirmed" not in node.core.statistics()


def test_a_death_from_one_mouth_is_a_suspicion_that_is_looked_into_and_from_two_is_believed() -> (
    None
):
    node = bench()
    node.meet(1, 2, 3)
    for _ in range(3):
        told = node.tell([Claim(claim(3, DEAD, accuser=1), merged=False)], peer=1)
    assert node.state(3) is SUSPECT
    assert not [m for m in messages_in(told) if isinstance(m, Claim) and m.update.state is DEAD]
    assert node.core.statistics()["probes"] == 1
    node.tell([Claim(claim(3, DEAD, accuser=2), merged=False)], peer=2)
    assert node.state(3) is DEAD


def test_a_leave_told_by_another_removes_nobody_and_by_itself_does() -> None:
    node = bench()
    node.meet(1, 2)
    for _ in range(3):
        node.tell([Claim(claim(2, LEFT), merged=False)], peer=1)
        node.tell([Claim(claim(2, LEFT), merged=True)], peer=1)
    assert node.state(2) is SUSPECT
    node.tell([Claim(claim(2, LEFT), merged=False)], peer=2)
    assert node.state(2) is LEFT


def test_an_accuser_who_is_refuted_again_and_again_is_not_listened_to_and_named() -> None:
    node = bench(replace(lan(), accusations_max=5))
    node.meet(1, 2, 3)
    for incarnation in range(10):
        accused = claim(3, SUSPECT, incarnation, accuser=1)
        node.tell([Claim(accused, merged=False)], peer=1)
        node.tell([Claim(claim(3, ALIVE, incarnation + 1), merged=False)], peer=3)
    assert node.core.statistics()["accusations_ignored"] == 4
    assert node.core.offences()[node_id(1)] == {"accusations_refuted": 1}
    node.tell([Claim(claim(3, SUSPECT, 10, accuser=2), merged=False)], peer=2)
    assert node.state(3) is SUSPECT  # others are


def test_an_accusation_in_our_name_that_we_never_made_is_dropped_and_its_teller_named() -> None:
    node = bench()
    node.meet(1, 3)
    forged = replace(claim(3, SUSPECT), accuser=node.store.owner)
    node.tell([Claim(forged, merged=False)], peer=1)
    assert node.state(3) is ALIVE
    assert node.core.offences()[node_id(1)] == {"claims_forged": 1}


def test_who_writes_anothers_name_under_its_lies_pays_itself() -> None:
    node = bench(replace(lan(), accusations_max=5))
    node.meet(1, 2, 3)
    for incarnation in range(20):
        accused = claim(3, SUSPECT, incarnation, accuser=2)
        node.tell([Claim(accused, merged=False)], peer=1)
        node.tell([Claim(claim(3, ALIVE, incarnation + 1), merged=False)], peer=3)
    assert list(node.core.offences()) == [node_id(1)]
    node.tell([Claim(claim(3, SUSPECT, 20, accuser=2), merged=False)], peer=2)
    assert node.state(3) is SUSPECT


def test_where_a_member_lives_is_asked_of_itself_at_both_addresses() -> None:
    node = bench()
    node.meet(1, 2)
    moved = replace(claim(2, ALIVE, 1), address=address(9))
    for _ in range(5):
        told = node.tell([Claim(moved, merged=False)], peer=1)
    assert node.core.statistics()["moves_asked"] == 1
    view = node.core.member(node_id(2))
    assert view is not None
    assert view.address == address(2)
    node.tell([Claim(moved, merged=False)], peer=2)
    view = node.core.member(node_id(2))
    assert view is not None
    assert view.address == address(9)
    assert told == ()


def test_a_mesh_that_loses_one_tells_little_more_than_two_witnesses_saw() -> None:
    node = bench()
    node.meet(*range(1, 31))
    for accuser in range(2, 31):
        told = replace(claim(1, SUSPECT, accuser=accuser), evidence=True)
        node.tell([Claim(told, merged=False)], peer=accuser)
    assert node.core.statistics()["rumours_started"] - 30 <= 2  # beside those of who joined


def test_what_no_clock_can_have_begun_is_believed_from_nobody_but_the_node_itself() -> None:
    node = bench()
    node.meet(1, 3)
    for epoch, incarnation in ((2**47 + 1, 0), (2**48 - 1, 0), (10, 2**31 + 1)):
        absurd = claim(3, ALIVE, incarnation, epoch=epoch)
        node.tell([Claim(absurd, merged=False)], peer=1)
    view = node.core.member(node_id(3))
    assert view is not None
    assert (view.epoch, view.incarnation) == (10, 0)
    assert node.core.offences()[node_id(1)] == {"epoch_absurd": 2}


def test_an_incarnation_of_ours_beyond_all_measure_ends_in_a_new_epoch_not_in_silence() -> None:
    node = bench()
    node.meet(1)
    node.now_s = 2.0
    me = node.store.owner
    told = Update(me, SUSPECT, node.store.epoch, 2**63 - 1, "me", ME_ADDRESS, node_id(1))
    before = node.store.epoch
    node.tell([Claim(told, merged=False)], peer=1)
    own = node.core.member(me)
    assert own is not None
    assert own.epoch > before
    assert own.incarnation == 0


def test_who_has_been_gone_longest_makes_room_for_who_comes() -> None:
    node = bench(replace(lan(), members_max=3))
    node.meet(1, 2, 3)
    node.tell([Claim(claim(1, LEFT), merged=False)], peer=1)
    node.meet(4)
    node.meet(4)
    assert node.state(1) is None
    assert node.state(4) is ALIVE


def test_a_dead_member_that_speaks_is_told_so() -> None:
    node = bench()
    node.meet(1)
    node.bury(1)
    told = messages_in(node.tell([Nack(1)], peer=1), address(1))
    assert [one.update.state for one in told if isinstance(one, Claim)] == [DEAD]


def test_an_earlier_life_is_told_of_the_later_and_not_listened_to() -> None:
    node = bench()
    node.tell([Claim(claim(1, epoch=50), merged=False)], epoch=50)
    told = messages_in(node.tell([Ping(1, node.store.owner, BEAT)], epoch=40), address(1))
    assert [type(one) for one in told] == [Claim]
    assert node.core.statistics()["dropped_old_epoch"] == 1


def test_a_stranger_is_asked_who_it_is() -> None:
    node = bench()
    told = messages_in(node.tell([Nack(1)], peer=9), address(9))
    assert told == [View(node_id(9), node_id(9), (), answer=False)]


def test_a_newcomers_record_is_pulled_from_itself() -> None:
    node = bench()
    node.meet(1)
    told = messages_in([effect for _, effect in node.run(0.1)], address(1))
    assert [[line.owner for line in one.lines] for one in told if isinstance(one, Pull)] == [
        [node_id(1)]
    ]


def test_two_with_one_name_are_both_kept_and_told_of() -> None:
    node = bench()
    other = replace(claim(1), name="me")
    events = events_in(node.tell([Claim(other, merged=False)]))
    assert NameContested("me", node_id(1), node.store.owner) in events
    assert node.state(1) is ALIVE


def test_a_contested_address_goes_to_the_later_life_and_the_other_is_suspected() -> None:
    node = bench()
    node.meet(1)
    newer = replace(claim(2, epoch=20), address=address(1))
    events = events_in(node.tell([Claim(newer, merged=False)], peer=2, epoch=20))
    assert AddressContested(address(1), node_id(2), node_id(1)) in events
    assert (node.state(1), node.state(2)) == (SUSPECT, ALIVE)


def test_two_that_both_show_themselves_at_one_address_are_not_accused_again_and_again() -> None:
    node = bench()
    node.meet(1)
    newer = replace(claim(2, epoch=20), address=address(1))
    seen = events_in(node.tell([Claim(newer, merged=False)], peer=2, epoch=20))
    for incarnation in range(1, 20):  # the loser refutes, and is believed
        refuted = replace(claim(1), incarnation=incarnation)
        seen += events_in(node.tell([Claim(refuted, merged=False)], peer=1))
    assert node.state(1) == ALIVE
    assert sum(isinstance(event, AddressContested) for event in seen) == 1
    assert sum(isinstance(event, MemberSuspected) for event in seen) == 1


def test_who_left_is_forgotten_with_its_record_and_is_no_ghost_later() -> None:
    node = bench()
    node.meet(1)
    node.tell([Claim(claim(1, LEFT), merged=False)])
    node.run(lan().left_keep_s + 2.0)
    assert node.state(1) is None
    node.tell([Claim(claim(1, ALIVE, 9), merged=True)], peer=2)
    assert node.state(1) is None
    node.tell([Claim(claim(1, epoch=11), merged=True)], peer=2)
    assert node.state(1) is ALIVE


# -- probing ---------------------------------------------------------------------------------------------


def test_a_ping_is_acked_and_one_for_another_is_not() -> None:
    node = bench()
    node.meet(1)
    told = messages_in(node.tell([Ping(7, node.store.owner, BEAT)]), address(1))
    assert [(one.sequence, one.subject) for one in told if isinstance(one, Ack)] == [(7, None)]
    told = messages_in(node.tell([Ping(8, node_id(5), BEAT)]))
    assert not any(isinstance(one, Ack) for one in told)
    assert node.core.statistics()["ping_for_another"] == 1


def test_silence_is_answered_by_indirect_probes_a_stream_ping_and_suspicion_then_death() -> None:
    node = bench()
    node.meet(1)
    seen = node.run(60.0)
    pings = [at for at, effect in seen if any(isinstance(m, Ping) for m in messages_in([effect]))]
    streams = [at for at, effect in seen if isinstance(effect, StreamPing)]
    events = [(at, type(event)) for at, effect in seen for event in events_in([effect])]
    suspected_s = next(at for at, kind in events if kind is MemberSuspected)
    failed_s = next(at for at, kind in events if kind is MemberFailed)
    assert streams[0] == pytest.approx(pings[0] + lan().probe_timeout_s)
    assert suspected_s == pytest.approx(pings[0] + lan().probe_deadline_s)
    assert failed_s - pings[0] == pytest.approx(lan().death_floor_s)


def test_a_stream_answer_saves_from_suspicion() -> None:
    node = bench()
    node.meet(1)
    seen = node.run(lan().probe_interval_s + lan().probe_timeout_s)
    token = next(effect.token for _, effect in seen if isinstance(effect, StreamPing))
    node.core.stream_pinged(token, True, node.now_s)
    seen = node.run(0.55)
    assert MemberSuspected not in [type(e) for _, effect in seen for e in events_in([effect])]


def test_a_missing_nack_is_our_own_ill_health_and_a_nack_is_not() -> None:
    for nacks, expected in ((0, 1), (1, 0)):
        node = bench()
        node.meet(1, 2)
        node.tell([Claim(claim(2, SUSPECT, accuser=1), merged=False)])  # a witness probes at once
        seen = node.run(0.45)
        asked = [m for _, e in seen for m in messages_in([e]) if isinstance(m, PingRequest)]
        about = next(one for one in asked if one.target == node_id(2))
        for _ in range(nacks):
            node.tell([Nack(about.sequence)])
        others = [m for _, e in seen for m in messages_in([e], address(1)) if isinstance(m, Ping)]
        for ping in others:
            node.tell([Ack(ping.sequence, node_id(1), BEAT)])
        before = node.core.statistics()["local_health"]
        node.run(lan().probe_deadline_s - 0.45 + 0.01)
        assert node.core.statistics()["local_health"] - before == expected


def test_the_dead_are_tried_now_and_then_and_told_of_their_death() -> None:
    node = bench()
    node.meet(1)
    node.bury(1)
    seen = node.run(10.0)
    tries = [messages_in([e], address(1)) for _, e in seen if isinstance(e, Send)]
    pings = [one for one in tries if any(isinstance(m, Ping) for m in one)]
    assert len(pings) == pytest.approx(10.0 / lan().dead_probe_interval_s, abs=1)
    assert all(isinstance(one[0], Claim) and one[0].update.state is DEAD for one in pings)


def test_one_who_comes_back_from_the_dead_is_compared_with_at_once() -> None:
    node = bench()
    node.meet(1)
    node.bury(1)
    told = messages_in(node.tell([Claim(claim(1, ALIVE, 1), merged=False)]), address(1))
    assert any(isinstance(one, Summary) for one in told)


def test_a_ping_that_tells_of_a_newer_record_is_followed_by_a_pull() -> None:
    node = bench()
    node.meet(1)
    node.run(0.2)
    node.tell([Ping(1, node.store.owner, Heartbeat(bytes(8), Version(4)))])
    told = messages_in([effect for _, effect in node.run(0.1)], address(1))
    assert [[line.owner for line in m.lines] for m in told if isinstance(m, Pull)] == [[node_id(1)]]


def test_a_helper_probes_relays_the_ack_or_says_nack() -> None:
    node = bench()
    node.meet(1, 2)
    told = messages_in(node.tell([PingRequest(5, node_id(2), address(2))], peer=1), address(2))
    ping = next(one for one in told if isinstance(one, Ping))
    nacks = messages_in([effect for _, effect in node.run(0.35)], address(1))
    assert Nack(5) in nacks
    acked = node.tell([Ack(ping.sequence, node_id(2), BEAT)], peer=2)
    relayed = [one for one in messages_in(acked, address(1)) if isinstance(one, Ack)]
    assert [(one.sequence, one.subject) for one in relayed] == [(5, node_id(2))]


def test_the_end_of_a_witness_stream_and_a_refused_knock_accuse_with_evidence() -> None:
    node = bench()
    node.meet(1, 2)
    effects = node.core.watch_ended(node_id(1), 10, True, 0.0)
    knock = next(effect for effect in effects if isinstance(effect, Knock))
    assert knock.to == address(1)
    assert events_in(effects) == []  # nobody is accused before we have looked
    effects = node.core.knocked(knock.token, True, 0.01)
    assert [type(event) for event in events_in(effects)] == [MemberSuspected]
    seen = node.run(0.02)
    told = [m for _, e in seen for m in messages_in([e], address(2)) if isinstance(m, Claim)]
    assert [(one.update.state, one.update.evidence) for one in told][:1] == [(SUSPECT, True)]


def test_two_accusers_with_evidence_are_death_after_a_short_time_and_one_is_not() -> None:
    def failed_s(accusers: int) -> list[float]:
        node = bench()
        node.meet(1, 2, 3)
        for accuser in (2, 3)[:accusers]:
            told = replace(claim(1, SUSPECT, accuser=accuser), evidence=True)
            node.tell([Claim(told, merged=False)], peer=accuser)
        events = [(at, event) for at, e in node.run(1.0) for event in events_in([e])]
        return [at for at, event in events if isinstance(event, MemberFailed)]

    assert failed_s(2) == [pytest.approx(lan().evidence_death_s)]
    assert failed_s(1) == []


def test_in_a_mesh_of_two_our_own_evidence_is_enough() -> None:
    node = bench()
    node.meet(1)
    effects = node.core.evidence_refused(address(1), 0.0)
    token = next(effect.token for effect in effects if isinstance(effect, Knock))
    node.core.knocked(token, True, 0.01)
    seen = node.run(lan().evidence_death_s + 0.02)
    failed = [at for at, effect in seen for e in events_in([effect]) if isinstance(e, MemberFailed)]
    assert failed == [pytest.approx(0.01 + lan().evidence_death_s)]


def test_evidence_can_be_refuted_all_the_time() -> None:
    node = bench()
    node.meet(1, 2, 3)
    for accuser in (2, 3):
        told = replace(claim(1, SUSPECT, accuser=accuser), evidence=True)
        node.tell([Claim(told, merged=False)], peer=accuser)
    node.run(lan().evidence_death_s - 0.01)
    node.tell([Claim(claim(1, ALIVE, 1), merged=False)], peer=1)
    node.run(1.0)
    assert node.state(1) is ALIVE


def test_a_refused_datagram_where_somebody_listens_is_only_a_reason_to_probe() -> None:
    node = bench()
    node.meet(1)
    effects = node.core.evidence_refused(address(1), 0.0)
    token = next(effect.token for effect in effects if isinstance(effect, Knock))
    effects = node.core.knocked(token, False, 0.01)
    assert any(isinstance(m, Ping) for m in messages_in(effects, address(1)))
    assert node.state(1) is ALIVE


def test_forged_refusals_make_few_knocks() -> None:
    node = bench()
    node.meet(1)
    knocks = 0
    for step in range(1000):
        effects = node.core.evidence_refused(address(1), step / 1000)
        for effect in effects:
            if isinstance(effect, Knock):
                knocks += 1
                node.core.knocked(effect.token, False, step / 1000)
    assert knocks == pytest.approx(1.0 / lan().knock_gap_s, abs=2)


def test_the_end_of_an_earlier_lifes_stream_says_nothing_of_the_later() -> None:
    node = bench()
    node.meet(1)
    assert node.core.watch_ended(node_id(1), 9, True, 0.0) == ()


def test_a_few_peers_are_watched_and_those_who_leave_are_replaced() -> None:
    node = bench()
    node.meet(*range(1, 9))
    first = [e.node for _, e in node.run(2.0) if isinstance(e, Watch)]
    assert len(first) == lan().witness_streams
    gone = next(number for number in range(1, 9) if node_id(number) == first[0])
    node.tell([Claim(claim(gone, LEFT), merged=False)], peer=gone)
    later = [e.node for _, e in node.run(2.0) if isinstance(e, Watch)]
    assert len(later) == 1
    assert later[0] not in first


def test_who_leaves_says_goodbye_on_all_witness_streams() -> None:
    node = bench()
    node.meet(1, 2)
    node.run(2.0)
    effects = node.core.leave(node.now_s)
    assert {e.node for e in effects if isinstance(e, Unwatch)} == {node_id(1), node_id(2)}


def test_who_hears_nobody_at_all_suspects_all_and_tells_nobody() -> None:
    node = bench()
    node.meet(*range(1, 13))
    seen = node.run(lan().isolation_s + lan().probe_interval_s + lan().probe_deadline_s)
    assert {node.state(number) for number in range(1, 13)} == {SUSPECT}
    assert node.core.statistics()["isolations"] == 1
    told = [m for _, e in seen for m in messages_in([e]) if isinstance(m, Claim)]
    accused = {one.update.node for one in told if one.update.state is SUSPECT}
    assert len(accused) <= 3  # those whose probes failed before it knew


def test_a_stall_of_our_own_accuses_nobody() -> None:
    node = bench()
    node.meet(1)
    node.run(0.9)
    node.now_s += 30.0  # we stood still in the middle of a probe
    effects = node.core.advance(node.now_s)
    assert events_in(effects) == []
    assert node.core.statistics()["stalls"] == 1
    assert node.core.deadline_s() > node.now_s - 1e-9


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
