"""The fuzz targets, as a coverage-guided fuzzer calls them: bytes in, an exception when something is wrong.

A target keeps its state for `LIFE` inputs, so that what one input leaves behind is there for the next; then it
is looked at once more and made anew.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from tests.fuzz.run import TARGETS
from tests.fuzz.support_targets import Target

LIFE: Final = 2_000
SEEDS: Final = 200
"""Inputs of the ordinary fuzzer that the coverage-guided one begins with."""


class TestOneInput:
    """What atheris calls."""

    __test__ = False  # the name is atheris's own; it is no test of pytest

    def __init__(self, name: str) -> None:
        self._name = name
        self._target = self._made()
        self._fed = 0

    def _made(self) -> Target:
        return TARGETS[self._name](random.Random(0))

    def __call__(self, data: bytes) -> None:
        """Feed one input."""
        self._target.feed(data)
        self._fed += 1
        if self._fed % LIFE == 0:
            self._target.finish()
            self._target = self._made()


def write_seeds(name: str, folder: Path) -> None:
    """Fill a folder with inputs to begin with: fresh ones, and those that were kept."""
    target = TARGETS[name](random.Random(1))
    inputs = [target.case() for _ in range(SEEDS)]
    for path in sorted((Path(__file__).parent / "corpus" / name).glob("*.hex")):
        inputs += [bytes.fromhex(line) for line in path.read_text().splitlines()]
    for number, data in enumerate(inputs):
        (folder / f"seed-{number}").write_bytes(data)
