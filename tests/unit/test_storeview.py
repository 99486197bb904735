"""Stores compared: who is behind, why, and what only looks like it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.orchestrate.storeview import Difference, differences, lasting, progress
from meshd_cms import DigestLine, Epoch, NodeId, Version

A, B = (NodeId(bytes([number]) * 16) for number in (1, 2))


def line(owner: NodeId, epoch: int, version: int, floor: int = 0) -> DigestLine:
    return DigestLine(owner, Epoch(epoch), Version(version), Version(floor))


@pytest.mark.parametrize(
    ("here", "there", "behind", "reason"),
    [
        (line(A, 1, 5), line(A, 1, 7), "here", "2 versions behind"),
        (line(A, 1, 8), line(A, 1, 7), "there", "1 version behind"),
        (line(A, 1, 99), line(A, 2, 1), "here", "an earlier life"),
        (None, line(A, 1, 1), "here", "not held"),
        (line(A, 1, 1), None, "there", "not held"),
        (line(A, 1, 5, 2), line(A, 1, 5, 3), "here", "tombstones not collected"),
    ],
)
def test_the_side_that_lacks_something_is_named(
    here: DigestLine | None, there: DigestLine | None, behind: str, reason: str
) -> None:
    [found] = differences([here] if here else [], [there] if there else [])
    assert found.is_here_behind is (behind == "here")
    assert found.reason == reason


def test_equal_stores_are_in_step_whatever_their_order() -> None:
    both = [line(A, 1, 5), line(B, 3, 2, 1)]
    assert differences(both, both[::-1]) == ()


def test_what_has_arrived_meanwhile_does_not_last() -> None:
    before = differences([line(A, 1, 5)], [line(A, 1, 7)])
    assert lasting(before, ()) == ()
    assert lasting(before, differences([line(A, 1, 7)], [line(A, 1, 9)])) == ()


def test_what_is_still_missing_lasts() -> None:
    before = differences([line(A, 1, 5)], [line(A, 1, 7)])
    after = differences([line(A, 1, 6)], [line(A, 1, 9)])
    assert lasting(before, after) == after


def test_sides_that_swapped_are_news_and_no_difference_that_lasts() -> None:
    before = differences([line(A, 1, 5)], [line(A, 1, 7)])
    after = differences([line(A, 1, 9)], [line(A, 1, 7)])
    assert lasting(before, after) == ()


lines = st.builds(
    line,
    st.sampled_from([A, B, NodeId(bytes(16))]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 1),
)
stores = st.lists(lines, unique_by=lambda each: each.owner)


@settings(max_examples=100, deadline=None)
@given(stores, stores)
def test_each_side_sees_the_same_differences_the_other_way_round(
    here: list[DigestLine], there: list[DigestLine]
) -> None:
    ours, theirs = differences(here, there), differences(there, here)
    assert [each.owner for each in ours] == [each.owner for each in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.is_here_behind is not other.is_here_behind
        assert mine.reason == other.reason
    assert lasting(ours, ours) == ours


def test_nothing_is_the_least_progress() -> None:
    assert progress(None) < progress(line(A, 1, 1))
    assert Difference(A, None, line(A, 1, 1)).is_here_behind
