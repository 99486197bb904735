"""Which models are loaded: room is made for the one that is asked for, at the cost of the idle ones.

What is true: models are loaded one at a time, so that the room which was found is still there when it is
used, and no measurement is spoilt by another load. A model with calls open, one that is to stay, and one
that came less than `residency_min_s` ago are never unloaded for another; of the others, the one that was
used longest ago goes first, and none goes unless that makes enough room (decision 0032).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from meshd_plugins.builtin.llama.config import Limits
from meshd_plugins.builtin.llama.running.fit import GIB, MIB, Need, Room
from meshd_plugins.builtin.llama.running.hardware import Machine

THRASH_WINDOW_S: Final = 600.0
THRASH_EVICTIONS: Final = 6
"""So many models unloaded for others within the window: the machine is too small for what is asked of it."""


class NoRoom(Exception):
    """A model cannot be loaded now. The message says what stands in the way. Nothing was unloaded."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A loaded model, as the choice sees it."""

    key: str
    label: str  # for people
    host_bytes: int
    device_bytes: int
    since_s: float
    used_s: float
    open_calls: int
    pinned: bool


class Occupant(Protocol):
    """A loaded model."""

    @property
    def seat(self) -> Seat:
        """What it takes, and how it is used."""
        ...

    @property
    def mapped_bytes(self) -> int:
        """Of its file in memory: counted by the system as available."""
        ...

    async def vacate(self) -> None:
        """Be unloaded; return when the memory is free."""
        ...


def choose_evictions(
    need: Need, room: Room, seats: Sequence[Seat], now_s: float, residency_min_s: float
) -> tuple[Seat, ...]:
    """Which models to unload, so that `need` fits, the longest unused first. Raises NoRoom."""
    host, device = need.host - room.host_bytes, need.device - room.device_bytes
    chosen: list[Seat] = []
    in_the_way: list[str] = []
    for seat in sorted(seats, key=lambda each: (each.used_s, each.key)):
        age_s = now_s - seat.since_s
        if seat.pinned:
            in_the_way.append(f"{seat.label} is to stay loaded")
        elif seat.open_calls:
            in_the_way.append(f"{seat.label} is in use")
        elif age_s < residency_min_s:
            in_the_way.append(f"{seat.label} was loaded {age_s:.0f} s ago")
        elif (host > 0 and seat.host_bytes) or (device > 0 and seat.device_bytes):
            chosen.append(seat)
            host -= seat.host_bytes
            device -= seat.device_bytes
    if host <= 0 and device <= 0:
        return tuple(chosen)
    short, where = (host, "") if host > 0 else (device, " on the GPU")
    others = f": {', '.join(in_the_way)}" if in_the_way else ""
    raise NoRoom(
        f"no memory for it now: it needs {need.total / GIB:.2f} GiB, and {max(short, MIB) / GIB:.2f} GiB"
        f"{where} of that cannot be had{others}"
    )


class Residency:
    """Who is loaded on this device. Used from one trio run.

    Args:
        machine: whose memory it is.
        limits: what the node may take of it.
        clock: monotonic seconds.
    """

    def __init__(self, machine: Machine, limits: Limits, clock: Callable[[], float]) -> None:
        self._machine = machine
        self._limits = limits
        self._clock = clock
        self._occupants: dict[str, Occupant] = {}
        self._evicted_s: deque[float] = deque(maxlen=THRASH_EVICTIONS)
        self._changed = trio.Event()
        self.turn = trio.Lock()
        """Held by who loads, from finding the room to being seated."""

    def whole(self) -> Room:
        """What there would be if nothing was loaded and nobody else took anything."""
        memory = self._machine.memory()
        free = memory.total - self._reserve(memory.reserve)
        allowed = self._capped(free, 0)
        return Room(allowed, limit="plugins.llama.memory_mib_max" if allowed < free else "")

    def empty_devices(self, free_bytes: int) -> int:
        """What would be free on GPUs of which so much is free now, if nothing was loaded."""
        return free_bytes + self._on_devices() if free_bytes else 0

    def _on_devices(self) -> int:
        return sum(each.seat.device_bytes for each in self._occupants.values())

    def room(self, device_bytes: int = 0) -> Room:
        """What there is now; `device_bytes` would be free on GPUs if nothing was loaded."""
        memory = self._machine.memory()
        mapped = sum(each.mapped_bytes for each in self._occupants.values())
        taken = sum(each.seat.host_bytes for each in self._occupants.values())
        free = memory.available - mapped - self._reserve(memory.reserve)
        # 1: there is a GPU, and nothing is left on it.
        left = max(device_bytes - self._on_devices(), 1) if device_bytes else 0
        return Room(max(self._capped(free, taken), 0), left)

    def evictions(self, need: Need, room: Room) -> tuple[Seat, ...]:
        """What `make_room` would unload. Raises NoRoom."""
        seats = [each.seat for each in self._occupants.values()]
        return choose_evictions(need, room, seats, self._clock(), self._limits.residency_min_s)

    async def make_room(self, need: Need, room: Room) -> tuple[Seat, ...]:
        """Unload what must go, and return that. The caller has the turn. Raises NoRoom."""
        victims = self.evictions(need, room)
        for seat in victims:
            self._evicted_s.append(self._clock())
            await self._occupants[seat.key].vacate()
        return victims

    def take(self, occupant: Occupant) -> None:
        """It is loaded."""
        self._occupants[occupant.seat.key] = occupant
        self.notify()

    def leave(self, key: str) -> None:
        """It is not loaded any more; no error when it was not."""
        self._occupants.pop(key, None)
        self.notify()

    def notify(self) -> None:
        """Something changed that may make room: a model went, or fell idle."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Return after the next change."""
        await self._changed.wait()

    def thrashes(self) -> bool:
        """Whether models are unloaded for one another again and again."""
        evicted_s = self._evicted_s
        full = len(evicted_s) == THRASH_EVICTIONS
        return full and self._clock() - evicted_s[0] <= THRASH_WINDOW_S

    def _reserve(self, usual: int) -> int:
        return self._limits.reserve_mib * MIB or usual

    def _capped(self, free: int, taken: int) -> int:
        limit = self._limits.memory_mib_max * MIB
        return min(free, limit - taken) if limit else free
