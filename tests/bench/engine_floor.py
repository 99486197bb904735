"""The same steps without any server: llama.cpp's own batched bench, where it lies beside llama-server."""

from __future__ import annotations

import json
import resource
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.engine_machine import Meter
from tests.bench.engine_report import Measured
from tests.bench.engine_subjects import Setting, with_libraries

PROGRAM: Final = "llama-batched-bench"
DEADLINE_S: Final = 600.0


def find_batched_bench(setting: Setting) -> Path | None:
    """Beside the server; None when it is not there."""
    if setting.llama_server is None:
        return None
    path = setting.llama_server.with_name(PROGRAM)
    return path if path.is_file() else None


def floor(
    program: Path, setting: Setting, streams: Sequence[int], prompt: int, answer: int, turn: int
) -> list[Measured]:
    """Decode rate at each number of streams, in one process that does nothing else."""
    argv = [str(program), "-m", str(setting.model), "-t", str(setting.threads)]
    argv += ["-c", str(max(streams) * (prompt + answer) + 256), "--output-format", "jsonl"]
    argv += ["-npp", str(prompt), "-ntg", str(answer), "-npl", ",".join(map(str, streams))]
    meter = Meter(())
    before_s = _ended_s()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            argv,
            env=with_libraries(program, Path(folder)),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    weather = meter.read(_ended_s() - before_s).to_wire()
    rows: list[Mapping[str, Any]] = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
    ]
    if done.returncode or not rows:
        raise SystemExit(f"{program} failed:\n{done.stderr[-2000:]}")
    return [
        Measured(
            figure=f"{row['pl']} streams",
            subject=PROGRAM,
            kind="floor",
            round=turn,
            values={"steady tokens/s": row["speed_tg"]},
            weather=weather,
        )
        for row in rows
    ]


def _ended_s() -> float:
    """Processor time of all processes that were started here and have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
