"""What the keeper of the state writes and when, and what a node makes of what it finds at the start."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.shell.support_log import KeptLog
from tests.unit.support_cms import real_signer
from tests.unit.support_storage import HONEST, STATE, Disk, PowerCut, Survival, storage_on

from meshd.core.effects import Address
from meshd.core.sealing import Floor
from meshd.shell.envelope import enclose
from meshd.shell.keeper import WINDOWS_EVERY_S, StateKeeper, load_store
from meshd.shell.storage import FORMAT, Storage
from meshd.trust.identity import Identity, init_mesh
from meshd_cms import Epoch, NodeId, Store, StoreConfig
from meshd_cms.snapshot import pack_snapshot, unpack_snapshot
from meshd_cms.types import Applied, Delta, Version

INTERVAL_S = 60.0
CLOCK_MS = 1_000  # far behind what is saved


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return init_mesh(tmp_path_factory.mktemp("state"), "home")


class Peer:
    """Another node's store, whose record is told to ours."""

    def __init__(self, identity: Identity, number: int = 1, epoch: int = 7) -> None:
        signer = real_signer(number)
        self.store = Store(StoreConfig(), identity.mesh_id, signer, Epoch(epoch), identity.verify)
        self._values = 0

    def news(self) -> Delta:
        self._values += 1
        delta = self.store.set("cap/echo", self._values)
        assert delta is not None
        return delta


def an_empty_store(identity: Identity, epoch: int) -> Store:
    return Store(StoreConfig(), identity.mesh_id, identity.signer, Epoch(epoch), identity.verify)


async def inline(call: Callable[[], bool]) -> bool:
    """No threads: the clock that jumps would jump while they work."""
    await trio.lowlevel.checkpoint()
    return call()


class TimedDisk(Disk):
    """Notes when each file was put in place, on trio's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: list[tuple[float, str]] = []

    def rename(self, path: Path, to: Path) -> None:
        super().rename(path, to)
        self.puts.append((trio.current_time(), to.name))


class Node:
    """A keeper over a disk in memory; whoever holds it plays the rest of the daemon."""

    def __init__(self, identity: Identity, disk: TimedDisk) -> None:
        self.disk = disk
        self.log = KeptLog()
        self.storage = storage_on(disk)
        self.storage.report_to(self.log)
        self.store = an_empty_store(identity, self.storage.next_epoch(now_ms=CLOCK_MS))
        self.peers: tuple[Address, ...] = ()
        self.floors: tuple[Floor, ...] = ()
        self.keeper = StateKeeper(
            self.storage,
            self.store,
            lambda: self.peers,
            interval_s=INTERVAL_S,
            peers_max=3,
            floors=lambda: self.floors,
            run=inline,
        )
        self.disk.puts.clear()

    def hear(self, delta: Delta) -> None:
        assert isinstance(self.store.apply(delta, trio.current_time()), Applied)


def run_for(seconds: float, main: Callable[[], Awaitable[None]], node: Node) -> None:
    """Run the keeper beside `main` for so long, on a clock that jumps."""

    async def both() -> None:
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.keeper.run)
                await main()
                await trio.sleep_forever()

    trio.run(both, clock=trio.testing.MockClock(autojump_threshold=0))


def made(identity: Identity, disk: TimedDisk) -> Node:
    """A node, outside a run of trio."""
    made: list[Node] = []

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        made.append(Node(identity, disk))

    trio.run(main)
    return made[0]


def test_a_quiet_mesh_writes_once_and_never_again(identity: Identity) -> None:
    node, peer = made(identity, TimedDisk()), Peer(identity)

    async def quiet() -> None:
        node.hear(peer.news())
        node.peers = (("10.0.0.2", 7946), ("10.0.0.1", 7946))
        while True:  # what goes on in a quiet mesh: records are confirmed, tables are walked
            await trio.sleep(10.0)
            node.store.confirm(peer.store.owner, trio.current_time())
            node.peers = node.peers[::-1]

    run_for(24 * 3600.0, quiet, node)
    assert [name for _, name in node.disk.puts] == ["store.snapshot", "peers"]
    assert node.storage.statistics.writes == 4  # with the two of the epoch


def test_a_busy_mesh_writes_once_an_interval(identity: Identity) -> None:
    node, peer = made(identity, TimedDisk()), Peer(identity)

    async def busy() -> None:
        for second in range(1_200):
            await trio.sleep(1.0)
            node.hear(peer.news())
            node.peers = ((f"10.0.0.{second % 250}", 7946),)

    run_for(1_200.5, busy, node)
    for name in ("store.snapshot", "peers"):
        at_s = [at_s for at_s, put in node.disk.puts if put == name]
        assert len(at_s) == 20
        gaps_s = [later - earlier for earlier, later in pairwise(at_s)]
        assert min(gaps_s) >= INTERVAL_S - 0.001


def test_replay_floors_are_written_beside_other_things_at_the_end_and_seldom(
    identity: Identity,
) -> None:
    node, peer = made(identity, TimedDisk()), Peer(identity)
    node.floors = (Floor(b"k" * 8, NodeId(b"a" * 16), Epoch(7), 3),)

    async def lives() -> None:
        node.hear(peer.news())
        await trio.sleep(20 * WINDOWS_EVERY_S)
        node.floors = (Floor(b"k" * 8, NodeId(b"a" * 16), Epoch(7), 9),)
        await node.keeper.save(last=True)
        await trio.sleep(1.0)

    run_for(20 * WINDOWS_EVERY_S + 2.0, lives, node)
    at_s = [at_s for at_s, put in node.disk.puts if put == "windows"]
    assert at_s[0] == next(at_s for at_s, put in node.disk.puts if put == "store.snapshot")
    assert 15 <= len(at_s) <= 22
    assert storage_on(node.disk).load_windows() == node.floors


def test_peers_to_try_first_are_bounded_and_outlive_those_who_are_gone(identity: Identity) -> None:
    node = made(identity, TimedDisk())
    node.peers = tuple((f"10.0.0.{number}", 7946) for number in range(5))

    async def gone() -> None:
        await trio.sleep(1.5 * INTERVAL_S)
        node.peers = ()

    run_for(4 * INTERVAL_S, gone, node)
    assert len(storage_on(node.disk).load_peers()) == 3


def test_what_the_disk_refused_is_written_once_it_takes_it(identity: Identity) -> None:
    disk = TimedDisk()
    disk.refusal = errno.EROFS
    node, peer = made(identity, disk), Peer(identity)
    epoch = node.store.epoch

    async def mended() -> None:
        node.hear(peer.news())
        node.peers = (("10.0.0.1", 7946),)
        await trio.sleep(10.5 * INTERVAL_S)
        assert not disk.files
        disk.refusal = None

    run_for(20 * INTERVAL_S, mended, node)
    assert [name for _, name in disk.puts] == ["epoch", "epoch.copy", "store.snapshot", "peers"]
    assert {at_s for at_s, _ in disk.puts} == {disk.puts[0][0]}
    assert node.log.events() == ["epoch.not_kept", "state.write_recovered"]
    assert storage_on(Disk(disk.files)).next_epoch(now_ms=CLOCK_MS) == epoch + 1


# -- starting ----------------------------------------------------------------------------------------------


def saved(identity: Identity, epoch: int = 5_000, news: int = 3) -> Disk:
    """The disk of a node that heard of one peer."""
    disk = Disk()
    storage = storage_on(disk)
    store = an_empty_store(identity, storage.next_epoch(now_ms=epoch))
    peer = Peer(identity)
    for _ in range(news):
        store.apply(peer.news(), 0.0)
    assert storage.save_snapshot(store.snapshot())
    return disk


def started(disk: Disk, identity: Identity) -> tuple[Store, KeptLog, Storage]:
    """The next life on this disk."""
    log, storage, stores = KeptLog(), storage_on(disk, draw=9), list[Store]()

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        epoch = storage.next_epoch(now_ms=CLOCK_MS)
        stores.append(load_store(storage, identity, epoch, log))

    trio.run(main)
    return stores[0], log, storage


def value_of_peer(store: Store) -> object:
    (owner,) = (owner for owner in store.owners() if owner != store.owner)
    return store.get(owner, "cap/echo")


def test_a_restart_goes_on_from_the_snapshot_under_a_higher_epoch(identity: Identity) -> None:
    store, log, storage = started(saved(identity), identity)
    assert store.epoch == 5_001
    assert value_of_peer(store) == 3
    assert log.events() == []
    assert storage.statistics.epoch_kept


def test_a_flip_of_a_bit_in_every_byte_of_a_snapshot_is_found(identity: Identity) -> None:
    whole = saved(identity).files
    snapshot = whole["store.snapshot"]
    assert snapshot is not None
    for at in range(len(snapshot)):
        damaged = bytearray(snapshot)
        damaged[at] ^= 1 << at % 8
        disk = Disk(whole | {"store.snapshot": bytes(damaged)})
        store, log, storage = started(disk, identity)
        assert store.owners() == ()
        assert store.epoch == 5_001
        assert log.events() == ["state.set_aside"]
        assert storage.statistics.quarantined == 1


def tampered(identity: Identity) -> Iterator[tuple[str, bytes]]:
    """Snapshots whose checksums are right."""
    snapshot = saved(identity).files["store.snapshot"]
    assert snapshot is not None
    inner = unpack_snapshot(snapshot.partition(b"\n")[2])
    (record,) = inner.records
    forged = replace(record, head=replace(record.head, signature=bytes(64)))
    yield "bad_proof", pack_snapshot(replace(inner, records=(forged,)))
    other = Peer(identity, number=2).store
    yield "other_node", other.snapshot()
    yield "truncated", b""
    yield "not_a_snapshot", b"something else entirely"


def test_a_snapshot_that_is_not_proven_is_set_aside_and_said(identity: Identity) -> None:
    for reason, content in tampered(identity):
        disk = saved(identity)
        disk.files["store.snapshot"] = enclose("store", FORMAT, content)
        store, log, storage = started(disk, identity)
        assert store.owners() == ()
        assert store.epoch == 5_001
        assert log.events() == ["snapshot.rejected"]
        fields = log.lines[0][2]
        assert reason in str(fields["error"])
        assert str(fields["kept_as"]).startswith(str(STATE / "store.snapshot.damaged-"))
        assert storage.statistics.quarantined == 1


def test_without_its_epoch_files_a_node_starts_well_above_what_the_snapshot_remembers(
    identity: Identity,
) -> None:
    disk = saved(identity, epoch=5_000)
    del disk.files["epoch"], disk.files["epoch.copy"]
    store, log, storage = started(disk, identity)
    assert store.epoch == 5_001 + 1 + 9  # the last life may have been a later one than it knows
    assert value_of_peer(store) == 3
    assert log.events() == ["epoch.lost"]
    assert storage.statistics.epoch_kept
    assert started(disk, identity)[0].epoch == store.epoch + 1


def test_an_old_snapshot_takes_no_epoch_back(identity: Identity) -> None:
    disk = saved(identity, epoch=5_000)
    assert storage_on(disk).next_epoch(now_ms=9_000) == 9_000
    assert started(disk, identity)[0].epoch == 9_001


def test_a_power_cut_at_every_byte_of_a_snapshot_leaves_the_old_or_the_new_catalogue(
    identity: Identity,
) -> None:
    before = saved(identity, news=1).files
    after = saved(identity, news=3).files["store.snapshot"]
    assert after is not None
    newer = after.partition(b"\n")[2]
    seen: set[object] = set()
    for steps in range(len(after) + 4):
        disk = Disk(dict(before), steps_left=steps)
        try:
            storage_on(disk).save_snapshot(newer)
            done = True
        except PowerCut:
            done = False
        for survival in Survival:
            store, log, _ = started(disk.survived(survival), identity)
            assert store.epoch == 5_001
            if store.owners():
                seen.add(value_of_peer(store))
                assert value_of_peer(store) == 3 or not done or survival is Survival.NO_RENAME
                assert log.events() == []
            else:
                assert survival not in HONEST
                assert log.events() == ["state.set_aside"]
    assert seen == {1, 3}


def test_an_epoch_that_peers_raised_outlives_the_lost_snapshot_and_the_clock(
    identity: Identity,
) -> None:
    disk = Disk()
    store, _, storage = started(disk, identity)
    assert store.epoch == CLOCK_MS
    assert store.learn_epoch(Epoch(9_000_000))  # as the core does on a peer's word
    assert storage.try_keep_epoch(store.epoch)
    again, _, _ = started(disk, identity)
    assert again.epoch == 9_000_002
    assert again.line(again.owner) is None  # and says everything anew, from version 1
    delta = again.set("node", 1)
    assert delta is not None
    assert delta.since == Version(0)
