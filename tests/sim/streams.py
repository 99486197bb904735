"""Streams between simulated machines: witness streams, stream pings and knocks.

What counts is how they end. A process that dies on a host that is up ends its streams by itself: the
kernel says so to the other side, after one latency, again and again if that is lost. A host that goes
silent says nothing; its peers keep a stream to nobody until they close it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.sim.machine import Life, SimNode
from tests.sim.network import RETRANSMISSIONS_MAX, RETRANSMIT_FIRST_S

from meshd.core.effects import Knock, StreamPing, Unwatch, Watch
from meshd_cms.types import Epoch, NodeId

if TYPE_CHECKING:
    from tests.sim.world import World

STREAM_TIMEOUT_S = 5.0
KNOCK_TIMEOUT_S = 1.0
_UNKNOWN_EPOCH = Epoch(0)


@dataclass(slots=True, eq=False)
class Stream:
    """A witness stream; made by the dialler, shared by both ends once it is established."""

    dialler: SimNode
    dialler_life: Life
    node: NodeId  # who was dialled
    target: SimNode | None = None  # set when established
    target_life: Life | None = None
    dialler_epoch: Epoch = _UNKNOWN_EPOCH
    target_epoch: Epoch = _UNKNOWN_EPOCH


class Streams:
    """Carries out `Watch`, `Unwatch`, `Knock` and `StreamPing`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.established = 0
        self.failed = 0

    # -- witness streams --------------------------------------------------------------------------------

    def watch(self, node: SimNode, life: Life, effect: Watch) -> None:
        """Dial."""
        world = self._world
        if effect.node in life.dialled:  # it has moved: dial its new address
            self._close(
                life, lambda one, peer: peer == effect.node and one.dialler is node, evident=False
            )
        stream = life.dialled[effect.node] = Stream(node, life, effect.node)
        target = world.by_address.get(effect.to)
        if target is None or not self._answers(node, target):
            self._later(STREAM_TIMEOUT_S, lambda: self._fail(stream))
        elif target.life is None or target.id != effect.node:
            self._later(self._trips_s(node, target, 2), lambda: self._fail(stream))
        else:
            taken_s = max(0.0, target.stalled_until_s - world.now_s)
            taken_s += self._trips_s(node, target, 3)
            if taken_s > STREAM_TIMEOUT_S:
                self._later(STREAM_TIMEOUT_S, lambda: self._fail(stream))
            else:
                self._later(taken_s, lambda: self._establish(stream, target))

    def unwatch(self, life: Life, effect: Unwatch) -> None:
        """Close every stream with that node, whoever dialled, and say goodbye."""
        self._close(life, lambda stream, peer: peer == effect.node, evident=False)

    def ended(self, node: SimNode, life: Life, *, goodbye: bool) -> None:
        """The process of this life is gone: its kernel closes what it had, if the host is up."""
        if node.host_up:
            self._close(life, lambda stream, peer: True, evident=not goodbye)
        life.dialled.clear()
        life.accepted.clear()

    def _establish(self, stream: Stream, target: SimNode) -> None:
        life, node = target.life, stream.dialler
        if stream.dialler_life.ended or stream.dialler_life.dialled.get(stream.node) is not stream:
            return  # given up meanwhile
        if life is None or target.id != stream.node or not self._answers(node, target):
            self._fail(stream)
            return
        stream.target, stream.target_life = target, life
        stream.dialler_epoch, stream.target_epoch = stream.dialler_life.epoch, life.epoch
        life.accepted[stream] = None
        self.established += 1

    def _fail(self, stream: Stream) -> None:
        life = stream.dialler_life
        if life.ended or life.dialled.get(stream.node) is not stream:
            return
        del life.dialled[stream.node]
        self.failed += 1
        self._world.call(
            stream.dialler,
            lambda core, now_s: core.watch_ended(stream.node, _UNKNOWN_EPOCH, False, now_s),
        )

    def _close(
        self, life: Life, chosen: Callable[[Stream, NodeId], bool], *, evident: bool
    ) -> None:
        for stream in [one for one in life.dialled.values() if chosen(one, one.node)]:
            del life.dialled[stream.node]
            if stream.target is not None and stream.target_life is not None:
                self._tell(stream.dialler, stream.target, stream.target_life, stream, evident)
        for stream in [one for one in life.accepted if chosen(one, one.dialler.id)]:
            del life.accepted[stream]
            assert stream.target is not None
            self._tell(stream.target, stream.dialler, stream.dialler_life, stream, evident)

    def _tell(
        self,
        source: SimNode,
        other: SimNode,
        other_life: Life,
        stream: Stream,
        evident: bool,
        attempt: int = 0,
    ) -> None:
        """The last segment travels, again while it is lost or cut off."""
        world = self._world
        blocked = not self._reaches(source, other)
        if blocked or world.network.is_lost(world.rng, source.number, other.number):
            if attempt < RETRANSMISSIONS_MAX:
                self._later(
                    RETRANSMIT_FIRST_S * 2**attempt,
                    lambda: self._tell(source, other, other_life, stream, evident, attempt + 1),
                )
            return
        self._later(
            self._trips_s(source, other, 1),
            lambda: self._hear(other, other_life, stream, evident),
        )

    def _hear(self, other: SimNode, life: Life, stream: Stream, evident: bool) -> None:
        dialled = life is stream.dialler_life
        if life.ended or other.is_asleep:
            return
        if dialled:
            if life.dialled.get(stream.node) is not stream:
                return
            del life.dialled[stream.node]
            gone, epoch = stream.node, stream.target_epoch
        else:
            if stream not in life.accepted:
                return
            del life.accepted[stream]
            gone, epoch = stream.dialler_life.store.owner, stream.dialler_epoch
        self._world.note("stream ended", other, f"{gone.hex()[:8]} evident {evident}")
        self._world.call(
            other, lambda core, now_s: core.watch_ended(gone, epoch, evident, now_s), life
        )

    # -- pings and knocks -------------------------------------------------------------------------------

    def knock(self, node: SimNode, life: Life, effect: Knock) -> None:
        """Somebody listens, nobody does, or there is silence."""
        target = self._world.by_address.get(effect.to)
        refused, taken_s = False, KNOCK_TIMEOUT_S
        if target is not None and self._answers(node, target):
            taken_s = self._trips_s(node, target, 2)
            refused = target.life is None and taken_s <= KNOCK_TIMEOUT_S
        self._later(
            min(taken_s, KNOCK_TIMEOUT_S),
            lambda: self._world.call(
                node, lambda core, now_s: core.knocked(effect.token, refused, now_s), life
            ),
        )

    def ping(self, node: SimNode, life: Life, effect: StreamPing) -> None:
        """An echo over a stream."""
        world = self._world
        target = world.by_address.get(effect.to)
        is_answered, taken_s = False, STREAM_TIMEOUT_S
        if target is not None and self._answers(node, target):
            if target.life is None:
                taken_s = self._trips_s(node, target, 2)
            elif target.id == effect.node:
                waits_s = max(0.0, target.stalled_until_s - world.now_s)
                taken_s = waits_s + self._trips_s(node, target, 4)
                is_answered = taken_s <= STREAM_TIMEOUT_S
        self._later(
            min(taken_s, STREAM_TIMEOUT_S),
            lambda: world.call(
                node, lambda core, now_s: core.stream_pinged(effect.token, is_answered, now_s), life
            ),
        )

    # -- inside -----------------------------------------------------------------------------------------

    def _reaches(self, source: SimNode, target: SimNode) -> bool:
        return target.hears and not self._world.network.is_cut(source.number, target.number)

    def _answers(self, node: SimNode, target: SimNode) -> bool:
        """Whether packets pass in both directions."""
        return self._reaches(node, target) and self._reaches(target, node)

    def _trips_s(self, source: SimNode, target: SimNode, trips: int) -> float:
        world = self._world
        return world.network.segment_s(world.rng, source.number, target.number, trips)

    def _later(self, after_s: float, call: Callable[[], None]) -> None:
        self._world.at(self._world.now_s + after_s, call)
