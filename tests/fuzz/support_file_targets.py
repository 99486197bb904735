"""Fuzz targets: what a node reads from its disk, from a person, and from mDNS."""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import Final

from tests.fuzz.support_figures import Broken
from tests.fuzz.support_mutation import mutant
from tests.fuzz.support_scene import VICTIM, traffic
from tests.fuzz.support_sizes import sizes
from tests.fuzz.support_targets import Target, check_address
from tests.shell.support_log import KeptLog
from tests.sim.world import MESH
from tests.unit.support_cms import hash_verify
from zeroconf import ServiceInfo

from meshd.core.effects import Address
from meshd.shell.discovery import HINTS_MAX, SERVICE_TYPE, Announcement, MdnsDiscovery
from meshd.shell.envelope import enclose
from meshd.shell.storage import EPOCH, EPOCH_COPY, FORMAT, PEERS, Storage, StorageError
from meshd_cms.errors import SnapshotError
from meshd_cms.packing import pack
from meshd_cms.store import Store
from meshd_cms.types import (
    Epoch,
    StoreConfig,
)


class SnapshotTarget(Target):
    """`Store.restore`: damaged snapshots, half of them with a checksum that fits again."""

    name = "snapshot"
    _AT: Final = 8 + 2 + 8

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._valid = traffic().snapshot
        self._mine = traffic().nodes[VICTIM]

    def case(self) -> bytes:
        payload = self._valid[self._AT + 16 :]
        if self.rng.random() < 0.5:
            return mutant([self._valid], self.rng)
        spoilt = mutant([payload], self.rng)
        covered = self._valid[8:10] + len(spoilt).to_bytes(8, "big")
        checksum = hashlib.blake2b(covered + spoilt, digest_size=16).digest()
        return self._valid[:8] + covered + checksum + spoilt

    def feed(self, data: bytes) -> None:
        mine, began_s = self._mine, thread_time()
        outcome = "restored"
        try:
            store = Store.restore(
                data, StoreConfig(), MESH, mine.signer, Epoch(5), hash_verify, as_of_s=0.0
            )
            for owner in store.owners():
                store.items(owner)
            if store.epoch < 5 or mine.node in store.owners():
                raise Broken("a snapshot brought our epoch down, or wrote our record")
        except SnapshotError as error:
            outcome = error.reason.value
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


class MemoryFiles:
    """A `FileSystem` that is quick and forgets."""

    def __init__(self) -> None:
        self.content: dict[Path, bytes] = {}

    def make_folder(self, folder: Path) -> None:
        pass

    def names(self, folder: Path) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self.content))

    def read(self, path: Path, bytes_max: int) -> bytes:
        if path not in self.content:
            raise FileNotFoundError(path)
        if len(self.content[path]) > bytes_max:
            raise OSError(errno.EFBIG, "too large")
        return self.content[path]

    def write(self, path: Path, content: bytes) -> None:
        self.content[path] = content

    def rename(self, path: Path, to: Path) -> None:
        self.content[to] = self.content.pop(path)

    def sync_folder(self, folder: Path) -> None:
        pass

    def remove(self, path: Path) -> None:
        del self.content[path]


class StorageTarget(Target):
    """The files that a node rewrites, whatever is in them; half of the mutants have a checksum that fits."""

    name = "storage"
    _FILES: Final = (EPOCH, EPOCH_COPY, PEERS)

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        peers = [pack([["10.0.0.1", 7946], ["192.0.2.7", 1]]), pack([])]
        epochs = [b"1754000000000", b"9223372036854775807", b"1"]
        self._corpus = (epochs, epochs, peers)

    def case(self) -> bytes:
        number = self.rng.randrange(len(self._FILES))
        kind = self._FILES[number].kind
        if self.rng.random() < 0.5:
            content = enclose(kind, FORMAT, mutant(self._corpus[number], self.rng))
        else:
            valid = [enclose(kind, FORMAT, one) for one in self._corpus[number]]
            content = mutant(valid, self.rng)
        return bytes((number,)) + content

    def feed(self, data: bytes) -> None:
        if not data:
            return
        file = self._FILES[data[0] % len(self._FILES)]
        folder, files = Path("state"), MemoryFiles()
        files.content[folder / file.name] = data[1:]
        storage, began_s = Storage(folder, files=files), thread_time()
        outcome = file.name
        if file is PEERS:
            for _, port in storage.load_peers():
                if not 0 < port < 65_536:
                    raise Broken(f"{port} is no port")
        else:
            try:
                first = storage.next_epoch(1_000)
                second = Storage(folder, files=files).next_epoch(1)
            except StorageError:
                outcome = "the last epoch"
            else:
                if not 1_000 <= first < second:
                    raise Broken(f"epochs fell from {first} to {second}")
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


class AnnouncementTarget(Target):
    """What an mDNS announcement says: a hint is an address to contact, or nothing."""

    name = "announcement"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        own = Announcement("me", 7946, ("127.0.0.1",), "feedc0de", {})
        self._found: list[Address] = []
        self._discovery = MdnsDiscovery(
            own, interfaces=list, found=self._found.append, log=KeptLog()
        )
        # The way in is a thread of zeroconf: this is what that thread calls in the end.
        self._take: Callable[[ServiceInfo], None] = getattr(self._discovery, "_take_hint")  # noqa: B009
        texts = (b"v=1", b"mesh=feedc0de", b"id=other", b"names=a,b", b"load=0.5")
        self._corpus = [
            b"".join(bytes((len(text),)) + text for text in texts[: count + 2])
            for count in range(4)
        ]
        self._fed = 0

    def case(self) -> bytes:
        rng = self.rng
        text = rng.choice(self._corpus) if rng.random() < 0.3 else mutant(self._corpus, rng)
        address = rng.choice(
            (b"\x0a\x00\x00\x05", bytes(4), b"\xff" * 4, b"\xe0\x00\x00\xfb", rng.randbytes(16))
        )
        return (
            rng.choice((b"\x1f\x0a", b"\x00\x00", b"\xff\xff"))
            + bytes((len(address),))
            + address
            + text
        )

    def feed(self, data: bytes) -> None:
        if len(data) < 3 or data[2] not in (4, 16) or len(data) < 3 + data[2]:
            return
        end = 3 + data[2]
        info = ServiceInfo(
            SERVICE_TYPE,
            f"x.{SERVICE_TYPE}",
            port=int.from_bytes(data[:2], "big"),
            addresses=[data[3:end]],
            properties=data[end : end + 1400],
        )
        self._found.clear()
        began_s = thread_time()
        self._take(info)
        outcome = "hint" if self._found else "ignored"
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1
        for host, port in self._found:
            check_address(
                (host, port or 1)
            )  # nothing can be sent to port 0, and nothing breaks of it
        self._fed += 1
        statistics = self._discovery.statistics
        if statistics.hints + statistics.other_mesh + statistics.other_protocol > self._fed:
            raise Broken("a hint was counted twice")

    def finish(self) -> None:
        found = sizes(self._discovery)
        self.figures.hold(found)
        if max(found.values()) > HINTS_MAX:
            raise Broken(f"announcements are remembered without a bound: {found}")
