"""Joining: everybody is welcomed in one datagram, tables within a bound, and nobody can use it all up."""

from __future__ import annotations

from dataclasses import replace

from tests.sim.world import World
from tests.unit.support_core import address, bench, claim, events_in, messages_in, node_id

from meshd.core.allowance import Allowance, Allowances
from meshd.core.answers import ANSWERS_BURST
from meshd.core.buckets import FIRST_ID, LAST_ID
from meshd.core.config import lan
from meshd.core.events import MeshJoined
from meshd.core.messages import Claim, Join, JoinAnswer, JoinLater, Summary, View

WHOLE = View(FIRST_ID, LAST_ID, (), answer=True)


def test_a_welcome_is_one_datagram_with_a_few_members() -> None:
    node = bench()
    node.meet(*range(1, 21))
    told = node.tell([Claim(claim(50), merged=False), Join(7)], peer=50)
    welcome = [one for one in told if JoinAnswer(7) in messages_in([one])]
    assert len(welcome) == 1
    members = [one.update.node for one in messages_in(welcome) if isinstance(one, Claim)]
    assert members[0] == node.store.owner
    assert len(members) == 5
    assert set(members[1:]) < {node_id(number) for number in range(1, 21)}


def test_who_is_not_served_whole_asks_one_of_the_members_it_was_told_of() -> None:
    node = bench()
    node.core.join([address(1)], 0.0)
    effects = [effect for _, effect in node.run(0.0)]
    join = next(one for one in messages_in(effects) if isinstance(one, Join))
    answer = JoinAnswer(join.token, is_whole=False)
    members = [Claim(claim(number), merged=True) for number in (2, 3)]
    told = node.tell([answer, Claim(claim(1), merged=False), *members])
    assert MeshJoined(node_id(1), address(1)) in events_in(told)
    asked = [effect for _, effect in node.run(0.3)]
    summaries = [
        number
        for number in (1, 2, 3)
        if any(isinstance(one, Summary) for one in messages_in(asked, address(number)))
    ]
    assert len(summaries) == 1
    assert summaries[0] in (2, 3)


def test_when_the_answers_are_used_up_joiners_are_welcomed_all_the_same() -> None:
    node = bench(replace(lan(), join_answers_burst=400, join_answers_per_s=400.0))
    node.meet(*range(1, 101))
    kinds: list[bool] = []
    for number in range(101, 240):
        told = node.tell([Claim(claim(number), merged=False), Join(7), *[WHOLE] * 4], peer=number)
        answers = [one for one in messages_in(told) if isinstance(one, JoinAnswer)]
        assert len(answers) == 1
        kinds.append(answers[0].is_whole)
    assert kinds[0]
    assert not kinds[-1]
    assert kinds == sorted(kinds, reverse=True)
    assert node.core.statistics()["joins_referred"] == kinds.count(False)
    assert kinds.count(True) * 4 <= ANSWERS_BURST


def test_a_flood_of_joins_by_one_node_is_its_own_offence() -> None:
    node = bench()
    node.meet(1, 2)
    answered = 0
    for token in range(1, 101):
        told = messages_in(node.tell([Join(token)]))
        answered += any(isinstance(one, JoinAnswer | JoinLater) for one in told)
    assert answered <= 8
    assert node.core.offences()[node_id(1)]["joins_excess"] == 100 - answered
    told = messages_in(node.tell([Join(5)], peer=2), address(2))
    assert any(isinstance(one, JoinAnswer) for one in told)  # others are none the worse


def test_a_crowd_beyond_the_bound_is_told_when_to_come_again() -> None:
    node = bench(replace(lan(), join_answers_burst=10, join_answers_per_s=10.0))
    later = 0
    for number in range(1, 31):
        told = messages_in(node.tell([Claim(claim(number), merged=False), Join(3)], peer=number))
        waits = [one.retry_after_s for one in told if isinstance(one, JoinLater)]
        assert all(0.5 <= wait_s <= 1.5 for wait_s in waits)
        later += len(waits)
    assert later == 20


def test_forty_that_join_at_once_know_each_other_and_all_records_within_a_second() -> None:
    world = World(5, lan())
    world.add(40)
    assert world.settle(10.0) < 1.0
    pulls = sum(world.core(number).statistics()["pulls"] for number in range(40))
    assert pulls < 40 * 39 * 0.75  # where each from each would be all of them


def test_an_allowance_is_never_exceeded_and_refills() -> None:
    one = Allowance(per_s=10.0, burst=5.0)
    assert [one.take(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert not one.take(0.05)
    assert one.take(0.1)
    assert one.left(100.0) == 5.0
    assert not one.take(100.0, 6.0)
    assert one.left(100.0) == 5.0  # what is refused is not taken off


def test_allowances_forget_who_has_not_come_for_longest() -> None:
    every = Allowances(per_s=0.0, burst=1.0, nodes_max=2)
    assert every.of(node_id(1)).take(0.0)
    assert every.of(node_id(2)).take(0.0)
    assert not every.of(node_id(1)).take(0.0)
    assert every.of(node_id(3)).take(0.0)
    assert every.of(node_id(2)).take(0.0)  # forgotten, and so full again
    assert not every.of(node_id(3)).take(0.0)
