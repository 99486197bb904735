"""The router and operations on vectors: how long a peer may compute in silence, and who never stands in."""

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
    run,
    saying,
)

from meshd.orchestrate.callers import Caller
from meshd.orchestrate.events import AttemptFailed, PlannedSubtask, Routed
from meshd.orchestrate.router import COMPUTING_STRETCH, RouterConfig
from meshd_naming import NotServed
from meshd_plugins.api import CapabilityError, Chunk, Operation, Rates, Request

EMBEDDINGS = "knowledge.gpt/embeddings"
RATES = Rates(prefill_tokens_per_s=100.0)


async def embed(world: World, tokens: int) -> None:
    """Ask for the vector of a text of about that many tokens."""

    async def routed(_event: Routed | AttemptFailed) -> None:
        await trio.lowlevel.checkpoint()

    async def emit(_chunk: Chunk) -> None:
        await trio.lowlevel.checkpoint()

    subtask = PlannedSubtask("t1", EMBEDDINGS, Operation.EMBED, "text")
    body = {"input": ["x" * 4 * (tokens - 1)]}
    request = Request("r-1", EMBEDDINGS, Operation.EMBED, body, deadline_s=3600.0)
    caller = Caller(world.node("hub"))
    await world.router.run(subtask, request, caller, routed=routed, emit=emit)


@pytest.mark.parametrize(("said", "bound_s"), [((), 30.0), (("rows",), 15.0)])
def test_a_peer_may_be_silent_for_as_long_as_its_rate_explains(
    said: tuple[str, ...], bound_s: float
) -> None:
    async def body() -> None:
        world = World(RouterConfig(first_piece_s=30.0, between_pieces_s=15.0))
        embeds = replace(descriptor(EMBEDDINGS), operations=(Operation.EMBED,), rates=RATES)
        world.host.add(Scripted(embeds, hanging(*said)))
        with pytest.raises(CapabilityError) as caught:
            await embed(world, tokens=1000)
        assert caught.value.code == "peer_hung"
        assert trio.current_time() == pytest.approx(bound_s + COMPUTING_STRETCH * 10.0)

    run(body)


def test_no_general_model_stands_in_for_one_whose_vectors_were_asked_for() -> None:
    async def body() -> None:
        world = World()
        general = replace(descriptor(GENERAL), operations=(Operation.EMBED,), rates=RATES)
        world.host.add(Scripted(general, saying("rows")))
        with pytest.raises(NotServed):
            await embed(world, tokens=10)

    run(body)
