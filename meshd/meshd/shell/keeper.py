"""Keeps a node's state on disk in step with what it knows, at the pace that flash bears."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from meshd.core.effects import Address
from meshd.shell.identity import Identity
from meshd.shell.storage import Storage
from meshd_cms import Epoch, SnapshotError, Store, StoreConfig
from meshd_plugins.api import Logger

SAVE_DEADLINE_S = 5.0  # a disk that hangs does not hold up the end of the daemon


def load_store(storage: Storage, identity: Identity, epoch: Epoch, log: Logger) -> Store:
    """The store from its snapshot, or an empty one; a snapshot that does not read is set aside.

    The store's epoch may be higher than the one given: the snapshot remembers. It is on disk on return.

    Raises:
        StorageError: the epoch cannot be written.
    """
    config, mesh, signer, verify = (
        StoreConfig(),
        identity.mesh_id,
        identity.signer,
        identity.verify,
    )
    snapshot = storage.load_snapshot()
    store: Store | None = None
    if snapshot is not None:
        try:
            store = Store.restore(
                snapshot, config, mesh, signer, epoch, verify, as_of_s=trio.current_time()
            )
        except SnapshotError as error:
            aside = storage.quarantine_snapshot()
            log.warning("snapshot.rejected", error=str(error), kept_as=str(aside))
    if store is None:
        store = Store(config, mesh, signer, epoch, verify)
    if store.epoch != epoch:
        storage.keep_epoch(store.epoch)
    return store


class StateKeeper:
    """Writes the snapshot and the peers to try first, when they changed, at most once an interval.

    Args:
        storage: the state folder.
        store: what is written.
        live_peers: addresses of the members that are alive now, without this node.
        interval_s: least time between two writes.
        peers_max: addresses that are remembered.
    """

    def __init__(
        self,
        storage: Storage,
        store: Store,
        live_peers: Callable[[], tuple[Address, ...]],
        *,
        interval_s: float,
        peers_max: int,
    ) -> None:
        self._storage = storage
        self._store = store
        self._live_peers = live_peers
        self._interval_s = interval_s
        self._peers_max = peers_max
        self._saved_snapshot = b""
        self._saved_peers: tuple[Address, ...] = ()

    async def run(self) -> None:
        """Keep writing until cancelled."""
        while True:
            await trio.sleep(self._interval_s)
            await self.save()

    async def save(self) -> None:
        """Write what changed since the last time; a disk that refuses is counted by the storage."""
        snapshot = self._store.snapshot()
        peers = self._live_peers()[: self._peers_max]
        with trio.move_on_after(SAVE_DEADLINE_S, shield=True):
            if snapshot != self._saved_snapshot:
                write = partial(self._storage.save_snapshot, snapshot)
                if await trio.to_thread.run_sync(write, abandon_on_cancel=True):
                    self._saved_snapshot = snapshot
            if peers and peers != self._saved_peers:
                write = partial(self._storage.save_peers, peers)
                if await trio.to_thread.run_sync(write, abandon_on_cancel=True):
                    self._saved_peers = peers
