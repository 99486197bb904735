"""The power fails at every byte of every write: the node starts, on the old or the new, or says what it lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_storage import HONEST, Disk, PowerCut, Survival, storage_on

from meshd.core.effects import Address
from meshd.shell.storage import EPOCH_MARGIN, Storage

OLD_PEERS: tuple[Address, ...] = (("10.0.0.1", 7946),)
NEW_PEERS: tuple[Address, ...] = (("10.0.0.2", 7946), ("10.0.0.3", 7946))


def before() -> Disk:
    """A state folder after one life."""
    disk = Disk()
    storage = storage_on(disk)
    assert storage.next_epoch(now_ms=1_000) == 1_000
    assert storage.save_snapshot(b"the old snapshot")
    assert storage.save_peers(OLD_PEERS)
    return disk


def cuts(act: Callable[[Storage], object]) -> Iterator[tuple[Disk, Survival, bool]]:
    """Every disk that a power cut in or after `act` can leave, and whether `act` was done."""
    whole = before()
    begun = whole.steps
    act(storage_on(whole))
    assert whole.steps > begun, "nothing was written"
    for steps in range(whole.steps - begun + 1):
        disk = Disk(dict(before().files), steps_left=steps)
        try:
            act(storage_on(disk))
            done = True
        except PowerCut:
            done = False
        assert done == (steps == whole.steps - begun)
        for survival in Survival:
            yield disk.survived(survival), survival, done


def test_an_epoch_that_was_spoken_under_is_never_taken_back() -> None:
    def act(storage: Storage) -> object:
        return storage.next_epoch(now_ms=1)  # the clock says 1970

    tried = 0
    for disk, survival, done in cuts(act):
        spoken = 1_001 if done else 1_000
        storage = storage_on(disk)
        assert storage.next_epoch(now_ms=1) > spoken, (survival, done)
        assert storage.statistics.epoch_kept
        assert storage_on(disk).next_epoch(now_ms=1) > spoken + 1
        tried += 1
    assert tried > 800


def test_an_epoch_raised_by_peers_is_never_taken_back() -> None:
    def act(storage: Storage) -> object:
        storage.next_epoch(now_ms=1)
        return storage.try_keep_epoch(storage.next_epoch(now_ms=9_000))

    for disk, survival, done in cuts(act):
        spoken = 9_000 if done else 1_000
        assert storage_on(disk).next_epoch(now_ms=1) > spoken, (survival, done)


def test_a_snapshot_is_the_old_or_the_new_or_is_set_aside() -> None:
    seen: set[bytes | None] = set()
    for disk, survival, done in cuts(lambda storage: storage.save_snapshot(b"a newer snapshot")):
        storage = storage_on(disk)
        found = storage.load_snapshot()
        seen.add(found)
        aside = [name for name in disk.files if name.startswith("store.snapshot.damaged-")]
        if found is None:
            assert survival not in HONEST
            assert len(aside) == storage.statistics.quarantined == 1
        else:
            assert found == b"a newer snapshot" or not done or survival is Survival.NO_RENAME
            assert not aside
        assert storage.save_snapshot(b"the newest")  # whatever was left lying about
        assert storage_on(disk).load_snapshot() == b"the newest"
    assert seen == {b"the old snapshot", b"a newer snapshot", None}


def test_peers_are_the_old_or_the_new_or_are_set_aside() -> None:
    seen: set[tuple[Address, ...]] = set()
    for disk, survival, _ in cuts(lambda storage: storage.save_peers(NEW_PEERS)):
        storage = storage_on(disk)
        found = storage.load_peers()
        seen.add(found)
        assert (found == ()) == (storage.statistics.quarantined == 1)
        assert found != () or survival not in HONEST
    assert seen == {OLD_PEERS, NEW_PEERS, ()}


def test_no_cut_touches_another_file() -> None:
    for disk, _, _ in cuts(lambda storage: storage.save_peers(NEW_PEERS)):
        storage = storage_on(disk)
        assert storage.load_snapshot() == b"the old snapshot"
        assert storage.next_epoch(now_ms=1) == 1_001


@pytest.mark.parametrize("survival", Survival)
def test_a_power_cut_while_what_another_damaged_is_set_aside(survival: Survival) -> None:
    damaged = before()
    damaged.files |= {"epoch": b"", "store.snapshot": bytes(100), "peers": b"meshd-state p"}

    def start(disk: Disk) -> None:
        storage = storage_on(disk)
        storage.load_peers()
        storage.next_epoch(now_ms=1)
        storage.load_snapshot()

    whole = Disk(dict(damaged.files))
    start(whole)
    for steps in range(whole.steps):
        disk = Disk(dict(damaged.files), steps_left=steps)
        with pytest.raises(PowerCut):
            start(disk)
        again = storage_on(disk.survived(survival))
        assert again.load_peers() == ()
        assert again.load_snapshot() is None
        assert again.next_epoch(now_ms=1) > 1_000


Life = tuple[int, int, int, bool, Survival]
LIVES = st.lists(
    st.tuples(
        st.integers(0, 5_000),  # the clock at the start
        st.integers(0, 400),  # the step of the cut; mostly beyond the last one
        st.integers(0, 3_000),  # peers raise the epoch to this
        st.booleans(),  # the disk refuses
        st.sampled_from(HONEST),
    ),
    min_size=2,
    max_size=6,
)


@settings(deadline=None, max_examples=100)
@given(LIVES)
def test_epochs_rise_over_any_lives_on_a_disk_that_keeps_what_it_says(lives: list[Life]) -> None:
    disk, kept = Disk(), 0
    for now_ms, steps, raised, refuses, survival in lives:
        disk.steps_left = steps
        disk.refusal = 28 if refuses else None
        try:
            storage = storage_on(disk)
            epoch = storage.next_epoch(now_ms=now_ms)
            assert epoch > kept
            assert storage.statistics.epoch_kept != refuses
            if storage.statistics.epoch_kept:
                kept = epoch
            if raised > epoch and storage.try_keep_epoch(type(epoch)(raised)):
                kept = raised
        except PowerCut:
            pass
        disk = disk.survived(survival)


def test_when_all_is_lost_the_epoch_is_random_and_above_the_clock() -> None:
    for data in (b"", bytes(90), b"1732182035000"):
        disk = Disk({"epoch": data, "epoch.copy": data})
        storage = storage_on(disk, draw=EPOCH_MARGIN)
        assert storage.next_epoch(now_ms=7_000) == 7_000 + EPOCH_MARGIN
        assert storage_on(disk).next_epoch(now_ms=7_000) == 7_001 + EPOCH_MARGIN
