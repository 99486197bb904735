"""Datagrams, and messages on streams: lost, doubled, late, refused, or taken."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tests.sim.machine import Life, SimNode
from tests.sim.network import datagram_bytes, stream_bytes

from meshd.core.effects import Lane, Send
from meshd_cms.types import Epoch, NodeId

if TYPE_CHECKING:
    from tests.sim.world import World


class Delivery:
    """Carries out `Send`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def send(self, node: SimNode, life: Life, effect: Send) -> None:
        """On its way, if it is not lost: what is sent to nobody is paid for all the same."""
        world = self._world
        network, rng = world.network, world.rng
        target = world.by_address.get(effect.to)
        copies = 1
        if effect.lane is Lane.DATAGRAM:
            world.datagrams += 1
            world.wire_bytes += datagram_bytes(effect.payload)
        else:
            world.wire_bytes += stream_bytes(effect.payload)
        if target is None or network.is_cut(node.number, target.number):
            return
        if effect.lane is Lane.DATAGRAM:
            if network.walled & {node.number, target.number}:
                return
            if network.is_lost(rng, node.number, target.number):
                return
            if world.loses is not None and world.loses(effect, target):
                return
            if network.duplication:
                copies += rng.random() < network.duplication
        elif network.is_cut(target.number, node.number):
            return  # no acknowledgement comes back
        sender, epoch = life.store.owner, life.epoch
        for _ in range(copies):
            if effect.lane is Lane.DATAGRAM:
                delay_s = network.delay_s(rng, node.number, target.number)
                if network.reordering and rng.random() < network.reordering:
                    delay_s += rng.uniform(0, network.reorder_most_s)
            else:
                delay_s = network.segment_s(rng, node.number, target.number, 3)
            world.at(
                world.now_s + delay_s, lambda: self.arrive(node, sender, epoch, target, effect)
            )

    def arrive(
        self, source: SimNode, sender: NodeId, epoch: Epoch, target: SimNode, effect: Send
    ) -> None:
        """It has arrived at the host: its process takes it, or the host refuses it."""
        if not target.hears:
            return
        if target.life is None:
            if effect.lane is Lane.DATAGRAM:
                self._refuse(source, target)
            return
        digest = hashlib.blake2b(effect.payload, digest_size=8).hexdigest()
        self._world.note("receive", target, f"from {source.number} {effect.lane.value} {digest}")
        address, lane, payload = source.address, effect.lane, effect.payload
        self._world.call(
            target,
            lambda core, now_s: core.receive(payload, sender, epoch, address, lane, now_s),
        )

    def _refuse(self, source: SimNode, target: SimNode) -> None:
        """The host answers with an ICMP refusal."""
        world = self._world
        network = world.network
        if network.is_cut(target.number, source.number) or not source.hears:
            return
        if network.is_lost(world.rng, target.number, source.number):
            return
        address = target.address
        world.at(
            world.now_s + network.delay_s(world.rng, target.number, source.number),
            lambda: self._world.call(
                source, lambda core, now_s: core.evidence_refused(address, now_s)
            ),
        )
