"""The executor: one subtask, two side by side, a calculation that was none, and what a failure cancels."""

from __future__ import annotations

import pytest
import trio
from tests.shell.support_orchestrate import (
    ARITHMETIC,
    GENERAL,
    World,
    asking,
    hanging,
    raising,
    route_of,
    run,
    saying,
    text_of,
)

from meshd.orchestrate.events import (
    ANSWER,
    Answered,
    Ask,
    AskEvent,
    Piece,
    Planned,
    SubtaskDone,
)
from meshd.orchestrate.planner import plan
from meshd_plugins.api import BadRequest, CapabilityError, Failed, Refused

TWO = "Write a line about the sea, and compute 37 * 43."
SUM = "What is 37 * 43?"


async def execute(world: World, ask: Ask) -> list[AskEvent]:
    events: list[AskEvent] = []

    async def send(event: AskEvent) -> None:
        await trio.lowlevel.checkpoint()
        events.append(event)

    await world.executor.run(ask, plan(ask, world.catalogue.data_names()), send)
    return events


def test_one_subtask_streams_and_ends_with_its_figures() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("The ", "sea.", gap_s=1.0, finish_reason="length"))
        events = await execute(world, asking())
        kinds = [type(event).__name__ for event in events]
        assert kinds == ["Planned", "Routed", "Piece", "Piece", "SubtaskDone", "Answered"]
        assert text_of(events) == "The sea."
        assert isinstance(events[-1], Answered)
        assert (events[-1].finish_reason, events[-1].total_s) == ("length", 2.0)

    run(body)


def test_two_subtasks_run_side_by_side_and_are_joined_in_the_order_asked() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("The ", "sea.", gap_s=5.0))
        world.peer("nano", ARITHMETIC, saying("37 * 43 = 1591", gap_s=1.0))
        events = await execute(world, asking(TWO))
        assert text_of(events) == "The sea.\n\n37 * 43 = 1591"
        assert {event.subtask for event in events if isinstance(event, Piece)} == {ANSWER}
        assert trio.current_time() == pytest.approx(10.0)  # not 11: side by side
        planned, answered = events[0], events[-1]
        assert isinstance(planned, Planned)
        assert isinstance(answered, Answered)
        assert planned.strategy == "decompose"
        assert [part.node_name for part in answered.parts] == ["pi", "nano"]
        assert answered.parts[1].total_s == pytest.approx(1.0)
        last = [index for index, event in enumerate(events) if isinstance(event, Piece)]
        done = [index for index, event in enumerate(events) if isinstance(event, SubtaskDone)]
        assert last[1] < done[0] < last[2] < done[1]

    run(body)


def test_each_subtask_is_asked_for_its_part_only() -> None:
    async def body() -> None:
        world = World()
        pi = world.peer("pi", GENERAL, saying("The sea."))
        nano = world.peer("nano", ARITHMETIC, saying("1591"))
        await execute(world, asking(TWO))
        asked = [scripted.requests[0] for scripted in (pi, nano)]
        assert [one.body["messages"] for one in asked] == [
            [{"role": "user", "content": "Write a line about the sea"}],
            [{"role": "user", "content": "compute 37 * 43."}],
        ]
        assert len({one.idempotency_id for one in asked}) == 2
        assert {one.request_id for one in asked} == {"r-1"}

    run(body)


@pytest.mark.parametrize("broken", ["pi", "nano"])
def test_one_that_fails_cancels_the_other_and_the_ask_fails_as_it_did(broken: str) -> None:
    async def body() -> None:
        world = World()
        scripts = {"pi": hanging("The "), "nano": hanging()}
        scripts[broken] = raising(Failed("the worker died", code="worker_died"), "begun")
        world.peer("pi", GENERAL, scripts["pi"])
        world.peer("nano", ARITHMETIC, scripts["nano"])
        with pytest.raises(Failed) as caught:
            await execute(world, asking(TWO))
        assert caught.value.code == "worker_died"
        assert world.remote.cancelled == [name for name in ("pi", "nano") if name != broken]

    run(body)


@pytest.mark.parametrize("question", [SUM, TWO])
def test_a_sum_that_the_calculator_does_not_understand_goes_to_a_model(question: str) -> None:
    async def body() -> None:
        world = World()
        pi = world.peer("pi", GENERAL, saying("About 1600."))
        world.peer("nano", ARITHMETIC, raising(BadRequest("which?", code="not_arithmetic")))
        events = await execute(world, asking(question))
        assert "nano" in route_of(events)
        assert text_of(events).endswith("About 1600.")
        assert isinstance(events[-1], Answered)
        assert events[-1].parts[-1].node_name == "pi"
        assert {request.name for request in pi.requests} == {GENERAL}

    run(body)


def test_other_faults_of_a_sum_are_told() -> None:
    async def body() -> None:
        world = World()
        pi = world.peer("pi", GENERAL, saying("About 1600."))
        world.peer("nano", ARITHMETIC, raising(BadRequest("division by zero", code="undefined")))
        with pytest.raises(BadRequest) as caught:
            await execute(world, asking(SUM))
        assert caught.value.code == "undefined"
        assert not pi.requests

    run(body)


def test_where_nobody_calculates_a_model_is_asked() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("About 1600."))
        assert text_of(await execute(world, asking(SUM))) == "About 1600."

    run(body)


def test_pieces_that_wait_for_their_turn_are_bounded_and_none_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("meshd.orchestrate.executor.PIECES_WAITING_MAX", 2)

    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("late", gap_s=20.0))
        world.peer("nano", ARITHMETIC, saying(*"0123456789"))
        assert text_of(await execute(world, asking(TWO))) == "late\n\n0123456789"

    run(body)


def test_parts_that_end_early_say_so_in_the_whole() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("The sea", finish_reason="length"))
        world.peer("nano", ARITHMETIC, saying("1591"))
        events = await execute(world, asking(TWO))
        assert isinstance(events[-1], Answered)
        assert events[-1].finish_reason == "length"

    run(body)


def test_the_deadline_counts_from_the_start_of_the_ask() -> None:
    """The calculator takes two of four seconds to say no; the model that is asked then gets two."""

    async def body() -> None:
        world = World()

        async def slow_no(request: object) -> object:
            await trio.sleep(2.0)
            raise BadRequest("which?", code="not_arithmetic")
            yield

        pi = world.peer("pi", GENERAL, hanging())
        world.peer("nano", ARITHMETIC, slow_no)  # type: ignore[arg-type]
        with pytest.raises(CapabilityError) as caught:
            await execute(world, asking(SUM, deadline_s=4.0))
        assert caught.value.code == "deadline_exceeded"
        assert pi.requests[0].deadline_s == pytest.approx(2.0)
        assert trio.current_time() == pytest.approx(4.0)

    run(body)


def test_a_refusal_of_all_is_told_as_one() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, raising(Refused("full", code="busy")))
        with pytest.raises(Refused):
            await execute(world, asking())

    run(body)
