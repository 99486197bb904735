"""Whether a prefix is fetched or computed: the arithmetic, what is learnt of links, and when a fetch is given up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_naming import node

from meshd.core.handoff import (
    LINKS_MAX,
    HandoffConfig,
    Links,
    Plan,
    Prospect,
    Reason,
    choose,
    is_too_slow,
)

CONFIG = HandoffConfig()
# The 135M model on two slow cores: 2.6 s for 1,000 tokens, 23 MB of state; a link of 1 Gb/s.
USUAL = Prospect(
    tokens=1000,
    tokens_here=0,
    bytes_per_token=23_040,
    prefill_tokens_per_s=385.0,
    link_bytes_per_s=100e6,
    round_trip_s=0.001,
)


def test_a_long_prefix_over_a_fast_link_is_fetched() -> None:
    plan = choose(USUAL, CONFIG)
    assert isinstance(plan, Plan)
    assert plan.expected_s == pytest.approx(0.02 + 0.002 + 0.2304)
    assert plan.deadline_s == pytest.approx(1000 / 385 / 1.5)
    assert plan.bytes_max >= 1000 * 23_040


@pytest.mark.parametrize(
    ("prospect", "reason"),
    [
        (replace(USUAL, tokens=255), Reason.TOO_SHORT),
        (replace(USUAL, tokens_here=800), Reason.TOO_SHORT),
        (replace(USUAL, link_bytes_per_s=11e6), Reason.SLOW_LINK),
        (replace(USUAL, prefill_tokens_per_s=20_000.0), Reason.SLOW_LINK),
        (replace(USUAL, round_trip_s=1.0), Reason.SLOW_LINK),
        (replace(USUAL, tokens=10**9), Reason.SLOW_LINK),
        (replace(USUAL, prefill_tokens_per_s=0.0), Reason.UNMEASURED),
        (replace(USUAL, bytes_per_token=0), Reason.UNMEASURED),
    ],
)
def test_it_is_computed_where_that_is_no_slower_by_far(prospect: Prospect, reason: Reason) -> None:
    assert choose(prospect, CONFIG) is reason


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**40),
    st.integers(0, 2**20),
    st.integers(0, 2**24),
    st.floats(0.0, 1e7),
    st.floats(0.0, 1e11),
    st.floats(0.0, 100.0),
)
def test_a_fetch_is_always_expected_to_pay(
    tokens: int, here: int, size: int, prefill: float, link: float, round_trip_s: float
) -> None:
    prospect = Prospect(tokens, here, size, prefill, link, round_trip_s)
    plan = choose(prospect, CONFIG)
    if isinstance(plan, Plan):
        prefill_s = (tokens - here) / prefill
        assert plan.expected_s < plan.deadline_s <= prefill_s / CONFIG.advantage
        assert plan.deadline_s <= CONFIG.deadline_s_max
        assert plan.bytes_max <= CONFIG.bytes_max + 65_536


def test_a_link_is_guessed_from_its_round_trip_until_it_was_seen() -> None:
    links = Links(CONFIG)
    assert links.bytes_per_s(node(1), 0.001, 0.0) == 60e6
    assert links.bytes_per_s(node(1), 0.040, 0.0) == pytest.approx(6e6)
    assert links.bytes_per_s(node(1), None, 0.0) == pytest.approx(15e6)
    links.note(node(1), 2_000_000, 1.0, 0.0)
    assert links.bytes_per_s(node(1), 0.001, 1.0) == 2e6
    assert links.bytes_per_s(node(2), 0.001, 1.0) == 60e6


def test_a_link_that_got_better_or_worse_is_believed_soon_and_not_for_ever() -> None:
    links = Links(CONFIG)
    links.note(node(1), 1_000_000, 1.0, 0.0)
    links.note(node(1), 9_000_000, 1.0, 10.0)
    assert links.bytes_per_s(node(1), 0.001, 20.0) == pytest.approx(5e6)
    later_s = 10.0 + CONFIG.remembered_s + 1.0
    assert links.bytes_per_s(node(1), 0.001, later_s) == 60e6


def test_nothing_is_learnt_from_nothing_and_not_of_everybody() -> None:
    links = Links(CONFIG)
    links.note(node(1), 0, 1.0, 0.0)
    links.note(node(1), 10, 0.0, 0.0)
    assert links.bytes_per_s(node(1), 0.001, 0.0) == 60e6
    for number in range(LINKS_MAX + 1):
        links.note(node(number), 1_000, 1.0, 0.0)
    assert links.bytes_per_s(node(0), 0.001, 0.0) == 60e6
    assert links.bytes_per_s(node(LINKS_MAX), 0.001, 0.0) == 1_000


PLAN = Plan(bytes_max=30_000_000, deadline_s=1.8, trial_s=0.25, silence_s=1.0, expected_s=0.4)


@pytest.mark.parametrize(
    ("so_far", "took_s", "too_slow"),
    [
        (0, 0.2, False),  # the trial is not over
        (0, 0.3, True),
        (20_000_000, 0.3, False),
        (5_000_000, 0.3, False),  # 1.38 s in all
        (3_000_000, 0.3, True),  # 2.3 s in all
        (23_000_000, 1.7, False),  # it is there
        (23_000_000, 1.9, True),
    ],
)
def test_a_fetch_is_given_up_once_it_is_seen_to_be_too_slow(
    so_far: int, took_s: float, too_slow: bool
) -> None:
    assert is_too_slow(PLAN, 23_000_000, so_far, took_s) is too_slow
