"""Nodes on loopback with real TLS, real passports and real records; their models only count tokens.

The "state" of a prefix is made of its tag, so that a test sees whether it arrived whole.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import trio
from tests.shell.support_log import KeptLog
from tests.shell.support_orchestrate import GENERAL
from tests.shell.support_streams import Peer, identities, peer
from tests.shell.test_remote_capabilities import KeptAudit

from meshd.config import access_rules
from meshd.core.frames import WarmHint
from meshd.core.handoff import HandoffConfig, Links
from meshd.core.membership import MemberState, MemberView
from meshd.orchestrate.access import AccessPolicy
from meshd.orchestrate.access_guard import Guard, Source
from meshd.orchestrate.callers import Caller, Passports
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.handoff import HandoffStatistics, PrefixServer
from meshd.orchestrate.host import CapabilityHost
from meshd.orchestrate.prefix_fetcher import PrefixFetcher
from meshd.orchestrate.records import (
    NODE_KEY,
    capability_key,
    capability_value,
    model_key,
    model_value,
)
from meshd.shell.streams import IncomingCall
from meshd.trust.identity import Identity
from meshd.trust.keys import verify
from meshd_cms import Epoch, NodeId, Store, Version
from meshd_cms.types import StoreConfig
from meshd_plugins.api import (
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    ModelFacts,
    Operation,
    PrefixExport,
    PrefixHead,
    Privacy,
    Rates,
    Refused,
    Request,
    Usage,
    Value,
    WarmPrefix,
)

KV_KEY = "the same file, build and cache"
TAG = b"tag-0001"
PROMPT_TOKENS = 1_000
STATE_BYTES_PER_TOKEN = 512
UNIX_S = 1_800_000_000.0


def model(kv_key: str = KV_KEY) -> Descriptor:
    """A slow model: 1,000 tokens take 10 s to compute."""
    facts = ModelFacts(
        "ab" * 32,
        "Counting",
        "llama",
        1,
        "Q4_1",
        4096,
        1,
        kv_key=kv_key,
        kv_bytes_per_token=STATE_BYTES_PER_TOKEN,
    )
    operations = (Operation.CHAT, Operation.COMPLETE)
    return Descriptor(
        GENERAL,
        operations,
        "counts",
        4,
        model=facts,
        rates=Rates(100.0, 10.0),
        privacy=Privacy.MESH,
    )


def state_of(tag: bytes, tokens: int = PROMPT_TOKENS) -> bytes:
    return blake2b(tag).digest() * (tokens * STATE_BYTES_PER_TOKEN // 64)


@dataclass
class Kept:
    """One state."""

    head: PrefixHead
    data: bytes


def kept(
    caller: str, tag: bytes = TAG, *, privacy: Privacy = Privacy.MESH, tokens: int = PROMPT_TOKENS
) -> Kept:
    data = state_of(tag, tokens)
    ids = b"".join(number.to_bytes(4, "little") for number in range(tokens))
    digest = blake2b(data, digest_size=32).digest()
    return Kept(PrefixHead(tag, caller, privacy, ids, len(data), digest), data)


class Counting:
    """A model that says how many tokens it had to compute; implements `PrefixHolder`.

    Attributes:
        spoil: changes what is handed out, to play a holder that is broken.
        checks: whether it looks at class and caller itself, as it should.
        reports: whether it has said by now what is warm.
    """

    def __init__(self, shown: Descriptor | None = None) -> None:
        self.descriptor = shown or model()
        self.states: dict[bytes, Kept] = {}
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        self.pause = trio.Event()
        self.pause.set()
        self.checks = True
        self.reports = True
        self.import_error: Exception | None = None
        self.warm_error: Exception | None = None
        self.begun = 0
        self.exported: Exported | None = None  # the last one
        self.refuses = False  # once it has said what it hands out
        self.let_go = 0  # exports that are over

    def keep(self, state: Kept) -> None:
        self.states[state.head.tag] = state

    def warm(self) -> Sequence[WarmPrefix]:
        if self.warm_error is not None:
            raise self.warm_error
        if not self.reports:
            return []
        return [WarmPrefix(tag, state.head.tokens) for tag, state in self.states.items()]

    @asynccontextmanager
    async def export_prefix(
        self, tag: bytes, caller: str, away: Privacy
    ) -> AsyncIterator[PrefixExport]:
        await trio.lowlevel.checkpoint()
        state = self.states.get(tag)
        if state is None:
            raise Refused("not here", code="not_warm")
        if self.checks and state.head.caller != caller:
            raise Refused("another's", code="caller")
        if self.checks and away > state.head.privacy:
            raise Refused("too far", code="privacy")
        self.exported = Exported(
            state.head, self.spoil(state.data), self.pause, refuses=self.refuses
        )
        try:
            yield self.exported
        finally:
            self.let_go += 1

    async def import_prefix(self, head: PrefixHead, data: AsyncIterable[bytes]) -> int:
        self.begun += 1
        pieces = [piece async for piece in data]
        if self.import_error is not None:
            raise self.import_error
        self.states[head.tag] = Kept(head, b"".join(pieces))
        return head.tokens

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        await trio.lowlevel.checkpoint()
        found = [self.states[tag] for tag in request.tags if tag in self.states]
        usable = [state for state in found if state.head.caller == request.caller]
        assert all(state.data == state_of(state.head.tag) for state in usable), (
            "used what is broken"
        )
        warm = max((state.head.tokens for state in usable), default=0)
        yield Chunk(f"computed {PROMPT_TOKENS - warm}")
        yield Done(usage=Usage(PROMPT_TOKENS, 2))


@dataclass
class Exported:
    """Implements `PrefixExport`; the pieces are small."""

    head: PrefixHead
    data: bytes
    pause: trio.Event
    at: int = 0
    refuses: bool = False

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise Refused("it is gone")
        if self.at:
            await self.pause.wait()
        piece = self.data[self.at : self.at + 100_000]
        self.at += len(piece)
        return piece or None


@dataclass
class Node:
    """One daemon, as far as hand-over goes."""

    peer: Peer
    store: Store
    catalogue: Catalogue
    guard: Guard
    host: CapabilityHost
    capability: Counting
    fetcher: PrefixFetcher
    server: PrefixServer
    passports: Passports
    audit: KeptAudit
    log: KeptLog = field(default_factory=KeptLog)

    @property
    def id(self) -> NodeId:
        return self.peer.node

    @property
    def statistics(self) -> HandoffStatistics:
        return self.fetcher.statistics

    async def ask(
        self, request: Request, caller: Caller, hint: WarmHint | None, sender: NodeId | None = None
    ) -> str:
        """Serve a request here; what the model says."""
        texts: list[str] = []

        async def emit(chunk: Chunk) -> None:
            texts.append(chunk.text)

        away = Privacy.LOCAL if sender is None else Privacy.LAN
        source = Source(caller, sender, away, hint)
        request = replace(request, caller=str(caller))
        await self.host.invoke(self.capability.descriptor.id, request, emit, source)
        return "".join(texts)


def request(
    *tags: bytes, privacy: Privacy = Privacy.MESH, name: str = GENERAL, deadline_s: float = 30.0
) -> Request:
    return Request(
        "r-1", name, Operation.CHAT, {}, privacy=privacy, deadline_s=deadline_s, tags=tags
    )


@asynccontextmanager
async def nodes(
    folder: Path,
    count: int = 2,
    *,
    rules: Mapping[int, Sequence[Mapping[str, Value]]] | None = None,
    config: HandoffConfig | None = None,
) -> AsyncIterator[list[Node]]:
    """Nodes that know each other, each with the same model."""
    made: list[Node] = []

    async def serve(index: int, call: IncomingCall) -> Value:
        return await made[index].server.serve(call)

    async with AsyncExitStack() as stack:
        members = identities(folder, count)
        peers: list[Peer] = []
        for index, identity in enumerate(members):

            async def handler(call: IncomingCall, index: int = index) -> Value:
                return await serve(index, call)

            peers.append(await stack.enter_async_context(peer(identity, handler)))
        for index, one in enumerate(peers):
            made.append(_node(one, members, peers, (rules or {}).get(index, ()), config))
        _introduce(made)
        yield made


def _node(
    own: Peer,
    members: Sequence[Identity],
    peers: Sequence[Peer],
    rules: Sequence[Mapping[str, Value]],
    config: HandoffConfig | None,
) -> Node:
    identity, log = own.identity, KeptLog()
    store = Store(StoreConfig(), identity.mesh_id, identity.signer, Epoch(1), verify)

    def views() -> tuple[MemberView, ...]:
        return tuple(
            MemberView(
                one.node,
                f"n{number}",
                one.address,
                MemberState.ALIVE,
                Epoch(1),
                0,
                0.0,
                0.001,
                is_self=one.node == own.node,
            )
            for number, one in enumerate(peers)
        )

    catalogue = Catalogue(store, views, trio.current_time)
    policy = AccessPolicy(access_rules(rules), own.node, catalogue.standing_of)
    guard = Guard(own.node, policy, catalogue.reach_of)
    keys = {each.node_id: each.signer.public_key for each in members}
    passports = Passports(
        identity.mesh_id, own.node, identity.signer, identity.verify, keys.get, lambda: UNIX_S
    )
    fetcher = PrefixFetcher(
        own.node,
        own.streams,
        catalogue,
        passports,
        config or HandoffConfig(),
        Links(config or HandoffConfig()),
        HandoffStatistics(),
        log,
    )
    host = CapabilityHost(
        guard=guard,
        queue_max=2,
        changed=lambda _change: None,
        load_changed=lambda: None,
        log=log,
        warmer=fetcher.warm,
    )
    capability = Counting()
    host.add(capability)
    audit = KeptAudit()
    server = PrefixServer(
        host, guard, passports, audit, config or HandoffConfig(), fetcher.statistics, log
    )
    return Node(
        own, store, catalogue, guard, host, capability, fetcher, server, passports, audit, log
    )


def _introduce(made: Sequence[Node]) -> None:
    """Write every record, and give it to everybody."""
    for number, one in enumerate(made):
        shown = one.capability.descriptor
        assert shown.model is not None
        one.store.set(NODE_KEY, {"name": f"n{number}"})
        one.store.set(model_key(shown.model.digest), model_value(shown.model))
        one.store.set(capability_key(shown.id), capability_value(shown))
    for one in made:
        for other in made:
            whole = other.store.delta_since(other.id, Version(0), 10**6)
            assert whole is not None
            if other is not one:
                one.store.apply(whole, trio.current_time())
            one.catalogue.record_changed(other.id)


BROKEN = Failed("it broke", code="failed")
