"""How far something is, on one line of a terminal that is written over and over."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.render import cell_width, duration, harmless, plain, size, terminal_size

if TYPE_CHECKING:
    from meshd_plugins.api import Value

WINDOW_S: Final = 5.0  # over which a rate is taken
BAR_CELLS: Final = 24


class ProgressLine:
    """Shows the items of an operation; on what is no terminal, only where a stage begins."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._stage = ""
        self._seen: deque[tuple[float, int]] = deque(maxlen=256)
        self._written = False

    def item(self, item: Mapping[str, Value]) -> None:
        """Show one."""
        stage = _stage(item)
        if stage != self._stage:
            self._stage = stage
            self._seen.clear()
            if self._shown and not self._terminal:
                click.echo(stage, err=True)
        if self._terminal:
            self._write(progress_text(stage, item, self._rate(item), _columns()))

    def end(self) -> None:
        """Leave the terminal at the start of an empty line."""
        if self._written:
            self._write("")
            click.echo("\r", nl=False, err=True)
            self._written = False

    def _rate(self, item: Mapping[str, Value]) -> float:
        """Bytes a second, lately."""
        so_far, now_s = _count(item, "bytes"), time.monotonic()
        self._seen.append((now_s, so_far))
        while self._seen[0][0] < now_s - WINDOW_S:
            self._seen.popleft()
        began_s, before = self._seen[0]
        return (so_far - before) / (now_s - began_s) if now_s > began_s else 0.0

    def _write(self, text: str) -> None:
        padding = " " * max(0, _columns() - cell_width(text))
        click.echo(f"\r{text}{padding}", nl=False, err=True)
        self._written = True


def progress_text(stage: str, item: Mapping[str, Value], rate: float, columns: int) -> str:
    """One line, no longer than `columns`; parts of it are left out where it is too narrow."""
    so_far, total = _count(item, "bytes"), _count(item, "total")
    parts = [stage]
    if total > 0:
        share = min(1.0, so_far / total)
        filled = int(share * BAR_CELLS)
        parts += [f"{share:4.0%}", f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}]"]
        parts.append(f"{size(so_far)} of {size(total)}")
    elif so_far > 0:
        parts.append(size(so_far))
    if rate > 0:
        parts.append(f"{size(rate)}/s")
        if total > so_far:
            parts.append(f"{duration((total - so_far) / rate)} left")
    while len(parts) > 1 and cell_width("  ".join(parts)) > columns:
        parts.pop()
    return "  ".join(parts)


def _stage(item: Mapping[str, Value]) -> str:
    phase, rate = item.get("phase"), item.get("tokens_per_s")
    if phase:  # of a measurement
        return harmless(f"{phase}: {plain(rate)} tokens/s")
    stage = harmless(str(item.get("stage") or "working"))
    part, parts = _count(item, "part"), _count(item, "parts")
    return f"{stage} ({part} of {parts})" if parts > 1 and part else stage


def _count(item: Mapping[str, Value], key: str) -> int:
    value = item.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _columns() -> int:
    return max(20, terminal_size()[0] - 1)
