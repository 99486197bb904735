"""Lifeguard's arithmetic, and the timers under it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.unit.support_core import claim, node_id

from meshd.core.config import PRESETS, GossipConfig, lan
from meshd.core.membership import MemberState, Update
from meshd.core.suspicion import LocalHealth, Size, Suspicions, suspicion_timeout_s
from meshd.core.timers import Timers

NO_FLOOR = replace(lan(), death_floor_s=0.0)


def test_timeout_shrinks_from_tmax_to_tmin_as_confirmations_arrive() -> None:
    least_s = NO_FLOOR.suspicion_multiplier * 2 * NO_FLOOR.probe_deadline_s  # log10 100 = 2
    times_s = [suspicion_timeout_s(NO_FLOOR, Size(100, 99), count, 1) for count in range(5)]
    assert times_s[0] == pytest.approx(NO_FLOOR.suspicion_max_multiplier * least_s)
    assert times_s[1] == pytest.approx(6 * least_s - 5 * least_s * math.log(2) / math.log(4))
    assert times_s[3] == times_s[4] == pytest.approx(least_s)
    assert times_s == sorted(times_s, reverse=True)


def test_nobody_to_confirm_means_tmin() -> None:
    assert suspicion_timeout_s(NO_FLOOR, Size(2, 1), 0, 1) == pytest.approx(3.0)


def test_ill_health_stretches_the_timeout() -> None:
    well_s = suspicion_timeout_s(NO_FLOOR, Size(10, 9), 0, 1)
    assert suspicion_timeout_s(NO_FLOOR, Size(10, 9), 0, 2) == pytest.approx(2 * well_s)
    most = NO_FLOOR.suspicion_health_max + 1
    assert suspicion_timeout_s(NO_FLOOR, Size(10, 9), 0, 9) == pytest.approx(most * well_s)


def test_where_few_are_left_to_confirm_few_confirmations_are_enough() -> None:
    all_s = suspicion_timeout_s(NO_FLOOR, Size(6, 3), 2, 1)
    assert all_s == pytest.approx(3.0)  # half of six are gone: the other two confirmed
    assert all_s < suspicion_timeout_s(NO_FLOOR, Size(6, 5), 2, 1)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_no_preset_lets_a_suspect_die_before_the_floor(preset: str) -> None:
    config = PRESETS[preset]()
    for nodes in (2, 3, 10, 100):
        for confirmations in range(6):
            timeout_s = suspicion_timeout_s(config, Size(nodes, nodes - 1), confirmations, 1)
            assert timeout_s >= config.death_floor_s


def test_local_health_stays_in_its_range() -> None:
    health = LocalHealth(8)
    health.better()
    assert health.factor == 1
    health.worse(20)
    assert health.factor == 9


def _running(config: GossipConfig) -> tuple[Suspicions, Timers, list[Update]]:
    timers, died = Timers(), list[Update]()
    suspicions = Suspicions(config, timers, died.append)
    suspicions.start(claim(1, MemberState.SUSPECT, 7), Size(10, 9), 1, 0.0)
    return suspicions, timers, died


def _fire(timers: Timers, now_s: float) -> None:
    while (call := timers.pop_due(now_s)) is not None:
        call()


def test_a_suspicion_that_runs_out_gives_back_what_was_suspected() -> None:
    _, timers, died = _running(lan())
    _fire(timers, 17.9)
    assert died == []
    _fire(timers, 18.0)
    assert [(one.node, one.incarnation) for one in died] == [(node_id(1), 7)]


def test_confirmations_bring_death_forward_but_not_before_the_floor() -> None:
    suspicions, timers, died = _running(lan())
    suspicions.confirm(node_id(1), Size(10, 9), 3, 1.0)
    _fire(timers, 5.9)
    assert died == []
    _fire(timers, 6.0)
    assert len(died) == 1


def test_evidence_hastens_and_never_delays() -> None:
    suspicions, timers, died = _running(lan())
    suspicions.hasten(node_id(1), 0.5, 1.0)
    suspicions.hasten(node_id(1), 0.5, 1.4)
    _fire(timers, 1.5)
    assert len(died) == 1


def test_a_refuted_suspicion_kills_nobody() -> None:
    suspicions, timers, died = _running(lan())
    suspicions.stop(node_id(1))
    _fire(timers, 1e9)
    assert died == []
    assert len(timers) == 0
