"""The frames two peers exchange on a stream, and how either end can get them wrong. Pure.

`meshd.core.frame_codec` turns them into bytes and back; docs/protocol.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final, TypeAlias

from meshd_cms.types import Epoch, MeshId, NodeId, Value

PROTOCOL_VERSION: Final = 1
LENGTH_BYTES: Final = 4
FRAME_BYTES_MAX: Final = 1 << 20
"""Default bound of one frame without its length."""
FRAME_BYTES_MIN: Final = 4096
"""What a peer may not bound frames below: every frame but CALL, CHUNK, END and GOSSIP fits."""
WINDOW_BYTES: Final = 256 * 1024
"""Default credit of a call at its start."""
CLOCK_MAX_S: Final = 2.0**40
"""No wall clock shows more seconds since 1970."""


class FrameType(IntEnum):
    """First element of a frame; the numbers are the wire."""

    HELLO = 0
    CALL = 1
    CHUNK = 2
    END = 3
    REFUSE = 4
    ERROR = 5
    CANCEL = 6
    CREDIT = 7
    PING = 8
    PONG = 9
    GOSSIP = 10
    GOAWAY = 11


class Fault(StrEnum):
    """How a peer broke the protocol. Travels as the reason of the last GOAWAY and labels a metric."""

    TOO_LARGE = "too_large"
    BAD_FRAME = "bad_frame"
    UNEXPECTED_FRAME = "unexpected_frame"  # not in this state of the call or connection
    BAD_CALL_ID = "bad_call_id"
    CREDIT_EXCEEDED = "credit_exceeded"
    OTHER_MESH = "other_mesh"
    OTHER_NODE = "other_node"  # HELLO names another node than the certificate
    VERSION_MISMATCH = "version_mismatch"


class ProtocolError(Exception):
    """The peer's fault. State: the connection is over; calls on it are lost.

    ProtocolError            code = a `Fault`
      VersionMismatch        speaks another protocol version
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
        self.code = fault.value
        self.message = message


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the stream protocol."""

    def __init__(self, ours: int, theirs: int) -> None:
        super().__init__(
            Fault.VERSION_MISMATCH,
            f"the peer speaks version {theirs} of the peer protocol and this node version {ours}: "
            f"install the same release of meshd on both",
        )
        self.ours = ours
        self.theirs = theirs


class UnsendableError(ValueError):
    """Our own frame cannot be sent. State: nothing was sent, the connection is whole.

    UnsendableError          code unsendable: something in it is not a `Value`, or a text is too long
      FrameTooLarge          code too_large
    """

    code = "unsendable"


class FrameTooLarge(UnsendableError):
    """The encoded frame exceeds the bound."""

    code = "too_large"


@dataclass(frozen=True, slots=True)
class WarmHint:
    """Where else the KV state of the beginning of a request is warm."""

    node: NodeId
    tag: bytes  # of the request that made it
    tokens: int


@dataclass(frozen=True, slots=True)
class CallHeader:
    """What travels with a request from node to node."""

    request_id: str  # the same on every node that touches it
    name: str  # the semantic name that was asked for
    capability_id: str  # the capability the caller chose on this peer
    operation: str
    caller: bytes = b""  # id of the node where it was asked; empty: of the sender
    principal: str = ""  # who asked there
    passport: bytes = b""  # the word of that node for all this: for whoever gets it from another
    privacy: int = 2  # `meshd_plugins.api.Privacy`
    trace: str = ""  # W3C traceparent
    remaining_s: float = 60.0  # what is left of the deadline when this was sent; finite, >= 0
    hops: int = 0  # forwards so far
    idempotency_id: str = ""
    tags: tuple[bytes, ...] = ()  # of the conversation's last prefixes; see `meshd.core.prefixes`
    hint: WarmHint | None = None


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame each way: who this end is, and what it takes."""

    mesh: MeshId
    node: NodeId
    epoch: Epoch
    frame_bytes_max: int = FRAME_BYTES_MAX  # the peer may send no larger frame
    window_bytes: int = WINDOW_BYTES  # credit of each call that this end opens, when it opens it
    clock_s: float = 0.0  # what this end's wall clock shows, seconds since 1970
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Call:
    """Caller to callee: a request."""

    call: int
    header: CallHeader
    body: Value


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the answer, or, from the caller, of what goes along with the request; costs credit."""

    call: int
    value: Value


@dataclass(frozen=True, slots=True)
class End:
    """Callee to caller, final: the answer is complete."""

    call: int
    trailer: Value
    load: Value


@dataclass(frozen=True, slots=True)
class Refuse:
    """Callee to caller, final: not taken, nothing was done."""

    call: int
    code: str
    message: str
    load: Value


@dataclass(frozen=True, slots=True)
class Error:
    """Callee to caller, final: broke; `callers_fault` says that any peer would have said so."""

    call: int
    code: str
    message: str
    callers_fault: bool
    load: Value


@dataclass(frozen=True, slots=True)
class Cancel:
    """Caller to callee: stop; the callee still answers with a final frame."""

    call: int
    reason: str


@dataclass(frozen=True, slots=True)
class Credit:
    """This many more bytes of CHUNK frames may be sent."""

    call: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered at once by a PONG with the same token."""

    token: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a PING."""

    token: int


@dataclass(frozen=True, slots=True)
class Gossip:
    """A message of the node core that does not fit a datagram."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Goaway:
    """Open no more calls here; those that run are finished. `reason` is a code."""

    reason: str


Frame: TypeAlias = (
    Hello | Call | Chunk | End | Refuse | Error | Cancel | Credit | Ping | Pong | Gossip | Goaway
)
