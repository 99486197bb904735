"""Tests that measure run alone; the others beside each other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.conftest import Gate

DEADLINE_S = 20.0


class Runner:
    """A test process: passes the gate when told to, and says what it did."""

    def __init__(self, folder: Path, told: queue.Queue[str], name: str) -> None:
        self._gate = Gate(folder)
        self._told = told
        self._name = name
        self._go: queue.Queue[bool | None] = queue.Queue()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def come(self, *, alone: bool = False) -> None:
        self._go.put(alone)

    def go(self) -> None:
        self._go.put(None)

    def _run(self) -> None:
        alone = self._go.get()
        assert alone is not None
        self._gate.enter(alone=alone)
        self._told.put(f"{self._name} in")
        assert self._go.get() is None
        self._told.put(f"{self._name} out")
        self._gate.leave()


@contextmanager
def runners(folder: Path, told: queue.Queue[str], names: str) -> Iterator[list[Runner]]:
    with ExitStack() as stack:
        made = [Runner(folder, told, name) for name in names]
        for each in made:
            stack.callback(each.thread.join, DEADLINE_S)
        yield made


def test_many_are_inside_at_once(tmp_path: Path) -> None:
    told: queue.Queue[str] = queue.Queue()
    with runners(tmp_path, told, "ab") as (a, b):
        a.come()
        b.come()
        assert {told.get(timeout=DEADLINE_S) for _ in range(2)} == {"a in", "b in"}
        a.go()
        b.go()


@pytest.mark.parametrize("alone", [False, True])
def test_who_is_alone_waits_for_all_and_lets_nobody_in(tmp_path: Path, alone: bool) -> None:
    told: queue.Queue[str] = queue.Queue()
    with runners(tmp_path, told, "amb") as (a, m, b):
        a.come()
        assert told.get(timeout=DEADLINE_S) == "a in"
        m.come(alone=True)
        a.go()
        assert told.get(timeout=DEADLINE_S) == "a out"
        assert told.get(timeout=DEADLINE_S) == "m in"
        b.come(alone=alone)
        m.go()
        assert told.get(timeout=DEADLINE_S) == "m out"
        assert told.get(timeout=DEADLINE_S) == "b in"
        b.go()


def test_who_stays_for_another_that_measures_passes_once(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.enter(alone=True)
    gate.enter(alone=True)
    gate.leave()
    gate.enter(alone=False)
    gate.leave()
