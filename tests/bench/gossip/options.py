"""How much a run of the gossip bench measures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.gossip.figures import NAMES

CELLS = ("main", "loss", "burners", "stalls", "partition")


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    nodes: tuple[int, ...]
    names: tuple[str, ...]
    out: Path
    cells: tuple[str, ...]
    updates: int
    slow_updates: int
    kills: int
    slow_kills: int
    stops: int
    slow_stops: int
    together: int
    idle_s: float
    robust_nodes: int
    window_s: float
    burners: int
    stalled: int
    seed: int


def options_of(arguments: Sequence[str] | None = None) -> Options:
    """From the command line."""
    parser = argparse.ArgumentParser(description="Gossip implementations, side by side.")
    add = parser.add_argument
    add("--nodes", type=numbers, default=(10, 30, 60, 100), help="sizes, as 10,30")
    add("--peers", type=words, default=NAMES, help=f"implementations: {','.join(NAMES)}")
    add("--cells", type=words, default=CELLS, help=f"parts: {','.join(CELLS)}")
    add("--out", type=Path, required=True, help="file of results, written anew")
    add("--append", action="store_true", help="add to the file")
    add("--updates", type=int, default=40, help="of each size, of a quick implementation")
    add("--slow-updates", type=int, default=20, help="of the others")
    add("--kills", type=int, default=20, help="SIGKILLs of each size, of a quick implementation")
    add("--slow-kills", type=int, default=6, help="of the others")
    add("--stops", type=int, default=6, help="SIGSTOPs of each size, of a quick implementation")
    add("--slow-stops", type=int, default=3, help="of the others")
    add("--together", type=int, default=3, help="slow failures at once, in meshes of 20 and more")
    add("--idle", type=float, default=10.0, help="seconds")
    add("--robust-nodes", type=int, default=30, help="size for loss, burners and stalls")
    add("--window", type=float, default=60.0, help="seconds of loss, burners and stalls")
    add("--burners", type=int, default=8)
    add("--stalled", type=int, default=3)
    add("--seed", type=int, default=1, help="of the choice of victims and writers")
    parsed = parser.parse_args(arguments)
    if unknown := sorted(set(parsed.cells) - set(CELLS)):
        parser.error(f"no such cells: {', '.join(unknown)}")
    if parsed.out.exists() and not parsed.append:
        parsed.out.unlink()
    return Options(
        nodes=parsed.nodes,
        names=parsed.peers,
        out=parsed.out,
        cells=parsed.cells,
        updates=parsed.updates,
        slow_updates=parsed.slow_updates,
        kills=parsed.kills,
        slow_kills=parsed.slow_kills,
        stops=parsed.stops,
        slow_stops=parsed.slow_stops,
        together=parsed.together,
        idle_s=parsed.idle,
        robust_nodes=parsed.robust_nodes,
        window_s=parsed.window,
        burners=parsed.burners,
        stalled=parsed.stalled,
        seed=parsed.seed,
    )


def numbers(text: str) -> tuple[int, ...]:
    """`10,30`."""
    return tuple(int(word) for word in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """`a,b`."""
    return tuple(text.split(","))
