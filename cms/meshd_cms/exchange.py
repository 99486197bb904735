"""What of a record a peer lacks, and the delta that brings it there."""

from __future__ import annotations

from meshd_cms.entries import entry_size_bytes
from meshd_cms.record import ZERO, Record
from meshd_cms.types import HEAD_BYTES_MAX, Delta, DigestLine, Version


def start_for(record: Record, line: DigestLine | None) -> Version | None:
    """From where a peer with this line needs our record; None when it needs nothing."""
    if line is None or line.epoch < record.epoch:
        return ZERO
    if line.epoch > record.epoch:
        return None
    if record.floor > line.floor and record.floor > line.max_version:
        return ZERO
    return line.max_version if line.max_version < record.max_version else None


def cut(record: Record, since: Version, bytes_max: int) -> tuple[Delta, int] | None:
    """The record above `since`, cut at a version to fit; with it, an upper bound of its encoded size.

    None when there is nothing above, or not even the first entry fits.
    """
    size_bytes = HEAD_BYTES_MAX
    if since >= record.max_version or size_bytes > bytes_max:
        return None
    entries = record.by_version(since)
    until = record.max_version
    for count, entry in enumerate(entries):
        one_bytes = entry_size_bytes(entry)
        if size_bytes + one_bytes > bytes_max:
            if count == 0:
                return None
            entries = entries[:count]
            until = entries[-1].version
            break
        size_bytes += one_bytes
    delta = Delta(record.owner, record.epoch, since, until, tuple(entries), record.head)
    return delta, size_bytes


def is_useless(delta: Delta, line: DigestLine | None) -> bool:
    """Whether the peer would refuse it: it ends below a floor of theirs that our record lacks."""
    return (
        line is not None
        and line.epoch == delta.epoch
        and delta.head.floor < line.floor
        and delta.until < line.floor
    )
