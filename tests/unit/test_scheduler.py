"""The order of candidates: classes, expected time, honesty about age, failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_naming import node, offer
from tests.unit.support_scheduler import Setting, lost_share

from meshd.core.scheduler import (
    NO_HEAD_START,
    POLICIES,
    Choice,
    Demand,
    ExpectedTimePolicy,
    HeadStart,
    InFlight,
    Key,
    Load,
    PeerHealth,
    Policy,
    Scheduler,
    SchedulerConfig,
    View,
)
from meshd_cms.types import NodeId
from meshd_naming import Candidate, Match
from meshd_plugins.api import Rates

NAME = "knowledge.gpt/general"


def candidate(
    number: int,
    *,
    decode: float = 20.0,
    slots: int = 2,
    match: Match = Match.EXACT,
    local: bool = False,
) -> Candidate:
    one = offer(number, NAME, decode=decode, slots=slots)
    return Candidate(one, match, 0, one.weight, 1.0, local)


def key(number: int) -> Key:
    return node(number), NAME


def ordered(
    *candidates: Candidate,
    loads: Mapping[int, Load] | None = None,
    scheduler: Scheduler | None = None,
    round_trips: Mapping[NodeId, float] | None = None,
    demand: Demand = Demand(),  # noqa: B008 (frozen)
    now_s: float = 100.0,
) -> tuple[Choice, ...]:
    known = {key(number): load for number, load in (loads or {}).items()}
    scheduler = scheduler or Scheduler(ExpectedTimePolicy(), SchedulerConfig(), Random(7))
    links = round_trips or {}
    return scheduler.order(candidates, demand, known.get, links.get, now_s)


def first(choices: tuple[Choice, ...]) -> int:
    return int.from_bytes(choices[0].candidate.offer.owner, "big")


def test_the_faster_of_two_idle_peers_comes_first() -> None:
    idle = {1: Load(0), 2: Load(0)}
    choices = ordered(candidate(1, decode=12.0), candidate(2, decode=60.0), loads=idle)
    assert first(choices) == 2
    assert choices[0].total_s == pytest.approx(0.005 + 64 / 600 + 128 / 60)
    assert choices[0].first_s == pytest.approx(0.005 + 64 / 600)


def test_a_fast_peer_with_a_queue_gives_way_to_a_slower_idle_one() -> None:
    pair = (candidate(1, decode=30.0, slots=1), candidate(2, decode=20.0, slots=1))
    queue = Load(1, queued=2, queue_max=8)
    assert first(ordered(*pair, loads={1: queue, 2: Load(0)})) == 2
    assert first(ordered(*pair, loads={1: Load(0), 2: queue})) == 1


def test_how_long_requests_take_there_says_how_long_this_one_waits() -> None:
    pair = (candidate(1, slots=2), candidate(2, slots=2))
    full = Load(2, queued=1, queue_max=8)
    choices = ordered(*pair, loads={1: replace(full, held_s=60.0), 2: replace(full, held_s=2.0)})
    assert first(choices) == 2
    waits = {choice.candidate.offer.owner: choice.first_s for choice in choices}
    # Two must end before it starts, one of the two slots at a time.
    assert waits[node(1)] - waits[node(2)] == pytest.approx(60.0 - 2.0)
    idle = Load(1, queue_max=8, held_s=60.0)
    assert first(ordered(*pair, loads={1: idle, 2: full})) == 1, "a free slot is not waited for"


def test_own_requests_since_the_sample_count() -> None:
    scheduler = Scheduler(ExpectedTimePolicy(), SchedulerConfig(), Random(7))
    pair = (candidate(1, slots=1), candidate(2, slots=1))
    loads = {1: Load(0, age_s=1.0), 2: Load(0, age_s=1.0)}
    token = scheduler.in_flight.begin(key(1), 99.5)
    choices = ordered(*pair, loads=loads, scheduler=scheduler)
    assert first(choices) == 2
    assert choices[1].last_resort, "its only slot is ours"
    scheduler.in_flight.finish(token, 99.8)
    assert not any(one.last_resort for one in ordered(*pair, loads=loads, scheduler=scheduler))


def test_own_requests_that_the_sample_saw_and_that_ended_are_taken_off() -> None:
    counts = InFlight()
    seen, unseen = counts.begin(key(1), 10.0), counts.begin(key(1), 20.0)
    assert (counts.count(key(1)), counts.since(key(1), 15.0)) == (2, 1)
    counts.finish(seen, 21.0)
    assert counts.since(key(1), 15.0) == 0
    counts.finish(unseen, 22.0)
    assert (counts.count(key(1)), counts.since(key(1), 15.0)) == (0, -1)
    assert counts.since(key(1), 30.0) == 0
    with pytest.raises(KeyError):
        counts.finish(seen, 23.0)


def test_a_lower_class_is_for_when_the_higher_ones_are_full_or_failing() -> None:
    exact, general = candidate(1, slots=1), candidate(2, decode=500.0, match=Match.GENERAL)
    loads = {1: Load(0), 2: Load(0)}
    assert first(ordered(exact, general, loads=loads)) == 1, "however much faster the other is"
    loads[1] = Load(1, queue_max=4)
    assert first(ordered(exact, general, loads=loads)) == 1, "it still takes work"
    loads[1] = Load(1)
    choices = ordered(exact, general, loads=loads)
    assert first(choices) == 2
    assert (choices[1].candidate, choices[1].last_resort) == (exact, True)
    loads[2] = Load(2)
    assert first(ordered(exact, general, loads=loads)) == 1, "all full: the best class again"


def test_failures_push_back_and_are_forgotten() -> None:
    scheduler = Scheduler(ExpectedTimePolicy(), SchedulerConfig(), Random(7))
    exact, general = candidate(1), candidate(2, match=Match.GENERAL)
    for _ in range(3):
        scheduler.health.failed(key(1), 100.0)
    choices = ordered(exact, general, scheduler=scheduler)
    assert first(choices) == 2
    assert "3.0 recent failures" in choices[1].reason
    assert first(ordered(exact, general, scheduler=scheduler, now_s=200.0)) == 1


def test_health_decays_and_success_forgives() -> None:
    health = PeerHealth(SchedulerConfig(failure_memory_s=10.0))
    assert health.score(key(1), 0.0) == 0.0
    health.failed(key(1), 0.0)
    assert health.score(key(1), 10.0) == pytest.approx(0.3679, abs=1e-3)
    health.failed(key(1), 10.0)
    assert health.score(key(1), 10.0) == pytest.approx(1.3679, abs=1e-3)
    for _ in range(10):
        health.succeeded(key(1), 10.0)
    assert health.score(key(1), 10.0) == 0.0


def test_one_failure_outweighs_a_small_gain() -> None:
    scheduler = Scheduler(ExpectedTimePolicy(), SchedulerConfig(), Random(7))
    scheduler.health.failed(key(1), 100.0)
    pair = (candidate(1, decode=30.0), candidate(2, decode=20.0))
    assert first(ordered(*pair, scheduler=scheduler, loads={1: Load(0), 2: Load(0)})) == 2


def test_this_node_wins_over_an_equal_peer_and_a_near_peer_over_a_far_one() -> None:
    loads = {1: Load(0), 2: Load(0)}
    assert first(ordered(candidate(1), candidate(2, local=True), loads=loads)) == 2
    links = {node(1): 0.5, node(2): 0.01}
    assert first(ordered(candidate(1), candidate(2), loads=loads, round_trips=links)) == 2


def test_a_batch_shares_the_rate_that_was_measured_for_it() -> None:
    rates = Rates(1000.0, 20.0, {1: 20.0, 4: 40.0})
    one = candidate(1, slots=4)
    batched = one._replace(offer=replace(one.offer, rates=rates))
    busy = ordered(batched, loads={1: Load(3)}, demand=Demand(0, 100))
    idle = ordered(batched, loads={1: Load(0)}, demand=Demand(0, 100))
    assert idle[0].total_s == pytest.approx(0.005 + 100 / 20)
    assert busy[0].total_s == pytest.approx(0.005 + 100 / 10)


def test_what_has_no_tokens_or_was_never_measured_has_a_finite_cost() -> None:
    calculator = candidate(1, decode=0.0)
    unmeasured = candidate(2)._replace(offer=replace(candidate(2).offer, rates=Rates()))
    choices = ordered(calculator, unmeasured)
    assert first(choices) == 1
    assert 0.0 < choices[0].total_s < choices[1].total_s < 60.0


def test_equals_share_the_work_and_stale_load_spreads_it() -> None:
    def firsts(age_s: float) -> int:
        scheduler = Scheduler(ExpectedTimePolicy(), SchedulerConfig(), Random(7))
        pair = (candidate(1, decode=20.0), candidate(2, decode=22.0))
        loads = {1: Load(0, age_s=age_s), 2: Load(0, age_s=age_s)}
        return sum(first(ordered(*pair, loads=loads, scheduler=scheduler)) == 1 for _ in range(200))

    assert firsts(0.0) == 0, "what is known is used"
    assert 40 <= firsts(60.0) <= 100, "what is not known spreads"


def test_the_reason_says_what_was_expected_and_how_old_it_is() -> None:
    reason = ordered(candidate(1), loads={1: Load(1, age_s=0.4)})[0].reason
    assert "expected_time: expected" in reason
    assert "1 of 2 slots taken, known 0.4 s ago" in reason
    assert "exact match; 20 tok/s decode" in reason


@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.tuples(st.sampled_from(Match), st.integers(0, 4), st.floats(0, 60)), max_size=8),
    st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_every_policy_returns_each_candidate_once_and_the_same_for_the_same_seed(
    policy: str, places: list[tuple[Match, int, float]], seed: int
) -> None:
    candidates = [candidate(n, match=match) for n, (match, _, _) in enumerate(places)]
    loads = {n: Load(busy, age_s=age) for n, (_, busy, age) in enumerate(places)}

    def run() -> tuple[Choice, ...]:
        scheduler = Scheduler(POLICIES[policy], SchedulerConfig(), Random(seed))
        return ordered(*candidates, loads=loads, scheduler=scheduler)

    choices = run()
    assert run() == choices
    assert sorted(one.candidate.offer.owner for one in choices) == sorted(
        one.offer.owner for one in candidates
    )
    hopeful = [one.candidate.priority for one in choices if not one.last_resort]
    assert hopeful == sorted(hopeful)
    assert [one.last_resort for one in choices] == sorted(one.last_resort for one in choices)


def test_weighted_follows_the_weights() -> None:
    views = [View(candidate(1, decode=30.0), None), View(candidate(2, decode=10.0), None)]
    rng = Random(7)
    orders = [POLICIES["weighted"].order(views, Demand(), rng) for _ in range(1000)]
    heavy = sum(order[0].view is views[0] for order in orders)
    assert 700 <= heavy <= 800


def test_two_choices_and_load_aware_prefer_the_less_utilised() -> None:
    busy, idle = View(candidate(1), Load(2, queue_max=1)), View(candidate(2), Load(0))
    for name in ("p2c", "load_aware"):
        assert [one.view for one in POLICIES[name].order([busy, idle], Demand(), Random(7))] == [
            idle,
            busy,
        ]


@pytest.mark.parametrize("refresh_s", [0.5, 5.0, 30.0])
def test_stale_load_does_not_make_a_herd(refresh_s: float) -> None:
    """With eight entry points and at every staleness: better than random with two retries."""

    def lost(policy: Policy, attempts: int, *, gossip: bool) -> float:
        shares = (
            lost_share(Setting(policy, attempts, refresh_s, seed, gossip=gossip)) for seed in (1, 2)
        )
        return sum(shares) / 2

    baseline = lost(POLICIES["random"], 3, gossip=False)
    assert lost(POLICIES["expected_time"], 2, gossip=True) < baseline
    assert 0.04 < baseline < 0.2, "the setting is loaded, and not hopeless"


def warm_order(
    *candidates: Candidate, warm: Mapping[int, int], loads: Mapping[int, Load], prompt_tokens: int
) -> tuple[Choice, ...]:
    """In order, with so many tokens of the prompt warm at each."""
    there = {node(number): HeadStart(count) for number, count in warm.items()}
    return started_order(*candidates, there=there, loads=loads, prompt_tokens=prompt_tokens)


def started_order(
    *candidates: Candidate,
    there: Mapping[NodeId, HeadStart],
    loads: Mapping[int, Load],
    prompt_tokens: int,
) -> tuple[Choice, ...]:
    """In order, with such a beginning at each."""
    known = {key(number): load for number, load in loads.items()}
    return Scheduler(ExpectedTimePolicy(), SchedulerConfig(), Random(7)).order(
        candidates,
        Demand(prompt_tokens, 50),
        known.get,
        {}.get,
        100.0,
        lambda candidate: there.get(candidate.offer.owner, NO_HEAD_START),
    )


def test_an_idle_peer_that_can_fetch_the_beginning_goes_before_a_warm_one_that_is_waited_for() -> (
    None
):
    pair = (candidate(1), candidate(2))
    busy = {1: Load(2, queued=0, queue_max=8, held_s=20.0), 2: Load(0, queue_max=8)}
    there = {node(1): HeadStart(9_500), node(2): HeadStart(0, 9_500, 1.5)}
    choices = started_order(*pair, there=there, loads=busy, prompt_tokens=10_000)
    assert first(choices) == 2
    assert choices[0].first_s == pytest.approx(0.005 + 1.5 + 500 / 200)
    assert "could fetch 9500 in 1.50 s" in choices[0].reason
    idle = {1: Load(0, queue_max=8), 2: Load(0, queue_max=8)}
    assert first(started_order(*pair, there=there, loads=idle, prompt_tokens=10_000)) == 1


def test_a_beginning_that_is_sooner_computed_than_fetched_is_computed() -> None:
    there = {node(1): HeadStart(0, 400, 5.0)}
    [choice] = started_order(candidate(1), there=there, loads={1: Load(0)}, prompt_tokens=500)
    assert choice.first_s == pytest.approx(0.005 + 500 / 200)


def test_what_is_warm_is_not_computed_again() -> None:
    [choice] = warm_order(candidate(1), warm={1: 950}, loads={1: Load(0)}, prompt_tokens=1000)
    assert choice.first_s == pytest.approx(0.005 + 50 / 200)
    assert "; warm: 950 tokens" in choice.reason


def test_a_model_that_nobody_has_measured_is_not_taken_for_a_calculator() -> None:
    offer_of = replace(candidate(1).offer, rates=None, fields={"family": "Somebody's"})
    model = candidate(1)._replace(offer=offer_of)
    calculator = model._replace(offer=replace(offer_of, fields={}))
    demand, config = Demand(100, 200), SchedulerConfig()
    [choice] = ordered(model, demand=demand)
    generating_s = 200 / config.default_decode_tokens_per_s
    assert choice.first_s == pytest.approx(0.005 + 100 / config.default_prefill_tokens_per_s)
    assert choice.total_s == pytest.approx(choice.first_s + generating_s)
    [choice] = ordered(calculator, demand=demand)
    assert choice.total_s == pytest.approx(0.005 + config.default_service_s)


def test_those_ahead_are_not_quicker_because_this_one_is_warm() -> None:
    full = candidate(1, slots=1)
    busy = {1: Load(1, queue_max=8)}
    [cold_choice] = warm_order(full, warm={}, loads=busy, prompt_tokens=1000)
    [warm_choice] = warm_order(full, warm={1: 950}, loads=busy, prompt_tokens=1000)
    assert cold_choice.first_s - warm_choice.first_s == pytest.approx(950 / 200), "its own prefill"


def test_more_that_is_warm_than_the_prompt_has_costs_nothing_less_than_nothing() -> None:
    [choice] = warm_order(candidate(1), warm={1: 5000}, loads={1: Load(0)}, prompt_tokens=1000)
    assert choice.first_s == pytest.approx(0.005)


@settings(max_examples=100, deadline=None)
@given(
    warm=st.integers(1, 4000),
    extra=st.integers(0, 4000),
    busy=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    queued=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_a_warm_peer_is_preferred_unless_its_queue_costs_more_than_the_prefill_it_saves(
    warm: int, extra: int, busy: tuple[int, int], queued: tuple[int, int]
) -> None:
    slots, queue_max, prompt = 4, 8, warm + extra
    pair = (candidate(1, slots=slots), candidate(2, slots=slots))
    loads = {
        number: Load(
            running, queued=waiting if running == slots else 0, queue_max=queue_max, age_s=0.0
        )
        for number, running, waiting in zip((1, 2), busy, queued, strict=True)
    }
    choices = warm_order(*pair, warm={1: warm}, loads=loads, prompt_tokens=prompt)
    cost = {
        int.from_bytes(choice.candidate.offer.owner, "big"): choice.first_s + choice.total_s
        for choice in choices
    }
    assert first(choices) == min(cost, key=lambda number: (cost[number], number != first(choices)))
    if (loads[1].busy, loads[1].queued) <= (loads[2].busy, loads[2].queued):
        assert first(choices) == 1, "no worse a queue, and less to compute"


def test_a_full_peer_is_not_asked_first_however_warm_it_is() -> None:
    pair = (candidate(1, slots=1), candidate(2, decode=5.0, slots=1))
    loads = {1: Load(1), 2: Load(0)}
    choices = warm_order(*pair, warm={1: 100_000}, loads=loads, prompt_tokens=100_000)
    assert first(choices) == 2
    assert choices[1].last_resort


def cold(number: int, load_s: float, *, decode: float = 20.0) -> Candidate:
    """A model that must be loaded first."""
    one = candidate(number, decode=decode)
    assert one.offer.rates is not None
    rates = replace(one.offer.rates, load_s=load_s)
    fields = {**one.offer.fields, "resident": False}
    return one._replace(offer=replace(one.offer, rates=rates, fields=fields))


def test_a_model_that_must_be_loaded_first_waits_behind_a_slower_one_that_is_there() -> None:
    idle = {1: Load(0), 2: Load(0)}
    choices = ordered(cold(1, 30.0, decode=60.0), candidate(2, decode=10.0), loads=idle)
    assert first(choices) == 2
    assert choices[1].first_s == pytest.approx(30.0 + 0.005 + 64 / 600)
    quick = ordered(cold(1, 1.0, decode=60.0), candidate(2, decode=10.0), loads=idle)
    assert first(quick) == 1


def test_a_resident_model_is_not_charged_for_its_load() -> None:
    one = cold(1, 30.0)
    there = one._replace(offer=replace(one.offer, fields={**one.offer.fields, "resident": True}))
    assert ordered(there, loads={1: Load(0)})[0].first_s < 1.0


def test_nothing_is_warm_where_the_model_is_not_in_memory() -> None:
    [choice] = warm_order(cold(1, 5.0), warm={1: 950}, loads={1: Load(0)}, prompt_tokens=1000)
    assert choice.first_s == pytest.approx(5.0 + 0.005 + 1000 / 200)
    assert "warm" not in choice.reason
