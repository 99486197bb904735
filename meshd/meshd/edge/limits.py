"""The bounds of the HTTP edge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What one client may cost. The defaults suit a board with 2 GiB of memory."""

    request_bytes_max: int = 8 << 20  # a longer body is refused with 413; raising it costs memory
    body_deadline_s: float = 30.0  # a body that is not whole by then is refused with 408
    deadline_default_s: float = 120.0  # of an ask that names none
    deadline_max_s: float = 3600.0  # a longer one is cut to this
    deadline_grace_s: float = 2.0  # the mesh answers its own deadline; after this the edge does
    heartbeat_s: float = 10.0  # silence after which a stream says `: waiting`; lower = more traffic
    require_key: bool = False  # of those who come over TCP from this machine, too


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may cost."""

    head_s: float = 10.0  # for a TLS handshake, and for the line and headers of a request
    stalled_s: float = 30.0  # for a client to take what was sent to it
    header_bytes_max: int = 16 * 1024  # line and headers together; above it 431
    headers_max: int = 100  # above it 431
    target_bytes_max: int = 8 * 1024  # path and query; above it 414
    per_source_max: int = 100  # TCP connections from one address
