"""A round: each figure of each subject, in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TextIO

from tests.bench.engine_client import Ask
from tests.bench.engine_figures import crowded, prefill, together, warm_prefix
from tests.bench.engine_floor import floor
from tests.bench.engine_machine import Memory, Meter
from tests.bench.engine_prompts import Prompts
from tests.bench.engine_report import Measured
from tests.bench.engine_subjects import Running, Setting, Subject, running

MIB: Final = 2**20
TAIL_TOKENS: Final = 20  # of a request after a prefix, and of a short one
RUNNING_TOKENS: Final = 1024  # of the stream that runs while a long prompt is computed


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    streams: tuple[int, ...]
    prompt_tokens: int
    answer_tokens: int
    long_tokens: int
    prefix_tokens: int
    prefill_tokens: tuple[int, ...]
    repeats: int  # of `crowded` and `warm` in a round
    after_s: float  # from the long request to the short one


class Bench:
    """Measures, shows each measurement, and keeps it."""

    def __init__(
        self, plan: Plan, prompts: Prompts, forbidden: tuple[int, ...], out: TextIO | None
    ) -> None:
        self.measured: list[Measured] = []
        self._plan = plan
        self._prompts = prompts
        self._forbidden = forbidden
        self._out = out
        self.figures: Mapping[str, Callable[[Sequence[Running], int], None]] = {
            "decode": self.decode,
            "crowded": self.crowded,
            "warm": self.warm,
            "prefill": self.prefill,
        }

    def decode(self, subjects: Sequence[Running], turn: int) -> None:
        """Aggregate decode rate at each number of streams."""
        for streams in self._plan.streams:
            asks = self._asks(streams, f"decode {turn}")
            for subject in subjects:
                measure = partial(together, subject.client, asks)
                tokens = sum(ask.tokens for ask in asks)
                self._measure(f"{streams} streams", subject, turn, measure, tokens)

    def crowded(self, subjects: Sequence[Running], turn: int) -> None:
        """First token of a short request, and gaps of a running stream, while a long prompt is computed."""
        plan = self._plan
        for repeat in range(plan.repeats):
            key = f"crowded {turn} {repeat}"
            stream = self._ask(TAIL_TOKENS, RUNNING_TOKENS, f"{key} running")
            long = self._ask(plan.long_tokens, 1, f"{key} long")
            short = self._ask(TAIL_TOKENS, 2, f"{key} short")
            for subject in subjects:
                measure = partial(crowded, subject.client, stream, long, short, plan.after_s)
                number = turn * plan.repeats + repeat
                self._measure(f"beside {plan.long_tokens}", subject, number, measure)

    def warm(self, subjects: Sequence[Running], turn: int) -> None:
        """First token of a request whose beginning was computed before."""
        plan = self._plan
        for repeat in range(plan.repeats):
            key = f"warm {turn} {repeat}"
            prefix = self._prompts.of(plan.prefix_tokens, key)
            cold, again = (
                Ask(f"{prefix} {self._prompts.of(TAIL_TOKENS, f'{key} {n}')}", 4, reuse=True)
                for n in ("cold", "warm")
            )
            for subject in subjects:
                measure = partial(warm_prefix, subject.client, cold, again)
                number = turn * plan.repeats + repeat
                self._measure(f"prefix {plan.prefix_tokens}", subject, number, measure)

    def prefill(self, subjects: Sequence[Running], turn: int) -> None:
        """Prompt tokens a second."""
        for tokens in self._plan.prefill_tokens:
            ask = self._ask(tokens, 1, f"prefill {turn} {tokens}")
            for subject in subjects:
                measure = partial(prefill, subject.client, ask, tokens)
                self._measure(f"prompt {tokens}", subject, turn, measure)

    def floor(self, program: Path, setting: Setting, turn: int) -> None:
        """Decode rate of llama.cpp's own bench, which nobody can be faster than."""
        plan = self._plan
        for measured in floor(
            program, setting, plan.streams, plan.prompt_tokens, plan.answer_tokens, turn
        ):
            self._keep(measured)

    def memory(self, subject: Subject, setting: Setting, turn: int) -> None:
        """Resident memory of a subject that lives alone: when it is ready, and after its streams."""
        with running(subject, setting) as alone:
            meter = Meter(alone.pids)
            idle = Memory.of(alone.pids)
            together(alone.client, self._asks(max(self._plan.streams), f"memory {turn}"))
            worked = Memory.of(alone.pids)
            weather = meter.read().to_wire()
        values = {
            f"{when} {name} MiB": size / MIB
            for when, memory in (("idle", idle), ("worked", worked))
            for name, size in (
                ("RSS", memory.resident),
                ("PSS", memory.shared_fairly),
                ("anonymous", memory.anonymous),
            )
        }
        self._keep(Measured("memory", subject.label, subject.kind, turn, values, weather))

    def _asks(self, streams: int, key: str) -> list[Ask]:
        plan = self._plan
        return [
            self._ask(plan.prompt_tokens, plan.answer_tokens, f"{key} {streams} {n}")
            for n in range(streams)
        ]

    def _ask(self, prompt_tokens: int, answer_tokens: int, key: str) -> Ask:
        return Ask(self._prompts.of(prompt_tokens, key), answer_tokens, self._forbidden)

    def _measure(
        self,
        figure: str,
        subject: Running,
        turn: int,
        measure: Callable[[], Mapping[str, float]],
        tokens: int = 0,
    ) -> None:
        meter = Meter(subject.pids)
        values = dict(measure())
        weather = meter.read().to_wire()
        if tokens:  # what a busy machine distorts least
            values["processor ms a token"] = 1e3 * weather["subject_cpu_s"] / tokens
        self._keep(
            Measured(figure, subject.subject.label, subject.subject.kind, turn, values, weather)
        )

    def _keep(self, measured: Measured) -> None:
        self.measured.append(measured)
        if self._out is not None:
            self._out.write(measured.to_line() + "\n")
            self._out.flush()
        shown = ", ".join(f"{name} {value:.1f}" for name, value in measured.values.items())
        weather = measured.weather
        print(
            f"{measured.round} {measured.figure}, {measured.subject}: {shown} [load "
            f"{weather['load_1']:.1f}, stolen {weather['steal_percent']:.0f} %, others "
            f"{weather['others_percent']:.0f} %, processor {weather['subject_cpu_s']:.2f} s, client "
            f"{weather['client_cpu_s']:.2f} s]",
            file=sys.stderr,
            flush=True,
        )
