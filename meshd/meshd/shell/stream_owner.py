"""What a connection needs of the pool that it belongs to, and what the pool counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from meshd.core.bodies import Bodies
from meshd.shell.stream_calls import Handler, StreamConfig
from meshd_cms.types import Epoch, NodeId, Value
from meshd_plugins.api import Logger

if TYPE_CHECKING:
    from meshd.shell.stream_connection import Connection


@dataclass(slots=True)
class StreamStatistics:
    """Counts since the start, over all connections."""

    connections: int = 0  # now
    dials: int = 0
    dials_failed: int = 0
    accepted: int = 0
    accepts_failed: int = 0  # handshakes that failed, and connections beyond the bounds
    knocks: int = 0  # closed before a word was said
    peers_restricted: int = 0  # expired, revoked, or let in by an issuer that is
    frames_ignored: int = 0  # gossip of such peers
    connections_lost: int = 0  # other than by agreement
    protocol_errors: int = 0
    calls_opened: int = 0
    calls_served: int = 0
    calls_refused: int = 0  # by us
    calls_failed: int = 0  # by us
    gossip_sent: int = 0
    gossip_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Owner(Protocol):
    """What a connection needs of the pool it belongs to."""

    config: StreamConfig
    statistics: StreamStatistics
    log: Logger
    handler: Handler
    draining: bool
    bodies: Bodies

    @property
    def is_observer(self) -> bool:
        """Whether this node serves nothing."""
        ...

    def load(self) -> Value:
        """This node's load, for a reply."""
        ...

    def load_heard(self, peer: NodeId, load: Value, /) -> None:
        """A reply brought a peer's load."""
        ...

    def gossip_heard(self, peer: NodeId, epoch: Epoch, payload: bytes, /) -> None:
        """A gossip message came."""
        ...

    def connection_up(self, connection: Connection, clock_s: float, /) -> None:
        """HELLO was exchanged; it said what the peer's clock shows. Sets the verdict."""
        ...

    def told_off(self, code: str, /) -> None:
        """The peer refused a call because of our certificate."""
        ...

    def connection_leaving(self, connection: Connection, /) -> None:
        """The peer asked for no more calls on it."""
        ...
