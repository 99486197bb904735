"""Admission: bounded, fair, honest about deadlines; no ticket is lost."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshd.core.admission import (
    Admission,
    AdmissionConfig,
    Admitted,
    Queued,
    Refused,
    Ticket,
)


def ticket(caller: str = "a", deadline_s: float = 60.0, service_s: float = 0.0) -> Ticket:
    return Ticket("request", caller, deadline_s, service_s)


def admission(slots: int = 1, queue_max: int = 4) -> Admission:
    return Admission(AdmissionConfig(slots, queue_max))


def test_slots_then_queue_then_refusal() -> None:
    door = admission(slots=2, queue_max=1)
    first = ticket()
    assert isinstance(door.request(first, 0.0), Admitted)
    assert isinstance(door.request(ticket(), 0.0), Admitted)
    waiting = ticket()
    assert door.request(waiting, 0.0) == Queued(1, 0.0)
    refused = door.request(ticket(), 0.0)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.message) == ("busy", "2 run and 1 wait")
    assert door.load() == {"slots": 2, "busy": 2, "queued": 1, "queue_max": 1, "draining": 0}
    assert door.release(first, 1.0) == (waiting,)
    assert door.load()["queued"] == 0


def test_no_queue_means_refusal_at_once() -> None:
    door = admission(queue_max=0)
    door.request(ticket(), 0.0)
    assert isinstance(door.request(ticket(), 0.0), Refused)


def test_callers_take_turns() -> None:
    door = admission()
    running = ticket("greedy")
    door.request(running, 0.0)
    greedy = [ticket("greedy") for _ in range(3)]
    for one in greedy:
        door.request(one, 0.0)
    modest = ticket("modest")
    assert door.request(modest, 0.0) == Queued(2, 0.0), "one turn of the other comes first"
    order = list(door.release(running, 0.0))
    while started := door.release(order[-1], 0.0):
        order += started
    assert order == [greedy[0], modest, greedy[1], greedy[2]]


def test_what_cannot_be_done_in_time_is_refused_at_once() -> None:
    door = admission()
    late = door.request(ticket(deadline_s=1.0, service_s=2.0), 0.0)
    assert late == Refused("busy", "about 2.0 s needed, 1.0 s left")
    assert isinstance(door.request(ticket(deadline_s=0.0), 0.0), Refused), "already over"
    first = ticket()
    door.request(first, 0.0)
    door.release(first, 10.0)
    door.request(ticket(), 10.0)
    assert isinstance(door.request(ticket(deadline_s=15.0), 10.0), Refused), "10 s wait expected"
    assert door.request(ticket(deadline_s=25.0), 10.0) == Queued(1, 10.0)
    assert door.counters()["refused_deadline"] == 3


def test_a_long_request_does_not_close_an_idle_door() -> None:
    door = admission()
    first = ticket(deadline_s=1e9)
    door.request(first, 0.0)
    door.release(first, 3600.0)
    assert door.held_s(3600.0) == 3600.0
    assert isinstance(door.request(ticket(deadline_s=3601.0), 3600.0), Admitted)


def test_a_door_full_of_long_requests_says_so_before_one_has_ended() -> None:
    door = admission(slots=2)
    assert door.held_s(0.0) == 0.0
    short = ticket()
    door.request(short, 0.0)
    door.release(short, 1.0)
    assert door.held_s(5.0) == 1.0
    for began_s in (10.0, 20.0):
        door.request(ticket(deadline_s=1e9), began_s)
    assert door.held_s(20.0) == 5.0
    assert door.held_s(70.0) == 55.0
    assert isinstance(door.request(ticket(deadline_s=80.0), 70.0), Refused), "27.5 s expected"
    assert door.request(ticket(deadline_s=100.0), 70.0) == Queued(1, 27.5)


def test_where_the_queue_is_full_who_has_most_gives_way_to_who_has_least() -> None:
    door = admission(queue_max=3)
    greedy = [ticket("greedy") for _ in range(4)]
    for one in greedy:
        door.request(one, 0.0)
    assert isinstance(door.request(ticket("greedy"), 0.0), Refused)
    modest = ticket("modest")
    verdict = door.request(modest, 0.0)
    assert isinstance(verdict, Queued)
    assert verdict.gave_way is greedy[3]
    assert isinstance(door.request(ticket("modest"), 0.0), Refused), "two of three are no more"
    order: list[Ticket] = []
    running = greedy[0]
    while started := door.release(running, 1.0):
        [running] = started
        order.append(running)
    assert order == [greedy[1], modest, greedy[2]]
    assert door.counters()["gave_way"] == 1


def test_late_tickets_are_stepped_over_and_handed_back() -> None:
    door = admission()
    first, late, good = ticket(), ticket(deadline_s=5.0), ticket()
    for one in (first, late, good):
        door.request(one, 0.0)
    assert door.release(first, 6.0) == (good,)
    assert door.expire(6.0) == (late,)
    assert door.expire(6.0) == ()
    assert door.load()["queued"] == 0


def test_cancel_takes_out_what_waits_and_nothing_else() -> None:
    door = admission()
    first, second = ticket(), ticket()
    door.request(first, 0.0)
    door.request(second, 0.0)
    assert not door.cancel(first), "it runs"
    assert door.cancel(second)
    assert not door.cancel(second)
    assert door.release(first, 1.0) == ()


def test_draining_refuses_and_hands_back_what_waits() -> None:
    door = admission()
    first, second = ticket(), ticket()
    door.request(first, 0.0)
    door.request(second, 0.0)
    assert door.drain() == (second,)
    refused = door.request(ticket(), 0.0)
    assert isinstance(refused, Refused)
    assert refused.code == "draining"
    assert door.release(first, 1.0) == ()
    assert door.load() == {"slots": 1, "busy": 0, "queued": 0, "queue_max": 4, "draining": 1}


class DoorMachine(RuleBasedStateMachine):
    """Requests, releases, cancels, time and draining in any order, against a model of who is where."""

    def __init__(self) -> None:
        super().__init__()
        self.config = AdmissionConfig(slots=2, queue_max=3)
        self.door = Admission(self.config)
        self.now_s = 0.0
        self.running: list[Ticket] = []
        self.waiting: list[Ticket] = []
        self.made = self.done = 0
        self.drained = False

    @rule(
        caller=st.sampled_from("abc"),
        patience_s=st.floats(-1.0, 20.0),
        service_s=st.floats(0.0, 10.0),
    )
    def request(self, caller: str, patience_s: float, service_s: float) -> None:
        one = ticket(caller, self.now_s + patience_s, service_s)
        self.made += 1
        match self.door.request(one, self.now_s):
            case Admitted():
                self.running.append(one)
            case Queued(position, wait_s, gave_way):
                assert 1 <= position <= len(self.waiting) + 1
                assert self.now_s + wait_s + service_s <= one.deadline_s + 1e-9
                if gave_way is not None:
                    assert len(self.waiting) == self.config.queue_max
                    theirs = [each.caller for each in self.waiting]
                    assert theirs.count(gave_way.caller) >= theirs.count(caller) + 2
                    self.waiting.remove(gave_way)
                    self.done += 1
                self.waiting.append(one)
            case Refused(code):
                assert code == ("draining" if self.drained else "busy")
                self.done += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        one = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.done += 1
        for started in self.door.release(one, self.now_s):
            self.waiting.remove(started)
            self.running.append(started)
            assert started.deadline_s > self.now_s

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        assert self.door.cancel(one)
        self.done += 1

    @rule(seconds=st.floats(0.0, 10.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        for one in self.door.expire(self.now_s):
            self.waiting.remove(one)
            self.done += 1
        assert all(one.deadline_s > self.now_s for one in self.waiting)

    @rule(really=st.integers(0, 9))
    def drain(self, really: int) -> None:
        if really == 0:
            handed_back = self.door.drain()
            assert sorted(map(id, handed_back)) == sorted(map(id, self.waiting))
            self.done += len(self.waiting)
            self.waiting.clear()
            self.drained = True

    @invariant()
    def bounds_hold_and_nobody_is_lost(self) -> None:
        load = self.door.load()
        assert load["busy"] == len(self.running) <= self.config.slots
        assert load["queued"] == len(self.waiting) <= self.config.queue_max
        assert self.made == self.done + len(self.running) + len(self.waiting)

    @invariant()
    def no_slot_is_free_while_someone_in_time_waits(self) -> None:
        if len(self.running) < self.config.slots:
            assert all(one.deadline_s <= self.now_s for one in self.waiting)

    @invariant()
    def counters_add_up(self) -> None:
        counted = self.door.counters()
        assert counted["admitted"] - counted["released"] == len(self.running)


TestDoor = DoorMachine.TestCase
TestDoor.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
