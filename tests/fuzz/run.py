"""`python -m tests.fuzz.run`: fuzz in blocks on all cores, print what was measured, and how to see a failure again.

python -m tests.fuzz.run --count 1000000 --seed 7             everything, shared out by `SHARES`
python -m tests.fuzz.run --target member --count 5000         one target
python -m tests.fuzz.run --target member --seed 7 --block 3   one block again, up to its failure
python -m tests.fuzz.run --target member --input FILE         one input, as hex, on a fresh target
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.fuzz.support_byte_targets import RecordTarget, SealedTarget, StreamTarget
from tests.fuzz.support_figures import Figures, Kind
from tests.fuzz.support_file_targets import (
    AnnouncementTarget,
    SnapshotTarget,
    StorageTarget,
)
from tests.fuzz.support_targets import FromMembers, FromStrangers, Target, WireTarget
from tests.fuzz.support_trust_targets import (
    CertificateTarget,
    DecreeTarget,
    ExchangeTarget,
    HelloTarget,
    JoinTarget,
    PassportTarget,
    TokenTarget,
)

TARGETS: Final[dict[str, type[Target]]] = {
    target.name: target
    for target in (
        FromMembers,
        FromStrangers,
        WireTarget,
        SealedTarget,
        StreamTarget,
        RecordTarget,
        SnapshotTarget,
        StorageTarget,
        AnnouncementTarget,
        JoinTarget,
        TokenTarget,
        ExchangeTarget,
        CertificateTarget,
        DecreeTarget,
        HelloTarget,
        PassportTarget,
    )
}
SHARES: Final = {
    "member": 0.28,
    "stranger": 0.14,
    "wire": 0.05,
    "sealed": 0.15,
    "stream": 0.11,
    "record": 0.11,
    "snapshot": 0.03,
    "announcement": 0.03,
    "storage": 0.01,
    "join": 0.03,
    "token": 0.01,
    "exchange": 0.001,  # an exchange takes milliseconds
    "certificate": 0.014,
    "decree": 0.015,
    "hello": 0.01,
    "passport": 0.01,
}
BLOCK: Final = 5_000
"""Inputs that one target object takes, one after another; its state carries over from one to the next."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An input that broke something."""

    target: str
    seed: int
    block: int
    index: int  # counted from 1
    data: bytes
    trace: str


@dataclass(frozen=True, slots=True)
class Done:
    """The result of one block."""

    target: str
    count: int
    figures: Figures
    resident_kb: int
    failure: Failure | None


def play(name: str, seed: int, block: int, count: int) -> Done:
    """Run one block: the same arguments give the same inputs."""
    rng = random.Random(f"{name} {seed} {block}")
    target, data, fed = TARGETS[name](rng), b"", 0
    failure: Failure | None = None
    try:
        while fed < count:
            data = target.case()
            fed += 1
            target.feed(data)
        target.finish()
    except Exception:  # noqa: BLE001  (whatever was raised is what is looked for)
        failure = Failure(name, seed, block, fed, data, traceback.format_exc())
    most_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Done(name, fed, target.figures, most_kb, failure)


def plan(count: int, only: str | None) -> list[tuple[str, int, int]]:
    """(target, block, inputs) for that many inputs in all."""
    shares = {only: 1.0} if only else SHARES
    blocks: list[tuple[str, int, int]] = []
    for name, share in shares.items():
        left, block = round(count * share), 0
        while left > 0:
            blocks.append((name, block, min(left, BLOCK)))
            left -= BLOCK
            block += 1
    return blocks


def run(blocks: list[tuple[str, int, int]], seed: int, workers: int) -> Iterator[Done]:
    """Run blocks on several processes, as they are done."""
    with ProcessPoolExecutor(workers) as pool:
        waiting = {pool.submit(play, name, seed, block, count) for name, block, count in blocks}
        for future in as_completed(waiting):
            yield future.result()


def tell(failure: Failure) -> str:
    """What failed and how to see it again; the input is saved as hex."""
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"fuzz-{failure.target}-", suffix=".hex", delete=False
    ) as file:
        file.write(failure.data.hex())
    command = f"python -m tests.fuzz.run --target {failure.target}"
    return (
        f"FAILED {failure.target}, block {failure.block}, input {failure.index}\n{failure.trace}\n"
        f"again:      {command} --seed {failure.seed} --block {failure.block}"
        f" --count {failure.index}\n"
        f"input only: {command} --input {file.name}\n"
    )


def _row(name: str, kind: Kind) -> str:
    mean_us, worst_us = kind.total_s / kind.count * 1e6, kind.worst_s * 1e6
    ratio = f"{kind.worst_ratio:8.1f} {kind.worst_datagrams:5d}"
    return f"  {name:44s} {kind.count:8d} {mean_us:8.0f} {worst_us:9.0f} {ratio}"


def report(name: str, figures: Figures, seconds: float) -> str:
    """What was measured of one target."""
    total = sum(kind.count for kind in figures.kinds.values())
    lines = [f"{name}: {total} inputs, {seconds:.0f} s of all workers"]
    outcomes = ", ".join(f"{key} {count}" for key, count in figures.outcomes.most_common(12))
    lines.append(f"  outcomes: {outcomes}")
    if figures.received_bytes:
        ratio = figures.answered_bytes / figures.received_bytes
        lines.append(f"  sent for each byte received, rumours included: {ratio:.2f}")
    head = f"  {'slowest kinds':44s} {'inputs':>8s} {'mean us':>8s} {'worst us':>9s} {'ratio':>8s}   dgr"
    slowest = sorted(figures.kinds.items(), key=lambda item: -item[1].worst_s)[:6]
    loudest = sorted(figures.kinds.items(), key=lambda item: -item[1].worst_ratio)[:4]
    lines += [head, *(_row(*item) for item in slowest)]
    if figures.received_bytes:
        lines += ["  largest answers", *(_row(*item) for item in loudest)]
    tables = sorted(figures.largest.items(), key=lambda item: -item[1])[:10]
    if tables:
        lines.append("  largest tables: " + ", ".join(f"{key} {size}" for key, size in tables))
    return "\n".join(lines)


def _again(name: str, file: Path) -> int:
    target = TARGETS[name](random.Random(0))
    target.feed(bytes.fromhex(file.read_text()))
    target.finish()
    print("nothing is broken by this input alone")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; 1 when something broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=60_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--block", type=int, help="only this block of the target")
    parser.add_argument("--input", type=Path, help="a file with one input in hex")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.input:
        return _again(options.target, options.input)
    if options.block is not None:
        blocks = [(options.target, options.block, min(options.count, BLOCK))]
    else:
        blocks = plan(options.count, options.target)
    total, fed, began_s = sum(count for *_, count in blocks), 0, time.monotonic()
    figures, spent_s, failures, most_kb = dict[str, Figures](), dict[str, float](), 0, 0
    for done in run(blocks, options.seed, options.workers):
        fed, most_kb = fed + done.count, max(most_kb, done.resident_kb)
        figures.setdefault(done.target, Figures()).add(done.figures)
        took_s = sum(kind.total_s for kind in done.figures.kinds.values())
        spent_s[done.target] = spent_s.get(done.target, 0.0) + took_s
        if done.failure:
            failures += 1
            print(tell(done.failure), file=sys.stderr)
        if fed * 20 // total > (fed - done.count) * 20 // total:
            print(f"{fed} of {total}, {failures} broken blocks", file=sys.stderr, flush=True)
    for name in figures:
        print(report(name, figures[name], spent_s[name]))
    took_s = time.monotonic() - began_s
    print(f"{fed} inputs in {took_s:.0f} s, {failures} broken blocks, {most_kb // 1024} MB at most")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
