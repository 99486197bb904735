"""The state folder: replaced as a whole or not at all, and never in the way of a start."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shell.support_log import KeptLog
from tests.unit.support_storage import Disk, storage_on

from meshd.core.effects import Address
from meshd.core.sealing import Floor
from meshd.shell.envelope import enclose
from meshd.shell.storage import (
    ASIDE_MAX,
    EPOCH_MARGIN,
    PEERS_MAX,
    WINDOWS_MAX,
    Storage,
    StorageError,
)
from meshd_cms import Epoch, NodeId
from meshd_cms.types import COUNTER_MAX

KINDS = {
    "epoch": "epoch",
    "epoch.copy": "epoch",
    "store.snapshot": "store",
    "peers": "peers",
    "windows": "windows",
}
FILES = tuple(KINDS)
PEERS: tuple[Address, ...] = (("10.0.0.1", 7946),)
FLOORS = (
    Floor(b"k" * 8, NodeId(b"a" * 16), Epoch(2**48 - 1), 7),
    Floor(b"k" * 8, NodeId(b"b" * 16), Epoch(1), 2**40),
)


def lived(folder: Path) -> Storage:
    """A state folder after one life, under epoch 5000."""
    storage = Storage(folder)
    assert storage.next_epoch(now_ms=5_000) == 5_000
    assert storage.save_snapshot(b"content")
    assert storage.save_peers(PEERS)
    assert storage.save_windows(FLOORS)
    return storage


def start(folder: Path, log: KeptLog | None = None) -> tuple[Epoch, bytes | None, bool, Storage]:
    """What the next life gets; whether the peers came back."""
    storage = Storage(folder)
    storage.report_to(KeptLog() if log is None else log)
    peers = storage.load_peers()
    assert peers in (PEERS, ())
    assert storage.load_windows() in (FLOORS, ())
    epoch = storage.next_epoch(now_ms=1)
    snapshot = storage.load_snapshot()
    assert snapshot in (b"content", None)
    return epoch, snapshot, peers == PEERS, storage


def test_epochs_rise_even_when_the_clock_goes_back(tmp_path: Path) -> None:
    first = Storage(tmp_path).next_epoch(now_ms=5_000)
    second = Storage(tmp_path).next_epoch(now_ms=1_000)
    third = Storage(tmp_path).next_epoch(now_ms=9_000)
    assert (first, second, third) == (5_000, 5_001, 9_000)


def test_a_state_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(StorageError, match="state_dir"):
            Storage(folder)


def test_files_are_replaced_whole_and_nothing_is_left_beside_them(tmp_path: Path) -> None:
    storage = lived(tmp_path)
    assert storage.save_snapshot(b"two")
    assert storage.load_snapshot() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
    assert storage.statistics.writes == 6
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert storage.statistics.bytes_written == written + len(enclose("store", 1, b"content"))


def test_replay_floors_come_back_bounded(tmp_path: Path) -> None:
    assert lived(tmp_path).load_windows() == FLOORS
    many = tuple(
        Floor(b"k" * 8, NodeId(number.to_bytes(16, "big")), Epoch(1), number)
        for number in range(5_000)
    )
    assert Storage(tmp_path).save_windows(many)
    assert Storage(tmp_path).load_windows() == many[-WINDOWS_MAX:]


def test_peers_come_back_bounded(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert storage.load_peers() == ()
    many = tuple((f"10.0.{number // 250}.{number % 250}", 7946) for number in range(2 * PEERS_MAX))
    assert storage.save_peers(many)
    assert storage.load_peers() == many[:PEERS_MAX]


# -- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_flip_of_any_bit_of_any_file_is_found_and_the_node_starts(
    name: str, tmp_path: Path
) -> None:
    lived(tmp_path)
    contents = {each: (tmp_path / each).read_bytes() for each in FILES}
    for at in range(len(contents[name])):
        for each, content in contents.items():
            (tmp_path / each).write_bytes(content)
        damaged = bytearray(contents[name])
        damaged[at] ^= 1 << at % 8
        (tmp_path / name).write_bytes(damaged)
        epoch, snapshot, peers, storage = start(tmp_path)
        assert epoch == 5_001  # the other copy
        assert (snapshot is None) == (name == "store.snapshot")
        assert peers == (name != "peers")
        assert storage.statistics.quarantined == 1
        assert bytes(damaged) in [path.read_bytes() for path in tmp_path.glob(f"{name}.damaged-*")]


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "full").touch()


def a_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(b"theirs")
    path.symlink_to(target)


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse


def an_empty_file(path: Path) -> None:
    path.touch()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(4096))


def a_bare_number(path: Path) -> None:
    path.write_bytes(b"9999999999999")


def another_kind(path: Path) -> None:
    path.write_bytes(enclose("other", 1, b"9999999999999"))


def another_format(path: Path) -> None:
    path.write_bytes(enclose(KINDS[path.name], 2, b"9999999999999"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (a_folder, "it is a folder"),
        (a_link, "it is a symbolic link, which is not followed here"),
        (a_dangling_link, "it is a symbolic link, which is not followed here"),
        (a_pipe, "it is no plain file"),
        (a_huge_file, "it is larger than meshd ever writes it"),
        (an_empty_file, "it is cut short"),
        (zeros, "it is not one that meshd wrote"),
        (a_bare_number, "it is not one that meshd wrote"),
        (another_kind, "it is another file of meshd under this name"),
        (another_format, "it is of another release of meshd"),
    ],
)
def test_whatever_stands_in_place_of_a_file_is_set_aside_and_said(
    name: str, make: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    lived(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    log = KeptLog()
    epoch, _, _, storage = start(tmp_path, log)
    assert epoch == 5_001
    assert storage.statistics.quarantined == 1
    assert log.events() == ["state.set_aside"]
    ((_, _, fields),) = log.lines
    assert fields["why"] == why
    assert fields["file"] == str(tmp_path / name)
    assert os.path.lexists(str(fields["kept_as"]))
    assert fields["do"]
    assert storage.save_snapshot(b"content")
    assert storage.save_peers(PEERS)
    assert start(tmp_path)[:3] == (5_002, b"content", True)
    if make is a_link:
        assert (tmp_path / "elsewhere").read_bytes() == b"theirs"


def test_when_both_copies_of_the_epoch_are_damaged_a_random_one_above_the_clock_is_taken() -> None:
    disk = Disk({"epoch": b"4999", "epoch.copy": None})
    storage, log = storage_on(disk, draw=77), KeptLog()
    storage.report_to(log)
    assert storage.next_epoch(now_ms=7_000) == 7_078
    assert log.events() == ["state.set_aside", "state.set_aside", "epoch.lost"]
    assert storage_on(disk).next_epoch(now_ms=1) == 7_079


def test_a_file_that_only_this_moment_cannot_be_read_stays_where_it_is(tmp_path: Path) -> None:
    lived(tmp_path)

    class OutOfDescriptors(Disk):
        def read(self, path: Path, bytes_max: int) -> bytes:
            raise OSError(errno.EMFILE, "Too many open files")

    disk = OutOfDescriptors({name: (tmp_path / name).read_bytes() for name in FILES})
    storage = storage_on(disk, draw=0)
    assert storage.load_snapshot() is None
    assert sorted(disk.files) == sorted(FILES)
    assert storage.statistics.failures == 1


def test_files_set_aside_do_not_fill_the_disk(tmp_path: Path) -> None:
    for number in range(3 * ASIDE_MAX):
        (tmp_path / f"store.snapshot.damaged-{1_700_000_000_000 + number}").touch()
    (tmp_path / "store.snapshot").write_bytes(b"newest")
    storage = Storage(tmp_path)
    assert storage.load_snapshot() is None
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == ASIDE_MAX
    assert kept[-1].read_bytes() == b"newest"


def test_the_last_epoch_there_is_says_what_to_do() -> None:
    storage = storage_on(Disk({"epoch": enclose("epoch", 1, str(COUNTER_MAX).encode())}))
    with pytest.raises(StorageError, match="meshd join TOKEN"):
        storage.next_epoch(now_ms=1)


@settings(deadline=None, max_examples=100)
@given(
    noise=st.binary(max_size=200),
    names=st.sets(st.sampled_from(FILES), min_size=1),
    enclosed=st.booleans(),
)
def test_any_bytes_in_any_file_start_the_node(
    noise: bytes, names: set[str], enclosed: bool
) -> None:
    files = {name: enclose(KINDS[name], 1, noise) if enclosed else noise for name in names}
    storage = storage_on(Disk(dict[str, bytes | None](files)))
    peers = storage.load_peers()
    assert {type(host) for host, _ in peers} <= {str}
    assert all(0 < port < 65_536 for _, port in peers)
    floors = storage.load_windows()
    assert len(floors) <= len(noise) // 36
    storage.load_snapshot()
    assert storage.next_epoch(now_ms=3) >= 3


# -- a disk that refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_at_the_start_lets_the_node_speak_under_a_random_epoch(
    refusal: int,
) -> None:
    disk = Disk()
    storage_on(disk).next_epoch(now_ms=9_000)
    disk.refusal = refusal
    drawn: list[Epoch] = []
    for draw in (0, 5, EPOCH_MARGIN):
        storage, log = storage_on(disk, draw=draw), KeptLog()
        storage.report_to(log)
        drawn.append(storage.next_epoch(now_ms=1))
        assert log.events() == ["epoch.not_kept"]
        assert os.strerror(refusal) in str(log.lines[0][2]["error"])
        assert not storage.statistics.epoch_kept
        assert storage.statistics.failures == 2
    assert drawn == [9_002, 9_007, 9_001 + EPOCH_MARGIN]


def test_an_epoch_that_could_not_be_kept_is_kept_once_the_disk_allows_it() -> None:
    disk = Disk(refusal=errno.ENOSPC)
    storage, log = storage_on(disk, draw=5), KeptLog()
    storage.report_to(log)
    epoch = storage.next_epoch(now_ms=9_000)
    assert not storage.keep_epoch_again()
    disk.refusal = None
    assert storage.keep_epoch_again()
    assert storage.statistics.epoch_kept
    assert log.events() == ["epoch.not_kept", "state.write_recovered"]
    writes = storage.statistics.writes
    assert storage.keep_epoch_again()
    assert storage.statistics.writes == writes
    assert storage_on(disk).next_epoch(now_ms=1) == epoch + 1


def test_a_disk_that_refuses_is_counted_said_once_and_the_old_snapshot_stays() -> None:
    disk = Disk()
    storage, log = storage_on(disk), KeptLog()
    storage.report_to(log)
    assert storage.save_snapshot(b"one")
    disk.refusal = errno.ENOSPC
    for _ in range(3):
        assert not storage.save_snapshot(b"two")
    assert storage.load_snapshot() == b"one"
    assert storage.statistics.failures == 3
    assert storage.statistics.refusing
    assert "No space" in storage.statistics.last_error
    disk.refusal = None
    assert storage.save_snapshot(b"two")
    assert not storage.statistics.refusing
    assert log.events() == ["state.write_refused", "state.write_recovered"]


def test_what_is_in_the_way_of_a_new_file_is_counted(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert storage.save_snapshot(b"one")
    (tmp_path / ".store.snapshot.new").mkdir()  # opening it for writing now fails, for root too
    assert not storage.save_snapshot(b"two")
    assert storage.load_snapshot() == b"one"
    assert storage.statistics.failures == 1


def test_a_link_left_in_place_of_a_new_file_is_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"theirs")
    (tmp_path / ".peers.new").symlink_to(precious)
    storage = Storage(tmp_path)
    assert storage.save_peers(PEERS)
    assert precious.read_bytes() == b"theirs"
    assert storage.load_peers() == PEERS


def test_a_second_write_of_a_file_while_the_first_hangs_fails_and_takes_nothing_back() -> None:
    class Reentrant(Disk):
        """Calls back in the middle of a write, as another thread would come."""

        def __init__(self) -> None:
            super().__init__()
            self.meanwhile: Callable[[], None] | None = None

        def rename(self, path: Path, to: Path) -> None:
            if self.meanwhile is not None:
                meanwhile, self.meanwhile = self.meanwhile, None
                meanwhile()
            super().rename(path, to)

    disk = Reentrant()
    storage = storage_on(disk)
    storage.next_epoch(now_ms=5_000)
    inner: list[bool] = []
    disk.meanwhile = lambda: inner.append(storage.try_keep_epoch(Epoch(8_000)))
    assert not storage.try_keep_epoch(Epoch(6_000))  # 8000 is spoken under by now
    assert inner == [False]
    assert not storage.statistics.epoch_kept
    assert storage.keep_epoch_again()
    assert storage_on(disk).next_epoch(now_ms=1) == 8_001
    disk.meanwhile = lambda: inner.append(storage.save_snapshot(b"second"))
    assert storage.save_snapshot(b"first")
    assert inner == [False, False]
    assert storage.load_snapshot() == b"first"
