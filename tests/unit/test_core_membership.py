"""The table of members: which claim wins, in whatever order claims arrive; ghosts; addresses."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_core import address, claim, node_id

from meshd.core.config import lan
from meshd.core.membership import Members, MemberState, StateHash, Update, Verdict
from meshd_cms.types import Epoch, NodeId

ALIVE, SUSPECT, DEAD, LEFT = MemberState
ME = NodeId(bytes(16))


def table(**changes: int) -> Members:
    return Members(replace(lan(), **changes), ME, random.Random(1))  # type: ignore[arg-type]


def held_then_claimed(held: Update, claimed: Update) -> bool:
    """Whether the second claim replaced the first."""
    members = table()
    if not held.state.is_live:  # get it listed first
        members.accept(replace(held, state=ALIVE), 0.0)
    members.accept(held, 0.0)
    return members.accept(claimed, 1.0).verdict is Verdict.ACCEPTED


# Rows of the table in the module's text: what is held -> the least incarnation of each claim that beats 5.
NEVER = None
BEATS = [
    (ALIVE, ALIVE, 6),
    (ALIVE, SUSPECT, 5),
    (ALIVE, DEAD, 5),
    (ALIVE, LEFT, 0),
    (SUSPECT, ALIVE, 6),
    (SUSPECT, SUSPECT, 6),
    (SUSPECT, DEAD, 5),
    (SUSPECT, LEFT, 0),
    (DEAD, ALIVE, 6),
    (DEAD, SUSPECT, 6),
    (DEAD, DEAD, 6),
    (DEAD, LEFT, 0),
    (LEFT, ALIVE, NEVER),
    (LEFT, SUSPECT, NEVER),
    (LEFT, DEAD, NEVER),
]


@pytest.mark.parametrize(("held", "claimed", "least"), BEATS)
def test_precedence_within_an_epoch(
    held: MemberState, claimed: MemberState, least: int | None
) -> None:
    for incarnation in range(9):
        wins = held_then_claimed(claim(1, held, 5), claim(1, claimed, incarnation))
        assert wins == (least is not NEVER and incarnation >= least), incarnation


@pytest.mark.parametrize("held", list(MemberState))
@pytest.mark.parametrize("claimed", list(MemberState))
def test_a_higher_epoch_always_wins_and_a_lower_one_never(
    held: MemberState, claimed: MemberState
) -> None:
    assert held_then_claimed(claim(1, held, 99, epoch=10), claim(1, claimed, 0, epoch=11))
    assert not held_then_claimed(claim(1, held, 0, epoch=10), claim(1, claimed, 99, epoch=9))


claims = st.builds(
    claim,
    st.just(1),
    st.sampled_from(list(MemberState)),
    st.integers(0, 3),
    st.integers(10, 12),
    st.sampled_from([2, 3]),
)


@given(st.lists(claims, max_size=8), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_same_claims_in_any_order_any_number_of_times_end_in_the_same_belief(
    told: list[Update], rng: random.Random
) -> None:
    other = told * 2
    rng.shuffle(other)
    ends: list[tuple[int, bool, int, int] | None] = []
    for order in (told, other):
        members = table()
        for update in order:
            members.accept(update, 0.0)
        last = members.last_word(node_id(1))
        ends.append(None if last is None else last.precedence)
    assert ends[0] == ends[1]


def test_only_distinct_accusers_confirm() -> None:
    members = table()
    for number in (1, 3):
        members.accept(claim(number), 0.0)
    members.accept(claim(1, SUSPECT, accuser=2), 0.0)
    again = members.accept(claim(1, SUSPECT, accuser=2), 0.0)
    another = members.accept(claim(1, SUSPECT, accuser=3), 0.0)
    assert (again.verdict, another.verdict) == (Verdict.STALE, Verdict.CONFIRMED)


def test_a_buried_node_does_not_come_back_as_a_ghost_but_does_in_a_new_incarnation() -> None:
    members = table()
    members.accept(claim(1, incarnation=4), 0.0)
    members.accept(claim(1, DEAD, 4), 0.0)
    members.bury(node_id(1), 0.0)
    assert members.accept(claim(1, ALIVE, 4), 1.0).verdict is Verdict.GHOST
    assert members.accept(claim(1, ALIVE, 5), 1.0).verdict is Verdict.ACCEPTED


def test_bad_news_about_a_stranger_lists_nobody_and_stops_its_ghost() -> None:
    members = table()
    assert members.accept(claim(1, DEAD, 4), 0.0).verdict is Verdict.UNKNOWN
    assert len(members) == 0
    assert members.accept(claim(1, ALIVE, 4), 0.0).verdict is Verdict.GHOST


def test_the_graveyard_ages_and_is_bounded() -> None:
    members = table(graveyard_max=2)
    for number in (1, 2, 3):
        members.accept(claim(number, DEAD), float(number))
    assert members.last_word(node_id(1)) is None
    members.expire_graveyard(2.0 + lan().graveyard_keep_s)
    assert members.last_word(node_id(2)) is None
    assert members.last_word(node_id(3)) is not None


def test_a_full_table_refuses_strangers() -> None:
    members = table(members_max=1)
    members.accept(claim(1), 0.0)
    assert members.accept(claim(2), 0.0).verdict is Verdict.FULL


def test_name_and_address_are_what_the_subject_said() -> None:
    members = table()
    members.accept(claim(1, incarnation=1), 0.0)
    lie = replace(claim(1, SUSPECT, 1, accuser=2), name="other", address=("9.9.9.9", 1))
    accepted = members.accept(lie, 0.0)
    assert accepted.member is not None
    assert (accepted.member.update.name, accepted.member.address) == ("peer-1", address(1))


def test_an_address_goes_to_the_later_life() -> None:
    members = table()
    older = replace(claim(1, epoch=10), address=address(9))
    newer = replace(claim(2, epoch=11), address=address(9))
    for order in ((older, newer), (newer, older)):
        members = table()
        for update in order:
            members.accept(update, 0.0)
        holder = members.at_address(address(9))
        assert holder is not None
        assert holder.node == node_id(2)


def test_the_address_of_a_dead_node_is_free() -> None:
    members = table()
    members.accept(claim(1), 0.0)
    members.accept(claim(1, DEAD), 0.0)
    assert members.at_address(address(1)) is None


def hashed(lives: list[tuple[NodeId, Epoch, int]]) -> bytes:
    return StateHash().of(lives, lambda _: None)


def test_the_state_hash_depends_on_the_lives_and_not_on_their_order() -> None:
    one, other = (node_id(1), Epoch(1), 0), (node_id(2), Epoch(1), 0)
    assert hashed([one, other]) == hashed([other, one])
    raised = (node_id(2), Epoch(1), 1)
    assert hashed([one, other]) != hashed([one, raised])
