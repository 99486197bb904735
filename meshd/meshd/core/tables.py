"""What one node tells another of a range of ids: views and digests, cut to fit datagrams, and the summary.

A `Tables` is a snapshot of the moment in which it was made; it lives for one call into the core.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Final

from meshd.core.buckets import FIRST_ID, LAST_ID, IdRange, Particulars, Tokens, ranges_of
from meshd.core.context import Context
from meshd.core.membership import Update
from meshd.core.messages import Digest, View, ViewLine
from meshd_cms.types import DigestLine, NodeId

_LINE_BYTES: Final = 46  # of a digest line, the longer of the two kinds, at most
_TABLE_BYTES: Final = 64  # of a digest or view beside its lines, with the envelope


def lines_per_table(datagram_payload_bytes: int) -> int:
    """How many lines of either kind fit a datagram, at least."""
    return (datagram_payload_bytes - _TABLE_BYTES) // _LINE_BYTES


class Tables:
    """What is held of all nodes listed, ourselves among them, and of all records; sorted by id."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._most_lines = lines_per_table(context.config.datagram_payload_bytes_max)
        updates = [member.update for member in context.members]
        updates.append(context.own_update())
        updates.sort(key=lambda update: update.node)
        self._updates = updates
        self._nodes = [update.node for update in updates]
        self._digest = context.store.digest()
        self._owners = [line.owner for line in self._digest]

    def updates(self, low: NodeId = FIRST_ID, high: NodeId = LAST_ID) -> list[Update]:
        """What is believed of the nodes of a range."""
        return self._updates[bisect_left(self._nodes, low) : bisect_right(self._nodes, high)]

    def digest_lines(
        self, low: NodeId = FIRST_ID, high: NodeId = LAST_ID
    ) -> tuple[DigestLine, ...]:
        """What is held of the records of a range."""
        return self._digest[bisect_left(self._owners, low) : bisect_right(self._owners, high)]

    def view_lines(self, low: NodeId = FIRST_ID, high: NodeId = LAST_ID) -> tuple[ViewLine, ...]:
        """`updates`, without the particulars."""
        return tuple(
            ViewLine(update.node, update.state, update.epoch, update.incarnation)
            for update in self.updates(low, high)
        )

    def views(self, low: NodeId, high: NodeId, *, answer: bool) -> list[View]:
        """The views of a range, each of a size that fits a datagram."""
        lines = self.view_lines(low, high)
        cuts = _cuts([line.node for line in lines], low, high, self._most_lines)
        return [View(*ids, lines[start:end], answer) for ids, start, end in cuts]

    def digests(self, low: NodeId, high: NodeId, *, answer: bool) -> list[Digest]:
        """The digests of a range, each of a size that fits a datagram."""
        lines = self.digest_lines(low, high)
        cuts = _cuts([line.owner for line in lines], low, high, self._most_lines)
        return [Digest(*ids, lines[start:end], answer) for ids, start, end in cuts]

    def summary(self, tokens: Tokens, buckets: int) -> tuple[int, ...]:
        """The hashes of so many buckets: see buckets.py."""
        lives: list[tuple[NodeId, Particulars]] = []
        for update in self._updates:
            if update.state.is_live:
                line = self._context.store.pull_line(update.node)
                epoch = 0 if line is None else int(line.epoch)
                version = 0 if line is None else int(line.max_version)
                lives.append((update.node, (update.epoch, update.incarnation, epoch, version)))
        return tokens.table(lives, buckets)


def differing(ours: Sequence[int], theirs: Sequence[int]) -> list[IdRange]:
    """The ranges of ids whose buckets differ between two tables of one size."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return ranges_of([index for index, (one, other) in pairs if one != other], len(ours))


def _cuts(
    nodes: Sequence[NodeId], low: NodeId, high: NodeId, size: int
) -> list[tuple[IdRange, int, int]]:
    """Cut [low, high] into adjoining ranges with at most `size` of the sorted `nodes` in each.

    Returns ids, first index and last index + 1 of each range; at least one range, which is empty when
    there are no nodes.
    """
    cuts: list[tuple[IdRange, int, int]] = []
    first = low
    for start in range(0, max(1, len(nodes)), size):
        end = min(start + size, len(nodes))
        last = high if end >= len(nodes) else nodes[end - 1]
        cuts.append(((first, last), start, end))
        if last != LAST_ID:
            first = NodeId((int.from_bytes(last, "big") + 1).to_bytes(len(last), "big"))
    return cuts
