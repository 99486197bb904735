"""The router: whom it asks, what it tries again elsewhere and what not, and how it notices silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from tests.shell.support_orchestrate import (
    GENERAL,
    Scripted,
    World,
    descriptor,
    hanging,
    raising,
    run,
    saying,
)

from meshd.orchestrate.callers import Caller
from meshd.orchestrate.events import (
    REASON_CHARS_MAX,
    AttemptFailed,
    PlannedSubtask,
    Routed,
    SubtaskDone,
)
from meshd.orchestrate.host import Emit
from meshd.orchestrate.router import RouterConfig, demand_of
from meshd_naming import NotServed
from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Chunk,
    Failed,
    Operation,
    Privacy,
    Rates,
    Refused,
    Request,
)

BUSY = Refused("all slots are taken", code="busy")
DIED = Failed("the worker died", code="worker_died")


class Asked:
    """What one subtask showed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.routes: list[Routed] = []
        self.failed: list[AttemptFailed] = []
        self.texts: list[str] = []

    @property
    def nodes(self) -> list[str]:
        return [route.node_name for route in self.routes]

    async def routed(self, event: Routed | AttemptFailed) -> None:
        match event:
            case Routed():
                self.routes.append(event)
            case AttemptFailed():
                assert event.attempt == len(self.routes), "after its own attempt, before the next"
                self.failed.append(event)

    async def emit(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)

    async def run(
        self, name: str = GENERAL, *, deadline_s: float = 120.0, emit: Emit | None = None
    ) -> SubtaskDone:
        subtask = PlannedSubtask("t1", name, Operation.CHAT, "prompt")
        request = Request("r-1", name, Operation.CHAT, {}, deadline_s=deadline_s)
        return await self.world.router.run(
            subtask,
            request,
            Caller(self.world.node("hub")),
            routed=self.routed,
            emit=emit or self.emit,
        )

    async def error(self, name: str = GENERAL, *, deadline_s: float = 120.0) -> CapabilityError:
        with pytest.raises(CapabilityError) as caught:
            await self.run(name, deadline_s=deadline_s)
        return caught.value


def test_a_peer_is_asked_one_hop_further_and_with_what_is_left_of_the_time() -> None:
    async def body() -> None:
        world = World()
        pi = world.peer("pi", GENERAL, saying("a", "b", gap_s=1.0))
        asked = Asked(world)
        done = await asked.run(deadline_s=30.0)
        assert asked.texts == ["a", "b"]
        assert (done.node_name, done.first_s, done.total_s) == ("pi", 1.0, 2.0)
        [request] = pi.requests
        assert (request.hops, request.deadline_s) == (1, 30.0)
        [route] = asked.routes
        assert (route.attempt, route.name, route.capability_id) == (1, GENERAL, GENERAL)
        assert world.router.statistics.forwarded == 1

    run(body)


def test_what_is_here_is_served_here() -> None:
    async def body() -> None:
        world = World()
        here = world.local(GENERAL, saying("a"))
        assert (await Asked(world).run()).node_name == "hub"
        assert here.requests[0].hops == 0
        assert (world.router.statistics.served_here, world.remote.called) == (1, [])

    run(body)


@pytest.mark.parametrize("first", [BUSY, DIED], ids=["refusal", "failure"])
def test_what_fails_before_the_first_piece_is_tried_elsewhere(first: CapabilityError) -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(first))
        world.peer("pi", GENERAL, saying("a"))
        asked = Asked(world)
        done = await asked.run()
        assert asked.nodes == ["hub", "pi"]
        assert [route.attempt for route in asked.routes] == [1, 2]
        assert (done.node_name, asked.texts) == ("pi", ["a"])
        assert world.router.statistics.retries == 1

    run(body)


@pytest.mark.parametrize("first", [BUSY, DIED], ids=["refusal", "failure"])
def test_why_an_attempt_came_to_nothing_is_told(first: CapabilityError) -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(first))
        world.peer("pi", GENERAL, saying("a"))
        asked = Asked(world)
        done = await asked.run()
        [failed] = asked.failed
        assert (failed.node_name, failed.attempt, failed.code) == ("hub", 1, first.code)
        assert failed.reason == first.message
        assert failed.refused is isinstance(first, Refused)
        assert done.failed == (failed,)

    run(body)


def test_a_reason_that_is_long_is_cut() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(Failed("x" * 5000, code="c" * 5000)))
        world.peer("pi", GENERAL, saying("a"))
        asked = Asked(world)
        await asked.run()
        [failed] = asked.failed
        assert failed.reason == "x" * (REASON_CHARS_MAX - 1) + "…"
        assert len(failed.code) <= REASON_CHARS_MAX

    run(body)


def test_the_last_attempt_is_told_by_the_error_alone() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(BUSY))
        asked = Asked(world)
        assert (await asked.error()).code == "busy"
        assert asked.failed == []

    run(body)


def test_nothing_is_retried_after_the_first_piece() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(DIED, "half an "))
        world.peer("pi", GENERAL, saying("answer"))
        asked = Asked(world)
        assert (await asked.error()).code == "worker_died"
        assert (asked.nodes, asked.texts) == (["hub"], ["half an "])

    run(body)


def test_a_bad_request_is_not_retried() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(BadRequest("cannot", code="undefined")))
        world.peer("pi", GENERAL, saying("a"))
        asked = Asked(world)
        error = await asked.error()
        assert isinstance(error, BadRequest)
        assert (error.code, asked.nodes) == ("undefined", ["hub"])

    run(body)


def test_attempts_are_bounded_and_the_error_says_what_each_said() -> None:
    async def body() -> None:
        world = World(RouterConfig(attempts_max=3))
        for number in range(5):
            world.peer(f"pi-{number}", GENERAL, raising(BUSY))
        asked = Asked(world)
        error = await asked.error()
        assert isinstance(error, Refused)
        assert error.code == "busy"
        assert len(asked.nodes) == len(set(asked.nodes)) == 3
        assert error.message.startswith("asked 3 peers; ")
        assert all(f"{node}: all slots are taken" in error.message for node in asked.nodes)
        assert world.router.statistics.refusals == 3

    run(body)


class PickyFailure(Failed):
    """A plugin's own error, not made from a message alone."""

    def __init__(self, device: int) -> None:
        super().__init__(f"device {device} broke", code="device")


def test_a_plugins_own_error_class_is_told_as_one_of_the_contract() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(PickyFailure(3)))
        error = await Asked(world).error()
        assert type(error) is Failed
        assert (error.code, error.message) == ("device", "hub: device 3 broke")

    run(body)


def test_a_peer_that_never_begins_is_given_up_and_held_against_it() -> None:
    async def body() -> None:
        world = World(RouterConfig(first_piece_s=10.0))
        world.local(GENERAL, hanging())
        world.peer("pi", GENERAL, saying("a"))
        asked = Asked(world)
        assert (await asked.run()).node_name == "pi"
        assert trio.current_time() == pytest.approx(10.0)
        assert world.router.statistics.hung == 1
        key = (world.node("hub"), GENERAL)
        assert world.scheduler.health.score(key, trio.current_time()) == pytest.approx(1.0)
        assert world.scheduler.in_flight.count(key) == 0
        assert world.host.busy() == {GENERAL: (0, 0)}

    run(body)


def test_one_that_must_load_its_model_first_is_given_that_time_too() -> None:
    async def body() -> None:
        world = World(RouterConfig(first_piece_s=10.0))
        cold = replace(descriptor(GENERAL), rates=Rates(load_s=20.0), fields={"resident": False})
        world.host.add(Scripted(cold, hanging()))
        assert (await Asked(world).error(deadline_s=300.0)).code == "peer_hung"
        assert trio.current_time() == pytest.approx(10.0 + 2 * 20.0)

    run(body)


def test_a_peer_that_stops_midway_ends_the_subtask() -> None:
    async def body() -> None:
        world = World(RouterConfig(between_pieces_s=5.0))
        world.peer("pi", GENERAL, hanging("half"))
        world.peer("nano", GENERAL, hanging("half"))
        asked = Asked(world)
        assert (await asked.error()).code == "peer_hung"
        assert trio.current_time() == pytest.approx(5.0)
        assert len(asked.nodes) == 1
        assert world.remote.cancelled == asked.nodes

    run(body)


def test_a_slow_reader_is_not_taken_for_a_hung_peer() -> None:
    async def body() -> None:
        world = World(RouterConfig(first_piece_s=5.0, between_pieces_s=5.0))
        world.peer("pi", GENERAL, saying("a", "b", gap_s=4.0))
        asked = Asked(world)

        async def slowly(chunk: Chunk) -> None:
            await trio.sleep(20.0)
            await asked.emit(chunk)

        done = await asked.run(emit=slowly)
        assert (asked.texts, done.first_s) == (["a", "b"], 4.0)

    run(body)


@pytest.mark.parametrize("remote", [True, False])
def test_the_deadline_ends_it_whoever_runs_it_and_is_nobodys_fault(remote: bool) -> None:
    async def body() -> None:
        world = World()
        if remote:
            world.peer("pi", GENERAL, hanging())
        else:
            world.local(GENERAL, hanging())
        world.peer("nano", GENERAL, hanging())
        asked = Asked(world)
        assert (await asked.error(deadline_s=3.0)).code == "deadline_exceeded"
        assert trio.current_time() == pytest.approx(3.0)
        assert len(asked.nodes) == 1
        assert world.router.statistics.hung == 0
        now_s = trio.current_time()
        for name in asked.nodes:
            assert world.scheduler.health.score((world.node(name), GENERAL), now_s) == 0.0

    run(body)


def test_a_peer_that_says_that_the_time_is_up_is_believed_and_not_blamed() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(Failed("too late", code="deadline_exceeded")))
        pi = world.peer("pi", GENERAL, saying("a"))
        assert (await Asked(world).error()).code == "deadline_exceeded"
        assert not pi.requests
        key = (world.node("hub"), GENERAL)
        assert world.scheduler.health.score(key, trio.current_time()) == 0.0

    run(body)


def test_no_attempt_starts_when_the_time_is_up() -> None:
    async def body() -> None:
        world = World(RouterConfig(first_piece_s=3.0))
        world.local(GENERAL, hanging())
        pi = world.peer("pi", GENERAL, saying("a"))
        assert (await Asked(world).error(deadline_s=3.0)).code in ("deadline_exceeded", "peer_hung")
        assert not pi.requests
        assert (await Asked(world).error(deadline_s=-1.0)).code == "deadline_exceeded"
        assert not pi.requests

    run(body)


def test_what_nobody_serves_names_the_nearest() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", "knowledge.gpt/geography", saying("a"))
        with pytest.raises(NotServed) as caught:
            await Asked(world).run("knowledge.gpt/geographie")
        assert caught.value.suggestion == "knowledge.gpt/geography"
        assert world.router.statistics.not_served == 1

    run(body)


def test_suspects_and_the_forgotten_are_not_asked() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("a"))
        world.peer("nano", GENERAL, saying("b"))
        world.suspect("pi")
        asked = Asked(world)
        await asked.run()
        assert asked.nodes == ["nano"]
        world.forget("nano")
        with pytest.raises(NotServed):
            await asked.run()
        assert [offer.node_name for offer in world.catalogue.offers()] == ["pi"]

    run(body)


def test_a_node_that_drains_is_not_asked_and_a_busy_one_last() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("a"))
        world.peer("nano", GENERAL, saying("b"))
        world.catalogue.note_load(world.node("pi"), {"draining": True, "capabilities": {}})
        asked = Asked(world)
        await asked.run()
        assert asked.nodes == ["nano"]
        load = {"queue_max": 2, "draining": False, "capabilities": {GENERAL: [4, 2, 0]}}
        world.catalogue.note_load(world.node("pi"), load)
        for _ in range(5):
            await asked.run()
        assert asked.nodes == ["nano"] * 6
        known = world.catalogue.load_of((world.node("pi"), GENERAL))
        assert known is not None
        assert (known.busy, known.queued, known.queue_max) == (4, 2, 2)

    run(body)


def test_a_malformed_load_of_a_peer_is_no_load() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("a"))
        key = (world.node("pi"), GENERAL)
        for wrong in (7, {}, {"capabilities": []}, {"capabilities": {GENERAL: [1]}}):
            world.catalogue.note_load(world.node("pi"), wrong)
            assert world.catalogue.load_of(key) is None
        assert (await Asked(world).run()).node_name == "pi"

    run(body)


def test_a_request_that_must_stay_here_goes_nowhere_else() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("a"))
        asked = Asked(world)
        subtask = PlannedSubtask("t1", GENERAL, Operation.CHAT, "prompt")
        request = Request("r-1", GENERAL, Operation.CHAT, {}, privacy=Privacy.LOCAL)
        here = Caller(world.node("hub"))
        with pytest.raises(NotServed):
            await world.router.run(subtask, request, here, routed=asked.routed, emit=asked.emit)
        near = replace(request, privacy=Privacy.LAN)  # 127.0.0.x counts as such
        await world.router.run(subtask, near, here, routed=asked.routed, emit=asked.emit)
        assert asked.nodes == ["pi"]

    run(body)


def test_demand_counts_text_wherever_it_stands_and_takes_the_asked_maximum() -> None:
    body = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 32}
    demand = demand_of(Request("r", GENERAL, Operation.CHAT, body))
    assert demand.answer_tokens == 32
    assert 100 <= demand.prompt_tokens <= 103
    assert demand_of(Request("r", GENERAL, Operation.CHAT, {"max_tokens": "x"})).answer_tokens > 0
