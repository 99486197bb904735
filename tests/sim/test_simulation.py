"""The simulator with fixed seeds: safety at every event, agreement at the end, and the same run each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.sim.invariants import Violation
from tests.sim.scenarios import SCENARIOS, play
from tests.sim.world import MESH, World
from tests.unit.support_cms import hash_verify

from meshd.core.config import lan
from meshd.core.wire import Record, encode, payload_of
from meshd_cms.store import Store
from meshd_cms.types import RUMOUR_BYTES_MAX, Epoch, StoreConfig, Version

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
