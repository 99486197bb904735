"""A node's epochs over its lives, with the real storage under simulated meshes, and its clock in the past."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from tests.sim.world import World
from tests.unit.support_storage import Disk, storage_on

from meshd.core.config import lan
from meshd.core.events import SelfEpochRaised
from meshd.core.membership import MemberState
from meshd.shell.storage import EPOCH_MARGIN, Storage

NODES = 5
NUMBER = 3
CLOCK_MS = 7  # 1970: what a board without a battery says before it has heard of the network's time


class Lives:
    """Lives of one node of a mesh, each started with what the storage says."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed, lan(), "durability")
        self.world.add(NODES)
        self.world.settle()
        self._seen = 0
        self.spoken: list[int] = [self.epoch]  # every epoch that peers have heard, in order

    @property
    def epoch(self) -> int:
        return int(self.world.store(NUMBER).epoch)

    def live(self, storage: Storage) -> None:
        """End the life that is, and live another one until all agree."""
        world = self.world
        world.crash(NUMBER)
        world.run(2.0)
        self._seen = len(world.events)
        world.boot(NUMBER, epoch=storage.next_epoch(now_ms=CLOCK_MS))
        world.settle(20.0)
        for _, node, event in world.events[self._seen :]:
            if node == world.id(NUMBER) and isinstance(event, SelfEpochRaised):
                storage.try_keep_epoch(event.epoch)  # as the daemon does
        self.spoken.append(self.epoch)


def views(world: World) -> set[tuple[MemberState, int]]:
    """What the others hold of the node."""
    node = world.id(NUMBER)
    held = [world.core(number).member(node) for number in range(NODES) if number != NUMBER]
    return {(view.state, int(view.epoch)) for view in held if view is not None}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_epoch_lost_with_the_disk_is_learnt_back_and_never_goes_back_again(seed: int) -> None:
    lives, disk = Lives(seed), Disk()  # an empty disk, and the key
    lives.live(storage_on(disk))
    assert lives.spoken[1] == lives.spoken[0] + 1
    for _ in range(3):
        lives.live(storage_on(disk))
    assert lives.spoken == sorted(set(lives.spoken))
    assert views(lives.world) == {(MemberState.ALIVE, lives.epoch)}


@pytest.mark.parametrize("draws", [(0, 0, 0), (9, 5, 1), (EPOCH_MARGIN, 0, EPOCH_MARGIN)])
def test_on_a_disk_that_cannot_be_written_every_life_rises_above_the_last(
    draws: tuple[int, ...],
) -> None:
    lives, disk = Lives(4), Disk(refusal=errno.EROFS)
    for draw in draws:
        storage = storage_on(disk, draw=draw)
        lives.live(storage)
        assert not storage.statistics.epoch_kept
    assert lives.spoken == sorted(set(lives.spoken))
    assert views(lives.world) == {(MemberState.ALIVE, lives.epoch)}


def test_what_was_learnt_on_a_full_disk_is_kept_when_there_is_room_again() -> None:
    lives, disk = Lives(5), Disk(refusal=errno.ENOSPC)
    storage = storage_on(disk, draw=3)
    lives.live(storage)
    disk.refusal = None
    assert storage.keep_epoch_again()
    assert storage_on(disk).next_epoch(now_ms=CLOCK_MS) == lives.epoch + 1


def test_a_node_that_lost_its_key_is_another_one_and_the_old_one_goes() -> None:
    world = World(6, replace(lan(), dead_keep_s=20.0), "durability")
    world.add(NODES)
    world.settle()
    world.crash(NUMBER)
    former = world.new_key(NUMBER)
    world.run(2.0)
    world.boot(NUMBER)
    world.settle(20.0)

    def forgotten() -> bool:
        return all(
            world.core(number).member(former) is None and former not in world.store(number).owners()
            for number in range(NODES)
        )

    assert world.id(NUMBER) != former
    world.run_until(forgotten, 40.0, "the old id is forgotten", 5.0)
    assert views(world) == {(MemberState.ALIVE, int(world.store(NUMBER).epoch))}


@pytest.mark.parametrize("with_snapshot", [1, NODES - 1], ids=["one", "all"])
def test_a_forgotten_owner_in_old_snapshots_is_never_listed_and_soon_gone(
    with_snapshot: int,
) -> None:
    """No graveyard outlives a restart: the record of a node of which all but snapshots know nothing."""
    world = World(7, replace(lan(), dead_keep_s=20.0), "durability")
    world.add(NODES)
    world.settle()
    others = [number for number in range(NODES) if number != NUMBER]
    ghost = world.id(NUMBER)
    for number in others[:with_snapshot]:
        world.save(number)
    world.crash(NUMBER, host=True)
    world.run(60.0)
    assert not any(ghost in world.store(number).owners() for number in others)
    for number in others:
        world.crash(number)
    for number in others:
        world.boot(number)

    def holders() -> int:
        return sum(ghost in world.store(number).owners() for number in others)

    assert holders() == with_snapshot
    left_keep_s = world.config.left_keep_s
    world.run_until(lambda: holders() == 0, 3 * left_keep_s, "the ghost is gone", 0.5)
    world.run(2 * left_keep_s)
    assert holders() == 0
    assert not any(world.core(number).member(ghost) for number in others)
