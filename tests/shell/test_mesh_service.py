"""The service: events as they come, leaving early, errors as themselves, and one log line for each ask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from tests.shell.support_orchestrate import (
    ARITHMETIC,
    GENERAL,
    HANDBOOK,
    World,
    asking,
    hanging,
    raising,
    run,
    saying,
    text_of,
)

from meshd.orchestrate.events import Answered, AskEvent, Piece
from meshd.orchestrate.planner import Plan
from meshd_naming import MissingSuffix, NotServed
from meshd_plugins.api import BadRequest, CapabilityError, Chunk, Done, Failed, Refused

SECRET = "my secret diary"
TWO = "Write a line about the sea, and compute 37 * 43."


def test_an_ask_is_answered_and_logged_once() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("The ", "sea.", gap_s=0.5))
        events = await world.events(asking(SECRET))
        assert text_of(events) == "The sea."
        assert isinstance(events[-1], Answered)
        [line] = world.lines()
        assert line["outcome"] == "ok"
        assert line["peers"] == [f"{GENERAL}@pi"]
        assert (line["first_ms"], line["total_ms"]) == (500.0, 1000.0)
        assert SECRET not in repr(world.log.lines)
        assert "sea" not in repr(world.log.lines)
        assert world.mesh.asks_in_flight == 0

    run(body)


def test_a_reader_that_leaves_early_cancels_everything_everywhere() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, hanging("The "))
        local = world.local(ARITHMETIC, hanging())
        with trio.CancelScope() as scope:

            def leave(event: AskEvent) -> None:
                if isinstance(event, Piece):
                    scope.cancel()

            await world.events(asking(TWO), leave)
        assert world.remote.cancelled == ["pi"]
        assert local.running == 0
        assert world.host.busy() == {ARITHMETIC: (0, 0)}
        assert world.mesh.asks_in_flight == 0
        assert [line["outcome"] for line in world.lines()] == ["cancelled"]

    run(body)


def test_a_reader_that_is_cancelled_cancels_everything_everywhere() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, hanging())
        with trio.move_on_after(2.0) as scope:
            await world.events(asking())
        assert scope.cancelled_caught
        assert world.remote.cancelled == ["pi"]
        assert [line["outcome"] for line in world.lines()] == ["cancelled"]

    run(body)


@pytest.mark.parametrize(
    "error",
    [
        Failed("the worker died", code="worker_died"),
        Refused("all slots are taken", code="busy"),
        BadRequest(f"cannot read {SECRET!r}", code="bad_expression"),
    ],
    ids=lambda error: error.code,
)
@pytest.mark.parametrize("question", ["Tell me about the sea.", TWO], ids=["one", "two"])
def test_an_error_comes_as_itself_and_its_code_is_logged(
    error: CapabilityError, question: str
) -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, raising(error))
        world.peer("nano", ARITHMETIC, hanging())
        with pytest.raises(type(error)) as caught:
            await world.events(asking(question))
        assert caught.value.code == error.code
        [line] = world.lines()
        assert line["outcome"] == error.code
        assert ("error" in line) == (not isinstance(error, BadRequest))
        assert SECRET not in repr(world.log.lines)

    run(body)


def test_an_error_after_some_pieces_comes_after_them() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, raising(Failed("lost", code="stream_lost"), "half"))
        seen: list[AskEvent] = []
        with pytest.raises(Failed):
            await world.events(asking(), seen.append)
        assert text_of(seen) == "half"

    run(body)


def test_a_malformed_target_is_told_before_anything_is_done() -> None:
    async def body() -> None:
        world = World()
        seen: list[AskEvent] = []
        with pytest.raises(MissingSuffix):
            await world.events(asking(target="knowledge/x"), seen.append)
        assert not seen
        assert [line["outcome"] for line in world.lines()] == [MissingSuffix.code]

    run(body)


def test_what_nobody_serves_is_told_with_what_is_near() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", "knowledge.gpt/rivers", saying("a"))
        with pytest.raises(NotServed) as caught:
            await world.events(asking(target="knowledge.gpt/river"))
        assert caught.value.suggestion == "knowledge.gpt/rivers"
        assert [line["outcome"] for line in world.lines()] == [NotServed.code]

    run(body)


@pytest.mark.parametrize("question", ["Tell me about the sea.", TWO], ids=["one", "two"])
def test_a_bug_of_ours_comes_as_itself(question: str) -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, raising(ZeroDivisionError(SECRET)))
        world.peer("nano", ARITHMETIC, hanging())
        with pytest.raises(ZeroDivisionError):
            await world.events(asking(question))
        assert [line["outcome"] for line in world.lines()] == ["internal"]
        assert SECRET not in repr(world.log.lines)

    run(body)


def test_what_the_reader_raises_passes_as_it_is() -> None:
    def lost(event: AskEvent) -> None:
        if isinstance(event, Piece):
            raise ConnectionResetError

    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, hanging("a"))
        with pytest.raises(ConnectionResetError):
            await world.events(asking(), lost)
        assert world.remote.cancelled == ["pi"]
        assert [line["outcome"] for line in world.lines()] == ["cancelled"]

    run(body)


def test_asks_are_bounded_and_refused_ones_are_logged_too() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, hanging())
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(world.events, asking())
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(Refused) as caught:
                await world.events(asking())
            assert caught.value.code == "busy"
            assert world.mesh.asks_in_flight == 4
            nursery.cancel_scope.cancel()
        outcomes = [line["outcome"] for line in world.lines()]
        assert outcomes == ["busy"] + ["cancelled"] * 4
        assert world.mesh.asks_in_flight == 0

    run(body)


def test_a_node_that_drains_takes_no_asks() -> None:
    async def body() -> None:
        world = World()
        await world.mesh.drain()
        with pytest.raises(Refused) as caught:
            await world.events(asking())
        assert caught.value.code == "draining"

    run(body)


def test_a_plan_that_ends_without_an_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(ask: object, plan: Plan, send: object) -> None:
        await trio.lowlevel.checkpoint()

    async def body() -> None:
        world = World()
        monkeypatch.setattr(world.executor, "run", nothing)
        with pytest.raises(Failed) as caught:
            await world.events(asking())
        assert caught.value.code == "internal"

    run(body)


def test_a_document_is_found_by_its_words_and_comes_as_data() -> None:
    async def page(request: object) -> object:
        yield Chunk(data=b"# Boards", content_type="text/markdown")
        yield Done()

    async def body() -> None:
        world = World()
        world.peer("nano", HANDBOOK, page)  # type: ignore[arg-type]
        events = await world.events(asking("Show me the shelf handbook."))
        [piece] = [event for event in events if isinstance(event, Piece)]
        assert (piece.data, piece.content_type) == (b"# Boards", "text/markdown")

    run(body)


def test_what_is_shown_of_peers_and_capabilities() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("a"), slots=4)
        world.local(ARITHMETIC, saying("1"), slots=2)
        await trio.sleep(3.0)
        load = {"queue_max": 8, "draining": False, "capabilities": {GENERAL: [3, 1, 0]}, "cpu": 0.5}
        world.catalogue.note_load(world.node("pi"), load, age_s=1.0)
        hub, pi = world.mesh.peers()
        assert (hub["name"], hub["self"], hub["load_age_s"]) == ("hub", True, None)
        assert (pi["name"], pi["state"], pi["capabilities"]) == ("pi", "alive", 1)
        assert (pi["load_age_s"], pi["round_trip_ms"]) == (1.0, 1.0)
        arithmetic, general = world.mesh.capabilities()
        assert (arithmetic["node_name"], arithmetic["age_s"]) == ("hub", 0.0)
        assert (general["busy"], general["queued"], general["slots"]) == (3, 1, 4)
        assert (general["age_s"], general["summary"]) == (3.0, "a script")
        resolved = world.mesh.resolve(GENERAL)
        assert [row["node_name"] for row in resolved["candidates"]] == ["pi"]  # type: ignore[union-attr,index,call-overload]

    run(body)


def test_a_named_ask_is_not_split() -> None:
    async def body() -> None:
        world = World()
        pi = world.peer("pi", GENERAL, saying("a"))
        await world.events(replace(asking(TWO), target=GENERAL))
        assert pi.requests[0].body["messages"] == [{"role": "user", "content": TWO}]

    run(body)
