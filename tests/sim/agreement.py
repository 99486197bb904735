"""When all agree: cheap to ask again and again, and whole when the answer is yes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.machine import Life, SimNode

from meshd.core.membership import MemberState

if TYPE_CHECKING:
    from tests.sim.world import World


class Agreement:
    """Whether all that run see exactly those that run as alive, and hold the same records of them.

    While state hashes differ nothing else is looked at, and the node that differed last is asked first.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._doubtful: SimNode | None = None

    def is_reached(self) -> bool:
        """The answer now."""
        up = self._world.up()
        lives = [node.life for node in up if node.life is not None]
        if not lives:
            return True
        wanted = lives[0].core.state_hash
        doubtful = self._doubtful
        last = None if doubtful is None else doubtful.life
        if last is not None and last.core.state_hash != wanted:
            return False
        for node in up:
            assert node.life is not None
            if node.life.core.state_hash != wanted:
                self._doubtful = node
                return False
        return _is_same_everywhere(lives)


def _is_same_everywhere(lives: list[Life]) -> bool:
    """The hashes agree: so must everything they stand for.

    Equal versions are equal contents: the checker looked at each record as it came.
    """
    wanted = sorted((life.store.owner, life.epoch) for life in lives)
    owners = [life.store.owner for life in lives]
    lines = [life.store.line(life.store.owner) for life in lives]
    for life in lives:
        alive = [
            (view.node, view.epoch)
            for view in life.core.members()
            if view.state is MemberState.ALIVE
        ]
        if alive != wanted or [life.store.line(owner) for owner in owners] != lines:
            return False
    return True
