"""Requests with images and sound go to those who take them in, whole, and nowhere else."""

from __future__ import annotations

from base64 import b64encode

import pytest
from tests.shell.support_orchestrate import (
    ARITHMETIC,
    GENERAL,
    HANDBOOK,
    World,
    own_source,
    raising,
    route_of,
    run,
    saying,
    text_of,
)
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

from meshd.orchestrate.events import Ask, Planned
from meshd.orchestrate.router import ANSWER_TOKENS_DEFAULT, LOOKING_S, RouterConfig, demand_of
from meshd_plugins.api import BadRequest, Chunk, Failed, Operation, Privacy, Refused, Request, Value
from meshd_plugins.media import TOKENS_PER_MEDIUM

SEES = ("text", "image")
VISION = "knowledge.gpt/vision"


def asking(*parts: Value, target: str = GENERAL) -> Ask:
    body: dict[str, Value] = {"messages": [{"role": "user", "content": list(parts)}]}
    return Ask(target, Operation.CHAT, body, "r-1", 60.0, Privacy.MESH)


LOOK = (text_part("Compute 2 + 2, and what is it?"), image_part(png()))
LISTEN = (audio_part(wav()),)


def test_an_image_goes_to_the_one_that_sees_and_arrives_as_it_was() -> None:
    async def body() -> None:
        world = World()
        blind = world.local(GENERAL, saying("blind"))
        seeing = world.peer("pi", GENERAL, saying("seen"), takes=SEES)
        events = await world.events(asking(*LOOK))
        assert (text_of(events), route_of(events)) == ("seen", ["pi"])
        assert blind.requests == []
        assert seeing.requests[0].body == asking(*LOOK).body

    run(body)


def test_where_the_nearest_name_is_blind_a_general_one_that_sees_answers() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", "knowledge.gpt/medicine", saying("blind"))
        world.peer("nano", GENERAL, saying("seen"), takes=SEES)
        events = await world.events(asking(*LOOK, target="knowledge.gpt/medicine"))
        assert route_of(events) == ["nano"]

    run(body)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (LOOK, rf'nothing that serves "{GENERAL}" now takes in images; what does: {VISION}'),
        (LISTEN, "takes in sound; the models of this mesh take in image, text"),
        ((*LOOK, *LISTEN), "takes in images and sound; the models of this mesh"),
    ],
)
def test_where_nobody_takes_it_in_it_is_said_who_would(
    parts: tuple[Value, ...], words: str
) -> None:
    async def body() -> None:
        world = World()
        blind = world.local(GENERAL, saying("blind"))
        world.peer("pi", VISION, saying("seen"), takes=SEES)
        with pytest.raises(BadRequest, match=words) as caught:
            await world.events(asking(*parts))
        assert (caught.value.code, blind.requests) == ("unsupported_modality", [])

    run(body)


def test_auto_asks_general_models_first_and_then_any_that_sees() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, saying("blind"))
        world.local(ARITHMETIC, saying("4"))
        world.peer("pi", VISION, saying("seen"), takes=SEES)
        events = await world.events(asking(*LOOK, target="auto"))
        assert (text_of(events), route_of(events)) == ("seen", ["pi"])
        [planned] = [event for event in events if isinstance(event, Planned)]
        assert (planned.strategy, len(planned.subtasks)) == ("single", 1)
        world.peer("nano", GENERAL, saying("general"), takes=SEES)
        assert route_of(await world.events(asking(*LOOK, target="auto"))) == ["nano"]

    run(body)


def test_an_image_without_a_word_is_a_question() -> None:
    async def body() -> None:
        world = World()
        world.peer("pi", GENERAL, saying("seen"), takes=SEES)
        assert text_of(await world.events(asking(image_part(png()), target="auto"))) == "seen"

    run(body)


@pytest.mark.parametrize("target", ["computation.gpt/echo", HANDBOOK])
def test_what_takes_no_messages_does_not_pass_an_image_over(target: str) -> None:
    async def body() -> None:
        world = World()
        capability = world.local(target, saying("blind"))
        with pytest.raises(BadRequest, match="does not take in images"):
            await world.events(asking(*LOOK, target=target))
        assert capability.requests == []

    run(body)


def test_who_serves_looks_for_itself_and_another_is_asked() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, saying("blind"))
        request = Request("r-1", GENERAL, Operation.CHAT, asking(*LOOK).body)

        async def nothing(_chunk: Chunk) -> None:
            raise AssertionError("it must not say a word")

        with pytest.raises(Refused, match="does not take in images") as caught:
            await world.host.invoke(GENERAL, request, nothing, own_source())
        refused = caught.value
        assert refused.code == "unsupported_modality"
        world.peer("once-saw", GENERAL, raising(refused), takes=SEES, slots=8)
        world.peer("sees", GENERAL, saying("seen"), takes=SEES)
        routes = [route_of(await world.events(asking(*LOOK))) for _ in range(4)]
        assert {route[-1] for route in routes} == {"sees"}
        assert ["once-saw", "sees"] in routes

    run(body)


def test_an_image_is_no_text_of_a_million_characters() -> None:
    photo = jpeg(3_000_000)
    words = text_part("x" * 400)

    def tokens(*parts: Value) -> int:
        request = Request("r-1", GENERAL, Operation.CHAT, asking(*parts).body)
        demand = demand_of(request)
        assert demand.answer_tokens == ANSWER_TOKENS_DEFAULT
        return demand.prompt_tokens

    assert tokens(words, image_part(photo)) - tokens(words) == TOKENS_PER_MEDIUM
    assert tokens(words, audio_part(wav(9)), image_part(photo)) - tokens(words) == (
        2 * TOKENS_PER_MEDIUM
    )


def test_a_look_may_take_its_time_and_not_for_ever() -> None:
    async def body() -> None:
        world = World(RouterConfig(first_piece_s=5.0))
        world.peer("pi", GENERAL, saying("seen", gap_s=LOOKING_S), takes=SEES)
        assert text_of(await world.events(asking(*LOOK))) == "seen"
        world.forget("pi")
        world.peer("nano", GENERAL, saying("seen", gap_s=LOOKING_S + 6.0), takes=SEES)
        with pytest.raises(Failed, match="nothing came for 50 s"):
            await world.events(asking(*LOOK))

    run(body)


def test_nothing_of_an_image_is_in_a_log() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, raising(RuntimeError("broke")), takes=SEES)
        for target in (GENERAL, "knowledge.gpt/nothing", "auto", ARITHMETIC):
            with pytest.raises(Exception, match=r"."):
                await world.events(asking(*LOOK, target=target))
        with pytest.raises(BadRequest):
            await world.events(asking(*LISTEN))
        told = repr(world.log.lines)
        assert len(world.lines()) == 5
        assert b64encode(png()).decode()[:24] not in told
        assert "data:image" not in told

    run(body)
