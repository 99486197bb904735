"""A simulated machine, one life of its process, and the store that says what was touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.sim.network import Clock
from tests.unit.support_cms import HashSigner

from meshd.core.effects import Address
from meshd.core.node import NodeCore
from meshd_cms.store import Store
from meshd_cms.types import ApplyResult, Delta, Epoch, NodeId, Value

if TYPE_CHECKING:
    from tests.sim.streams import Stream

BACKLOG_MAX = 4096
"""Datagrams that wait in the socket of a process that stands still; more are lost."""


class WatchedStore(Store):
    """The store itself, noting which owners a call may have touched: only those are checked."""

    touched: dict[NodeId, None]

    @staticmethod
    def over(store: Store) -> WatchedStore:
        """The same store, watched; the other must not be used any more."""
        watched = WatchedStore.__new__(WatchedStore)
        vars(watched).update(vars(store))
        watched.touched = dict.fromkeys(store.owners())
        return watched

    def set(self, key: str, value: Value) -> Delta | None:
        self.touched[self.owner] = None
        return super().set(key, value)

    def delete(self, key: str) -> Delta | None:
        self.touched[self.owner] = None
        return super().delete(key)

    def collect_tombstones(self, keep: int) -> Delta | None:
        self.touched[self.owner] = None
        return super().collect_tombstones(keep)

    def learn_epoch(self, seen: Epoch) -> bool:
        self.touched[self.owner] = None
        return super().learn_epoch(seen)

    def apply(self, delta: Delta, now_s: float) -> ApplyResult:
        self.touched[delta.owner] = None
        return super().apply(delta, now_s)

    def forget(self, owner: NodeId) -> None:
        self.touched[owner] = None
        super().forget(owner)


@dataclass(slots=True, eq=False)
class Life:
    """One life of a node's process."""

    core: NodeCore
    store: WatchedStore
    epoch: Epoch
    wake_s: float = float("inf")  # the earliest wake-up in the heap, true time
    ended: bool = False
    dialled: dict[NodeId, Stream] = field(default_factory=dict[NodeId, "Stream"])
    accepted: dict[Stream, None] = field(default_factory=dict["Stream", None])
    told_of: dict[NodeId, None] = field(
        default_factory=dict[NodeId, None]
    )  # events not checked yet
    checks: int = 0


@dataclass(slots=True, eq=False)
class SimNode:
    """One machine."""

    number: int
    name: str
    address: Address
    id: NodeId
    signer: HashSigner
    clock: Clock
    life: Life | None = None  # None: the process does not run
    host_up: bool = True  # a host without the process refuses; a host that is down is silent
    is_asleep: bool = False  # neither computes nor hears anything
    stalled_until_s: float = 0.0
    backlog: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    disk: bytes = b""  # the last snapshot
    decrees: list[bytes] = field(default_factory=list[bytes])  # kept as soon as they are known
    wall_off_s: float = 0.0  # how far its wall clock is off
    disturbed: bool = False  # it was crashed, stalled or cut off: its death may be told

    @property
    def hears(self) -> bool:
        """Whether packets reach the host at all."""
        return self.host_up and not self.is_asleep
