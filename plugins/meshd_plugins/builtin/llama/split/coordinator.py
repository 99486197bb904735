"""A model whose layers lie on several nodes: lenders found, connected, kept, and lost.

The worker of such a model runs here and has the file. For each lender there is a tunnel through the mesh, and
a socket on which the worker hands over its half of the connection to it; this module carries the bytes
between the two. What a lender's end does to the worker is known and used: when a tunnel ends, its connection is
closed, llama.cpp aborts, every call of the worker ends with an error that says which node was lost, and the
model is loaded anew with the lenders that there are then.

A request of a narrower privacy class than the way to the farthest lender is refused: lenders see activations,
from which words can be guessed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from meshd_plugins.api import (
    CapabilityError,
    Failed,
    Logger,
    PeerOffer,
    Peers,
    Privacy,
    Refused,
    Tunnel,
    Value,
    Worker,
    WorkerCall,
)
from meshd_plugins.builtin.llama.arguments import RemotePart
from meshd_plugins.builtin.llama.running.fit import MIB, Need, Shape
from meshd_plugins.builtin.llama.split.config import AUTO
from meshd_plugins.builtin.llama.split.connections import Control, read, write
from meshd_plugins.builtin.llama.split.placement import Lent, choose_lenders, place_layers

LOST_CODES: Final = ("worker_died", "worker_hung")
REQUESTS: Final = ("chat", "complete", "embed", "rerank", "kv_begin")
"""Operations of a worker that bring content of somebody's request."""


@dataclass(frozen=True, slots=True)
class Part:
    """The layers that one lender is to hold."""

    offer: PeerOffer
    layers: int


def usable(offers: Sequence[PeerOffer], build: str, nodes: Sequence[str]) -> dict[str, PeerOffer]:
    """The offers that can be used now, by name of the node: of those nodes, or of all that are near."""
    found: dict[str, PeerOffer] = {}
    for offer in offers:
        wanted = offer.distance is Privacy.LAN if nodes == AUTO else offer.node_name in nodes
        memory, same = offer.fields.get("memory_mib"), offer.fields.get("build") == build
        is_free = offer.busy is None or offer.busy < offer.slots
        if wanted and same and is_free and isinstance(memory, int) and memory > 0:
            found.setdefault(offer.node_name, offer)
    return found


def plan(
    shape: Shape, need: Need, here_bytes: int, offers: Mapping[str, PeerOffer], nodes: Sequence[str]
) -> tuple[Part, ...]:
    """Which lender holds how many layers; nothing: it fits here. Raises DoesNotFit.

    Of nodes that are named, all that there are take part; of any, the fewest that make it fit.
    """
    lent = [Lent(name, _memory_bytes(offer)) for name, offer in sorted(offers.items())]
    chosen = tuple(lent) if nodes != AUTO else choose_lenders(shape, need, here_bytes, lent)
    if not chosen:
        return tuple(Part(offers[each.node], 0) for each in chosen)
    layers = place_layers(shape, need, here_bytes, chosen)
    return tuple(Part(offers[each.node], count) for each, count in zip(chosen, layers, strict=True))


def missing(offers: Sequence[PeerOffer], build: str, nodes: Sequence[str]) -> str:
    """Why there is no lender among these, for people."""
    if nodes == AUTO and not offers:
        return "no peer offers memory: set plugins.llama.rpc.offer_mib there"
    known = {offer.node_name: offer for offer in offers}
    reasons: list[str] = []
    for node in sorted(known) if nodes == AUTO else nodes:
        offer = known.get(node)
        if offer is None:
            reasons.append(f"{node} offers no memory, or is not reached")
        elif offer.fields.get("build") != build:
            theirs = offer.fields.get("build")
            reasons.append(f"{node} has another build of llama.cpp ({theirs}, here {build})")
        elif offer.busy is not None and offer.busy >= offer.slots:
            reasons.append(f"{node} lends its memory to another model")
        elif nodes == AUTO and offer.distance is not Privacy.LAN:
            reasons.append(f"{node} is not near: name it in `split` to use it")
    return "; ".join(reasons)


def _memory_bytes(offer: PeerOffer) -> int:
    memory = offer.fields.get("memory_mib")
    assert isinstance(memory, int), "`usable` has looked"
    return memory * MIB


class Lines:
    """The tunnels to the lenders of one model, while they are open."""

    def __init__(self, parts: Sequence[Part], log: Logger) -> None:
        self.parts = tuple(parts)
        self._controls = [Control() for _ in parts]
        self._log = log
        self._privacy = Privacy.LOCAL
        self.lost: list[str] = []  # what ended, in order, for people
        self._is_lost = trio.Event()

    @property
    def remote_parts(self) -> tuple[RemotePart, ...]:
        """For the worker's arguments."""
        return tuple(
            RemotePart(control.theirs, part.offer.node_name, part.layers)
            for control, part in zip(self._controls, self.parts, strict=True)
        )

    @property
    def sockets(self) -> tuple[int, ...]:
        """What the worker inherits."""
        return tuple(control.theirs for control in self._controls)

    @property
    def privacy(self) -> Privacy:
        """The narrowest class that a request may have: its activations travel so far."""
        return self._privacy

    @property
    def spread(self) -> tuple[str, ...]:
        """What is announced of it."""
        return tuple(f"{part.offer.node_name}:{part.layers}" for part in self.parts)

    def close(self) -> None:
        """Give the sockets back."""
        for control in self._controls:
            control.close()

    async def wait_lost(self) -> None:
        """Return when one of them has ended."""
        await self._is_lost.wait()

    async def carry(self, index: int, tunnel: Tunnel) -> None:
        """Body of a task: join the worker's connection to a tunnel. Raises nothing."""
        self._privacy = max(self._privacy, tunnel.distance)
        try:
            connection = await self._controls[index].receive()
            async with connection:
                await self._join(index, connection, tunnel)
        except CapabilityError as error:
            self._note(index, error.message)

    async def _join(self, index: int, connection: trio.SocketStream, tunnel: Tunnel) -> None:
        async def forth() -> None:
            try:
                while data := await read(connection):
                    await tunnel.send(data)
            except CapabilityError:
                return  # `back` is told why

        async def back() -> None:
            try:
                while await write(connection, await tunnel.receive()):
                    pass
            except CapabilityError as error:
                self._note(index, error.message)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(forth)
            nursery.start_soon(back)

    def _note(self, index: int, why: str) -> None:
        part = self.parts[index]
        words = f"{part.offer.node_name}, which holds {part.layers} of the layers, was lost: {why}"
        self.lost.append(words)
        self._is_lost.set()
        self._log.warning("llama.lender_lost", node=part.offer.node_name, reason=why)


@asynccontextmanager
async def connected(
    peers: Peers, parts: Sequence[Part], log: Logger
) -> AsyncGenerator[Lines, None]:
    """Open the tunnels. Leaving closes them. Raises Refused, Failed: one does not open."""
    lines = Lines(parts, log)
    async with AsyncExitStack() as stack:
        stack.callback(lines.close)
        tunnels: list[Tunnel] = []
        for part in parts:
            opening = peers.tunnel(part.offer, part.offer.distance)
            try:
                tunnels.append(await stack.enter_async_context(opening))
            except CapabilityError as error:
                raise Failed(f"{part.offer.node_name}: {error.message}", code=error.code) from error
        try:
            async with trio.open_nursery() as nursery:
                for index, tunnel in enumerate(tunnels):
                    nursery.start_soon(lines.carry, index, tunnel)
                yield lines
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The tasks above raise nothing: what one error there is came from the caller's block.
            _, stopped = group.split(Exception)
            if stopped is not None:  # it was cancelled in the same moment
                raise stopped from None
            raised = group.exceptions[0] if len(group.exceptions) == 1 else group
            raise raised from raised.__cause__


class SplitWorker:
    """Implements `Worker`: the worker of a split model, whose errors say which node was lost."""

    def __init__(self, worker: Worker, lines: Lines) -> None:
        self._worker = worker
        self._lines = lines

    @property
    def hello(self) -> Mapping[str, Value]:
        """What the process said when it was ready."""
        return self._worker.hello

    def call(self, message: Mapping[str, Value]) -> AbstractAsyncContextManager[WorkerCall]:
        """Send a request. Raises Refused: `privacy`; and as the worker does."""
        if message.get("operation") in REQUESTS and _privacy(message) < self._lines.privacy:
            allowed = self._lines.privacy.name.lower()
            raise Refused(
                f"this model lies on several nodes, which see what it computes: it takes requests of the "
                f"class {allowed} and wider",
                code="privacy",
            )
        return self._call(message)

    @asynccontextmanager
    async def _call(self, message: Mapping[str, Value]) -> AsyncGenerator[WorkerCall, None]:
        async with self._worker.call(message) as call:
            yield _SplitCall(call, self._lines)

    async def wait_died(self) -> str:
        """Return why, with the node that was lost: at once, since a worker that computes nothing sees nothing."""
        reasons: list[str] = []

        async def watch() -> None:
            reasons.append(await self._worker.wait_died())
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await self._lines.wait_lost()
            nursery.cancel_scope.cancel()
        return told(self._lines, reasons[0] if reasons else "")


class _SplitCall:
    def __init__(self, call: WorkerCall, lines: Lines) -> None:
        self._call = call
        self._lines = lines

    async def receive(self) -> Mapping[str, Value] | None:
        try:
            return await self._call.receive()
        except Failed as error:
            if error.code not in LOST_CODES:
                raise
            raise Failed(told(self._lines, error.message), code=error.code) from error


def _privacy(message: Mapping[str, Value]) -> int:
    """The class of the request, or of the one that a state was computed for; the narrowest if it is not said."""
    head = message.get("head")
    said = head.get("privacy") if isinstance(head, Mapping) else message.get("privacy")
    return said if isinstance(said, int) else Privacy.LOCAL


def told(lines: Lines, message: str) -> str:
    """What is said of a worker that died: that a node was lost is the reason, and said alone."""
    if lines.lost or not lines.parts:
        return lines.lost[0] if lines.lost else message
    return f"{message} (its layers lie on {', '.join(lines.spread)} beside this node)"
