"""How one node core finds out who is silent: probes, knocks, witness streams, and death."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.support_core import (
    address,
    bench,
    by_stream,
    claim,
    events_in,
    messages_in,
    node_id,
)

from meshd.core.config import lan
from meshd.core.effects import Knock, Lane, Send, StreamPing, Unwatch, Watch
from meshd.core.events import (
    MemberFailed,
    MemberSuspected,
)
from meshd.core.membership import MemberState
from meshd.core.messages import (
    Ack,
    Claim,
    Heartbeat,
    Nack,
    Ping,
    PingRequest,
    Pull,
    Summary,
)
from meshd_cms.types import Version

ALIVE, SUSPECT, DEAD, LEFT = MemberState
BEAT = Heartbeat(bytes(8), Version(0))


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


def test_a_suspect_that_answers_by_stream_is_told_of_it_by_stream() -> None:
    """Behind a firewall that drops UDP it hears of it in no other way."""
    node = bench()
    node.meet(1)
    seen = node.run(lan().probe_interval_s * 3)
    assert node.state(1) is SUSPECT
    token = next(effect.token for _, effect in reversed(seen) if isinstance(effect, StreamPing))
    told = node.core.stream_pinged(token, True, node.now_s)
    [claimed] = [m for m in messages_in(by_stream(told), address(1)) if isinstance(m, Claim)]
    assert (claimed.update.node, claimed.update.state) == (node_id(1), SUSPECT)


@pytest.mark.parametrize("lane", Lane)
def test_a_suspicion_is_refuted_the_way_it_was_heard(lane: Lane) -> None:
    node = bench()
    node.meet(1)
    accused = replace(claim(1, SUSPECT, accuser=1), node=node.store.owner, epoch=node.store.epoch)
    answers = node.tell([Claim(accused, merged=False)], lane=lane)
    [refutation] = [
        one.update
        for effect in answers
        if isinstance(effect, Send) and effect.lane is lane
        for one in messages_in([effect], address(1))
        if isinstance(one, Claim)
    ]
    assert (refutation.state, refutation.incarnation) == (ALIVE, 1)


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
