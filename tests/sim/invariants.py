"""What must hold after every event, whatever the network does; and the exception that says it did not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from tests.sim.machine import Life

from meshd.core.effects import Lane, Send
from meshd.core.membership import MemberState, MemberView
from meshd.core.offences import OFFENDERS_MAX
from meshd_cms.types import NodeId, Value

if TYPE_CHECKING:
    from tests.sim.machine import SimNode
    from tests.sim.world import World

SMALL = 8
"""In meshes of up to so many nodes everything is looked at after every event."""

WHOLE_EVERY = 32
"""In larger ones, everything after so many events of a node, or as many as there are nodes; in between, what
the event touched."""

_TIMERS_MAX_BASE = 1024

Line: TypeAlias = tuple[int, int]
Belief: TypeAlias = tuple[int, bool, int, int]


class Violation(AssertionError):
    """An invariant does not hold, or something good did not happen in time."""


class Checker:
    """Watches one world.

    - A record held anywhere is, key for key, what its owner held at that (epoch, version): nobody else wrote
      it, nothing is missing below its version, and nothing deleted came back.
    - The (epoch, version) held of an owner never falls within one life of the holder.
    - The claim held about a member only ever gets stronger; who left stays gone in that epoch.
    - Messages, queues and tables are within their bounds.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._history: dict[tuple[NodeId, int], dict[int, Mapping[str, Value]]] = {}
        self._newest: dict[tuple[NodeId, int], int] = {}
        self._lines: dict[int, dict[NodeId, Line]] = {}
        self._beliefs: dict[int, dict[NodeId, Belief]] = {}
        self._same: dict[Line | Belief, Line | Belief] = {}  # one object for equal ones
        self.malformed_allowed = False  # somebody is made to send what nobody can read

    def born(self, node: SimNode) -> None:
        """A new life remembers nothing; what it has was restored from its own disk."""
        self._lines[node.number] = {}
        self._beliefs[node.number] = {}

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

    def check(self, node: SimNode) -> None:
        """After every event, on the node it touched."""
        life = node.life
        if life is None:
            return
        life.checks += 1
        nodes = len(self._world.nodes)
        if nodes <= SMALL or life.checks % max(WHOLE_EVERY, nodes) == 0:
            self.check_whole(node)
            return
        if life.store.touched:
            self._records(node, life)
        if life.told_of:
            for member in life.told_of:
                view = life.core.member(member)
                if view is not None:
                    self._belief(node, view)
            life.told_of.clear()

    def check_whole(self, node: SimNode) -> None:
        """Everything that is held on a node."""
        life = node.life
        if life is None:
            return
        self._records(node, life)
        for owner in life.store.owners():
            self._line(node, life, owner)
        for view in life.core.members():
            self._belief(node, view)
        life.told_of.clear()
        self._bounds(life)

    # -- records ----------------------------------------------------------------------------------------

    def _records(self, node: SimNode, life: Life) -> None:
        store = life.store
        touched = list(store.touched)
        store.touched.clear()
        if store.owner in touched:
            self._note_own(life)
        for owner in touched:
            if self._line(node, life, owner) and owner != store.owner:
                self._record(node, life, owner)

    def _note_own(self, life: Life) -> None:
        """Note what a node's own record is at this version."""
        line = life.store.line(life.store.owner)
        if line is None:
            return
        life_of = (line.owner, int(line.epoch))
        items = dict(life.store.items(line.owner))
        versions = self._history.setdefault(life_of, {})
        if versions.setdefault(int(line.max_version), items) != items:
            self._fail(f"an owner has two records at {line}")
        self._newest[life_of] = max(self._newest.get(life_of, 0), int(line.max_version))

    def _line(self, node: SimNode, life: Life, owner: NodeId) -> bool:
        """Look at the version that is held; true when there is a record, of another version than before."""
        lines, line = self._lines[node.number], life.store.line(owner)
        before = lines.get(owner)
        if line is None:
            lines.pop(owner, None)
            return False
        now = (int(line.epoch), int(line.max_version))
        if now == before:
            return False
        if before is not None and now < before:
            self._fail(f"node {node.number} went back from {before} to {now}")
        lines[owner] = self._same.setdefault(now, now)  # type: ignore[assignment]
        return True

    def _record(self, node: SimNode, life: Life, owner: NodeId) -> None:
        """A record was replaced or moved forward."""
        line = life.store.line(owner)
        assert line is not None
        life_of, version = (owner, int(line.epoch)), int(line.max_version)
        if version > self._newest.get(life_of, 0):
            self._fail(f"node {node.number} holds a version of {line} that was never written")
        versions = self._history[life_of]
        expected, held = versions.get(version), dict(life.store.items(owner))
        # A record cut on the way to one written anew (a learnt epoch) has versions nobody looked at.
        if expected is None or held == expected:
            return
        later = [items for at, items in versions.items() if at > version]
        for key in sorted(expected.keys() | held.keys()):
            if held.get(key) == expected.get(key):
                continue
            # A sender that is ahead does not hold, and so does not send, what was written again later.
            if key in held or all(items.get(key) == expected[key] for items in later):
                self._fail(f"node {node.number} holds {held} at {line}, its owner wrote {expected}")

    # -- members ----------------------------------------------------------------------------------------

    def _belief(self, node: SimNode, view: MemberView) -> None:
        if (view.node == node.id) != view.is_self:
            self._fail(f"node {node.number} lists itself among the others")
        beliefs = self._beliefs[node.number]
        belief = (
            int(view.epoch),
            view.state is MemberState.LEFT,
            view.incarnation,
            view.state.strength,
        )
        held = beliefs.get(view.node)
        if held is None or belief != held:
            if held is not None and belief < held:
                self._fail(f"node {node.number} believes {belief} after {held}")
            beliefs[view.node] = self._same.setdefault(belief, belief)  # type: ignore[assignment]

    # -- bounds -----------------------------------------------------------------------------------------

    def _bounds(self, life: Life) -> None:
        figures, config = life.core.statistics(), self._world.config
        if figures["rumours_queued"] > config.rumours_max:
            self._fail(f"{figures['rumours_queued']} rumours are queued")
        if figures["timers"] > _TIMERS_MAX_BASE + 8 * len(self._world.nodes):
            self._fail(f"{figures['timers']} timers run")
        if figures.get("dropped_malformed", 0) and not self.malformed_allowed:
            self._fail("a node sent what another cannot read")
        if len(life.core.offences()) > OFFENDERS_MAX:
            self._fail(f"{len(life.core.offences())} offenders are remembered")
        if len(life.dialled) > config.witness_streams + config.witnesses:
            self._fail(f"{len(life.dialled)} witness streams were dialled")

    def _fail(self, what: str) -> None:
        raise Violation(self._world.message(what))
