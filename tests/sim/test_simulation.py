"""The simulator with fixed seeds: safety at every event, agreement at the end, and the same run each time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.sim import plots
from tests.sim.figures import Job, gather, measured, table
from tests.sim.invariants import SMALL, Violation
from tests.sim.measures import MEASURES
from tests.sim.network import Clock
from tests.sim.plays import known_to_all
from tests.sim.preformed import preform
from tests.sim.run import main
from tests.sim.scenarios import SCENARIOS, play
from tests.sim.world import MESH, World
from tests.unit.support_cms import hash_verify

from meshd.core.config import lan
from meshd.core.effects import Address, Effect, Lane
from meshd.core.membership import MemberState
from meshd.core.messages import Claim, Record
from meshd.core.node import NodeCore
from meshd.core.wire import decode, encode, payload_of
from meshd_cms.store import Store
from meshd_cms.types import RUMOUR_BYTES_MAX, Epoch, NodeId, StoreConfig, Version

ROOT = Path(__file__).resolve().parents[2]
SEEDS = [
    (name, int(nodes), int(seed))
    for line in (ROOT / "tests/sim/seeds.txt").read_text().splitlines()
    if not line.startswith("#")
    for name, nodes, seed in [line.split()]
]


@pytest.mark.parametrize(("name", "nodes", "seed"), SEEDS)
def test_run_keeps_every_invariant_and_converges(name: str, nodes: int, seed: int) -> None:
    play(name, seed, nodes)  # raises Violation, with the command that replays it


def test_every_scenario_has_fixed_seeds() -> None:
    assert {name for name, _, _ in SEEDS} == set(SCENARIOS)


def _trace_in_another_process(hash_seed: str) -> bytes:
    command = ["tests.sim.run", "--seed", "4", "--scenario", "chaos", "--nodes", "4", "--trace"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    return done.stdout


def test_same_seed_is_the_same_run_byte_for_byte_whatever_the_hash_seed() -> None:
    one, other = _trace_in_another_process("1"), _trace_in_another_process("2")
    assert one.count(b"\n") > 1000
    assert one == other


def test_other_seed_is_another_run() -> None:
    assert play("join", 1, 3).world.fingerprint() != play("join", 2, 3).world.fingerprint()


def test_failure_names_the_seed_and_the_command_that_replays_it() -> None:
    world = World(77, lan(), "join --nodes 3")
    world.add(3)
    with pytest.raises(Violation, match="run --seed 77 --scenario join"):
        world.settle(0.0)


def test_checker_sees_a_record_that_its_owner_did_not_write() -> None:
    world = World(5, lan())
    world.add(2)
    world.settle()
    owner = world.nodes[0]
    assert owner.life is not None
    # The same key pair in another process: all signatures are good, and yet the owner never wrote it.
    thief = Store(StoreConfig(), MESH, owner.signer, Epoch(owner.life.epoch + 1), hash_verify)
    thief.set("key", 1)
    delta = thief.delta_since(thief.owner, Version(0), RUMOUR_BYTES_MAX)
    assert delta is not None
    payload = payload_of([encode(Record(delta, rumour=True))])
    with pytest.raises(Violation, match="never written"):
        world.deliver(0, 1, payload)


class _Resurrecting(NodeCore):
    """Planted bug: it believes whoever says that a member is alive, however old the news."""

    def receive(
        self,
        payload: bytes,
        sender: NodeId,
        sender_epoch: int,
        source: Address,
        lane: Lane,
        now_s: float,
    ) -> tuple[Effect, ...]:
        effects = super().receive(payload, sender, sender_epoch, source, lane, now_s)
        for message in decode(payload):
            if isinstance(message, Claim) and message.update.state is MemberState.ALIVE:
                member = self._context.members.get(message.update.node)
                if member is not None:
                    member.update = message.update
        return effects


class _Losing(NodeCore):
    """Planted bug: records of others lose their first entry."""

    def receive(
        self,
        payload: bytes,
        sender: NodeId,
        sender_epoch: int,
        source: Address,
        lane: Lane,
        now_s: float,
    ) -> tuple[Effect, ...]:
        effects = super().receive(payload, sender, sender_epoch, source, lane, now_s)
        store = self._context.store
        record = store._records.get(sender)
        if record is not None and len(record.entries) > 1:
            kept = dict(list(record.entries.items())[1:])
            store._records[sender] = replace(record, entries=kept)
        return effects


@pytest.mark.parametrize("nodes", [4, SMALL + 4])
def test_checker_sees_a_dead_member_that_comes_back_by_old_news(nodes: int) -> None:
    world = World(6, lan(), core=_Resurrecting)
    preform(world, nodes)
    world.run(1.0)
    old = world.core(2)._context.own_update()
    world.crash(2)
    gone = known_to_all(world, world.id(2), MemberState.DEAD)
    world.run_until(gone, 10.0, "the crash is known")
    payload = payload_of([encode(Claim(old, merged=False))])

    def tell_old_news() -> None:
        world.deliver(1, 0, payload)
        world.check_all()

    with pytest.raises(Violation, match="believes"):
        tell_old_news()


def test_checker_sees_a_record_that_lost_an_entry() -> None:
    world = World(6, lan(), core=_Losing)
    preform(world, 3)

    def write() -> None:
        for number in range(5):
            world.write(1, f"cap/{number}", number)
            world.run(1.0)

    with pytest.raises(Violation, match="its owner wrote"):
        write()


def test_preformed_mesh_is_as_one_that_joined() -> None:
    formed, joined = World(3, lan()), World(3, lan())
    preform(formed, 12)
    joined.add(12)
    joined.settle()
    assert formed.agreed()
    for world in (formed, joined):
        before = len(world.events)
        world.run(20.0)
        assert world.events[before:] == []
    views = [
        [(one.node, one.name, one.address, one.state, one.incarnation) for one in core.members()]
        for core in (formed.core(0), joined.core(0))
    ]
    assert views[0] == views[1]


def test_clock_is_read_back_as_it_was_set() -> None:
    clock = Clock(100.0)
    clock.drift(10.0, 1.25)
    clock.leap(20.0, 5.0)
    assert clock.at(20.0) == pytest.approx(100.0 + 10.0 + 10.0 * 1.25 + 5.0)
    assert clock.when(clock.at(33.0)) == pytest.approx(33.0)


def test_many_workers_find_what_one_finds() -> None:
    jobs = [Job("update", 4, seed) for seed in range(4)]
    assert gather(jobs, workers=1) == gather(jobs, workers=2)


def test_soak_prints_each_failure_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--scenario", "join", "--nodes", "3", "--soak"]) == 0
    assert "2 runs, 0 failed" in capsys.readouterr().out


def test_table_has_every_figure() -> None:
    found = measured([3], seeds=1, workers=1)
    printed = table(found)
    assert "| - |" not in printed
    assert set(MEASURES) >= {"join", "update", "crash", "silent", "idle"}


def test_plots_without_matplotlib_say_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotsMissing, match="make plots"):
        plots.draw(tmp_path / "new", {}, ())
    assert not (tmp_path / "new").exists()
