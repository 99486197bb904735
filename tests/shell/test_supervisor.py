import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
from tests.shell.support_supervisor import RecordingLog, fake_worker, process_exists, process_runs

from meshd.shell.supervisor import ProcessSupervisor, SupervisorConfig
from meshd_plugins.api import BadRequest, Failed, Refused, Value, Worker, WorkerCall, WorkerSpec

DEADLINE_S = 20
FAST = SupervisorConfig(hang_s=0.4, poll_s=0.1, close_s=0.2, terminate_s=0.2)


def supervisor(config: SupervisorConfig | None = None) -> ProcessSupervisor:
    return ProcessSupervisor(RecordingLog(), config)


async def ask(worker: Worker, **message: Value) -> list[Mapping[str, Value]]:
    async with worker.call(message) as call:
        return await read_all(call)


async def read_all(call: WorkerCall) -> list[Mapping[str, Value]]:
    items: list[Mapping[str, Value]] = []
    while (item := await call.receive()) is not None:
        items.append(item)
    return items


def run(body: object, *args: object) -> None:
    async def bounded() -> None:
        with trio.fail_after(DEADLINE_S):
            await body(*args)  # type: ignore[operator]

    trio.run(bounded)


def test_calls_are_answered_and_the_process_is_gone_afterwards() -> None:
    async def body() -> None:
        async with supervisor().worker(fake_worker()) as worker:
            assert worker.hello["behaviour"] == "normal"
            assert await ask(worker, do="echo", text="one two") == [
                {"word": "one"},
                {"word": "two"},
            ]
            pid = worker.hello["pid"]
            assert isinstance(pid, int)
            assert process_exists(pid)
        assert not process_exists(pid)

    run(body)


def test_calls_are_multiplexed_and_typed_errors_arrive_as_themselves() -> None:
    async def body() -> None:
        async with supervisor().worker(fake_worker()) as worker:
            async with worker.call({"do": "wait"}) as waiting:
                assert await waiting.receive() == {"waiting": True}
                assert await ask(worker, do="echo", text="meanwhile") == [{"word": "meanwhile"}]
                with pytest.raises(Refused, match="not now") as refused:
                    await ask(worker, do="refuse")
                with pytest.raises(BadRequest) as bad:
                    await ask(worker, do="bad")
            assert (refused.value.code, bad.value.code) == ("busy", "bad_thing")

    run(body)


def test_leaving_a_call_cancels_it_in_the_worker() -> None:
    async def body() -> None:
        log = RecordingLog()
        async with ProcessSupervisor(log).worker(fake_worker()) as worker:
            async with worker.call({"do": "wait"}) as call:
                await call.receive()
            await log.wait_for("worker.said", line="cancelled 1")

    run(body)


@pytest.mark.parametrize(
    ("action", "words"), [("die", "exited with status 7"), ("segfault", "killed by SIGSEGV")]
)
def test_death_fails_every_open_call_in_words(action: str, words: str) -> None:
    async def body() -> None:
        async with supervisor().worker(fake_worker()) as worker:
            async with worker.call({"do": "wait"}) as bystander:
                await bystander.receive()
                with pytest.raises(Failed, match=words) as died:
                    await ask(worker, do=action)
                with pytest.raises(Failed, match=words):
                    await bystander.receive()
            assert died.value.code == "worker_died"
            assert words in await worker.wait_died()
            with pytest.raises(Refused) as refused:
                await ask(worker, do="echo", text="too late")
            assert refused.value.code == "starting"

    run(body)


def test_the_last_lines_of_stderr_are_in_the_error() -> None:
    async def body() -> None:
        async with supervisor().worker(fake_worker()) as worker:
            with pytest.raises(Failed) as died:
                await ask(worker, do="die")
            assert "line 99" in died.value.message
            assert "line 80" in died.value.message
            assert "line 79" not in died.value.message

    run(body)


def test_a_hung_worker_is_killed_and_its_calls_fail() -> None:
    async def body() -> None:
        async with supervisor(FAST).worker(fake_worker()) as worker:
            with pytest.raises(Failed, match="no sign of life") as hung:
                await ask(worker, do="hang")
            assert hung.value.code == "worker_hung"

    run(body)


def test_heartbeats_keep_a_silent_call_alive() -> None:
    async def body() -> None:
        config = SupervisorConfig(hang_s=1.6, poll_s=0.1)
        async with supervisor(config).worker(fake_worker()) as worker:
            async with worker.call({"do": "wait"}) as call:
                await call.receive()
                with trio.move_on_after(2.2) as quiet:
                    await call.receive()
                assert quiet.cancelled_caught  # neither an item nor Failed(worker_hung)
            assert await ask(worker, do="echo", text="alive") == [{"word": "alive"}]

    run(body)


@pytest.mark.parametrize(
    ("action", "words"), [("garbage", "not msgpack"), ("huge", "bound"), ("unasked", "unexpected")]
)
def test_what_is_not_the_protocol_costs_the_process_its_life(action: str, words: str) -> None:
    async def body() -> None:
        async with supervisor().worker(fake_worker()) as worker:
            with pytest.raises(Failed, match="broke the protocol") as died:
                await ask(worker, do=action)
            assert words in died.value.message

    run(body)


def test_a_worker_that_prints_instead_of_speaking_does_not_come_up() -> None:
    async def body() -> None:
        spec = WorkerSpec(name="printer", argv=(sys.executable, "-c", "print('hello, world')"))
        with pytest.raises(Failed, match="broke the protocol"):
            async with supervisor().worker(spec):
                pytest.fail("it came up")

    run(body)


def test_a_process_that_dies_at_start_says_why() -> None:
    async def body() -> None:
        with pytest.raises(Failed, match=r"exited with status 3.*no such model: café") as died:
            async with supervisor().worker(fake_worker("dies_at_start")):
                pytest.fail("it came up")
        assert died.value.code == "worker_died"

    run(body)


def test_a_process_that_is_never_ready_is_ended() -> None:
    async def body() -> None:
        with pytest.raises(Failed, match=r"not ready within 0\.5 s"):
            async with supervisor().worker(fake_worker("never_ready", start_deadline_s=0.5)):
                pytest.fail("it came up")

    run(body)


def test_a_program_that_is_not_there_is_a_clear_error() -> None:
    async def body() -> None:
        with pytest.raises(Failed, match="does not start"):
            async with supervisor().worker(
                WorkerSpec(name="ghost", argv=("/nonexistent/program",))
            ):
                pytest.fail("it came up")

    run(body)


def test_a_stopped_worker_that_ignores_term_is_killed_on_leaving() -> None:
    async def body() -> None:
        async with supervisor(FAST).worker(fake_worker("stubborn")) as worker:
            pid = worker.hello["pid"]
            assert isinstance(pid, int)
            os.kill(pid, signal.SIGSTOP)
        assert not process_exists(pid)

    run(body)


def test_children_of_a_worker_end_with_it() -> None:
    async def body() -> None:
        async with supervisor().worker(fake_worker(processes=True)) as worker:
            [answer] = await ask(worker, do="child")
            child = answer["pid"]
            assert isinstance(child, int)
            os.kill(child, 0)
        while process_runs(child):
            await trio.lowlevel.checkpoint()

    run(body)


def test_a_caller_that_does_not_read_loses_only_its_own_call() -> None:
    async def body() -> None:
        config = SupervisorConfig(call_messages_max=10)
        async with supervisor(config).worker(fake_worker()) as worker:
            async with worker.call({"do": "flood", "count": 1000}) as flooded:
                assert await ask(worker, do="echo", text="fine") == [{"word": "fine"}]
                with pytest.raises(Failed) as slow:
                    await read_all(flooded)
            assert slow.value.code == "slow_consumer"
            assert await ask(worker, do="echo", text="still") == [{"word": "still"}]

    run(body)


def test_what_one_call_has_unread_is_bounded_in_bytes_too() -> None:
    async def body() -> None:
        config = SupervisorConfig(call_bytes_max=100_000)
        async with supervisor(config).worker(fake_worker()) as worker:
            async with worker.call({"do": "echo", "text": "x" * 30_000}) as small:
                assert len(await read_all(small)) == 1
            long = " ".join("x" * 30_000 for _ in range(4))
            async with worker.call({"do": "echo", "text": long}) as large:
                assert await ask(worker, do="echo", text="fine") == [{"word": "fine"}]
                with pytest.raises(Failed) as slow:
                    await read_all(large)
            assert slow.value.code == "slow_consumer"
            assert await ask(worker, do="echo", text="still") == [{"word": "still"}]

    run(body)


def test_too_many_calls_and_too_large_a_request_are_refused_at_once() -> None:
    async def body() -> None:
        config = SupervisorConfig(calls_max=1)
        async with supervisor(config).worker(fake_worker()) as worker:
            async with worker.call({"do": "wait"}):
                with pytest.raises(Refused) as busy:
                    await ask(worker, do="echo", text="x")
            with pytest.raises(BadRequest) as large:
                await ask(worker, do="echo", text="x" * (17 * 1024 * 1024))
            assert (busy.value.code, large.value.code) == ("busy", "too_large")
            assert await ask(worker, do="echo", text="after") == [{"word": "after"}]

    run(body)


def test_memory_over_the_limit_ends_the_worker_with_that_reason() -> None:
    async def body() -> None:
        spec = fake_worker(memory_bytes_max=128 * 1024 * 1024)
        async with supervisor(SupervisorConfig(poll_s=0.1)).worker(spec) as worker:
            with pytest.raises(Failed, match="its limit is 128 MiB"):
                await ask(worker, do="memory", bytes=256 * 1024 * 1024)

    run(body)


def test_the_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_SECRET", "hunter2")

    async def body() -> None:
        spec = fake_worker(environment={"OMP_NUM_THREADS": "1"})
        async with supervisor().worker(spec) as worker:
            variables = worker.hello["variables"]
            assert isinstance(variables, list)
            allowed = {"PATH", "HOME", "LANG", "LC_CTYPE", "OMP_NUM_THREADS"}
            assert set(variables) <= allowed
            assert "OMP_NUM_THREADS" in variables

    run(body)


def test_the_achieved_isolation_is_recorded_and_true() -> None:
    async def body() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        workers = supervisor()
        async with workers.worker(fake_worker()) as worker:
            [status] = workers.statistics()
            steps = status.isolation.steps
            assert status.isolation.applied
            assert status.ready
            assert status.resident_bytes > 1024 * 1024
            assert steps["parent_death"] == "yes"
            assert steps["no_new_privileges"] == "yes"
            assert steps["limits"] == "yes"
            [answer] = await ask(worker, do="connect", port=port)
            reached = answer["answer"] == "connected"
            assert reached == steps["no_network"].startswith("no:")
        assert workers.statistics() == ()
        listener.close()

    run(body)


def test_a_worker_dies_with_a_daemon_that_is_killed() -> None:
    """The fence against starting processes from a thread that ends before the daemon does."""
    program = (
        "import sys, trio\n"
        "from meshd.shell.supervisor import ProcessSupervisor\n"
        "from tests.shell.support_supervisor import RecordingLog, fake_worker\n"
        "async def main():\n"
        "    async with ProcessSupervisor(RecordingLog()).worker(fake_worker()) as worker:\n"
        "        print(worker.hello['pid'], flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )

    async def body() -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        daemon = await trio.lowlevel.open_process(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
        )
        assert daemon.stdout is not None
        pid = int(await daemon.stdout.receive_some(100))
        daemon.kill()
        await daemon.wait()
        await daemon.stdout.aclose()
        while process_runs(pid):
            await trio.lowlevel.checkpoint()

    run(body)


def test_an_error_of_the_caller_leaves_the_context_as_itself() -> None:
    async def body() -> None:
        with pytest.raises(LookupError, match="mine"):
            async with supervisor().worker(fake_worker()):
                raise LookupError("mine")

    run(body)
