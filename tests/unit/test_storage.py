"""The state folder: replaced as a whole or not at all, and never in the way of a start."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.shell.storage import PEERS_MAX, Storage, StorageError


def test_epochs_rise_even_when_the_clock_goes_back(tmp_path: Path) -> None:
    first = Storage(tmp_path).next_epoch(now_ms=5_000)
    second = Storage(tmp_path).next_epoch(now_ms=1_000)
    third = Storage(tmp_path).next_epoch(now_ms=9_000)
    assert (first, second, third) == (5_000, 5_001, 9_000)


def test_a_damaged_epoch_file_is_set_aside_and_the_clock_decides(tmp_path: Path) -> None:
    (tmp_path / "epoch").write_bytes(b"\x00\xffgarbage")
    storage = Storage(tmp_path)
    assert storage.next_epoch(now_ms=7_000) == 7_000
    assert storage.statistics.quarantined == 1
    assert [p.read_bytes() for p in tmp_path.glob("epoch.damaged-*")] == [b"\x00\xffgarbage"]


def test_a_state_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="state_dir"):
        Storage(tmp_path / "file" / "state")


def test_a_snapshot_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert storage.load_snapshot() is None
    assert storage.save_snapshot(b"one")
    assert storage.save_snapshot(b"two")
    assert storage.load_snapshot() == b"two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.snapshot"]


def test_a_disk_that_refuses_is_counted_and_the_old_snapshot_stays(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert storage.save_snapshot(b"one")
    (tmp_path / ".store.snapshot.new").mkdir()  # opening it for writing now fails, for root too
    assert not storage.save_snapshot(b"two")
    assert storage.load_snapshot() == b"one"
    assert storage.statistics.failures == 1


def test_peers_come_back_bounded(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert storage.load_peers() == ()
    many = tuple(("10.0.0.1", port) for port in range(1, 2 * PEERS_MAX))
    assert storage.save_peers(many)
    assert storage.load_peers() == many[:PEERS_MAX]


@given(noise=st.binary(max_size=200))
def test_any_bytes_in_the_peers_file_start_the_node(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes
) -> None:
    folder = tmp_path_factory.mktemp("state")
    (folder / "peers").write_bytes(noise)
    peers = Storage(folder).load_peers()
    assert all(isinstance(host, str) and isinstance(port, int) for host, port in peers)
