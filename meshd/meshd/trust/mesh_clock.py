"""The clock of the mesh: the median of what its nodes' clocks show. Pure.

A board without a clock chip starts in 1970 or at its last shutdown, and whether a certificate has ended must not
hang on that. Every node says its wall clock when it says hello; here each is kept as an offset from the time
elapsed on this machine, which no setting of a clock moves, our own among them and with no more weight.

Invariants:

* As long as less than half of the clocks that count lie, the median lies between two clocks that do not.
* Of an even number the later one of the two in the middle counts: a clock that was not set is behind. But where
  one of the two alone is an issuer's, that counts: certificates are dated by it, so a board whose clock is far
  ahead can tell from the first issuer that it meets.
* A clock that shows a time before the mesh can have been made does not count. If none is left, it is our own,
  and not before that time.

`elapsed_s` has to go on while the machine sleeps (CLOCK_BOOTTIME on Linux); otherwise all others would seem to
be ahead after it woke.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from meshd_cms.types import NodeId

SAMPLES_MAX: Final = 128
"""Clocks that are kept; who was heard longest ago makes room. Up: costs a sort at each connection."""
EARLIEST_S: Final = 1_735_689_600.0
"""2025-01-01: no mesh is older than this software."""
FAR_OFF_S: Final = 60.0
"""A clock that is reported. Certificates bear more, logs and people do not."""
JUMP_S: Final = 5.0
"""A change of our own clock against the elapsed time that is told; network time slews what is less."""


class MeshClock:
    """What this node knows of the clocks of its mesh.

    Args:
        earliest_s: seconds since 1970 before which this mesh cannot have been made.
        samples_max: clocks of others that are kept.
    """

    def __init__(self, earliest_s: float = EARLIEST_S, *, samples_max: int = SAMPLES_MAX) -> None:
        self._earliest_s = max(earliest_s, EARLIEST_S)
        self._samples_max = samples_max
        self._offsets_s: OrderedDict[NodeId, float] = OrderedDict()
        self._issuers: set[NodeId] = set()  # among those
        self._own_offset_s: float | None = None
        self.is_issuer = False  # this node

    def __len__(self) -> int:
        """The clocks of others that are kept."""
        return len(self._offsets_s)

    def heard(
        self, node: NodeId, wall_s: float, elapsed_s: float, *, is_issuer: bool | None = None
    ) -> None:
        """A node that showed who it is said what its clock shows, now. `is_issuer`: None: as it was."""
        self._offsets_s[node] = wall_s - elapsed_s
        self._offsets_s.move_to_end(node)
        if is_issuer is not None:
            (self._issuers.add if is_issuer else self._issuers.discard)(node)
        if len(self._offsets_s) > self._samples_max:
            forgotten, _ = self._offsets_s.popitem(last=False)
            self._issuers.discard(forgotten)

    def forget(self, node: NodeId) -> None:
        """A node has no voice any more."""
        self._offsets_s.pop(node, None)
        self._issuers.discard(node)

    def now_s(self, wall_s: float, elapsed_s: float) -> float:
        """What time it is in the mesh, seconds since 1970; `wall_s` is what our own clock shows."""
        said = [(wall_s - elapsed_s, self.is_issuer)]
        said += [(each, node in self._issuers) for node, each in self._offsets_s.items()]
        counting = sorted(each for each in said if each[0] + elapsed_s >= self._earliest_s)
        if not counting:
            return max(wall_s, self._earliest_s)
        middle = len(counting) // 2
        later_s, by_issuer = counting[middle]
        if len(counting) % 2 == 0 and not by_issuer and counting[middle - 1][1]:
            return counting[middle - 1][0] + elapsed_s
        return later_s + elapsed_s

    def is_known(self, wall_s: float, elapsed_s: float) -> bool:
        """Whether any clock counts, our own or another."""
        offsets_s = (wall_s - elapsed_s, *self._offsets_s.values())
        return any(each + elapsed_s >= self._earliest_s for each in offsets_s)

    def own_offset_s(self, wall_s: float, elapsed_s: float) -> float:
        """By how much our own clock is ahead of the mesh's; negative: behind."""
        return wall_s - self.now_s(wall_s, elapsed_s)

    def far_off(self, wall_s: float, elapsed_s: float) -> Mapping[NodeId, float]:
        """Who else's clock is off by more than `FAR_OFF_S`, and by how much it is ahead."""
        now_s = self.now_s(wall_s, elapsed_s)
        ahead_s = {node: each + elapsed_s - now_s for node, each in self._offsets_s.items()}
        return {node: each for node, each in ahead_s.items() if abs(each) > FAR_OFF_S}

    def jumped_s(self, wall_s: float, elapsed_s: float) -> float:
        """By how much our own clock was set since the last call, 0.0 for less than `JUMP_S`."""
        before_s, self._own_offset_s = self._own_offset_s, wall_s - elapsed_s
        jump_s = 0.0 if before_s is None else self._own_offset_s - before_s
        return jump_s if abs(jump_s) >= JUMP_S else 0.0
