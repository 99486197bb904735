"""Precision and recall of splitting on the committed prompts: `python -m tests.bench.bench_splitting`.

A prompt counts as split when the classifier makes more than one part. Precision: of the prompts that were
split, how many should be. Recall: of those that should be, how many were. The last figure asks for more:
exactly the right parts, in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meshd.orchestrate.classifier import classify

PROMPTS = Path(__file__).with_name("data") / "splitting.tsv"
DATA_NAMES = (
    "data.gpt/shelf/handbook",
    "data.gpt/network/plan",
    "data.gpt/notes/monday",
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts over the prompts."""

    prompts: int
    compound: int  # that should be split
    split: int  # that were
    rightly_split: int
    right_parts: int
    wrong: tuple[str, ...]

    @property
    def precision(self) -> float:
        return self.rightly_split / self.split if self.split else 1.0

    @property
    def recall(self) -> float:
        return self.rightly_split / self.compound if self.compound else 1.0


def labelled() -> Iterator[tuple[tuple[str, ...], str]]:
    """Expected parts and prompt, of each line."""
    for line in PROMPTS.read_text().splitlines():
        if not line.startswith("#"):
            parts, _, prompt = line.partition("\t")
            yield tuple(parts.split("+")), prompt


def measure() -> Figures:
    """Classify every prompt."""
    prompts = compound = split = rightly = right_parts = 0
    wrong: list[str] = []
    for wanted, prompt in labelled():
        found = tuple(part.need.value for part in classify(prompt, DATA_NAMES).parts)
        prompts += 1
        compound += len(wanted) > 1
        split += len(found) > 1
        rightly += len(wanted) > 1 and len(found) > 1
        right_parts += wanted == found
        if wanted != found:
            wrong.append(f"{'+'.join(found)} instead of {'+'.join(wanted)}: {prompt}")
    return Figures(prompts, compound, split, rightly, right_parts, tuple(wrong))


if __name__ == "__main__":
    figures = measure()
    print(f"{figures.prompts} prompts, {figures.compound} compound, {figures.split} split")
    print(f"precision {figures.precision:.3f}, recall {figures.recall:.3f}")
    print(f"exactly the right parts: {figures.right_parts}/{figures.prompts}")
    for line in figures.wrong:
        print(f"  {line}")
