"""What happened lately, on a clock of the test's own."""

from __future__ import annotations

import trio.testing

from meshd.core.events import (
    AddressContested,
    MemberJoined,
    MemberUpdated,
    MeshJoined,
    SeedUnreachable,
    SelfEpochRaised,
)
from meshd.orchestrate.incidents import (
    MOVERS_MAX,
    SAMPLE_INTERVAL_S,
    WINDOW_S,
    Incidents,
    event_name,
)
from meshd_cms import Epoch, NodeId

ONE, TWO = NodeId(b"1" * 16), NodeId(b"2" * 16)
ADDRESS = ("192.0.2.1", 7946)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_after_the_start_everything_is_recent() -> None:
    clock = Clock()
    incidents = Incidents(lambda: {"stalls": 4}, clock)
    clock.now_s += 7
    assert (incidents.lately(), incidents.window_s) == ({"stalls": 4}, 7.0)


def test_what_was_counted_before_the_window_does_not_count() -> None:
    counted = {"stalls": 100}

    async def main() -> None:
        incidents = Incidents(lambda: dict(counted), trio.current_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incidents.run)
            await trio.sleep(WINDOW_S + SAMPLE_INTERVAL_S / 2)
            assert incidents.lately() == {"stalls": 0}
            counted["stalls"] = 103
            assert incidents.lately() == {"stalls": 3}
            assert WINDOW_S - SAMPLE_INTERVAL_S <= incidents.window_s <= WINDOW_S
            await trio.sleep(WINDOW_S)
            assert incidents.lately() == {"stalls": 0}
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_epochs_and_contested_addresses_are_forgotten_in_time() -> None:
    clock = Clock()
    incidents = Incidents(dict[str, int], clock)
    contested = AddressContested(ADDRESS, ONE, TWO)
    for event in (contested, contested, SelfEpochRaised(Epoch(7))):
        incidents.note(event)
    assert incidents.contested() == ((ADDRESS, ONE, TWO),)
    assert incidents.epochs_raised() == 1
    clock.now_s += WINDOW_S + 1
    assert incidents.contested() == ()
    assert incidents.epochs_raised() == 0


def test_a_seed_is_silent_until_it_answers() -> None:
    incidents = Incidents(dict[str, int], Clock())
    assert not incidents.is_silent(ADDRESS)
    incidents.note(SeedUnreachable(ADDRESS, 5))
    assert incidents.is_silent(ADDRESS)
    incidents.note(MeshJoined(ONE, ADDRESS))
    assert not incidents.is_silent(ADDRESS)


def test_events_have_a_name_in_the_log() -> None:
    assert event_name(SelfEpochRaised(Epoch(1))) == "self.epoch_raised"
    assert event_name(MeshJoined(ONE, ADDRESS)) == "mesh.joined"


def test_a_node_that_takes_two_addresses_in_turn_is_two() -> None:
    clock = Clock()
    incidents = Incidents(dict[str, int], clock)
    first, second, third = (("192.0.2.1", port) for port in (1, 2, 3))
    for address in (first, first, second, third):
        incidents.note(MemberUpdated(ONE, "pi", address))
        incidents.note(MemberJoined(TWO, "nano", first))
    assert incidents.doubles() == {}  # moved twice, and restarted in between
    incidents.note(MemberUpdated(ONE, "pi", second))
    assert incidents.doubles() == {ONE: (first, second, third)}
    clock.now_s += WINDOW_S + 1
    assert incidents.doubles() == {}


def test_nodes_that_move_are_bounded() -> None:
    incidents = Incidents(dict[str, int], Clock())
    for number in range(MOVERS_MAX + 10):
        node = NodeId(number.to_bytes(16, "big"))
        for port in (1, 2, 1):
            incidents.note(MemberUpdated(node, "x", ("192.0.2.1", port)))
    assert len(incidents.doubles()) == MOVERS_MAX
