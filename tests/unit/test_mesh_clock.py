"""The mesh's clock: what liars and clocks that were never set can do to it, and what they cannot."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.trust.mesh_clock import EARLIEST_S, FAR_OFF_S, JUMP_S, MeshClock
from meshd_cms.types import NodeId

TRUE_S = 1_790_000_000.0
ANY = settings(max_examples=100, deadline=None)
HONEST_S = st.floats(-30.0, 30.0)
LIE_S = st.floats(0.0, 2.0**40)


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def test_alone_it_is_our_own_clock() -> None:
    clock = MeshClock()
    assert clock.now_s(TRUE_S, 5.0) == TRUE_S
    assert clock.own_offset_s(TRUE_S, 5.0) == 0.0


@ANY
@given(st.data())
def test_a_minority_of_liars_cannot_move_it_beyond_the_honest(data: st.DataObject) -> None:
    honest = data.draw(st.lists(HONEST_S, min_size=2, max_size=20))
    lies = data.draw(st.lists(LIE_S, max_size=len(honest) - 1))
    clock = MeshClock()
    told = [*(TRUE_S + each for each in honest[1:]), *lies]
    for number, index in enumerate(data.draw(st.permutations(range(len(told))))):
        is_issuer = data.draw(st.booleans())  # a lying one moves it no further
        clock.heard(node(number), told[index], elapsed_s=100.0, is_issuer=is_issuer)
    now_s = clock.now_s(TRUE_S + honest[0], 100.0)
    assert TRUE_S + min(honest) <= now_s <= TRUE_S + max(honest)


@ANY
@given(st.lists(HONEST_S, min_size=1, max_size=9))
def test_a_board_that_starts_in_1970_has_the_time_of_the_others(honest: list[float]) -> None:
    clock = MeshClock()
    assert clock.now_s(12.0, 10.0) == EARLIEST_S
    assert not clock.is_known(12.0, 10.0)
    for number, offset_s in enumerate(honest):
        clock.heard(node(number), TRUE_S + offset_s, 10.0)
    assert clock.is_known(12.0, 10.0)
    assert TRUE_S + min(honest) <= clock.now_s(12.0, 10.0) <= TRUE_S + max(honest)
    assert clock.own_offset_s(12.0, 10.0) < -TRUE_S / 2


def test_a_peer_that_starts_in_1970_does_not_count() -> None:
    clock = MeshClock()
    for number in range(5):
        clock.heard(node(number), float(number), 10.0)
    assert clock.now_s(TRUE_S, 10.0) == TRUE_S


def test_of_two_clocks_the_later_one_counts() -> None:
    behind_s = TRUE_S - 30 * 86_400.0
    clock = MeshClock()
    clock.heard(node(1), TRUE_S, 10.0)
    assert clock.now_s(behind_s, 10.0) == TRUE_S
    clock.heard(node(1), behind_s, 10.0)
    assert clock.now_s(TRUE_S, 10.0) == TRUE_S


def test_of_two_clocks_that_of_an_issuer_counts() -> None:
    ahead_s = TRUE_S + 400 * 86_400.0
    clock = MeshClock()
    clock.heard(node(1), TRUE_S, 10.0, is_issuer=True)
    assert clock.now_s(ahead_s, 10.0) == TRUE_S
    clock.heard(node(1), TRUE_S, 10.0)  # said on a way that does not show it: as it was
    assert clock.now_s(ahead_s, 10.0) == TRUE_S
    clock.is_issuer = True
    assert clock.now_s(ahead_s, 10.0) == ahead_s, "of two issuers the later one"
    clock.heard(node(1), ahead_s, 10.0, is_issuer=False)
    assert clock.now_s(TRUE_S, 10.0) == TRUE_S, "an issuer believes itself rather than a member"
    clock.forget(node(1))
    clock.heard(node(1), ahead_s, 10.0)
    clock.is_issuer = False
    assert clock.now_s(TRUE_S, 10.0) == ahead_s, "what was known of it is forgotten"


def test_setting_our_own_clock_does_not_move_what_was_heard() -> None:
    clock = MeshClock()
    clock.heard(node(1), TRUE_S, 10.0)
    clock.heard(node(2), TRUE_S + 1.0, 10.0)
    assert clock.now_s(TRUE_S, 10.0) == TRUE_S
    assert clock.now_s(0.0, 20.0) == TRUE_S + 11.0
    assert clock.now_s(TRUE_S + 86_400.0, 20.0) == TRUE_S + 11.0


def test_who_is_forgotten_has_no_voice() -> None:
    clock = MeshClock()
    clock.heard(node(1), TRUE_S + 500.0, 0.0)
    assert clock.now_s(TRUE_S, 0.0) == TRUE_S + 500.0
    clock.forget(node(1))
    clock.forget(node(2))
    assert clock.now_s(TRUE_S, 0.0) == TRUE_S


def test_the_samples_are_bounded_and_a_node_has_one_voice() -> None:
    clock = MeshClock(samples_max=3)
    for number in range(10):
        clock.heard(node(number), TRUE_S, 0.0)
        clock.heard(node(number), TRUE_S, 0.0)
        assert len(clock) <= 3
    clock.heard(node(9), TRUE_S, 0.0)
    assert len(clock) == 3


def test_a_clock_that_is_far_off_is_told() -> None:
    clock = MeshClock()
    for number, offset_s in enumerate((0.0, 1.0, FAR_OFF_S * 2, -FAR_OFF_S * 2)):
        clock.heard(node(number), TRUE_S + offset_s, 0.0)
    found = clock.far_off(TRUE_S, 0.0)
    assert set(found) == {node(2), node(3)}
    assert math.isclose(found[node(2)], 2 * FAR_OFF_S, abs_tol=2.0)


def test_a_jump_of_our_own_clock_is_told_once() -> None:
    clock = MeshClock()
    assert clock.jumped_s(TRUE_S, 0.0) == 0.0
    assert clock.jumped_s(TRUE_S + 100.0, 100.0) == 0.0
    assert clock.jumped_s(TRUE_S + 100.0 + JUMP_S / 2, 100.0) == 0.0
    assert clock.jumped_s(TRUE_S + 1_000.0, 110.0) > JUMP_S
    assert clock.jumped_s(TRUE_S + 1_000.0, 110.0) == 0.0
    assert clock.jumped_s(0.0, 110.0) < -JUMP_S
