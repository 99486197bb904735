"""How many bytes of large requests are held at once: a bound for the whole node, whoever sends them.

Invariant: what is held is the sum of what was taken and not given back; a take that would go beyond the bound
takes nothing. Bodies up to `BODY_BYTES_FREE` are not counted: the bounds on connections and calls hold them.
"""

from __future__ import annotations

from typing import Final

BODY_BYTES_FREE: Final = 64 * 1024
HELD_BYTES_MAX: Final = 64 * 1024 * 1024


class Bodies:
    """The bytes that are held.

    Args:
        bytes_max: at most so many. Up: more large requests at once, more memory.
    """

    def __init__(self, bytes_max: int = HELD_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self.held_bytes = 0

    def share(self) -> BodyShare:
        """What one request will hold; give it back with `release`."""
        return BodyShare(self)

    def take(self, count: int) -> bool:
        """Hold so many more, if the bound allows it; otherwise none."""
        if self.held_bytes + count > self._bytes_max:
            return False
        self.held_bytes += count
        return True

    def give(self, count: int) -> None:
        """Hold so many less."""
        assert count <= self.held_bytes, "more than was taken"
        self.held_bytes -= count


class BodyShare:
    """The bytes of one request, while it arrives and until it is done with."""

    __slots__ = ("_bodies", "_held_bytes")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._held_bytes = 0

    def grow(self, size: int) -> bool:
        """The body has so many bytes by now; False where they are too many to be held now."""
        counted = max(0, size - BODY_BYTES_FREE)
        if counted > self._held_bytes and not self._bodies.take(counted - self._held_bytes):
            return False
        self._held_bytes = max(self._held_bytes, counted)
        return True

    def release(self) -> None:
        """The body is not needed any more. Once more does nothing."""
        self._bodies.give(self._held_bytes)
        self._held_bytes = 0
