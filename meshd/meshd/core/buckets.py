"""Hashes of what is held, a bucket of node ids each: where two nodes differ is found in one datagram.

Invariant: the buckets of a table adjoin, cover all ids, and are as many as a power of two; the bucket of a
node is given by the first bits of its id, which is itself a hash. A bucket's hash is the XOR of a token for
each live node in it, ourselves among them, over

    (node, epoch, incarnation, epoch and version of its record, as far as we would pull it)

So two nodes that see the same live members, and neither lacks a part of their records, have the same table,
in whatever order they learnt it. As in the state hash, suspicions and the dead are left out: the former come
and go by themselves, the latter are forgotten here and there at different times. A record that is pulled
again from the start counts as empty, unlike in the state hash, because an exchange can mend it.

Two different buckets have one hash by a chance of 2**-32; the next change of anything in them ends that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from meshd_cms.errors import CodecError
from meshd_cms.types import NODE_ID_BYTES, NodeId

BUCKET_BYTES: Final = 4  # of a bucket's hash
BUCKETS_MAX: Final = 256  # what fits a datagram
FIRST_ID: Final = NodeId(bytes(NODE_ID_BYTES))
LAST_ID: Final = NodeId(b"\xff" * NODE_ID_BYTES)
_ID_BITS: Final = 8 * NODE_ID_BYTES

Particulars: TypeAlias = tuple[int, int, int, int]
"""Of a live node: epoch, incarnation, and epoch and version of its record (0, 0: none)."""

IdRange: TypeAlias = tuple[NodeId, NodeId]
"""Lowest and highest id."""


def buckets_for(nodes: int) -> int:
    """How many buckets a table of so many nodes has: two nodes a bucket, until there are `BUCKETS_MAX`."""
    half = min(BUCKETS_MAX, max(1, nodes // 2))
    return 1 << (half.bit_length() - 1)


def bucket_of(node: NodeId, buckets: int) -> int:
    """The place of a node's bucket in a table of so many."""
    return int.from_bytes(node[:2], "big") * buckets >> 16


def ranges_of(indices: Sequence[int], buckets: int) -> list[IdRange]:
    """The ids of some buckets, by ascending index; adjoining ones are joined."""
    width_bits = _ID_BITS - (buckets.bit_length() - 1)
    spans: list[tuple[int, int]] = []
    for index in indices:
        first, last = index << width_bits, ((index + 1) << width_bits) - 1
        if spans and spans[-1][1] + 1 == first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return [(_id(first), _id(last)) for first, last in spans]


def _id(number: int) -> NodeId:
    return NodeId(number.to_bytes(NODE_ID_BYTES, "big"))


class Tokens:
    """The token of every live node; remembered, because most of them did not change since the last table."""

    def __init__(self) -> None:
        self._tokens: dict[NodeId, tuple[Particulars, int]] = {}

    def table(self, lives: Iterable[tuple[NodeId, Particulars]], buckets: int) -> tuple[int, ...]:
        """The hashes of a table of so many buckets; of nodes not named any more nothing is remembered."""
        before, self._tokens = self._tokens, {}
        hashes = [0] * buckets
        for node, particulars in lives:
            known = before.get(node)
            if known is None or known[0] != particulars:
                known = (particulars, _token(node, particulars))
            self._tokens[node] = known
            hashes[bucket_of(node, buckets)] ^= known[1]
        return tuple(hashes)


def _token(node: NodeId, particulars: Particulars) -> int:
    text = b"bucket %b %d %d %d %d" % (node, *particulars)
    return int.from_bytes(hashlib.blake2b(text, digest_size=BUCKET_BYTES).digest(), "big")


def pack_hashes(hashes: Sequence[int]) -> bytes:
    """The hashes of a table as they travel."""
    return b"".join(one.to_bytes(BUCKET_BYTES, "big") for one in hashes)


def unpack_hashes(item: object) -> tuple[int, ...]:
    """The hashes that `pack_hashes` packed.

    Raises:
        CodecError: they are none, or their number is not a power of two up to `BUCKETS_MAX`.
    """
    if not isinstance(item, bytes):
        raise CodecError("hashes of buckets are not bytes")
    count, rest = divmod(len(item), BUCKET_BYTES)
    if rest or not 0 < count <= BUCKETS_MAX or count & (count - 1):
        raise CodecError("the number of buckets is no power of two, or too large")
    starts = range(0, len(item), BUCKET_BYTES)
    return tuple(int.from_bytes(item[at : at + BUCKET_BYTES], "big") for at in starts)
