"""What a node keeps on disk between two lives: its epoch, the store's snapshot, peers to try first.

Invariant: a file is replaced as a whole or not at all (written beside, synced, renamed, directory synced),
so a power cut leaves the old or the new content. A file that does not read back is set aside under
another name, never deleted, and the node starts without it: peers give back what it held.

The epoch is the one thing that must be on disk before the node speaks, or a restart within the same
millisecond-clock reading could reuse it: `next_epoch` writes it before it returns.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from meshd.core.effects import Address
from meshd_cms import CodecError, Epoch
from meshd_cms.packing import pack, unpack

EPOCH_FILE = "epoch"
SNAPSHOT_FILE = "store.snapshot"
PEERS_FILE = "peers"
PEERS_MAX = 64
FILE_BYTES_MAX = 64 * 1024 * 1024


class StorageError(Exception):
    """The state folder cannot be used.

    The message says what to do. State left behind: nothing was changed on disk.
    """

    code = "storage"


@dataclass(slots=True)
class StorageStatistics:
    """What the disk did so far."""

    writes: int = 0
    failures: int = 0
    quarantined: int = 0
    last_error: str = ""


class Storage:
    """The files of one state folder. All calls block: run them in a thread once the daemon is up."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is missing.

        Raises:
            StorageError: it cannot be made or written to.
        """
        self._folder = folder
        self.statistics = StorageStatistics()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"cannot create the state folder {folder}: {error.strerror}; "
                "choose another with [node] state_dir or --state-dir"
            ) from error

    def next_epoch(self, now_ms: int | None = None) -> Epoch:
        """A higher epoch than any before, already on disk.

        `max(saved + 1, unix ms)`: a clock that went back cannot make it fall.

        Raises:
            StorageError: it cannot be written; a node that speaks under an epoch it may forget would
                be taken for a ghost of itself.
        """
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        saved = self._read_int(EPOCH_FILE)
        epoch = Epoch(max(saved + 1, now_ms, 1))
        self.keep_epoch(epoch)
        return epoch

    def keep_epoch(self, epoch: Epoch) -> None:
        """Write the epoch that the node is about to speak under.

        Raises:
            StorageError: the disk refused; the former epoch is still there.
        """
        try:
            self._replace(EPOCH_FILE, str(epoch).encode())
        except OSError as error:
            raise StorageError(
                f"cannot write to the state folder {self._folder}: {error.strerror}; "
                "free some space, or make it writable for the user that runs meshd"
            ) from error

    def try_keep_epoch(self, epoch: Epoch) -> bool:
        """Write a raised epoch while the node runs; False when the disk refused (counted).

        Nothing is lost for good: the next snapshot holds the epoch too, and whoever raised it, raises it
        again.
        """
        return self._try_replace(EPOCH_FILE, str(epoch).encode())

    def load_snapshot(self) -> bytes | None:
        """The store's last snapshot, None when there is none or it cannot be read."""
        return self._read(SNAPSHOT_FILE)

    def save_snapshot(self, snapshot: bytes) -> bool:
        """Replace the snapshot; False when the disk refused (counted, the old one stays)."""
        return self._try_replace(SNAPSHOT_FILE, snapshot)

    def quarantine_snapshot(self) -> Path | None:
        """Set a snapshot aside that did not read back; its new path, None when that failed."""
        return self._quarantine(SNAPSHOT_FILE)

    def load_peers(self) -> tuple[Address, ...]:
        """Addresses that were members when the node last ran; at most `PEERS_MAX`."""
        raw = self._read(PEERS_FILE)
        if raw is None:
            return ()
        try:
            decoded = unpack(raw)
        except CodecError:
            decoded = None
        if not isinstance(decoded, list):
            self._quarantine(PEERS_FILE)
            return ()
        peers: list[Address] = []
        for each in cast("list[object]", decoded):
            match each:
                case [str(host), int(port)]:
                    peers.append((host, port))
                case _:
                    pass
        return tuple(peers[:PEERS_MAX])

    def save_peers(self, peers: tuple[Address, ...]) -> bool:
        """Replace the list of peers to try first; False when the disk refused."""
        return self._try_replace(PEERS_FILE, pack([list(peer) for peer in peers[:PEERS_MAX]]))

    def _read_int(self, name: str) -> int:
        raw = self._read(name)
        if raw is None:
            return 0
        text = raw.strip()
        if not text.isdigit() or len(text) > 18:
            self._quarantine(name)
            return 0
        return int(text)

    def _read(self, name: str) -> bytes | None:
        path = self._folder / name
        try:
            with path.open("rb") as file:
                return file.read(FILE_BYTES_MAX)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed(error)
            return None

    def _try_replace(self, name: str, content: bytes) -> bool:
        try:
            self._replace(name, content)
        except OSError as error:
            self._failed(error)
            return False
        return True

    def _replace(self, name: str, content: bytes) -> None:
        path = self._folder / name
        beside = self._folder / f".{name}.new"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        self._sync_folder()
        self.statistics.writes += 1

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
                raise
        finally:
            os.close(descriptor)

    def _quarantine(self, name: str) -> Path | None:
        aside = self._folder / f"{name}.damaged-{time.time_ns() // 1_000_000}"
        try:
            (self._folder / name).rename(aside)
        except OSError as error:
            self._failed(error)
            return None
        self.statistics.quarantined += 1
        return aside

    def _failed(self, error: OSError) -> None:
        self.statistics.failures += 1
        self.statistics.last_error = str(error)
