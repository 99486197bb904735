"""The folder of the library: which files mean what, and in which order they change.

    ID.model            description of a model: `models.entries`
    ID.gguf             its file, where the library keeps it
    ID.gguf.removed     it is being removed
    ID.model.damaged    a description that could not be believed
    begun/KEY.json      a transfer that was asked for: written by the daemon alone
    begun/KEY/          what of it has arrived: written by workers, believed by nobody

What is true after a power cut at any moment: a description that can be read belongs to a file that was
whole and on the disk before it; a file without one is found and told of (`Found.strays`); a removal that
had begun is finished by the next `load`.

Everything here blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.models.entries import (
    DESCRIPTION_BYTES_MAX,
    Entry,
    FlawedDescription,
    disclose,
    enclose,
    is_id,
)

RESERVE_BYTES: Final = (
    512 << 20
)  # of the disk, never filled by models: logs and the store need some
NOTHING_BYTES: Final = 64 << 10
DESCRIPTION: Final = ".model"
MODEL: Final = ".gguf"
REMOVED: Final = ".removed"
DAMAGED: Final = ".damaged"


@dataclass(frozen=True, slots=True)
class Begun:
    """A transfer of which something may have arrived."""

    key: str
    id: str
    source: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder held when it was read."""

    entries: tuple[Entry, ...] = ()
    strays: tuple[str, ...] = ()  # ids of files without a description
    damaged: tuple[str, ...] = ()  # ids of descriptions that were set aside


@dataclass(frozen=True, slots=True)
class Room:
    """How much may still be written, and why not more."""

    bytes: int
    why: str


class ModelFolder:
    """See the module; every method raises OSError."""

    def __init__(self, folder: Path, disk_mib_max: int = 0) -> None:
        self.path = folder
        self._begun = folder / "begun"
        self._disk_bytes_max = disk_mib_max << 20

    def load(self) -> Found:
        """Make the folder, finish what was interrupted, and read everything."""
        self._begun.mkdir(mode=0o700, parents=True, exist_ok=True)
        for removed in self.path.glob(f"*{MODEL}{REMOVED}"):
            self._finish_removal(removed.name.removesuffix(MODEL + REMOVED))
        for unfinished in self.path.glob(".*.new"):
            unfinished.unlink()
        entries: dict[str, Entry] = {}
        damaged: list[str] = []
        for path in sorted(self.path.glob(f"*{DESCRIPTION}")):
            try:
                entry = disclose(_read(path))
                if entry.id != path.name.removesuffix(DESCRIPTION):
                    raise FlawedDescription("it is another model's")
            except (OSError, FlawedDescription):
                path.rename(path.with_name(path.name + DAMAGED))
                damaged.append(path.name.removesuffix(DESCRIPTION))
                continue
            entries[entry.id] = entry
        moved = {  # the state folder may have been
            entry.path: str(self.file(entry.id)) for entry in entries.values() if entry.kept
        }
        entries = {key: _at(entry, moved) for key, entry in entries.items()}
        ids = (path.name.removesuffix(MODEL) for path in sorted(self.path.glob(f"*{MODEL}")))
        strays = tuple(each for each in ids if each not in entries and is_id(each))
        return Found(tuple(entries.values()), strays, tuple(damaged))

    def file(self, entry_id: str) -> Path:
        """Where the library keeps the file of that id."""
        return self.path / f"{entry_id}{MODEL}"

    def place(self, arrived: Path, entry_id: str) -> Path:
        """Give a file that has arrived its place; `save` is next. Returns the place."""
        place = self.file(entry_id)
        descriptor = os.open(arrived, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        arrived.rename(place)
        self._sync()
        return place

    def save(self, entry: Entry) -> None:
        """Write a description, as a whole or not at all."""
        beside = self.path / f".{entry.id}{DESCRIPTION}.new"
        _write(beside, enclose(entry))
        beside.rename(self.path / f"{entry.id}{DESCRIPTION}")
        self._sync()

    def forget(self, entry: Entry) -> None:
        """Remove a description, and the file where it is kept here."""
        place = self.file(entry.id)
        if entry.kept and place.exists():
            place.rename(place.with_name(place.name + REMOVED))
            self._sync()
        self._finish_removal(entry.id)

    def _finish_removal(self, entry_id: str) -> None:
        (self.path / f"{entry_id}{DESCRIPTION}").unlink(missing_ok=True)
        self._sync()
        (self.path / f"{entry_id}{MODEL}{REMOVED}").unlink(missing_ok=True)

    # -- what has begun to arrive --------------------------------------------------------------------------

    def begin(self, source: str, entry_id: str) -> tuple[Begun, Path]:
        """Note a transfer, and return the folder for what arrives; both may be there already."""
        key = _key(source)
        begun, folder = Begun(key, entry_id, source), self._begun / key
        _write(self._begun / f".{key}.new", json.dumps(asdict(begun)).encode())
        (self._begun / f".{key}.new").rename(self._begun / f"{key}.json")
        folder.mkdir(mode=0o700, exist_ok=True)
        return begun, folder

    def give_up(self, source: str) -> None:
        """Of a transfer that failed: forget it, where next to nothing has arrived."""
        begun = Begun(_key(source), "", source)
        if self.arrived_bytes(begun) < NOTHING_BYTES:
            self.drop(begun)

    def begun(self) -> tuple[Begun, ...]:
        """All transfers that are noted; what cannot be read of them is thrown away."""
        found: list[Begun] = []
        for path in sorted(self._begun.glob("*.json")):
            begun = _noted(path)
            if begun is None:
                self.drop(Begun(path.stem, "", ""))
            else:
                found.append(begun)
        return tuple(found)

    def arrived_bytes(self, begun: Begun) -> int:
        """What of a transfer is here."""
        return _bytes_in(self._begun / begun.key)

    def drop(self, begun: Begun) -> None:
        """Throw away what has arrived."""
        shutil.rmtree(self._begun / begun.key, ignore_errors=True)
        (self._begun / f"{begun.key}.json").unlink(missing_ok=True)

    def room(self, to: Path) -> Room:
        """How large a file may become; what of it is here already counts for it."""
        disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize
        room, why = (
            free - RESERVE_BYTES,
            f"the disk has {free >> 20:,} MiB free, and {RESERVE_BYTES >> 20} MiB of them stay free",
        )
        if self._disk_bytes_max:
            used = _bytes_in(self.path)
            left = self._disk_bytes_max - used
            if left < room:
                room, why = (
                    left,
                    f"plugins.llama.disk_mib_max allows {self._disk_bytes_max >> 20:,} MiB, and "
                    f"{used >> 20:,} MiB are used",
                )
        here = to.stat().st_size if to.is_file() else 0
        return Room(max(0, room) + here, why)

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # a file system that cannot do this for folders
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _at(entry: Entry, moved: Mapping[str, str]) -> Entry:
    """An entry, and what it is served with, where the files are now."""

    def placed(table: Mapping[str, Value], key: str) -> dict[str, Value]:
        path = table.get(key)
        return {**table, key: moved[path]} if isinstance(path, str) and path in moved else {**table}

    options = placed(entry.options, "projector")
    lora = options.get("lora")
    if isinstance(lora, Sequence):
        options["lora"] = [placed(each, "path") for each in lora if isinstance(each, Mapping)]
    return replace(entry, path=moved.get(entry.path, entry.path), options=options)


def _key(source: str) -> str:
    return hashlib.blake2b(source.encode(), digest_size=10).hexdigest()


def _noted(path: Path) -> Begun | None:
    """What a note says; None: nothing that can be believed."""
    try:
        raw: dict[str, Any] = json.loads(_read(path))
        begun = Begun(**raw)
        known = begun.key == path.stem == _key(begun.source) and is_id(begun.id)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return begun if known else None


def _read(path: Path) -> bytes:
    """A plain file of ours; a link, a pipe or anything large is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(DESCRIPTION_BYTES_MAX + 1)


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _bytes_in(folder: Path) -> int:
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                yield (Path(place) / name).lstat().st_size
