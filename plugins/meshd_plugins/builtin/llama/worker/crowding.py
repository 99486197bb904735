"""As many threads as there are processors for them, at every moment.

ggml's threads meet some hundred times for each token, and whoever is there first waits by turning in a loop:
falling asleep and being woken costs more than the work between (a token of a small model took 72 ms instead of
13 on two virtual processors). But when another process takes the processor of one of them, all the others turn
while it waits to go on, and a token takes seconds. So the threads turn, and there are fewer of them while others
compute: one thread more than there are processors is what hurts, one less only costs its share.

Crowded is a worker whose threads got less processor time than they were there for. It is not any more when
processors stand idle beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

LOOK_S: Final = 0.25  # of computing, between looks at what the threads got
IDLE_LOOK_S: Final = 1.0  # between looks at whether there is room for one more
CROWDED_SHARE: Final = 0.75  # of a thread's time on a processor; below it there are too many
ROOM_CORES: Final = 0.8  # idle beside us: one more thread has a processor


def fewer(threads: int, share: float) -> int:
    """How many threads there should be when each of them got this share of a processor."""
    if share >= CROWDED_SHARE or threads == 1:
        return threads
    return max(1, min(threads - 1, round(threads * share)))


class Threads:
    """Told about each step; changes the number of threads between steps."""

    def __init__(
        self,
        most: int,
        change: Callable[[int], None],
        idle: Callable[[], float] | None = None,
    ) -> None:
        """At most `most`; `change` sets them, `idle` tells processor seconds that stood idle so far."""
        self.now = self._most = most
        self._change = change
        self._idle = idle or idle_s
        self._wall_s = self._used_s = 0.0
        self._looked_s = 0.0
        self._idle_s = 0.0
        self._left = 0  # threads that something else in this process has

    def leave(self, threads: int) -> None:
        """Leave so many to something else in this process, until it is called with 0."""
        if threads == self._left:
            return
        self._left = threads
        wanted = max(1, self._most - threads)
        if wanted != self.now:
            self._set(wanted)

    def stepped(self, now_s: float, wall_s: float, used_s: float) -> None:
        """A step ended `now_s`, took `wall_s` and as much processor time as `used_s`."""
        if self._left:  # what the process used says nothing of these threads
            return
        self._wall_s += wall_s
        self._used_s += used_s
        if self._wall_s >= LOOK_S:
            wanted = fewer(self.now, self._used_s / (self._wall_s * self.now))
            self._wall_s = self._used_s = 0.0
            if wanted < self.now:
                self._set(wanted)
                self._looked_s, self._idle_s = now_s, self._idle()
        if self.now < self._most and now_s - self._looked_s >= IDLE_LOOK_S:
            idle_s = self._idle()
            if (idle_s - self._idle_s) / (now_s - self._looked_s) >= ROOM_CORES:
                self._set(self.now + 1)
            self._looked_s, self._idle_s = now_s, idle_s

    def _set(self, threads: int) -> None:
        self.now = threads
        self._change(threads)
        self._wall_s = self._used_s = 0.0


class Stopwatch:
    """Wall and processor time of one step of this process."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._used_s = time.process_time()

    def read(self) -> tuple[float, float, float]:
        """Now, and how long it took, and how much processor time, in seconds."""
        now_s = time.monotonic()
        return now_s, now_s - self._began_s, time.process_time() - self._used_s


def idle_s() -> float:
    """Processor seconds that all processors together stood idle since the machine started; 0.0: not told."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return (int(first[4]) + int(first[5])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
