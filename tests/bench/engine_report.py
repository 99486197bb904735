"""Lines of measurements, and the tables made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

REFERENCE: Final = "server"  # the kind that the others are compared with


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one subject in one round."""

    figure: str
    subject: str
    kind: str
    round: int
    values: Mapping[str, float]
    weather: Mapping[str, float]

    def to_line(self) -> str:
        """As JSON."""
        fields = {
            "figure": self.figure,
            "subject": self.subject,
            "kind": self.kind,
            "round": self.round,
            "values": {name: round(value, 3) for name, value in self.values.items()},
            "weather": self.weather,
        }
        return json.dumps(fields)


def read_lines(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Return the machine's line and the measurements of a file."""
    machine: dict[str, Any] = {}
    found: list[Measured] = []
    for line in path.read_text().splitlines():
        raw: dict[str, Any] = json.loads(line)
        if "figure" in raw:
            found.append(Measured(**raw))
        else:
            machine = raw
    return machine, found


def table(measured: Sequence[Measured]) -> str:
    """Markdown: a row a figure and number, median (least to most); then the ratio to the reference.

    A ratio is the median over rounds of the ratios within a round: the machine's speed drifts from round to
    round, and both subjects of a round had nearly the same machine.
    """
    subjects = list(dict.fromkeys(one.subject for one in measured))
    reference = next((one.subject for one in measured if one.kind == REFERENCE), None)
    compared = [subject for subject in subjects if reference and subject != reference]
    heads = ["", *subjects, *(f"{subject} / {reference}" for subject in compared)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for figure, name in _rows(measured):
        by_subject = {
            subject: {
                one.round: one.values[name]
                for one in measured
                if (one.figure, one.subject) == (figure, subject) and name in one.values
            }
            for subject in subjects
        }
        cells = [
            f"{figure}, {name}",
            *(_spread(list(by_subject[one].values())) for one in subjects),
        ]
        for subject in compared:
            assert reference is not None
            cells.append(_ratio(by_subject[subject], by_subject[reference]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(measured: Iterable[Measured]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((one.figure, name) for one in measured for name in one.values))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = _short(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({_short(min(values))} to {_short(max(values))})"


def _ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    both = [ours[turn] / theirs[turn] for turn in ours if theirs.get(turn)]
    if not both:
        return ""
    text = f"{statistics.median(both):.3f}"
    return text if len(both) == 1 else f"{text} ({min(both):.2f} to {max(both):.2f})"


def _short(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def weather_line(measured: Sequence[Measured]) -> str:
    """How quiet the machine was."""

    def worst(name: str) -> str:
        values = sorted(one.weather[name] for one in measured if name in one.weather)
        if not values:
            return "not read"
        return f"{statistics.median(values):.1f} (at most {values[-1]:.1f})"

    return (
        f"load average {worst('load_1')}; of all cores' time, stolen by the host "
        f"{worst('steal_percent')} %, used by other processes {worst('others_percent')} %"
    )
