"""How long a worker may be silent, and what is said when the kernel ends it for want of memory."""

import os
import signal
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from tests.shell.support_supervisor import RecordingLog, fake_worker

from meshd.shell.supervisor import ProcessSupervisor, SupervisorConfig
from meshd_plugins.api import Failed, Worker

DEADLINE_S = 20
QUIET = SupervisorConfig(
    hang_s=3600.0, hang_steps=10.0, hang_min_s=0.2, hang_max_s=0.6, poll_s=0.1, close_s=0.2
)
GROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES = 96 * 1024 * 1024


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(DEADLINE_S):
            await body()

    trio.run(bounded)


def pid_of(worker: Worker) -> int:
    pid = worker.hello["pid"]
    assert isinstance(pid, int)
    return pid


@pytest.mark.parametrize(
    ("step_s", "allowed"),
    [
        ("0.001", "0.2 s"),  # never less than that
        ("0.04", "0.4 s"),  # ten steps
        ("1e9", "0.6 s"),  # never more, whatever it says
    ],
)
def test_a_stopped_worker_is_ended_after_some_of_its_own_steps(step_s: str, allowed: str) -> None:
    async def body() -> None:
        supervisor = ProcessSupervisor(RecordingLog(), QUIET)
        async with (
            supervisor.worker(fake_worker(f"step_s={step_s}")) as worker,
            worker.call({"do": "wait"}) as call,
        ):
            await call.receive()
            os.kill(pid_of(worker), signal.SIGSTOP)
            with pytest.raises(Failed, match=f"no sign of life for {allowed}") as hung:
                await call.receive()
            assert hung.value.code == "worker_hung"

    run(body)


@pytest.mark.parametrize("step_s", ["-1", "nan"])
def test_a_step_of_no_length_says_nothing(step_s: str) -> None:
    async def body() -> None:
        config = SupervisorConfig(hang_s=0.3, hang_min_s=3600.0, hang_max_s=3600.0, poll_s=0.1)
        supervisor = ProcessSupervisor(RecordingLog(), config)
        async with supervisor.worker(fake_worker(f"step_s={step_s}")) as worker:
            with pytest.raises(Failed, match=r"no sign of life for 0\.3 s"):
                async with worker.call({"do": "hang"}) as call:
                    await call.receive()

    run(body)


@contextmanager
def memory_group() -> Generator[Path, None, None]:
    """A control group that holds less than the test needs; the test is skipped where there is none."""
    version_1 = (GROUPS / "memory/memory.limit_in_bytes").exists()
    base = GROUPS / "memory" if version_1 else GROUPS
    name = "memory.limit_in_bytes" if version_1 else "memory.max"
    group = base / f"meshd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(LIMIT_BYTES))
        (group / "cgroup.procs").open("a").close()
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group for memory can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def test_a_worker_that_the_kernel_ends_for_memory_is_told_apart() -> None:
    async def body(group: Path) -> None:
        supervisor = ProcessSupervisor(RecordingLog(), SupervisorConfig(poll_s=3600.0))
        async with supervisor.worker(fake_worker()) as worker:
            (group / "cgroup.procs").write_text(str(pid_of(worker)))
            with pytest.raises(Failed) as died:
                async with worker.call({"do": "memory", "bytes": 4 * LIMIT_BYTES}) as call:
                    await call.receive()
            assert died.value.code == "worker_died"
            assert "the system was out of memory, and the kernel has ended" in died.value.message

    with memory_group() as group:
        run(lambda: body(group))
