"""What left this node, what it did for others, and who was let in or shut out: never what was in it.

Lines are gathered and written together, at most `FLUSH_S` after they came, and at the stop of the daemon. So an
idle node writes nothing, a busy one writes once in a while, and a power cut loses what came in the last
`FLUSH_S` seconds and nothing else: what was written is on the disk.

A disk that refuses stops no request: what could not be kept is counted, and said as soon as it can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from meshd.orchestrate.audit_chain import Verdict
from meshd.orchestrate.audit_files import AuditFiles
from meshd_plugins.api import Logger, Value

FLUSH_S: Final = 3.0
"""Most seconds a line waits to be written; up: fewer writes, more lost at a power cut."""
WAITING_MAX: Final = 20_000
"""Lines that wait; more are lost, and counted."""
READ_MAX: Final = 1_000
"""Lines of one answer."""
TO_CLOUD: Final = "cloud"
FOLDER: Final = "audit"


class Recorder(Protocol):
    """Notes that something happened: `Audit.record`."""

    def __call__(self, kind: str, /, **fields: Value) -> None:
        """Note it. Never content: no prompt, no answer, no secret."""
        ...


def no_record(_kind: str, /, **_fields: Value) -> None:
    """Where there is no trail."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines somebody wants to read."""

    since_s: float = 0.0  # wall clock
    to: str = ""  # beginning of a node's id, its name, or `cloud`
    privacy: str = ""  # class of the request
    kind: str = ""
    after: int = 0  # number of a line: only what came after it
    limit: int = READ_MAX  # the newest so many


@dataclass(slots=True)
class AuditStatistics:
    """What the trail did so far."""

    recorded: int = 0
    lost: int = 0  # the disk refused, or too many waited
    flushes: int = 0


class Audit:
    """The trail of one node.

    Args:
        folder: for its files.
        size_bytes_max: of all of them; the oldest go first.
        keep: False: nothing is kept, and nothing read.
        unix_s: the wall clock.
        log: bound logger.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size_bytes_max: int,
        keep: bool,
        unix_s: Callable[[], float],
        log: Logger,
    ) -> None:
        self._files = AuditFiles(folder, size_bytes_max)
        self._keep = keep
        self._unix_s = unix_s
        self._log = log
        self._waiting: list[dict[str, Value]] = []
        self._came = trio.Event()
        self._disk = trio.Lock()
        self._lost = 0  # since the last line that says so
        self.statistics = AuditStatistics()

    def record(self, kind: str, /, **fields: Value) -> None:
        """Note that something happened. Never content: no prompt, no answer, no secret."""
        if not self._keep:
            return
        if len(self._waiting) >= WAITING_MAX:
            self._lose(1)
            return
        self._waiting.append({"at": round(self._unix_s(), 3), "kind": kind, **fields})
        self.statistics.recorded += 1
        if not self._came.is_set():
            self._came.set()

    async def run(self) -> None:
        """Write what gathers, until cancelled."""
        while True:
            await self._came.wait()
            await trio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits."""
        async with self._disk:
            entries, self._waiting = self._waiting, []
            self._came = trio.Event()
            if self._lost and entries:
                entries.append(
                    {"at": round(self._unix_s(), 3), "kind": "lost", "lines": self._lost}
                )
            if not entries:
                return
            try:
                await trio.to_thread.run_sync(self._files.append, entries)
            except OSError as error:
                if not self._lost:
                    self._log.warning("audit.refused", reason=error.strerror or str(error))
                self._lose(sum(entry["kind"] != "lost" for entry in entries))
                return
            self._lost = 0
            self.statistics.flushes += 1

    async def read(self, wanted: Wanted) -> list[Mapping[str, Value]]:
        """The newest lines that are wanted, oldest first.

        Raises:
            OSError: the files cannot be read.
        """
        await self.flush()
        async with self._disk:
            return await trio.to_thread.run_sync(partial(selected, self._files, wanted))

    async def verify(self) -> Verdict:
        """Look over all that is kept. Raises OSError as `read`."""
        await self.flush()
        async with self._disk:
            return await trio.to_thread.run_sync(self._files.verify)

    def _lose(self, count: int) -> None:
        self._lost += count
        self.statistics.lost += count


def selected(files: AuditFiles, wanted: Wanted) -> list[Mapping[str, Value]]:
    """The newest lines that are wanted, oldest first. Blocks."""
    found: list[Mapping[str, Value]] = []
    for fields in files.newest():
        number, at = fields["n"], fields.get("at")
        if isinstance(number, int) and number <= wanted.after:
            break
        if isinstance(at, int | float) and at < wanted.since_s:
            break
        if _fits(fields, wanted):
            found.append({key: value for key, value in fields.items() if key != "chain"})
            if len(found) >= min(wanted.limit, READ_MAX):
                break
    return found[::-1]


def _fits(fields: Mapping[str, Value], wanted: Wanted) -> bool:
    if fields.get("kind") == "continued" or (wanted.kind and fields.get("kind") != wanted.kind):
        return False
    if wanted.privacy and fields.get("privacy") != wanted.privacy:
        return False
    if not wanted.to:
        return True
    to, name = fields.get("to"), fields.get("to_name")
    return name == wanted.to or (isinstance(to, str) and to.startswith(wanted.to))
