"""A small event-heap world of entry points that schedule on stale load, for comparing policies.

Four devices of 25 tokens/s with four slots and four of 12 tokens/s with two, no queue, Poisson arrivals
that are four times as many for 120 s of every 600 s. What finds no slot within its attempts is *lost*.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tests.unit.support_naming import offer

from meshd.core.scheduler import (
    Demand,
    Key,
    Load,
    Policy,
    Scheduler,
    SchedulerConfig,
    View,
)
from meshd_cms.types import NodeId
from meshd_naming import Candidate, Match

SIZES, SIZE_WEIGHTS = (50, 100, 200, 300, 500), (0.40, 0.28, 0.17, 0.10, 0.05)
RATES = (25.0, 25.0, 25.0, 25.0, 12.0, 12.0, 12.0, 12.0)
SLOTS = (4, 4, 4, 4, 2, 2, 2, 2)
ARRIVALS_PER_S = 0.8


@dataclass(frozen=True, slots=True)
class Setting:
    """One run."""

    policy: Policy
    attempts: int
    refresh_s: float  # mean time between two load samples of one device at one entry point
    seed: int
    duration_s: float = 3600.0
    entries: int = 8
    gossip: bool = True  # False: the policy sees the candidates and nothing else


class Door:
    """One entry point: its scheduler and what it believes."""

    def __init__(self, policy: Policy, rng: Random) -> None:
        self.scheduler = Scheduler(policy, SchedulerConfig(), rng)
        self.known: dict[Key, tuple[int, float]] = {}
        self.now_s = 0.0

    def load_of(self, key: Key) -> Load | None:
        known = self.known.get(key)
        return Load(known[0], age_s=self.now_s - known[1]) if known else None


def round_trip_of(_node: NodeId) -> float | None:
    return 0.002


class World:
    """Devices, doors and the heap."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.rng = Random(setting.seed)
        offers = [
            offer(number + 1, "knowledge.gpt/general", decode=rate, slots=slots)
            for number, (rate, slots) in enumerate(zip(RATES, SLOTS, strict=True))
        ]
        self.candidates = [Candidate(one, Match.EXACT, 0, one.weight, 0.0, False) for one in offers]
        self.keys: list[Key] = [(one.owner, one.capability_id) for one in offers]
        self.busy = [0] * len(offers)
        self.doors = [
            Door(setting.policy, Random(setting.seed + 1 + number))
            for number in range(setting.entries)
        ]
        self.asked = self.lost = 0
        self._heap: list[tuple[float, int, str, int, int, int]] = []
        self._order = 0

    def run(self) -> float:
        """Share of requests lost."""
        setting = self.setting
        self._push(self.rng.expovariate(ARRIVALS_PER_S), "arrive")
        for door in range(setting.entries):
            for device in range(len(self.busy)):
                self._push(self.rng.random() * setting.refresh_s, "refresh", door, device)
        while self._heap:
            now_s, _, kind, door, device, token = heapq.heappop(self._heap)
            more = now_s < setting.duration_s
            if kind == "arrive":
                if more:
                    surge = 4.0 if now_s % 600.0 < 120.0 else 1.0
                    self._push(now_s + self.rng.expovariate(ARRIVALS_PER_S * surge), "arrive")
                self._arrive(now_s)
            elif kind == "refresh":
                self._learn(door, device, now_s)
                if more:
                    wait_s = self.rng.expovariate(1.0 / setting.refresh_s)
                    self._push(now_s + wait_s, "refresh", door, device)
            else:
                self.busy[device] -= 1
                self.doors[door].scheduler.in_flight.finish(token, now_s)
                self._learn(door, device, now_s)
        assert self.busy == [0] * len(self.busy)
        return self.lost / self.asked

    def _arrive(self, now_s: float) -> None:
        self.asked += 1
        number = self.rng.randrange(self.setting.entries)
        size = self.rng.choices(SIZES, SIZE_WEIGHTS)[0]
        door = self.doors[number]
        door.now_s = now_s
        for candidate in self._chosen(door, Demand(size, size))[: self.setting.attempts]:
            device = self.candidates.index(candidate)
            if self.busy[device] < SLOTS[device]:
                self.busy[device] += 1
                token = door.scheduler.in_flight.begin(self.keys[device], now_s)
                self._push(now_s + size / RATES[device], "end", number, device, token)
                return
            self._learn(number, device, now_s)  # a refusal carries the load
        self.lost += 1

    def _chosen(self, door: Door, demand: Demand) -> Sequence[Candidate]:
        if not self.setting.gossip:
            views = [View(one, None) for one in self.candidates]
            ordered = self.setting.policy.order(views, demand, self.rng)
            return [ranked.view.candidate for ranked in ordered]
        choices = door.scheduler.order(
            self.candidates, demand, door.load_of, round_trip_of, door.now_s
        )
        return [choice.candidate for choice in choices]

    def _learn(self, door: int, device: int, now_s: float) -> None:
        self.doors[door].known[self.keys[device]] = (self.busy[device], now_s)

    def _push(self, at_s: float, kind: str, door: int = 0, device: int = 0, token: int = 0) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at_s, self._order, kind, door, device, token))


def lost_share(setting: Setting) -> float:
    """Share of requests that found no slot."""
    return World(setting).run()
