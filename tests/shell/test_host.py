"""The host: slots, queue, deadline, drain, withdrawal, cancellation, and plugins that break the contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
import trio
from tests.shell.support_log import KeptLog
from tests.shell.support_orchestrate import (
    GENERAL,
    Script,
    Scripted,
    descriptor,
    hanging,
    open_guard,
    own_source,
    raising,
    run,
    saying,
)

from meshd.orchestrate.host import HOSTED_MAX, CapabilityHost, HostChange
from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Chunk,
    Done,
    Event,
    Failed,
    Operation,
    Refused,
    Request,
)

SECRET = "the secret prompt"


def request(number: int = 0, *, deadline_s: float = 60.0, caller: str = "a") -> Request:
    return Request(f"r-{number}", GENERAL, Operation.CHAT, {}, caller=caller, deadline_s=deadline_s)


class Setup:
    """A host with one scripted capability."""

    def __init__(self, script: Script, *, slots: int = 1, queue_max: int = 2) -> None:
        self.log = KeptLog()
        self.changes: list[HostChange] = []
        self.host = CapabilityHost(
            guard=open_guard(),
            queue_max=queue_max,
            changed=self.changes.append,
            load_changed=lambda: None,
            log=self.log,
        )
        self.capability = Scripted(descriptor(GENERAL, slots=slots), script)
        self.host.add(self.capability)
        self.chunks: list[Chunk] = []
        self.ends: list[str] = []  # "ok" or a code, in the order in which requests ended

    async def emit(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    async def invoke(self, asked: Request | None = None) -> Done:
        return await self.host.invoke(GENERAL, asked or request(), self.emit, own_source())

    async def note(self, asked: Request) -> None:
        """Invoke, and note how it ended."""
        try:
            await self.invoke(asked)
        except CapabilityError as error:
            self.ends.append(error.code)
        else:
            self.ends.append("ok")


def code_of(setup: Setup, asked: Request | None = None) -> str:
    """The code with which an invocation fails."""
    codes: list[str] = []

    async def body() -> None:
        with pytest.raises(CapabilityError) as caught:
            await setup.invoke(asked)
        codes.append(caught.value.code)
        assert setup.host.busy() == {GENERAL: (0, 0)}
        assert setup.host.in_flight == 0

    run(body)
    return codes[0]


def test_chunks_go_out_in_order_and_the_end_is_returned() -> None:
    setup = Setup(saying("a", "b", finish_reason="length"))

    async def body() -> None:
        assert (await setup.invoke()).finish_reason == "length"

    run(body)
    assert [chunk.text for chunk in setup.chunks] == ["a", "b"]


def test_never_more_run_than_there_are_slots_and_all_that_fit_are_served() -> None:
    setup = Setup(saying("x", gap_s=1.0), slots=3, queue_max=7)

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(setup.note, request(number, caller=f"c-{number % 3}"))
            await trio.testing.wait_all_tasks_blocked()
            assert setup.host.busy() == {GENERAL: (3, 7)}
        assert trio.current_time() == pytest.approx(4.0)

    run(body)
    assert setup.capability.most == 3
    assert setup.ends == ["ok"] * 10
    assert setup.host.busy() == {GENERAL: (0, 0)}


def test_a_full_queue_refuses_at_once() -> None:
    setup = Setup(saying("x", gap_s=1.0), queue_max=1)

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(setup.note, request(number))
            await trio.testing.wait_all_tasks_blocked()
            began_s = trio.current_time()
            with pytest.raises(Refused) as caught:
                await setup.invoke(request(3))
            assert caught.value.code == "busy"
            assert trio.current_time() == began_s

    run(body)
    assert setup.ends == ["ok", "ok"]


def test_a_deadline_ends_what_runs() -> None:
    setup = Setup(hanging("a"))
    assert code_of(setup, request(deadline_s=2.0)) == "deadline_exceeded"
    assert setup.capability.running == 0


def test_a_deadline_ends_what_waits_and_its_place_is_free_again() -> None:
    setup = Setup(saying("x", gap_s=5.0), queue_max=1)

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.note, request(1))
            await trio.testing.wait_all_tasks_blocked()
            await setup.note(request(2, deadline_s=2.0))
            assert trio.current_time() == pytest.approx(2.0)
            assert setup.host.busy() == {GENERAL: (1, 0)}
            await setup.note(request(3))

    run(body)
    assert setup.ends == ["deadline_exceeded", "ok", "ok"]


def test_drain_finishes_what_runs_and_turns_away_what_waits_and_what_comes() -> None:
    setup = Setup(saying("x", gap_s=3.0))

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.note, request(1))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(setup.note, request(2))
            await trio.testing.wait_all_tasks_blocked()
            await setup.host.drain()
            assert trio.current_time() == pytest.approx(3.0)
        await setup.note(request(3))
        assert setup.host.draining

    run(body)
    assert setup.ends == ["draining", "ok", "draining"]


def test_what_is_added_while_draining_takes_nothing() -> None:
    setup = Setup(saying("x"))

    async def body() -> None:
        await setup.host.drain()
        setup.host.add(Scripted(descriptor("knowledge.gpt/late"), saying("y")))
        with pytest.raises(Refused) as caught:
            await setup.host.invoke("knowledge.gpt/late", request(), setup.emit, own_source())
        assert caught.value.code == "draining"

    run(body)


def test_removal_lets_what_runs_go_on_and_turns_away_what_waits() -> None:
    setup = Setup(saying("x", gap_s=3.0))

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.note, request(1))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(setup.note, request(2))
            await trio.testing.wait_all_tasks_blocked()
            setup.host.remove(GENERAL)
            await setup.note(request(3))

    run(body)
    assert setup.ends == ["not_here", "not_here", "ok"]
    assert setup.changes[-1] == HostChange(GENERAL, None)
    assert setup.host.in_flight == 0


def test_cancelling_what_runs_reaches_the_capability_and_frees_the_slot() -> None:
    setup = Setup(hanging())

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.note, request(1))
            await trio.testing.wait_all_tasks_blocked()
            assert setup.capability.running == 1
            nursery.cancel_scope.cancel()
        assert setup.capability.running == 0
        assert setup.host.busy() == {GENERAL: (0, 0)}

    run(body)


def test_who_asks_much_gives_way_at_once_to_who_asks_little() -> None:
    setup = Setup(saying("x", gap_s=1.0))

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(setup.note, request(number, caller="greedy"))
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(setup.note, request(4, caller="modest"))
            await trio.testing.wait_all_tasks_blocked()
            assert setup.ends == ["busy"], "so that it can be asked of another node"
            assert setup.host.busy() == {GENERAL: (1, 2)}

    run(body)
    assert setup.ends == ["busy", "ok", "ok", "ok"]


def test_cancelling_what_waits_frees_its_place() -> None:
    setup = Setup(saying("x", gap_s=3.0), queue_max=1)

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.note, request(1))
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(1.0):
                await setup.invoke(request(2))
            assert setup.host.busy() == {GENERAL: (1, 0)}

    run(body)


def test_admitted_and_cancelled_in_the_same_moment_passes_the_slot_on() -> None:
    """The first ends while the second, next in turn, is cancelled: the third must get the slot.

    Trio runs the two in either order; in twenty runs both orders come.
    """

    async def body() -> None:
        setup = Setup(saying("x", gap_s=1.0))
        first, second = trio.CancelScope(), trio.CancelScope()

        async def cancellable(number: int, scope: trio.CancelScope) -> None:
            with scope:
                await setup.invoke(request(number))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancellable, 1, first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(cancellable, 2, second)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(setup.note, request(3))
            await trio.testing.wait_all_tasks_blocked()
            assert setup.host.busy() == {GENERAL: (1, 2)}
            first.cancel()
            second.cancel()
        assert setup.ends == ["ok"]
        assert setup.host.busy() == {GENERAL: (0, 0)}

    for _ in range(20):
        run(body)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (raising(Refused("no", code="starting")), "starting"),
        (raising(BadRequest("no", code="undefined")), "undefined"),
        (raising(Failed("no", code="worker_died"), "a"), "worker_died"),
        (raising(ValueError(SECRET), "a"), "crashed"),
        (raising(ExceptionGroup(SECRET, [ValueError(SECRET)])), "crashed"),
        (raising(ExceptionGroup("one", [Refused("no", code="starting")])), "starting"),
    ],
)
def test_errors_of_the_contract_pass_and_all_else_is_a_crash(script: Script, code: str) -> None:
    assert code_of(Setup(script)) == code


def test_a_crash_is_logged_without_the_words_of_the_error() -> None:
    setup = Setup(raising(ValueError(SECRET)))

    async def body() -> None:
        with pytest.raises(Failed) as caught:
            await setup.invoke()
        assert "ValueError" in caught.value.message
        assert SECRET not in caught.value.message

    run(body)
    [(level, event, fields)] = setup.log.lines
    assert (level, event, fields["error"]) == ("error", "capability.crashed", "ValueError")
    assert str(fields["where"]).partition(":")[0].endswith("support_orchestrate.py")
    assert SECRET not in repr(fields)


async def no_end(request: Request) -> AsyncGenerator[Event, None]:
    yield Chunk("a")


async def two_ends(request: Request) -> AsyncGenerator[Event, None]:
    yield Done()
    yield Done()


async def goes_on(request: Request) -> AsyncGenerator[Event, None]:
    yield Done()
    yield Chunk("more")


async def no_event(request: Request) -> AsyncGenerator[Event, None]:
    yield "a"  # type: ignore[misc]


@pytest.mark.parametrize("script", [no_end, two_ends, goes_on, no_event])
def test_a_broken_contract_is_a_failure(script: Script) -> None:
    assert code_of(Setup(script)) == "contract"


def test_what_the_reader_raises_is_not_the_capabilitys_fault() -> None:
    setup = Setup(saying("a", "b"))

    async def broken(chunk: Chunk) -> None:
        raise BrokenPipeError

    async def body() -> None:
        with pytest.raises(BrokenPipeError):
            await setup.host.invoke(GENERAL, request(), broken, own_source())
        assert setup.capability.running == 0
        assert setup.host.busy() == {GENERAL: (0, 0)}

    run(body)
    assert not setup.log.lines


def test_a_cancelled_capability_may_clean_up_with_awaits() -> None:
    cleaned: list[str] = []

    async def script(request: Request) -> AsyncGenerator[Event, None]:
        try:
            yield Chunk("a")
            yield Done()
        finally:
            await trio.sleep(0.5)
            cleaned.append("yes")

    async def stuck(chunk: Chunk) -> None:
        await trio.sleep_forever()

    setup = Setup(saying())
    setup.host.replace(_Plain(script))

    async def body() -> None:
        with trio.move_on_after(1.0) as scope:
            await setup.host.invoke(GENERAL, request(), stuck, own_source())
        assert scope.cancelled_caught
        assert cleaned == ["yes"]

    run(body)


class _Plain:
    """A capability that is its script."""

    def __init__(self, script: Script) -> None:
        self.descriptor = descriptor(GENERAL)
        self.invoke = script


def test_an_operation_that_is_not_offered_is_refused() -> None:
    setup = Setup(saying("a"))
    asked = replace(request(), operation=Operation.EMBED)
    assert code_of(setup, asked) == "unsupported"
    assert not setup.capability.requests


def test_what_is_not_here_is_refused() -> None:
    setup = Setup(saying("a"))

    async def body() -> None:
        with pytest.raises(Refused) as caught:
            await setup.host.invoke("knowledge.gpt/other", request(), setup.emit, own_source())
        assert caught.value.code == "not_here"

    run(body)


@pytest.mark.parametrize(
    "wrong",
    [
        descriptor(GENERAL),  # taken
        descriptor("knowledge.gpt/A"),
        descriptor("general"),
        replace(descriptor("knowledge.gpt/x"), slots=0),
        replace(descriptor("knowledge.gpt/x"), operations=()),
        replace(descriptor("knowledge.gpt/x"), fields={"topics": "x" * 2000}),
        replace(descriptor("knowledge.gpt/x"), fields={"size": 2**70}),
    ],
)
def test_what_cannot_be_announced_is_not_added(wrong: object) -> None:
    setup = Setup(saying("a"))
    before = setup.host.descriptors()
    with pytest.raises(ValueError):
        setup.host.add(Scripted(wrong, saying("b")))  # type: ignore[arg-type]
    assert setup.host.descriptors() == before
    assert len(setup.changes) == 1


def test_the_number_of_capabilities_is_bounded() -> None:
    setup = Setup(saying("a"))
    for number in range(HOSTED_MAX - 1):
        setup.host.add(Scripted(descriptor(f"knowledge.gpt/n{number}"), saying("a")))
    with pytest.raises(ValueError, match="one too many"):
        setup.host.add(Scripted(descriptor("knowledge.gpt/more"), saying("a")))


def test_replacing_changes_slots_and_what_is_invoked() -> None:
    setup = Setup(saying("old", gap_s=1.0))
    other = Scripted(descriptor(GENERAL, slots=2), saying("new", gap_s=1.0))

    async def body() -> None:
        setup.host.replace(other)
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(setup.note, request(number))
            await trio.testing.wait_all_tasks_blocked()
            assert setup.host.busy() == {GENERAL: (2, 0)}

    run(body)
    assert [chunk.text for chunk in setup.chunks] == ["new", "new"]
    assert setup.host.descriptors() == (other.descriptor,)
    with pytest.raises(KeyError):
        setup.host.replace(Scripted(descriptor("knowledge.gpt/none"), saying("a")))
