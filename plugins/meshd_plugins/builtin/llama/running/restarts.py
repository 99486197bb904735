"""When a worker that died is started again, and when its model is left out. Pure, told the time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
CRASHES_MAX: Final = 5
CRASH_WINDOW_S: Final = 120.0
HEALTHY_S: Final = 60.0  # after serving this long the backoff begins anew
QUARANTINE_FIRST_S: Final = 600.0
QUARANTINE_MAX_S: Final = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Waits:
    """What the waits begin with, in seconds; each is twice the one before, up to a most."""

    backoff_s: float = BACKOFF_FIRST_S
    quarantine_s: float = QUARANTINE_FIRST_S


class RestartPolicy:
    """How long to wait before the next start, and how long a quarantine lasts."""

    def __init__(self, waits: Waits | None = None) -> None:
        self._waits = waits or Waits()
        self._crashes_s: deque[float] = deque(maxlen=CRASHES_MAX)
        self._backoff_s = self._waits.backoff_s
        self._quarantine_s = self._waits.quarantine_s

    def crashed(self, now_s: float, served_s: float) -> float | None:
        """Return seconds to wait; None when it crashed too often to go on."""
        if served_s >= HEALTHY_S:
            self._backoff_s = self._waits.backoff_s
            self._quarantine_s = self._waits.quarantine_s
        self._crashes_s.append(now_s)
        if len(self._crashes_s) == CRASHES_MAX and now_s - self._crashes_s[0] <= CRASH_WINDOW_S:
            return None
        wait_s = self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
        return wait_s

    def asked(self) -> None:
        """Somebody asks for another try, having mended something: the next quarantine is a first one."""
        self._quarantine_s = self._waits.quarantine_s

    def quarantined(self) -> float:
        """Return seconds until it is tried again; each time twice as long. Crashes count from 0 then."""
        self._crashes_s.clear()
        self._backoff_s = self._waits.backoff_s
        wait_s = self._quarantine_s
        self._quarantine_s = min(2 * self._quarantine_s, QUARANTINE_MAX_S)
        return wait_s
