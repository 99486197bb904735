"""Work that outlasts no one who waits for it: started for a caller, ended when the caller goes.

A caller reads from a generator, and generators cannot hold the nurseries that workers need; so the work
itself runs as a task of `Jobs.run`, and the generator looks at it. What is true: a job has ended, with an
outcome, when its generator has; at most `JOBS_MAX` are there at a time, and `AT_ONCE` of them run.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import trio

from meshd_plugins.api import CapabilityError, Failed, Refused, Value

JOBS_MAX: Final = 16
AT_ONCE: Final = 2
TELL_S: Final = 0.25
END_S: Final = 4.0  # for a job to end when nobody waits for it any more

Item: TypeAlias = "Mapping[str, Value]"


@dataclass(slots=True, eq=False)
class Job:
    """One piece of work, as far as it is. The thread or task that does it writes; anybody reads."""

    verb: str
    id: str  # of the model
    source: str = ""
    stage: str = "waiting"  # then as the work says: downloading, hashing, reading, loading, ...
    bytes: int = 0
    total: int | None = None
    part: int = 0  # of `parts`, from 1 on; 0: there is one
    parts: int = 0
    inner: Job | None = None  # what it does first, a transfer of its own
    done: Item | None = None
    error: Exception | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    def begin(self, stage: str, total: int | None = None, part: int = 0, parts: int = 0) -> None:
        """Go on to another stage."""
        self.stage, self.bytes, self.total = stage, 0, total
        self.part, self.parts = part, parts

    def tell(self, so_far: int, total: int | None) -> None:
        """How far the stage is."""
        self.bytes, self.total = so_far, total

    def item(self) -> dict[str, Value]:
        """How far it is, for people who wait."""
        if self.inner is not None:
            return self.inner.item()
        item: dict[str, Value] = {"id": self.id, "stage": self.stage, "bytes": self.bytes}
        if self.total is not None:
            item["total"] = self.total
        if self.parts > 1:
            item |= {"part": self.part, "parts": self.parts}
        return item

    def outcome(self) -> Item:
        """How it ended. Raises how it failed."""
        if self.error is not None:
            raise self.error
        if self.done is None:
            raise Failed(
                f"{self.verb} {self.id} was stopped with the node; what has arrived is kept",
                code="stopped",
            )
        return self.done


Work: TypeAlias = Callable[[Job], Awaitable[Item]]


class Jobs:
    """The jobs of one library."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[Job, Work]](JOBS_MAX)
        self._at_once = trio.CapacityLimiter(AT_ONCE)
        self.open: list[Job] = []

    async def run(self) -> None:
        """Carry jobs out, until cancelled."""
        async with trio.open_nursery() as nursery:
            async for job, work in self._receive:
                nursery.start_soon(self._carry_out, job, work)

    async def follow(self, job: Job, work: Work) -> AsyncGenerator[Item, None]:
        """Have it carried out: its progress, and at last `{"done": ...}`; closing ends it.

        Raises:
            Refused: busy: there are too many.
            Exception: as the work does.
        """
        if len(self.open) >= JOBS_MAX:
            raise Refused(f"{JOBS_MAX} things are being done to models already", code="busy")
        self.open.append(job)
        self._send.send_nowait((job, work))
        told: Item = {}
        try:
            while not job.ended.is_set():
                with trio.move_on_after(TELL_S):
                    await job.ended.wait()
                item = job.item()
                if item != told:
                    told = item
                    yield item
            yield {"done": job.outcome()}
        finally:
            job.scope.cancel()
            with trio.move_on_after(END_S, shield=True):
                await job.ended.wait()

    async def _carry_out(self, job: Job, work: Work) -> None:
        try:
            with job.scope:
                async with self._at_once:
                    job.done = await work(job)
        except CapabilityError as error:
            job.error = error
        except OSError as error:
            job.error = Failed(f"{error.filename or 'the disk'}: {error.strerror}", code="disk")
        except Exception as error:  # noqa: BLE001 (raised again by `outcome`, to who waits)
            job.error = error
        finally:
            self.open.remove(job)
            job.ended.set()
