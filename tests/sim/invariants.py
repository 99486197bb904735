"""What must hold after every event, whatever the network does; and the exception that says it did not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from meshd.core.effects import Lane, Send
from meshd.core.events import MemberJoined, RecordChanged
from meshd.core.membership import MemberState
from meshd_cms.store import Store
from meshd_cms.types import NodeId, Value

if TYPE_CHECKING:
    from tests.sim.world import SimNode, World

_TIMERS_MAX_BASE = 1024


class Violation(AssertionError):
    """An invariant does not hold, or something good did not happen in time."""


class Checker:
    """Watches one world.

    - A record held anywhere is, key for key, what its owner held at that (epoch, version): nobody else wrote
      it, nothing is missing below its version, and nothing deleted came back.
    - The (epoch, version) held of an owner never falls within one life of the holder.
    - The claim held about a member only ever gets stronger; who left stays gone in that epoch.
    - Messages and queues are within their bounds.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._history: dict[tuple[NodeId, int, int], Mapping[str, Value]] = {}
        self._newest: dict[tuple[NodeId, int], int] = {}
        self._lines: dict[tuple[int, NodeId], tuple[int, int]] = {}
        self._claims: dict[tuple[int, NodeId], tuple[int, bool, int, int]] = {}

    def born(self, node: SimNode) -> None:
        """A new life remembers nothing; what it has was restored from its own disk."""
        for table in (self._lines, self._claims):
            for key in [key for key in table if key[0] == node.number]:
                del table[key]

    def _note_own(self, store: Store) -> None:
        """Note what a node's own record is at this version."""
        line = store.line(store.owner)
        if line is None:
            return
        at = (store.owner, int(line.epoch), int(line.max_version))
        items = dict(store.items(store.owner))
        if self._history.setdefault(at, items) != items:
            self._fail(f"an owner has two records at {line}")
        newest = self._newest.get(at[:2], 0)
        self._newest[at[:2]] = max(newest, at[2])

    def sent(self, effect: Send) -> None:
        """A message went out."""
        config = self._world.config
        limit = (
            config.datagram_payload_bytes_max
            if effect.lane is Lane.DATAGRAM
            else config.stream_payload_bytes_max
        )
        if len(effect.payload) > limit:
            self._fail(f"a {effect.lane.value} payload of {len(effect.payload)} bytes")
        if effect.lane is Lane.STREAM and effect.node is None:
            self._fail("a stream to nobody")

    def record_changed(self, node: SimNode, event: RecordChanged) -> None:
        """A record was replaced or moved forward."""
        assert node.life is not None
        store = node.life.store
        line = store.line(event.owner)
        if line is None:
            self._lines.pop((node.number, event.owner), None)
            return
        newest = self._newest.get((event.owner, int(line.epoch)), 0)
        if line.max_version > newest:
            self._fail(f"node {node.number} holds a version of {line} that was never written")
        at = (event.owner, int(line.epoch), int(line.max_version))
        expected = self._history.get(at)
        held = dict(store.items(event.owner))
        # A record cut on the way to one written anew (a learnt epoch) has versions nobody looked at.
        if expected is None or held == expected:
            return
        later = [
            items
            for (owner, epoch, version), items in self._history.items()
            if (owner, epoch) == at[:2] and version > at[2]
        ]
        for key in expected.keys() | held.keys():
            if held.get(key) == expected.get(key):
                continue
            # A sender that is ahead does not hold, and so does not send, what was written again later.
            if key in held or all(items.get(key) == expected[key] for items in later):
                self._fail(f"node {node.number} holds {held} for {at}, its owner wrote {expected}")

    def joined(self, node: SimNode, event: MemberJoined) -> None:
        """A member came: it is not one who left in that very epoch, and not ourselves."""
        assert node.life is not None
        if event.node == node.life.store.owner:
            self._fail(f"node {node.number} lists itself")

    def check(self, node: SimNode) -> None:
        """After every event, on the node it touched."""
        life = node.life
        if life is None:
            return
        self._note_own(life.store)
        for owner in life.store.owners():
            line = life.store.line(owner)
            assert line is not None
            key, now = (node.number, owner), (int(line.epoch), int(line.max_version))
            before = self._lines.get(key)
            if before is not None and now < before:
                self._fail(f"node {node.number} went back from {before} to {now}")
            self._lines[key] = now
        for view in life.core.members():
            claim = (
                int(view.epoch),
                view.state is MemberState.LEFT,
                view.incarnation,
                view.state.strength,
            )
            key = (node.number, view.node)
            held = self._claims.get(key)
            if held is not None and claim < held:
                self._fail(f"node {node.number} believes {claim} after {held}")
            self._claims[key] = claim
        figures = life.core.statistics()
        config = self._world.config
        if figures["rumours_queued"] > config.rumours_max:
            self._fail(f"{figures['rumours_queued']} rumours are queued")
        if figures["timers"] > _TIMERS_MAX_BASE + 8 * len(self._world.nodes):
            self._fail(f"{figures['timers']} timers run")
        if figures.get("dropped_malformed", 0):
            self._fail("a node sent what another cannot read")

    def _fail(self, what: str) -> None:
        raise Violation(self._world.message(what))
