"""What the node core asks of the world: the whole vocabulary between the core and its driver.

The core returns effects in the order in which they are to be carried out. An effect that cannot be
carried out (a full socket buffer, an unreachable peer) is dropped by the driver and counted there: every
message of the core may be lost, so nothing needs to be reported back except what `stream_pinged`,
`knocked`, `watch_ended` and `evidence_refused` say.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from meshd.core.events import Event
from meshd_cms.types import NodeId

Address: TypeAlias = tuple[str, int]
"""An IP literal and a port; datagrams and streams of one node share the port number."""


class Lane(Enum):
    """How a payload travels."""

    DATAGRAM = "datagram"  # may be lost, doubled, reordered; at most `datagram_payload_bytes_max`
    STREAM = "stream"  # the multiplexed connection to that node; at most `stream_payload_bytes_max`


@dataclass(frozen=True, slots=True)
class Send:
    """Carry an encoded, not yet sealed, payload to a node."""

    to: Address
    node: (
        NodeId | None
    )  # None: whoever answers at that address (a first contact); always a datagram
    payload: bytes
    lane: Lane = Lane.DATAGRAM


@dataclass(frozen=True, slots=True)
class StreamPing:
    """Ping over the stream connection, dialling if there is none; report with `stream_pinged(token, ...)`."""

    node: NodeId
    to: Address
    token: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Keep an idle witness stream to that node; report its end with `watch_ended(node, ...)`.

    A process that is killed ends it within milliseconds, which no probe could notice so soon.
    """

    node: NodeId
    to: Address


@dataclass(frozen=True, slots=True)
class Unwatch:
    """Close the witness streams with that node, whoever dialled them, and say goodbye on them first."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Knock:
    """Open a TCP connection to that node's port and close it at once; report with `knocked(token, ...)`."""

    node: NodeId
    to: Address
    token: int


@dataclass(frozen=True, slots=True)
class Notify:
    """Something happened that the rest of the daemon may care about."""

    event: Event


Effect: TypeAlias = Send | StreamPing | Watch | Unwatch | Knock | Notify
