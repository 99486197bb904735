"""Nodes with gossip, streams, witness streams and a warden, in one process, on loopback, with clocks of their own."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from tests.shell.support_log import KeptLog

from meshd.core.config import GossipConfig, local
from meshd.core.effects import Address
from meshd.core.events import Decreed, Event, MemberJoined
from meshd.core.membership import LocalNode, MemberState
from meshd.core.node import NodeCore
from meshd.core.sealing import Opener, Sealer
from meshd.shell.addresses import listen
from meshd.shell.driver import GossipDriver
from meshd.shell.gate import is_internal
from meshd.shell.streams import IncomingCall, PeerStreams, StreamConfig
from meshd.shell.trust_calls import TrustServer, is_trust
from meshd.shell.trust_state import TrustState, load_trust
from meshd.shell.warden import Warden
from meshd.shell.warden_tools import Contact, Tools
from meshd.shell.witness import WitnessStreams
from meshd.trust.identity import Identity, load_identity
from meshd_cms import Epoch, NodeId, Store, StoreConfig, Value

HOST = "127.0.0.1"
CONFIG: GossipConfig = local()


@dataclass
class TrustNode:
    """One node."""

    state: TrustState
    warden: Warden
    streams: PeerStreams
    witness: WitnessStreams
    driver: GossipDriver
    opener: Opener
    address: Address
    log: KeptLog
    killed: trio.CancelScope
    out: list[str]
    rejoined: list[bool] = field(default_factory=list[bool])

    @property
    def node(self) -> NodeId:
        return self.state.identity.node_id

    @property
    def identity(self) -> Identity:
        return self.state.identity

    def live(self) -> set[NodeId]:
        """Who is a live member here, this node included."""
        views = self.driver.core.members()
        return {view.node for view in views if view.state is MemberState.ALIVE}

    def join(self, *others: TrustNode) -> None:
        addresses = tuple(each.address for each in others)
        self.driver.post(lambda core, now_s: core.join(addresses, now_s))

    def generation(self) -> int:
        return self.state.ring.current.generation


class Book:
    """Where everybody is, and who is an issuer: what records tell real nodes."""

    def __init__(self) -> None:
        self.nodes: list[TrustNode] = []
        self.strangers: list[Address] = []

    def contacts(self, me: NodeId) -> Sequence[Contact]:
        known = [
            Contact(each.node, each.address, each.state.is_issuer)
            for each in self.nodes
            if each.node != me
        ]
        return [*known, *(Contact(None, address) for address in self.strangers)]


@asynccontextmanager
async def node(
    state_dir: Path,
    book: Book,
    *,
    epoch: int = 1,
    days: float = 7.0,
    ahead_s: float = 0.0,
    port: int = 0,
) -> AsyncGenerator[TrustNode]:
    """A node that runs until the end of the block, and is then gone as if it were killed."""
    log, out, rejoined = KeptLog(), list[str](), list[bool]()
    state = load_trust(
        state_dir,
        load_identity(state_dir),
        certificate_days=days,
        log=log,
        wall_s=lambda: time.time() + ahead_s,
    )
    identity, ring = state.identity, state.ring
    me, mesh = identity.node_id, identity.mesh_id
    listening = listen(HOST, port)
    raw, address = listening.datagrams, (HOST, listening.port)
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listening.streams))]
    store = Store(StoreConfig(), mesh, identity.signer, Epoch(epoch), identity.verify)
    core = NodeCore(
        CONFIG, LocalNode(me, f"n{address[1]}", address), store, random.Random(epoch), state.decrees
    )
    sealer = Sealer(ring.current.key, mesh, me, Epoch(epoch))
    opener = Opener(ring.opening, mesh, me)
    server = TrustServer(state)

    async def serve(call: IncomingCall) -> Value:
        if is_trust(call):
            return await server.serve(call)
        assert not is_internal(call.header.capability_id)
        return call.body

    def heard(event: Event) -> None:
        match event:
            case Decreed():
                warden.decreed(event.decree)
            case MemberJoined():
                warden.member_seen(event.node, event.name)
            case _:
                pass

    def gossip(sender: NodeId, life: Epoch, payload: bytes) -> None:
        driver.stream_message(sender, life, address, payload)

    def unsealed(source: Address) -> None:
        warden.unsealed(source)

    witness = WitnessStreams(
        me,
        sealer,
        opener,
        lambda node, life, evident: driver.watch_ended(node, life, evident),
        state.gate,
    )
    streams = PeerStreams(
        identity,
        StreamConfig(),
        epoch=epoch,
        handler=serve,
        on_gossip=gossip,
        load=lambda: None,
        witness=witness.accept,
        gate=state.gate,
        log=log,
    )
    driver = GossipDriver(
        core,
        raw,
        sealer=sealer,
        opener=opener,
        streams=streams,
        witness=witness,
        notify=heard,
        unsealed=unsealed,
        log=log,
    )

    def rejoin() -> None:
        rejoined.append(True)
        this.join(*(each for each in book.nodes if each is not this))

    async def run_at_once(call: object) -> bool:
        assert callable(call)
        return bool(call())

    tools = Tools(
        streams=streams,
        witness=witness,
        sealer=sealer,
        opener=opener,
        post=driver.post,
        contacts=lambda: book.contacts(me),
        rejoin=rejoin,
        renewed=lambda _identity: None,
        out=out.append,
        run=run_at_once,
        rng=random.Random(epoch),
    )
    warden = Warden(state, tools, log)
    killed = trio.CancelScope()
    this = TrustNode(
        state, warden, streams, witness, driver, opener, address, log, killed, out, rejoined
    )
    book.nodes.append(this)

    async def life(*, task_status: trio.TaskStatus[None]) -> None:
        with killed:
            async with trio.open_nursery() as nursery:
                await nursery.start(streams.serve, listeners)
                await nursery.start(witness.run)
                await nursery.start(driver.run)
                await nursery.start(warden.run)
                task_status.started()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(life)
            yield this
            killed.cancel()
    finally:
        book.nodes.remove(this)
