"""The contract check finds what breaks the contract; the echo keeps it; the fakes behave."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from meshd_plugins.api import (
    BadRequest,
    Capability,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    Operation,
    PluginConfigError,
    Refused,
    Request,
    Value,
    WorkerSpec,
)
from meshd_plugins.builtin import echo
from meshd_plugins.builtin.echo import EchoCapability, EchoConfig
from meshd_plugins.testing import (
    ContractBroken,
    FakeCapabilities,
    FakeSupervisor,
    check_capability,
    fake_context,
    make_request,
)

RUN = make_request(Operation.RUN, {"input": "hello"})
Invoke = Callable[[Request], AsyncGenerator[Event, None]]


class Made:
    """A capability out of an `invoke` function."""

    def __init__(self, invoke: Invoke, name: str = "computation.gpt/made", slots: int = 1) -> None:
        self.invoke = invoke
        self.descriptor = Descriptor(name, (Operation.RUN,), "Made for a test", slots)


async def no_done(request: Request) -> AsyncGenerator[Event, None]:
    await trio.lowlevel.checkpoint()
    yield Chunk("a")


async def after_done(request: Request) -> AsyncGenerator[Event, None]:
    await trio.lowlevel.checkpoint()
    yield Done()
    yield Chunk("late")


async def two_dones(request: Request) -> AsyncGenerator[Event, None]:
    await trio.lowlevel.checkpoint()
    yield Done()
    yield Done()


async def strange_event(request: Request) -> AsyncGenerator[Event, None]:
    await trio.lowlevel.checkpoint()
    yield cast("Event", "text")
    yield Done()


async def strange_error(request: Request) -> AsyncGenerator[Event, None]:
    await trio.lowlevel.checkpoint()
    yield Chunk("a")
    raise KeyError("x")


async def refuses_late(request: Request) -> AsyncGenerator[Event, None]:
    await trio.lowlevel.checkpoint()
    yield Chunk("a")
    raise Refused("too late for that")


async def turns_cancellation_into_failure(request: Request) -> AsyncGenerator[Event, None]:
    try:
        yield Chunk("a")
        await trio.lowlevel.checkpoint()
        yield Done()
    except trio.Cancelled as error:
        raise Failed("cancelled") from error


async def never_notices_cancellation(request: Request) -> AsyncGenerator[Event, None]:
    with trio.CancelScope(shield=True):
        await trio.sleep(20)
    yield Done()


def returns_a_list(request: Request) -> AsyncGenerator[Event, None]:
    return cast("AsyncGenerator[Event, None]", [Done()])


@pytest.mark.parametrize(
    ("invoke", "says"),
    [
        (no_done, "ended without Done"),
        (after_done, "Chunk came after Done"),
        (two_dones, "Done came after Done"),
        (strange_event, "yielded str"),
        (strange_error, "raised KeyError"),
        (refuses_late, "Refused after the first event"),
        (turns_cancellation_into_failure, "cancelled .*, it raised Failed"),
        (never_notices_cancellation, "went on for 20.0 s"),
        (returns_a_list, "returned list"),
    ],
)
def test_a_broken_capability_is_found(invoke: Invoke, says: str) -> None:
    async def main() -> None:
        with pytest.raises(ContractBroken, match=says):
            await check_capability(Made(invoke), RUN)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("error", [BadRequest("b"), Refused("r"), Failed("f")])
def test_an_allowed_error_before_the_first_chunk_passes(error: Exception) -> None:
    async def raises(request: Request) -> AsyncGenerator[Event, None]:
        await trio.lowlevel.checkpoint()
        if request.body:
            raise error
        yield Done()

    with pytest.raises(type(error)):
        trio.run(check_capability, Made(raises), RUN)


@pytest.mark.parametrize(
    ("capability", "says"),
    [
        (Made(after_done, name="lamp"), "not of the form"),
        (Made(after_done, slots=0), "at least 1"),
    ],
)
def test_a_wrong_descriptor_is_found(capability: Capability, says: str) -> None:
    with pytest.raises(ContractBroken, match=says):
        trio.run(check_capability, capability, RUN)


def test_an_operation_that_is_not_announced_is_found() -> None:
    with pytest.raises(ContractBroken, match="does not announce embed"):
        trio.run(check_capability, Made(after_done), make_request(Operation.EMBED))


@pytest.mark.parametrize(
    ("body", "pieces"),
    [
        ({}, ["hello"]),
        ({"chunks": 2}, ["he", "llo"]),
        ({"chunks": 5}, list("hello")),
        ({"chunks": 7}, ["", "h", "e", "", "l", "l", "o"]),
    ],
)
def test_the_echo_gives_back_its_input_in_pieces(body: dict[str, Value], pieces: list[str]) -> None:
    request = make_request(Operation.RUN, {"input": "hello", **body})
    checked = trio.run(check_capability, EchoCapability(EchoConfig()), request)
    assert [chunk.text for chunk in checked.chunks] == pieces
    assert checked.text == "hello"


def test_the_echo_waits_before_each_piece() -> None:
    request = make_request(Operation.RUN, {"input": "hello", "chunks": 3, "delay_s": 2})

    async def main() -> float:
        before_s = trio.current_time()
        await check_capability(EchoCapability(EchoConfig()), request, cancel=False)
        return trio.current_time() - before_s

    assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)) == pytest.approx(6)


@pytest.mark.parametrize(
    "body", [{"chunks": 0}, {"chunks": True}, {"chunks": 1e9}, {"delay_s": -1}, {"delay_s": "1"}]
)
def test_the_echo_rejects_wrong_parameters(body: dict[str, Value]) -> None:
    request = make_request(Operation.RUN, {"input": "hello", **body})
    with pytest.raises(BadRequest, match=next(iter(body))):
        trio.run(check_capability, EchoCapability(EchoConfig()), request)


@pytest.mark.parametrize(
    "table", [{"slot": 1}, {"slots": 0}, {"chunk_count": "x"}, {"delay_s": 61}]
)
def test_the_echo_rejects_a_wrong_table(table: dict[str, Value], tmp_path: Path) -> None:
    with pytest.raises(PluginConfigError, match=rf"plugins\.echo\.{next(iter(table))}"):
        echo.meshd_register(fake_context("echo", tmp_path, table))


def test_the_echo_registers_with_its_settings(tmp_path: Path) -> None:
    capabilities = FakeCapabilities()
    echo.meshd_register(fake_context("echo", tmp_path, {"slots": 3}, capabilities=capabilities))
    assert capabilities.added[0].descriptor.slots == 3
    with pytest.raises(ValueError, match="already registered"):
        capabilities.add(EchoCapability(EchoConfig()))


def _twice(message: Mapping[str, Value], /) -> list[Mapping[str, Value]]:
    return [{"echo": message["n"]}, {"echo": message["n"]}]


def test_the_fake_supervisor_runs_a_script_and_lets_a_worker_die() -> None:
    async def main() -> None:
        supervisor = FakeSupervisor(_twice, {"ready": True})
        async with supervisor.worker(WorkerSpec("w", ("w",))) as worker:
            assert worker.hello == {"ready": True}
            async with worker.call({"n": 1}) as call:
                assert [await call.receive() for _ in range(3)] == [{"echo": 1}, {"echo": 1}, None]
            supervisor.started[0].die("killed")
            assert await worker.wait_died() == "killed"
            with pytest.raises(Failed) as caught:
                async with worker.call({"n": 2}):
                    raise AssertionError("a dead worker took a call")
            assert caught.value.code == "worker_died"

    trio.run(cast("Callable[[], Awaitable[None]]", main))
