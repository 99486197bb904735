"""Where a conversation goes on: where its beginning is warm, unless that is full; and what the others are told."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

import trio
from tests.shell.support_handoff import model
from tests.shell.support_orchestrate import (
    GENERAL,
    Script,
    World,
    raising,
    route_of,
    run,
)
from tests.unit.support_cms import store

from meshd.core.frames import WarmHint
from meshd.core.prefixes import TAG_BYTES, TAGS_MAX, pack_warm
from meshd.core.scheduler import HeadStart
from meshd.orchestrate.callers import Caller
from meshd.orchestrate.events import Ask, Routed
from meshd.orchestrate.host import Emit
from meshd.orchestrate.records import capability_key, capability_value, model_key, model_value
from meshd.orchestrate.router import Target
from meshd.orchestrate.warmth import REMEMBERED_S, TOLD_WITHIN_S
from meshd_cms import Version
from meshd_naming import ResolveOptions
from meshd_plugins.api import (
    Chunk,
    Descriptor,
    Done,
    Event,
    Operation,
    Privacy,
    Refused,
    Request,
    Usage,
    Value,
)

_OPTIONS = ResolveOptions(operation="chat")
LONG = "The quick brown fox jumps over the lazy dog. " * 90  # about 1,000 tokens


def answering(prompt_tokens: int = 1_000) -> Script:
    async def script(request: Request) -> AsyncGenerator[Event, None]:
        await trio.lowlevel.checkpoint()
        yield Chunk("an answer")
        yield Done(usage=Usage(prompt_tokens, 20))

    return script


@dataclass
class Mesh:
    """A world of peers with one model, and what was sent to them."""

    world: World

    def __post_init__(self) -> None:
        self.targets: list[Target] = []
        self.requests: list[Request] = []
        inner = self.world.remote.invoke

        async def invoke(target: Target, request: Request, caller: Caller, emit: Emit) -> Done:
            self.targets.append(target)
            self.requests.append(request)
            return await inner(target, request, caller, emit)

        self.world.remote.invoke = invoke  # type: ignore[method-assign]

    def peer(self, name: str, script: Script, shown: Descriptor | None = None) -> None:
        """A member with the model, idle as far as is known."""
        world = self.world
        scripted = world.peer(name, GENERAL, script)
        theirs = store(len(world._members))
        shown = shown or model()
        assert shown.model is not None
        theirs.set("node", {"name": name})
        theirs.set(model_key(shown.model.digest), model_value(shown.model))
        theirs.set(capability_key(shown.id), capability_value(shown))
        whole = theirs.delta_since(theirs.owner, Version(0), 10**6)
        assert whole is not None
        world._store.forget(theirs.owner)
        world._store.apply(whole, trio.current_time())
        world.catalogue.record_changed(theirs.owner)
        scripted.descriptor = shown
        self.load(name)

    def load(
        self,
        name: str,
        *,
        busy: int = 0,
        warm: dict[bytes, int] | None = None,
        queue_max: int = 0,
        held_tenths: int = 0,
    ) -> None:
        """What a peer says of itself now."""
        load: dict[str, Value] = {
            "queue_max": queue_max,
            "capabilities": {model().id: [busy, 0, held_tenths]},
        }
        if warm is not None:
            load["warm"] = pack_warm(list(warm.items()))
        self.world.catalogue.note_load(self.world.node(name), load)

    async def ask(self, *texts: str, privacy: Privacy = Privacy.MESH) -> str:
        """Ask with a conversation; who served it."""
        roles = ("user", "assistant")
        messages: list[Value] = [
            {"role": roles[number % 2], "content": text} for number, text in enumerate(texts)
        ]
        asked = Ask(GENERAL, Operation.CHAT, {"messages": messages}, "r-1", 120.0, privacy)
        return route_of(await self.world.events(asked))[-1]


def made(seed: int = 7) -> Mesh:
    mesh = Mesh(World())
    mesh.world.scheduler._rng = random.Random(seed)
    return mesh


def test_a_conversation_goes_on_where_it_began() -> None:
    async def body() -> None:
        for seed in range(8):
            mesh = made(seed)
            mesh.peer("a", answering())
            mesh.peer("b", answering())
            first = await mesh.ask(LONG)
            for name in ("a", "b"):
                mesh.load(name)
            assert await mesh.ask(LONG, "an answer", "And then?") == first
            assert all(target.hint is None for target in mesh.targets), "it went where it is warm"
            tags = [request.tags for request in mesh.requests]
            assert [len(each) for each in tags] == [1, 3]
            assert tags[1][0] == tags[0][0]

    run(body)


def test_another_conversation_is_not_taken_for_it() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        await mesh.ask(LONG)
        before = mesh.requests[-1].tags
        await mesh.ask(LONG + "!", "an answer", "And then?")
        assert not set(before) & set(mesh.requests[-1].tags)

    run(body)


def test_where_it_is_warm_but_full_another_serves_and_is_told_where_to_fetch() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        mesh.peer("b", answering())
        first = await mesh.ask(LONG)
        other = {"a": "b", "b": "a"}[first]
        mesh.load(first, busy=model().slots)
        mesh.load(other)
        assert await mesh.ask(LONG, "an answer", "And then?") == other
        tag = mesh.requests[0].tags[-1]
        assert mesh.targets[-1].hint == WarmHint(mesh.world.node(first), tag, 1_020)
        assert mesh.world.router.statistics.hinted == 1

    run(body)


def test_who_would_wait_long_where_it_is_warm_goes_to_who_can_fetch_it_sooner() -> None:
    async def served_by(*, held_tenths: int) -> tuple[str, str, WarmHint | None]:
        mesh = made()
        mesh.peer("a", answering())
        mesh.peer("b", answering())
        first = await mesh.ask(LONG)
        other = {"a": "b", "b": "a"}[first]
        mesh.load(first, busy=model().slots, queue_max=8, held_tenths=held_tenths)
        mesh.load(other, queue_max=8)
        return first, await mesh.ask(LONG, "an answer", "And then?"), mesh.targets[-1].hint

    async def body() -> None:
        first, then, hint = await served_by(held_tenths=600)
        assert then != first
        assert hint is not None, "and it is told where to fetch"
        first, then, hint = await served_by(held_tenths=1)
        assert then == first, "the slot is free sooner than anything could be fetched"
        assert hint is None

    run(body)


def test_what_can_be_fetched_is_counted_by_where_it_is_and_how_far_that_is() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        await mesh.ask(LONG)
        mesh.peer("b", answering())
        world, tag = mesh.world, mesh.requests[0].tags[-1]
        texts: list[Value] = [
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": "an answer"},
            {"role": "user", "content": "And then?"},
        ]
        request = Request("r-1", GENERAL, Operation.CHAT, {"messages": texts}, privacy=Privacy.MESH)
        caller = Caller(world.node("hub"))
        there = {
            each.offer.owner: world.router._warmth.begin(request, caller).head_start(each)
            for each in world.catalogue.resolve(GENERAL, _OPTIONS).candidates
        }
        assert tag in world.router._warmth.begin(request, caller).tags(
            world.catalogue.resolve(GENERAL, _OPTIONS).candidates[0]
        )
        assert there[world.node("a")] == HeadStart(1_020)
        fetching = there[world.node("b")]
        assert (fetching.warm_tokens, fetching.fetched_tokens) == (0, 1_020)
        assert 0.0 < fetching.fetch_s < 10.0, "its prefill takes 10 s"
        local = replace(request, privacy=Privacy.LOCAL)
        for each in world.catalogue.resolve(GENERAL, _OPTIONS).candidates:
            found = world.router._warmth.begin(local, caller).head_start(each)
            assert not found.fetched_tokens, "what stays here is fetched from nowhere"

    run(body)


def test_the_reason_says_what_is_warm() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        await mesh.ask(LONG)
        messages: list[Value] = [
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": "an answer"},
            {"role": "user", "content": "And then?"},
        ]
        asked = Ask(GENERAL, Operation.CHAT, {"messages": messages}, "r-1", 120.0, Privacy.MESH)
        routed = [each for each in await mesh.world.events(asked) if isinstance(each, Routed)]
        assert "; warm: 1020 tokens" in routed[0].reason

    run(body)


def test_what_nodes_tell_is_believed_too() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        mesh.peer("b", answering())
        await mesh.ask(LONG)
        tag = mesh.requests[0].tags[-1]
        await trio.sleep(REMEMBERED_S + 1.0)
        mesh.load("a", warm={})
        mesh.load("b", warm={tag: 1_020})
        assert await mesh.ask(LONG, "an answer", "And then?") == "b"

    run(body)


def test_a_node_that_forgot_is_not_preferred_any_more() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        mesh.peer("b", answering())
        first = await mesh.ask(LONG)
        node, tag = mesh.world.node(first), mesh.requests[0].tags[-1]
        warmth = mesh.world.router._warmth
        assert warmth.tokens(node, tag) == 1_020
        mesh.load(first, warm={})  # made in the same moment: its worker has not reported yet
        assert warmth.tokens(node, tag) == 1_020
        await trio.sleep(TOLD_WITHIN_S + 1.0)
        mesh.load(first, warm={bytes([n]) * TAG_BYTES: 64 for n in range(16)})  # more than it tells
        assert warmth.tokens(node, tag) == 1_020
        mesh.load(first, warm={})
        assert warmth.tokens(node, tag) == 0

    run(body)


def test_only_nodes_with_the_same_model_are_named_and_none_that_may_not_be_asked() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        first = await mesh.ask(LONG)
        assert first == "a"
        mesh.peer("b", answering(), model("another build"))
        mesh.load("a", busy=model().slots)
        assert await mesh.ask(LONG, "an answer", "And then?") == "b"
        assert mesh.targets[-1].hint is None
        assert not set(mesh.requests[-1].tags) & set(mesh.requests[0].tags), "tags are of a model"

    run(body)


def test_a_request_that_failed_is_not_remembered() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", raising(Refused("full", code="busy")))
        mesh.peer("b", answering())
        assert await mesh.ask(LONG) == "b"
        tag = mesh.requests[-1].tags[-1]
        warmth = mesh.world.router._warmth
        assert warmth.tokens(mesh.world.node("a"), tag) == 0
        assert warmth.tokens(mesh.world.node("b"), tag) == 1_020

    run(body)


def test_a_request_that_stays_here_says_nothing_of_others() -> None:
    async def body() -> None:
        world = World()
        world.local(GENERAL, answering())
        beginning = world.router._warmth.begin(
            Request("r-1", GENERAL, Operation.CHAT, {"messages": []}, privacy=Privacy.LOCAL),
            Caller(world.node("hub")),
        )
        [candidate] = world.catalogue.resolve(GENERAL, _OPTIONS).candidates
        assert beginning.tags(candidate) == (), "what keeps no state is sent no tags"
        assert beginning.hint(candidate, lambda _offer: True) is None

    run(body)


def test_long_conversations_have_tags_of_their_last_messages() -> None:
    async def body() -> None:
        mesh = made()
        mesh.peer("a", answering())
        texts = [str(number) for number in range(20)]
        await mesh.ask(*texts)
        await mesh.ask(*texts, "one more")
        before, after = (request.tags for request in mesh.requests)
        assert len(before) == len(after) == TAGS_MAX
        assert before[1:] == after[:-1]

    run(body)
