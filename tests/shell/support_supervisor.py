"""Helpers for tests that run real worker processes."""

import sys
from pathlib import Path

import trio

from meshd_plugins.api import WorkerSpec

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


class RecordingLog:
    """A structlog stand-in that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, object]]] = []
        self._changed = trio.Event()

    def _add(self, level: str, event: str, fields: dict[str, object]) -> None:
        self.events.append((level, event, fields))
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for(self, event: str, **fields: object) -> None:
        """Return once that event was logged with (at least) those fields."""
        while not any(e == event and fields.items() <= f.items() for _, e, f in self.events):
            await self._changed.wait()

    def debug(self, event: str, **fields: object) -> None:
        self._add("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._add("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._add("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._add("error", event, fields)


def fake_worker(behaviour: str = "normal", **options: object) -> WorkerSpec:
    return WorkerSpec(
        name="fake",
        argv=(sys.executable, "-P", str(FAKE_WORKER), behaviour),
        **options,  # type: ignore[arg-type]
    )


def process_exists(pid: int) -> bool:
    """Whether it runs; a zombie counts as running: leaving one behind is a leak."""
    return Path(f"/proc/{pid}").exists()


def process_runs(pid: int) -> bool:
    """For processes that others must reap (orphans): a zombie no longer runs."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
