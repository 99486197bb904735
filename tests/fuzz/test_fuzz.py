"""Sixty thousand inputs with fixed seeds; `python -m tests.fuzz.run` feeds as many as one likes."""

from __future__ import annotations

import gc
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from tests.fuzz.run import SHARES, TARGETS, Failure, main, play, tell
from tests.fuzz.support_figures import Broken, Figures
from tests.fuzz.support_grammar import Grammar
from tests.fuzz.support_scene import Scene, alive, read, traffic
from tests.fuzz.support_targets import CoreTarget, FromMembers

from meshd.core.messages import DecreesHeld, Interest, JoinLater, Message, Proclaim
from meshd_cms.types import NodeId

COUNTS = {
    "member": 10_000,
    "stranger": 5_500,
    "wire": 3_000,
    "sealed": 12_000,
    "stream": 10_000,
    "record": 8_000,
    "snapshot": 2_500,
    "announcement": 2_000,
    "storage": 1_300,
    "join": 2_000,
    "token": 1_500,
    "exchange": 40,
    "certificate": 700,
    "decree": 700,
    "hello": 600,
    "passport": 160,
}
CORPUS = Path(__file__).parent / "corpus"
ANSWERED_BYTES_MAX = 4.0
"""Sent for each byte received, over a block at 500 payloads a second, rumours and repairs included."""
ANSWERED_DATAGRAMS_MAX = 128  # to one payload, at once
GROWTH_BYTES_MAX = 300_000


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_input_raises_grows_memory_or_changes_what_it_should_not(name: str) -> None:
    done = play(name, seed=1, block=0, count=COUNTS[name])
    assert done.failure is None, tell(done.failure)
    assert sum(done.figures.outcomes.values()) > 0.9 * COUNTS[name]
    assert len(done.figures.outcomes) >= 2
    if name in ("member", "stranger"):
        assert done.figures.answered_bytes < ANSWERED_BYTES_MAX * done.figures.received_bytes
        most = max(kind.worst_datagrams for kind in done.figures.kinds.values())
        assert most <= ANSWERED_DATAGRAMS_MAX


def test_every_target_has_a_share_and_a_fixed_run() -> None:
    assert set(SHARES) == set(TARGETS) == set(COUNTS)
    assert sum(SHARES.values()) == pytest.approx(1.0)
    assert sum(COUNTS.values()) == 60_000


def test_the_corpus_and_the_grammar_hold_every_kind_of_message() -> None:
    recorded = {type(message) for heard in traffic().heard for message in read(heard.payload)}
    every, rng, grammar = set(get_args(Message)), random.Random(1), Grammar(traffic())
    assert {type(grammar.message(rng)) for _ in range(1_000)} == every
    # Recorded in a mesh of a dozen, where nobody asks for loads, no more join than can be served, and nothing is
    # decreed.
    assert every - recorded <= {Interest, JoinLater, Proclaim, DecreesHeld}


def test_memory_is_flat_over_the_second_half_of_a_run() -> None:
    target = FromMembers(random.Random(3))
    halves: list[int] = []
    tracemalloc.start()
    try:
        for _ in range(2):
            for _ in range(1_500):
                target.feed(target.case())
            target.scene.at(target.scene.now_s + 40.0)  # what was suspected, parked or read expires
            target.figures = Figures()
            read.cache_clear()
            gc.collect()
            halves.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert halves[1] - halves[0] < GROWTH_BYTES_MAX, halves


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: path.name)
def test_inputs_that_were_interesting_once_break_nothing(path: Path) -> None:
    target = TARGETS[path.parent.name](random.Random(0))
    for line in path.read_text().splitlines():
        target.feed(bytes.fromhex(line))
    target.finish()


# -- the oracles themselves --------------------------------------------------------------------------------


def test_a_record_of_ours_that_a_peer_wrote_is_seen_at_the_next_look() -> None:
    target = FromMembers(random.Random(1))
    target.scene.store.set("own", "written by nobody")
    with pytest.raises(Broken, match="our own record"):
        target.finish()


def test_a_member_that_nobody_told_of_is_seen_at_the_next_look() -> None:
    target = FromMembers(random.Random(1))
    ghost = replace(target.scene.nodes[1], node=NodeId(b"told by no input"))
    target.scene.tell([alive(ghost)], ghost)
    with pytest.raises(Broken, match="nobody told of"):
        target.finish()


def test_a_core_that_answers_nobody_is_seen() -> None:
    target: CoreTarget = FromMembers(random.Random(1))
    target.scene.core.leave(target.scene.now_s)
    with pytest.raises(Broken):
        target.finish()


def test_two_runs_of_one_block_feed_the_same() -> None:
    one, other = (play("member", 5, 2, 200).figures for _ in range(2))
    assert one.outcomes == other.outcomes
    assert one.answered_bytes == other.answered_bytes
    assert one.largest == other.largest
    assert play("member", 5, 3, 200).figures.received_bytes != one.received_bytes


def test_a_failure_is_told_with_its_input_and_the_command_that_repeats_it() -> None:
    told = tell(Failure("member", 7, 3, 41, b"\x01\x02", "Traceback ..."))
    assert "--target member --seed 7 --block 3 --count 41" in told
    saved = Path(told.rpartition("--input ")[2].strip())
    assert bytes.fromhex(saved.read_text()) == b"\x01\x02"
    assert main(["--target", "member", "--input", str(saved)]) == 0
    saved.unlink()


def test_the_scene_is_a_mesh_in_the_middle_of_its_work() -> None:
    scene = Scene()
    states = sorted(view.state.value for view in scene.core.members())
    assert states == ["alive"] * 11 + ["suspect"]
    assert len(scene.store.owners()) == 12
    assert scene.core.statistics()["rumours_queued"] > 0
