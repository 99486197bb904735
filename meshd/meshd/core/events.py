"""What the node core tells the rest of the daemon. Each event is a fact, already true when it is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from meshd.core.decrees import Decree
from meshd_cms.types import Epoch, NodeId


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A node is a member now: new, or back after it had failed or left."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class MemberUpdated:
    """A live member changed its name or address, or is another life (epoch) of the same node."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class MemberSuspected:
    """A member did not answer: route no new work to it. It is not dead yet."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class MemberAlive:
    """A suspected member refuted the suspicion."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class MemberFailed:
    """A member is declared dead."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class MemberLeft:
    """A member left by its own will; that is not a failure."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class MemberForgotten:
    """A node dead or gone for long is no longer remembered; its record was dropped from the store."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class MemberRevoked:
    """A member was shut out by decree: it is not listed any more, and its record is gone."""

    node: NodeId
    name: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Decreed:
    """An authority decreed something that was not known here. It is in force, and is passed on.

    It may be about this very node. What it voids, and what it expels, has happened.
    """

    decree: Decree


@dataclass(frozen=True, slots=True)
class DecreesPassedOver:
    """A decree may have been missed: too many bad ones came by datagram. Ask a peer by stream; told now and then."""


@dataclass(frozen=True, slots=True)
class AddressContested:
    """Two members claim one address. `holder` keeps it; `other` is suspected and has to show itself."""

    address: tuple[str, int]
    holder: NodeId
    other: NodeId


@dataclass(frozen=True, slots=True)
class NameContested:
    """Two live members carry one name. Both stay: identity is the node id; a person should rename one."""

    name: str
    node: NodeId
    other: NodeId


@dataclass(frozen=True, slots=True)
class RecordChanged:
    """The record of `owner` changed. `reset`: it was replaced as a whole (a new life, or a gap)."""

    owner: NodeId
    keys: tuple[str, ...]
    reset: bool


@dataclass(frozen=True, slots=True)
class SoftChanged:
    """A soft value of `owner` was refreshed; its age is readable in the soft table."""

    owner: NodeId
    key: str


@dataclass(frozen=True, slots=True)
class SelfEpochRaised:
    """A peer remembered a later life of ours: this process continues under `epoch`. Seal with it now."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class MeshJoined:
    """A seed answered: there is a mesh beyond this node."""

    via: NodeId
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class SeedUnreachable:
    """A seed address has not answered `attempts` joins in a row; told once per silence."""

    address: tuple[str, int]
    attempts: int


MemberEvent: TypeAlias = (
    MemberJoined
    | MemberUpdated
    | MemberSuspected
    | MemberAlive
    | MemberFailed
    | MemberLeft
    | MemberForgotten
    | MemberRevoked
)
Event: TypeAlias = (
    MemberEvent
    | Decreed
    | DecreesPassedOver
    | AddressContested
    | NameContested
    | RecordChanged
    | SoftChanged
    | SelfEpochRaised
    | MeshJoined
    | SeedUnreachable
)
