"""One node with real host, catalogue, scheduler, router, executor and mesh; its peers are scripts."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing

import trio
import trio.testing
from tests.shell.support_log import KeptLog
from tests.unit.support_cms import store

from meshd.config import access_rules
from meshd.core.handoff import HandoffConfig, Links
from meshd.core.membership import MemberState, MemberView
from meshd.core.prefixes import SECRET_BYTES, Tagger
from meshd.core.scheduler import ExpectedTimePolicy, Scheduler, SchedulerConfig
from meshd.orchestrate.access import AccessPolicy, Standing
from meshd.orchestrate.access_guard import Guard, Source
from meshd.orchestrate.callers import Caller
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.events import Ask, AskEvent, Piece, Routed
from meshd.orchestrate.executor import Executor
from meshd.orchestrate.host import CapabilityHost, Emit, HostChange
from meshd.orchestrate.mesh import Faces, Mesh
from meshd.orchestrate.metrics import Family
from meshd.orchestrate.records import (
    NODE_KEY,
    capability_key,
    capability_value,
    model_key,
    model_value,
)
from meshd.orchestrate.router import Router, RouterConfig, Target
from meshd.orchestrate.warmth import Warmth
from meshd_cms import Epoch, NodeId, Version
from meshd_plugins.api import (
    Chunk,
    Descriptor,
    Done,
    Event,
    Operation,
    Privacy,
    Request,
    Value,
)

GENERAL = "knowledge.gpt/general"
ARITHMETIC = "knowledge.gpt/arithmetic"
HANDBOOK = "data.gpt/shelf/handbook"
Script = Callable[[Request], AsyncGenerator[Event, None]]


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test under a clock that jumps when nothing can happen; at most an hour of it."""

    async def bounded() -> None:
        with trio.fail_after(3600):
            await test()

    trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))


def descriptor(
    name: str, *, slots: int = 1, privacy: Privacy = Privacy.MESH, takes: Sequence[str] = ()
) -> Descriptor:
    operations: tuple[Operation, ...] = (Operation.CHAT, Operation.COMPLETE, Operation.RUN)
    if name.startswith("data"):
        operations = (Operation.FETCH,)
    fields: dict[str, Value] = {"modality": list(takes)} if takes else {}
    return Descriptor(name, operations, "a script", slots, privacy, fields=fields)


def saying(*texts: str, gap_s: float = 0.0, finish_reason: str = "stop") -> Script:
    """Say these, a pause before each, and be done."""

    async def script(request: Request) -> AsyncGenerator[Event, None]:
        for text in texts:
            await trio.sleep(gap_s)
            yield Chunk(text)
        yield Done(finish_reason)

    return script


def raising(error: Exception, *before: str) -> Script:
    """Say these, and break."""

    async def script(request: Request) -> AsyncGenerator[Event, None]:
        await trio.lowlevel.checkpoint()
        for text in before:
            yield Chunk(text)
        raise error

    return script


def hanging(*before: str) -> Script:
    """Say these, and nothing ever again."""

    async def script(request: Request) -> AsyncGenerator[Event, None]:
        for text in before:
            yield Chunk(text)
        await trio.sleep_forever()
        yield Done()

    return script


class Scripted:
    """A capability that follows a script."""

    def __init__(self, shown: Descriptor, script: Script) -> None:
        self.descriptor = shown
        self.requests: list[Request] = []
        self.running = 0
        self.most = 0  # that ran at once
        self._script = script

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async with aclosing(self._script(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.running -= 1


ME = NodeId(b"m" * 16)


def open_guard(
    me: NodeId = ME,
    reach_of: Callable[[NodeId], Privacy] = lambda _node: Privacy.MESH,
    rules: Sequence[Mapping[str, Value]] = (),
) -> Guard:
    """A guard without rules, unless there are some."""
    return Guard(me, AccessPolicy(access_rules(rules), me, lambda _node: Standing()), reach_of)


def own_source(node: NodeId = ME) -> Source:
    """Somebody at this node."""
    return Source(Caller(node))


class FakeRemote:
    """Implements the router's `Remote` by scripts, one for each peer."""

    def __init__(self) -> None:
        self.scripts: dict[NodeId, Scripted] = {}
        self.names: dict[NodeId, str] = {}
        self.called: list[str] = []
        self.callers: list[Caller] = []
        self.cancelled: list[str] = []

    async def invoke(self, target: Target, request: Request, caller: Caller, emit: Emit) -> Done:
        name = self.names[target.owner]
        self.called.append(name)
        self.callers.append(caller)
        try:
            async with aclosing(self.scripts[target.owner].invoke(request)) as events:
                async for event in events:
                    if isinstance(event, Done):
                        return event
                    await emit(event)
        except (trio.Cancelled, ConnectionError):  # or by what a reader of the tests raises
            self.cancelled.append(name)
            raise
        raise AssertionError("scripts of peers end with Done")


class World:
    """A node with its peers."""

    def __init__(
        self,
        config: RouterConfig | None = None,
        *,
        queue_max: int = 2,
        rules: Sequence[Mapping[str, Value]] = (),
    ) -> None:
        self.log = KeptLog()
        self.changes: list[HostChange] = []
        self.remote = FakeRemote()
        self._store = store(1)
        self._store.set(NODE_KEY, {"name": "hub"})
        self._members = [self._member(1, self._store.owner, "hub", is_self=True)]
        self.catalogue = Catalogue(self._store, lambda: tuple(self._members), trio.current_time)
        me = self._store.owner
        policy = AccessPolicy(access_rules(rules), me, self.catalogue.standing_of)
        self.guard = Guard(me, policy, self.catalogue.reach_of)
        self.host = CapabilityHost(
            guard=self.guard,
            queue_max=queue_max,
            changed=self._host_changed,
            load_changed=lambda: None,
            log=self.log,
        )
        scheduling = SchedulerConfig()
        self.scheduler = Scheduler(ExpectedTimePolicy(scheduling), scheduling, random.Random(7))
        self.router = Router(
            config or RouterConfig(),
            self.catalogue,
            self.scheduler,
            self.host,
            self.remote,
            self.guard,
            Warmth(
                self.catalogue,
                Tagger(bytes(SECRET_BYTES)),
                trio.current_time,
                HandoffConfig(),
                Links(HandoffConfig()),
            ),
        )
        self.executor = Executor(self.router, me)
        self.mesh = Mesh(
            self.catalogue,
            self.executor,
            Faces(NothingToSee(), list[Mapping[str, Value]], list[Mapping[str, Value]], _nothing),
            requests_max=4,
            log=self.log,
        )

    def local(
        self,
        name: str,
        script: Script,
        *,
        slots: int = 1,
        privacy: Privacy = Privacy.MESH,
        takes: Sequence[str] = (),
    ) -> Scripted:
        capability = Scripted(descriptor(name, slots=slots, privacy=privacy, takes=takes), script)
        self.host.add(capability)
        return capability

    def peer(
        self,
        name: str,
        capability: str,
        script: Script,
        *,
        slots: int = 4,
        privacy: Privacy = Privacy.MESH,
        host: str = "",
        takes: Sequence[str] = (),
    ) -> Scripted:
        """A new member that serves one capability; on the LAN unless its address says otherwise."""
        number = len(self._members) + 1
        theirs = store(number)
        shown = descriptor(capability, slots=slots, privacy=privacy, takes=takes)
        theirs.set(NODE_KEY, {"name": name})
        theirs.set(capability_key(shown.id), capability_value(shown))
        whole = theirs.delta_since(theirs.owner, Version(0), 10**6)
        assert whole is not None
        self._store.apply(whole, trio.current_time())
        self._members.append(self._member(number, theirs.owner, name, host=host))
        self.catalogue.members_changed()
        self.catalogue.record_changed(theirs.owner)
        scripted = Scripted(shown, script)
        self.remote.scripts[theirs.owner] = scripted
        self.remote.names[theirs.owner] = name
        return scripted

    def node(self, name: str) -> NodeId:
        return next(view.node for view in self._members if view.name == name)

    def forget(self, name: str) -> None:
        """Membership and store no longer know this node."""
        node = self.node(name)
        self._members = [view for view in self._members if view.node != node]
        self._store.forget(node)
        self.catalogue.members_changed()

    def suspect(self, name: str) -> None:
        """Membership doubts this node."""
        node = self.node(name)
        self._members = [
            self._member(9, view.node, view.name, state=MemberState.SUSPECT)
            if view.node == node
            else view
            for view in self._members
        ]
        self.catalogue.members_changed()

    async def events(
        self, ask: Ask, seen: Callable[[AskEvent], None] = lambda _event: None
    ) -> list[AskEvent]:
        """Everything that an ask shows; `seen` is told of each event as it comes."""
        shown: list[AskEvent] = []

        async def take(event: AskEvent) -> None:
            seen(event)
            shown.append(event)

        await self.mesh.ask(ask, take)
        return shown

    def lines(self) -> list[dict[str, object]]:
        """The canonical lines."""
        return [fields for _, event, fields in self.log.lines if event == "ask.finished"]

    def _host_changed(self, change: HostChange) -> None:
        self.changes.append(change)
        key = capability_key(change.capability_id)
        if change.descriptor is None:
            self._store.delete(key)
        else:
            model = change.descriptor.model
            if model is not None:
                self._store.set(model_key(model.digest), model_value(model))
            self._store.set(key, capability_value(change.descriptor))
        self.catalogue.record_changed(self._store.owner)

    @staticmethod
    def _member(
        number: int,
        node: NodeId,
        name: str,
        *,
        is_self: bool = False,
        state: MemberState = MemberState.ALIVE,
        host: str = "",
    ) -> MemberView:
        address = (host or f"127.0.0.{number}", 7946)
        return MemberView(node, name, address, state, Epoch(1), 0, 0.0, 0.001, is_self=is_self)


class NothingToSee:
    """An operator's view of no daemon."""

    def status(self) -> Mapping[str, Value]:
        return {}

    def metrics(self) -> list[Family]:
        return []

    def store(self, node: str) -> Mapping[str, Value]:
        return {"records": []}

    async def store_diff(self, node: str) -> Mapping[str, Value]:
        return {"differences": []}

    async def doctor(self) -> Mapping[str, Value]:
        return {"findings": []}


async def _nothing() -> None:
    pass


def asking(
    text: str = "Tell me about the sea.", target: str = "auto", *, deadline_s: float = 120.0
) -> Ask:
    body: dict[str, Value] = {"messages": [{"role": "user", "content": text}]}
    return Ask(target, Operation.CHAT, body, "r-1", deadline_s, Privacy.MESH)


def text_of(events: list[AskEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def route_of(events: list[AskEvent]) -> list[str]:
    """Nodes in the order in which they were asked."""
    return [event.node_name for event in events if isinstance(event, Routed)]
