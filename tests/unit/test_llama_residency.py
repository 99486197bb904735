"""Which models make room for another one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.builtin.llama.running.fit import GIB, Need, Room
from meshd_plugins.builtin.llama.running.residency import NoRoom, Seat, choose_evictions

NOW_S = 1000.0
MIN_S = 30.0


def seat(key: str, used_s: float, **changes: float | bool) -> Seat:
    usual: dict[str, int | float | bool] = {
        "host_bytes": GIB,
        "device_bytes": 0,
        "since_s": 0.0,
        "open_calls": 0,
        "pinned": False,
    }
    return Seat(key=key, label=key, used_s=used_s, **{**usual, **changes})  # type: ignore[arg-type]


def test_the_longest_unused_goes_and_no_more_than_needed() -> None:
    seats = [seat("new", 900.0), seat("old", 100.0), seat("older", 50.0)]
    gone = choose_evictions(Need(2 * GIB, 0, 0), Room(GIB // 2), seats, NOW_S, MIN_S)
    assert [each.key for each in gone] == ["older", "old"]
    assert choose_evictions(Need(GIB, 0, 0), Room(GIB), seats, NOW_S, MIN_S) == ()


def test_what_must_not_go_is_named_and_nothing_goes_in_vain() -> None:
    seats = [
        seat("idle", 1.0),
        seat("busy", 2.0, open_calls=1),
        seat("kept", 3.0, pinned=True),
        seat("fresh", 4.0, since_s=NOW_S - 5),
    ]
    with pytest.raises(NoRoom) as refused:
        choose_evictions(Need(3 * GIB, 0, 0), Room(GIB), seats, NOW_S, MIN_S)
    assert str(refused.value) == (
        "no memory for it now: it needs 3.00 GiB, and 1.00 GiB of that cannot be had: busy is in use, "
        "kept is to stay loaded, fresh was loaded 5 s ago"
    )


def test_room_on_the_gpu_is_made_by_those_that_take_it() -> None:
    seats = [seat("host", 1.0), seat("gpu", 2.0, device_bytes=GIB)]
    need = Need(2 * GIB, 0, 0, device=2 * GIB)
    gone = choose_evictions(need, Room(8 * GIB, GIB), seats, NOW_S, MIN_S)
    assert [each.key for each in gone] == ["gpu"]


seats_drawn = st.lists(
    st.builds(
        Seat,
        key=st.uuids().map(str),
        label=st.just("m"),
        host_bytes=st.integers(0, 10),
        device_bytes=st.integers(0, 10),
        since_s=st.floats(0, NOW_S),
        used_s=st.floats(0, NOW_S),
        open_calls=st.integers(0, 2),
        pinned=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.key,
)
amounts = st.integers(0, 30)


@settings(max_examples=100, deadline=None)
@given(seats_drawn, amounts, amounts, amounts, amounts)
def test_there_is_room_afterwards_or_nothing_happens(
    seats: list[Seat], host: int, device: int, free: int, device_free: int
) -> None:
    need, room = Need(host + device, 0, 0, device=device), Room(free, device_free)
    movable = [
        each
        for each in seats
        if not each.pinned and not each.open_calls and NOW_S - each.since_s >= MIN_S
    ]
    all_host = free + sum(each.host_bytes for each in movable)
    all_device = device_free + sum(each.device_bytes for each in movable)
    try:
        gone = choose_evictions(need, room, seats, NOW_S, MIN_S)
    except NoRoom:
        assert all_host < host or all_device < device
        return
    assert all(each in movable for each in gone)
    assert free + sum(each.host_bytes for each in gone) >= host
    assert device_free + sum(each.device_bytes for each in gone) >= device
    if gone:
        assert host > free or device > device_free, "nothing goes when there is room"
