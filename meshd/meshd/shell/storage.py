"""What a node keeps on disk between two lives: its epoch, the store's snapshot, peers to try first, replay floors.

Invariant: a file is replaced as a whole or not at all (written beside, synced, renamed, folder synced), and
says itself what it is, with a checksum (`meshd.shell.envelope`). A power cut leaves the old or the new
content; what a lying disk or a bit that flipped makes of it is found, set aside under another name, and the
node starts without it: peers give back what it held.

The epoch is what a restart may not repeat: datagrams are sealed under it, and peers take a lower one for a
ghost. `next_epoch` returns one that is on disk already, in two files, written one after the other: no cut,
and no damage to either, takes it back. Where the disk refuses, or both files are lost, the node speaks all
the same, under an epoch drawn at random from the `EPOCH_MARGIN` above all it knows and above the clock: it
meets no earlier one, and peers raise it above the one they remember (docs/decisions/0016).

Nothing here raises because of what is on the disk, or because the disk refuses, once there is a folder.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Lock
from typing import Final, cast

from meshd.core.effects import Address
from meshd.core.sealing import Floor
from meshd.shell.envelope import Flaw, FlawedFile, disclose, enclose
from meshd.shell.files import FileSystem, LocalFiles
from meshd_cms import CodecError, Epoch, NodeId
from meshd_cms.packing import pack, unpack
from meshd_cms.types import COUNTER_MAX
from meshd_plugins.api import Logger

FORMAT: Final = 1  # of every file below
PEERS_MAX: Final = 4096
WINDOWS_MAX: Final = 4096
EPOCH_MARGIN: Final = 2**32
"""Milliseconds, 50 days. Two lives that cannot know of each other meet in one epoch once in so many pairs."""
ASIDE_MAX: Final = 4
"""Files set aside that are kept of each; the oldest goes. A disk that damages daily is not filled."""
REPORTS_MAX: Final = 64
"""Reports held until there is a log."""

_MIB: Final = 1 << 20
_FLOOR: Final = struct.Struct(">8s16s6s6s")  # key, sender, epoch, counter
_PASSING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})
"""Failures to read that say nothing about the file."""
_IN_WORDS: Final[Mapping[int | None, str]] = {
    errno.EISDIR: "it is a folder",
    errno.ELOOP: "it is a symbolic link, which is not followed here",
    errno.EINVAL: "it is no plain file",
    errno.EFBIG: "it is larger than meshd ever writes it",
}
_MEND: Final = "free some space, or make it writable for the user that runs meshd"


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    kind: str  # the word in its first line
    bytes_max: int


EPOCH: Final = _File("epoch", "epoch", 4096)
EPOCH_COPY: Final = _File("epoch.copy", "epoch", 4096)
SNAPSHOT: Final = _File("store.snapshot", "store", 64 * _MIB + 4096)
PEERS: Final = _File("peers", "peers", _MIB)
WINDOWS: Final = _File("windows", "windows", _MIB)


class _Nothing(Enum):
    ABSENT = "there is no such file"
    UNUSABLE = "there is something, and it cannot be believed"


class StorageError(Exception):
    """The state folder cannot be used.

    The message says what to do. State left behind: nothing was changed on disk.
    """

    code = "storage"


@dataclass(slots=True)
class StorageStatistics:
    """What the disk did so far."""

    writes: int = 0
    bytes_written: int = 0
    failures: int = 0  # reads and writes that the system refused
    quarantined: int = 0  # files set aside
    last_error: str = ""
    refusing: bool = False  # the last write failed
    epoch_kept: bool = False  # what this life speaks under is on disk


class Storage:
    """The files of one state folder. All calls block: run them in a thread once the daemon is up.

    Calls may come from several threads; of two for one file at the same time the later one fails, counted.

    Args:
        folder: made if it is missing.
        files: the file system.
        draw: `draw(n)` is a random number from 0 to n - 1.

    Raises:
        StorageError: there is no folder, and it cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: FileSystem | None = None,
        draw: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self._folder = folder
        self._files: FileSystem = LocalFiles() if files is None else files
        self._draw = draw
        self._log: Logger | None = None
        self._reports: list[tuple[str, dict[str, object]]] = []
        self._spoken = 0  # the highest epoch handed out or given to keep
        self._busy = {kind: Lock() for kind in ("epoch", "store", "peers", "windows")}
        self.statistics = StorageStatistics()
        try:
            self._files.make_folder(folder)
        except OSError as error:
            raise StorageError(
                f"cannot create the state folder {folder}: {error.strerror}; "
                "choose another with [node] state_dir or --state-dir"
            ) from error

    def report_to(self, log: Logger) -> None:
        """Say in this log what was found so far, and from now on what is found."""
        self._log = log
        for event, fields in self._reports:
            log.warning(event, **fields)
        self._reports.clear()

    # -- the epoch ---------------------------------------------------------------------------------------

    def next_epoch(self, now_ms: int | None = None) -> Epoch:
        """A higher epoch than any before: `max(saved + 1, unix ms)`, so the clock cannot make it fall.

        It is on disk on return, or else random (see above), with `statistics.epoch_kept` False.

        Raises:
            StorageError: the saved epoch is the last one there is.
        """
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        found = [self._read_epoch(file) for file in (EPOCH, EPOCH_COPY)]
        known = [epoch for epoch in found if epoch is not None]
        saved = max(known, default=0)
        if saved >= COUNTER_MAX - EPOCH_MARGIN:
            raise StorageError(
                f"the epoch in {self._folder / EPOCH.name} is the last one there is: "
                "move the folder identity away and join the mesh anew as another node "
                "(`meshd join TOKEN`)"
            )
        epoch = max(saved + 1, now_ms, 1)
        if saved == 0 and None in found:
            return self.epoch_above(Epoch(epoch))
        if self.try_keep_epoch(Epoch(epoch)):
            return Epoch(epoch)
        return self._random_above(epoch)

    def epoch_above(self, known: Epoch) -> Epoch:
        """An epoch for a node that knows one of its epochs, and not the last: the saved ones are lost."""
        epoch = Epoch(min(known + 1 + self._draw(EPOCH_MARGIN), COUNTER_MAX))
        kept = self.try_keep_epoch(epoch)
        self._report(
            "epoch.lost",
            epoch=epoch,
            kept=kept,
            what="the saved epoch could not be believed: going on under a random one above the clock",
            do="nothing: peers correct it if they remember a higher one",
        )
        return epoch

    def try_keep_epoch(self, epoch: Epoch) -> bool:
        """Write what the node speaks under from now on; False when the disk refused (counted).

        Nothing is lost for good: `keep_epoch_again` tries again, the next snapshot holds the epoch too, and
        whoever raised it, raises it again.
        """
        self._spoken = max(self._spoken, epoch)
        lock = self._busy[EPOCH.kind]
        if not lock.acquire(blocking=False):
            self._failed(_busy(EPOCH))
            self.statistics.epoch_kept = False
            return False
        try:
            keeping = self._spoken
            content = str(keeping).encode()
            # Each file is to be tried, and one of them is enough.
            kept = [self._replace_locked(file, content) for file in (EPOCH, EPOCH_COPY)]
            self.statistics.epoch_kept = any(kept) and keeping == self._spoken
        finally:
            lock.release()
        return self.statistics.epoch_kept

    def keep_epoch_again(self) -> bool:
        """Try again if the epoch in force is not on disk; whether it is there now."""
        if not self.statistics.epoch_kept and self._spoken:
            return self.try_keep_epoch(Epoch(self._spoken))
        return self.statistics.epoch_kept

    def _random_above(self, epoch: int) -> Epoch:
        self._spoken = Epoch(epoch + 1 + self._draw(EPOCH_MARGIN))
        self._report(
            "epoch.not_kept",
            epoch=self._spoken,
            error=self.statistics.last_error,
            what="the disk refuses: speaking under a random epoch above the clock, tried again later",
            do=f"{self._folder}: {_MEND}",
        )
        return Epoch(self._spoken)

    def _read_epoch(self, file: _File) -> int | None:
        """0 where there is no such file, None where there is one that cannot be believed."""
        content = self._read(file)
        if not isinstance(content, bytes):
            return 0 if content is _Nothing.ABSENT else None
        if not content.isdigit() or len(content) > 19 or int(content) > COUNTER_MAX:
            self._set_aside(file, f"it is {Flaw.NOT_OURS.value}")
            return None
        return int(content)

    # -- the snapshot and the peers ----------------------------------------------------------------------

    def load_snapshot(self) -> bytes | None:
        """The store's last snapshot, None when there is none or it cannot be read."""
        content = self._read(SNAPSHOT)
        return content if isinstance(content, bytes) else None

    def save_snapshot(self, snapshot: bytes) -> bool:
        """Replace the snapshot; False when the disk refused (counted, the old one stays)."""
        return self._replace(SNAPSHOT, snapshot)

    def quarantine_snapshot(self) -> Path | None:
        """Set a snapshot aside that did not read back; its new path, None when that failed.

        Nothing is reported: who found the fault says which.
        """
        return self._move_aside(SNAPSHOT)

    def load_peers(self) -> tuple[Address, ...]:
        """Addresses that were members when the node last ran; at most `PEERS_MAX`."""
        content = self._read(PEERS)
        if not isinstance(content, bytes):
            return ()
        try:
            decoded = unpack(content)
        except CodecError:
            decoded = None
        if not isinstance(decoded, list):
            self._set_aside(PEERS, f"it is {Flaw.NOT_OURS.value}")
            return ()
        peers: list[Address] = []
        for each in cast("list[object]", decoded):
            match each:
                case [str(host), int(port)] if _is_ip(host) and 0 < port < 65_536:
                    peers.append((host, port))
                case _:
                    pass
        return tuple(peers[:PEERS_MAX])

    def save_peers(self, peers: tuple[Address, ...]) -> bool:
        """Replace the list of peers to try first; False when the disk refused."""
        return self._replace(PEERS, pack([list(peer) for peer in peers[:PEERS_MAX]]))

    def load_windows(self) -> tuple[Floor, ...]:
        """How far senders of datagrams were heard when this was last kept; at most `WINDOWS_MAX`."""
        content = self._read(WINDOWS)
        if not isinstance(content, bytes):
            return ()
        size = _FLOOR.size
        if len(content) % size or len(content) > WINDOWS_MAX * size:
            self._set_aside(WINDOWS, f"it is {Flaw.NOT_OURS.value}")
            return ()
        return tuple(
            Floor(
                key,
                NodeId(sender),
                Epoch(int.from_bytes(epoch, "big")),
                int.from_bytes(counter, "big"),
            )
            for key, sender, epoch, counter in _FLOOR.iter_unpack(content)
        )

    def save_windows(self, floors: tuple[Floor, ...]) -> bool:
        """Replace them, of the senders heard last; False when the disk refused."""
        packed = b"".join(
            _FLOOR.pack(
                one.key_id, one.sender, one.epoch.to_bytes(6, "big"), one.counter.to_bytes(6, "big")
            )
            for one in floors[-WINDOWS_MAX:]
        )
        return self._replace(WINDOWS, packed)

    # -- files -------------------------------------------------------------------------------------------

    def _read(self, file: _File) -> bytes | _Nothing:
        try:
            raw = self._files.read(self._folder / file.name, file.bytes_max)
        except FileNotFoundError:
            return _Nothing.ABSENT
        except OSError as error:
            self._failed(error)
            if error.errno not in _PASSING:
                self._set_aside(file, _reason(error))
            return _Nothing.UNUSABLE
        try:
            return disclose(file.kind, FORMAT, raw)
        except FlawedFile as flawed:
            self._set_aside(file, f"it is {flawed.flaw.value}")
            return _Nothing.UNUSABLE

    def _replace(self, file: _File, content: bytes) -> bool:
        lock = self._busy[file.kind]
        if not lock.acquire(blocking=False):
            self._refused(_busy(file), file)
            return False
        try:
            return self._replace_locked(file, content)
        finally:
            lock.release()

    def _replace_locked(self, file: _File, content: bytes) -> bool:
        data = enclose(file.kind, FORMAT, content)
        beside = self._folder / f".{file.name}.new"
        try:
            self._files.write(beside, data)
            self._files.rename(beside, self._folder / file.name)
            self._files.sync_folder(self._folder)
        except OSError as error:
            self._refused(error, file)
            return False
        self.statistics.writes += 1
        self.statistics.bytes_written += len(data)
        if self.statistics.refusing:
            self.statistics.refusing = False
            self._report("state.write_recovered", file=file.name)
        return True

    def _refused(self, error: OSError, file: _File) -> None:
        self._failed(error)
        begins, self.statistics.refusing = not self.statistics.refusing, True
        # One line when it begins, not one a minute; who keeps an epoch says it in words of its own.
        if begins and file.kind != EPOCH.kind:
            self._report(
                "state.write_refused",
                file=str(self._folder / file.name),
                error=str(error),
                do=f"{self._folder}: {_MEND}",
            )

    def _set_aside(self, file: _File, why: str) -> None:
        aside = self._move_aside(file)
        self._report(
            "state.set_aside",
            file=str(self._folder / file.name),
            why=why,
            kept_as=None if aside is None else str(aside),
            do="nothing: peers give back what it held; if this happens again, replace the disk",
        )

    def _move_aside(self, file: _File) -> Path | None:
        stem = f"{file.name}.damaged-"
        aside = self._folder / f"{stem}{time.time_ns() // 1_000_000}"
        try:
            self._files.rename(self._folder / file.name, aside)
        except OSError as error:
            self._failed(error)
            return None
        self.statistics.quarantined += 1
        try:
            kept = [name for name in self._files.names(self._folder) if name.startswith(stem)]
            for name in kept[:-ASIDE_MAX]:
                self._files.remove(self._folder / name)
        except OSError as error:
            self._failed(error)
        return aside

    def _failed(self, error: OSError) -> None:
        self.statistics.failures += 1
        self.statistics.last_error = str(error)

    def _report(self, event: str, **fields: object) -> None:
        if self._log is not None:
            self._log.warning(event, **fields)
        elif len(self._reports) < REPORTS_MAX:
            self._reports.append((event, fields))


def _busy(file: _File) -> OSError:
    """The disk hangs: the thread that writes the same file has not come back."""
    return OSError(errno.EBUSY, os.strerror(errno.EBUSY), file.name)


def _reason(error: OSError) -> str:
    return _IN_WORDS.get(error.errno, f"it cannot be read: {error.strerror or error}")


def _is_ip(host: str) -> bool:
    """Whether it is an IP literal."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
