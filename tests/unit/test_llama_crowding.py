"""How many threads a worker has while others compute beside it."""

import pytest

from meshd_plugins.builtin.llama.worker.crowding import Threads, fewer, idle_s

STEP_S = 0.05


class Machine:
    """Processors, some of them taken by others; threads beyond them wait for each other."""

    def __init__(self, cores: float, threads: int) -> None:
        self.cores = cores
        self.taken = 0.0
        self.now_s = 100.0
        self.idle_s = 0.0
        self.threads = Threads(threads, self.change, lambda: self.idle_s)
        self.changes: list[int] = []

    def change(self, threads: int) -> None:
        self.changes.append(threads)

    def compute(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            running = min(self.threads.now, max(self.cores - self.taken, 0.5))
            self.now_s += STEP_S
            self.idle_s += STEP_S * max(self.cores - self.taken - running, 0.0)
            self.threads.stepped(self.now_s, STEP_S, STEP_S * running)


def test_alone_it_keeps_all_threads() -> None:
    machine = Machine(4, 4)
    machine.compute(10)
    assert machine.changes == []


@pytest.mark.parametrize(("cores", "taken", "left"), [(2, 1, 1), (4, 2, 2), (4, 3.9, 1), (8, 4, 4)])
def test_it_leaves_the_processors_that_others_use(cores: int, taken: float, left: int) -> None:
    machine = Machine(cores, cores)
    machine.taken = taken
    machine.compute(5)
    assert machine.threads.now == left
    assert len(machine.changes) <= 3, "it does not swing"


def test_it_takes_them_back_when_they_are_idle() -> None:
    machine = Machine(4, 4)
    machine.taken = 3
    machine.compute(3)
    machine.taken = 0
    machine.compute(6)
    assert machine.threads.now == 4


def test_a_daemon_beside_it_that_uses_little_changes_nothing() -> None:
    machine = Machine(2, 2)
    machine.taken = 0.3
    machine.compute(10)
    assert machine.changes == []


@pytest.mark.parametrize("threads", range(1, 17))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.74, 0.75, 1.0])
def test_fewer_is_fewer_and_at_least_one(threads: int, share: float) -> None:
    found = fewer(threads, share)
    assert 1 <= found <= threads
    assert (found < threads) == (share < 0.75 and threads > 1)


def test_this_machine_tells_its_idle_time() -> None:
    assert idle_s() > 0.0


def test_it_leaves_threads_to_something_else_in_its_process_and_takes_them_back() -> None:
    machine = Machine(4, 4)
    machine.threads.leave(3)
    assert machine.threads.now == 1
    machine.compute(5)  # processors that stand idle meanwhile are not for it
    assert machine.threads.now == 1
    machine.threads.leave(0)
    assert machine.threads.now == 4
    machine.threads.leave(9)
    assert machine.threads.now == 1, "one is always left"
