"""Keeps a node's state on disk in step with what it knows, at the pace that flash bears."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

import trio

from meshd.core.effects import Address
from meshd.core.sealing import Floor
from meshd.shell.storage import Storage
from meshd.trust.identity import Identity
from meshd_cms import Epoch, SnapshotError, Store, StoreConfig
from meshd_plugins.api import Logger

WINDOWS_EVERY_S = 600.0
SAVE_DEADLINE_S = 5.0  # a disk that hangs does not hold up the end of the daemon

Run: TypeAlias = Callable[[Callable[[], bool]], Awaitable[bool]]
"""Runs a call that blocks; may be cancelled, and then the call goes on by itself."""


async def in_thread(call: Callable[[], bool]) -> bool:
    """The `Run` of a daemon."""
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


def load_store(storage: Storage, identity: Identity, epoch: Epoch, log: Logger) -> Store:
    """The store from its snapshot, or an empty one; a snapshot that does not read is set aside.

    What the storage found damaged so far, and will find, is said in `log`. The store's epoch may be higher
    than the one given: the snapshot remembers. It is on disk on return if the disk allows it.
    """
    storage.report_to(log)
    snapshot = storage.load_snapshot()
    if snapshot is None:
        return Store(StoreConfig(), identity.mesh_id, identity.signer, epoch, identity.verify)
    try:
        store = _restored(snapshot, identity, epoch)
        if store.epoch > epoch:
            # It knows of a life that the epoch's own files have forgotten: there may be still later ones.
            store = _restored(snapshot, identity, storage.epoch_above(store.epoch))
    except SnapshotError as error:
        aside = storage.quarantine_snapshot()
        log.warning(
            "snapshot.rejected",
            error=str(error),
            kept_as=None if aside is None else str(aside),
            do="nothing: peers give back what it held",
        )
        return Store(StoreConfig(), identity.mesh_id, identity.signer, epoch, identity.verify)
    return store


def _restored(snapshot: bytes, identity: Identity, epoch: Epoch) -> Store:
    return Store.restore(
        snapshot,
        StoreConfig(),
        identity.mesh_id,
        identity.signer,
        epoch,
        identity.verify,
        as_of_s=trio.current_time(),
    )


class StateKeeper:
    """Writes the snapshot and the peers to try first, when they changed, at most once an interval.

    What only ages (load, when a record was last confirmed) is in neither. How far senders were heard changes
    with each datagram: it is written beside other things, at the end, and otherwise every `WINDOWS_EVERY_S`.

    Args:
        storage: the state folder.
        store: what is written.
        live_peers: addresses of the members that are alive now, without this node, in any order.
        interval_s: least time between two writes.
        peers_max: addresses that are remembered.
        floors: how far each sender of datagrams was heard.
        run: where the calls to the storage, which block, are made.
    """

    def __init__(
        self,
        storage: Storage,
        store: Store,
        live_peers: Callable[[], tuple[Address, ...]],
        *,
        interval_s: float,
        peers_max: int,
        floors: Callable[[], tuple[Floor, ...]] = tuple,
        run: Run = in_thread,
    ) -> None:
        self._storage = storage
        self._store = store
        self._live_peers = live_peers
        self._interval_s = interval_s
        self._peers_max = peers_max
        self._floors = floors
        self._run = run
        self._saved_floors_s = 0.0
        self._saved_snapshot = b""  # its digest
        self._saved_peers: tuple[Address, ...] = ()

    async def run(self) -> None:
        """Keep writing until cancelled."""
        while True:
            await trio.sleep(self._interval_s)
            await self.save()

    async def save(self, *, last: bool = False) -> None:
        """Write what changed since the last time; a disk that refuses is counted by the storage.

        Args:
            last: the daemon ends.
        """
        writes = self._storage.statistics.writes
        snapshot = self._store.snapshot()
        digest = hashlib.blake2b(snapshot, digest_size=16).digest()
        peers = tuple(sorted(self._live_peers())[: self._peers_max])
        with trio.move_on_after(SAVE_DEADLINE_S, shield=True):
            if not self._storage.statistics.epoch_kept:
                await self._run(self._storage.keep_epoch_again)
            if digest != self._saved_snapshot:
                write = partial(self._storage.save_snapshot, snapshot)
                if await self._run(write):
                    self._saved_snapshot = digest
            # Nobody alive is no reason to forget whom to try first.
            if peers and peers != self._saved_peers:
                write = partial(self._storage.save_peers, peers)
                if await self._run(write):
                    self._saved_peers = peers
            await self._save_floors(due=last or self._storage.statistics.writes > writes)

    async def _save_floors(self, *, due: bool) -> None:
        now_s, floors = trio.current_time(), self._floors()
        if floors and (due or now_s - self._saved_floors_s >= WINDOWS_EVERY_S):
            self._saved_floors_s = now_s
            await self._run(partial(self._storage.save_windows, floors))
