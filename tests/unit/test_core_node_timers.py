"""The timer heap."""

from __future__ import annotations

import math

from meshd.core.timers import Timers


def _fired(timers: Timers, now_s: float) -> None:
    while (call := timers.pop_due(now_s)) is not None:
        call()


def test_timers_fire_in_order_of_time_then_of_creation() -> None:
    timers, seen = Timers(), list[str]()
    timers.at(2.0, lambda: seen.append("late"))
    timers.at(1.0, lambda: seen.append("first"))
    timers.at(1.0, lambda: seen.append("second"))
    _fired(timers, 1.0)
    assert seen == ["first", "second"]
    assert timers.deadline_s() == 2.0


def test_a_cancelled_timer_is_invisible() -> None:
    timers, seen = Timers(), list[str]()
    timer = timers.at(1.0, lambda: seen.append("x"))
    timer.cancel()
    timer.cancel()
    assert (timers.deadline_s(), len(timers)) == (math.inf, 0)
    _fired(timers, 9.0)
    assert seen == []


def test_dead_wood_is_dropped() -> None:
    timers = Timers()
    for _ in range(10_000):
        timers.at(1.0, lambda: None).cancel()
    assert len(timers) == 0
    assert len(timers._heap) < 200


def test_postponed_timers_keep_their_order_and_can_still_be_cancelled() -> None:
    timers, seen = Timers(), list[str]()
    timers.at(1.0, lambda: seen.append("first"))
    timers.at(1.0, lambda: seen.append("second"))
    third = timers.at(1.0, lambda: seen.append("third"))
    timers.postpone(5.0)
    third.cancel()
    _fired(timers, 5.9)
    assert seen == []
    _fired(timers, 6.0)
    assert seen == ["first", "second"]


def test_a_cleared_heap_fires_nothing_and_its_handles_are_harmless() -> None:
    timers, seen = Timers(), list[str]()
    timer = timers.at(1.0, lambda: seen.append("x"))
    timers.clear()
    timer.cancel()
    timers.at(2.0, lambda: seen.append("y"))
    _fired(timers, 9.0)
    assert seen == ["y"]
