"""The messages of the gossip protocol. How they look on the wire: `meshd.core.wire`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from meshd.core.decrees import DECREE_ID_BYTES
from meshd.core.effects import Address
from meshd.core.membership import MemberState, Update
from meshd_cms.soft import SoftTold
from meshd_cms.types import Delta, DigestLine, Epoch, NodeId, Version

TARGET_BYTES: Final = 4  # of an id: enough to tell who holds an address from who held it


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What every ping and ack says of its sender."""

    state_hash: (
        bytes | None
    )  # 8 bytes, see membership.state_hash; None: that of the ping it answers
    version: Version  # of the sender's own record

    def answering(self, ping: Heartbeat) -> Heartbeat:
        """This heartbeat as an ack to a ping with that one carries it."""
        return Heartbeat(None, self.version) if self.state_hash == ping.state_hash else self


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with an ack of the same sequence, if it is for you."""

    sequence: int
    target: (
        bytes  # a node id; its first `TARGET_BYTES` travel: an address may have had another holder
    )
    heartbeat: Heartbeat

    def is_for(self, node: NodeId) -> bool:
        """Whether that node is meant."""
        return node.startswith(self.target)


@dataclass(frozen=True, slots=True)
class Ack:
    """The subject of the probe is alive."""

    sequence: int
    subject: NodeId | None  # None: the sender; named when it was relayed
    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Probe `target` for me; relay its ack, or say nack when it is late."""

    sequence: int
    target: NodeId
    address: Address


@dataclass(frozen=True, slots=True)
class Nack:
    """The target has not answered me yet; at least we two can talk."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about a node. `merged`: out of a table, not a rumour; bad news in it is only a suspicion."""

    update: Update
    merged: bool


@dataclass(frozen=True, slots=True)
class Record:
    """A delta of somebody's record; a rumour is passed on, a repair is not."""

    delta: Delta
    rumour: bool


@dataclass(frozen=True, slots=True)
class Digest:
    """What I hold of all owners with low <= id <= high; owners not listed I do not know."""

    low: NodeId
    high: NodeId
    lines: tuple[DigestLine, ...]
    answer: bool  # ask back for what you lack


@dataclass(frozen=True, slots=True)
class ViewLine:
    """What I believe of a node, without the particulars."""

    node: NodeId
    state: MemberState
    epoch: Epoch
    incarnation: int


@dataclass(frozen=True, slots=True)
class View:
    """What I believe of all nodes with low <= id <= high; nodes not listed I do not know."""

    low: NodeId
    high: NodeId
    lines: tuple[ViewLine, ...]
    answer: bool  # ask back where I know better


@dataclass(frozen=True, slots=True)
class Join:
    """Somebody new, or back, at an address from outside the protocol; its claim comes with it."""

    token: int


@dataclass(frozen=True, slots=True)
class JoinAnswer:
    """Welcome. Some members come in the same datagram."""

    token: int
    is_whole: bool = True  # the rest follows; otherwise ask one of those members for it


@dataclass(frozen=True, slots=True)
class JoinLater:
    """Too many join at once: come again after this time."""

    token: int
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Soft:
    """A soft reading of the sender."""

    told: SoftTold


@dataclass(frozen=True, slots=True)
class SoftStill:
    """The sender's reading of this sequence still holds."""

    sequence: int
    age_s: float  # since it was found to hold


@dataclass(frozen=True, slots=True)
class Interest:
    """Tell me your soft readings now, and directly for a while."""

    for_s: float  # 0: just now


@dataclass(frozen=True, slots=True)
class Summary:
    """Hashes of what I hold, a bucket of node ids each: answer with your lines where yours differ."""

    hashes: tuple[int, ...]  # a power of two of them; see buckets.py
    decrees: bytes = bytes(DECREE_ID_BYTES)  # `Decrees.hash`


@dataclass(frozen=True, slots=True)
class Proclaim:
    """A decree, as its authority signed it; a rumour is passed on, a repair is passed on when it is news."""

    raw: bytes
    rumour: bool


@dataclass(frozen=True, slots=True)
class DecreesHeld:
    """The decrees I hold with low <= id <= high: tell me the others."""

    low: bytes  # 8 bytes
    high: bytes
    ids: tuple[bytes, ...]  # sorted
    answer: bool  # list yours, if I hold some that you lack


@dataclass(frozen=True, slots=True)
class Pull:
    """Send me what I lack of exactly these owners; of one I do not know at all I hold version 0."""

    lines: tuple[DigestLine, ...]


Message: TypeAlias = (
    Ping
    | Ack
    | PingRequest
    | Nack
    | Claim
    | Record
    | Digest
    | View
    | Join
    | JoinAnswer
    | JoinLater
    | Soft
    | Pull
    | SoftStill
    | Interest
    | Summary
    | Proclaim
    | DecreesHeld
)
