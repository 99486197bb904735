"""Many runs on all cores. A run is decided by its arguments alone, so it is the same wherever it runs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_PROGRESS_S = 2.0


class _Task(Generic[Job, Result]):
    """What a worker does with a job. Cyclic garbage is collected between runs: cores are large and live."""

    def __init__(self, work: Callable[[Job], Result]) -> None:
        self._work = work

    def __call__(self, numbered: tuple[int, Job]) -> tuple[int, Result]:
        number, job = numbered
        gc.disable()
        try:
            return number, self._work(job)
        finally:
            gc.enable()
            gc.collect()


def spread(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None = None
) -> Iterator[tuple[Job, Result]]:
    """Do all jobs; yields each with its result as it is done, in no order. Progress goes to stderr.

    Args:
        work: a function of a module.
        jobs: small and picklable; the slowest should come first.
        workers: processes; all cores when not given. With one, everything happens in this process.
    """
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    task, numbered, began_s = _Task(work), list(enumerate(jobs)), time.monotonic()
    told_s = began_s
    if workers <= 1:
        for job in numbered:
            yield job[1], task(job)[1]
        return
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=20) as pool:
        for done, (number, result) in enumerate(pool.imap_unordered(task, numbered), 1):
            yield jobs[number], result
            now_s = time.monotonic()
            if now_s - told_s >= _PROGRESS_S or done == len(jobs):
                told_s = now_s
                print(
                    f"\r{done}/{len(jobs)} runs, {now_s - began_s:.0f} s", end="", file=sys.stderr
                )
    print(file=sys.stderr)
