"""Tables and figures for people. What comes from other nodes is made harmless to a terminal."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from meshd_plugins.api import Value

_GAP: Final = "  "
_NARROWEST: Final = 8
_NONE: Final = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: the key in each row, its title, and how a value is written."""

    key: str
    title: str
    write: Callable[[Value], str] | None = None
    right: bool = False  # aligned, for figures
    optional: bool = False  # left out where the terminal is too narrow for all


def table(rows: Sequence[Mapping[str, Value]], columns: Sequence[Column], width: int) -> str:
    """Aligned lines with a title line, no longer than `width` as far as columns can shrink.

    Optional columns go first, the last of them before the others; then the widest columns give way, and
    a cell that does not fit ends in an ellipsis.
    """
    columns = list(columns)
    cells = [[column.title.upper() for column in columns]]
    cells.extend([(c.write or plain)(row.get(c.key)) for c in columns] for row in rows)
    widths = [max(cell_width(line[i]) for line in cells) for i in range(len(columns))]
    spare = width - sum(widths) - len(_GAP) * (len(columns) - 1)
    for i in reversed([i for i, column in enumerate(columns) if column.optional]):
        if spare >= 0:
            break
        spare += widths.pop(i) + len(_GAP)
        del columns[i]
        for line in cells:
            del line[i]
    while spare < 0:
        widest = max(range(len(widths)), key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
        spare += 1
    lines: list[str] = []
    for line in cells:
        padded = [_fit(cell, widths[i], right=columns[i].right) for i, cell in enumerate(line)]
        lines.append(_GAP.join(padded).rstrip())
    return "\n".join(lines)


def terminal_width() -> int:
    """Columns of the terminal; a pipe has no end."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def terminal_size() -> tuple[int, int]:
    """Columns and lines of the terminal."""
    found = shutil.get_terminal_size()
    return found.columns, found.lines


def facts(mapping: Mapping[str, Value], *, skip: Sequence[str] = ()) -> str:
    """`key  value` lines, keys aligned; a mapping inside is written on one line."""
    shown = {_label(key): _of_key(key, value) for key, value in mapping.items() if key not in skip}
    widest = max(map(len, shown), default=0)
    return "\n".join(f"{key.ljust(widest)}{_GAP}{text}" for key, text in shown.items())


def plain(value: Value) -> str:
    """Any value on one line."""
    match value:
        case None | "":
            return _NONE
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
        case str():
            return harmless(value)
        case Mapping():
            pairs = [f"{_label(key)} {_of_key(key, part)}" for key, part in value.items()]
            return ", ".join(pairs) or _NONE
        case bytes():
            return value.hex()
        case list() | tuple():
            return ", ".join(map(plain, value)) or _NONE
        case _:
            return str(value)


def duration(value: Value) -> str:
    """Seconds in the unit that fits: `2.1 ms`, `0.42 s`, `3 min`, `2 h 5 min`, `4 d`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    if 0 < value < 0.01:
        return f"{value * 1e3:.2g} ms"
    if value < 10:
        return f"{value:.2f} s".replace(".00 s", " s")
    if value < 60:
        return f"{value:.0f} s"
    if value < 3600:
        return f"{value / 60:.0f} min"
    if value < 86_400:
        return f"{value // 3600:.0f} h {value % 3600 // 60:.0f} min"
    return f"{value / 86_400:.0f} d"


def size(value: Value) -> str:
    """Bytes in the unit that fits: `98 MB`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def load_text(value: Value) -> str:
    """What a person wants to see of a load: how busy, and whatever is out of the ordinary."""
    if not isinstance(value, Mapping) or not value:
        return plain(None)
    parts: list[str] = []
    cpu, memory, busy = (value.get(key) for key in ("cpu", "memory_free_bytes", "capabilities"))
    if isinstance(cpu, int | float):
        parts.append(f"cpu {cpu:.0%}")
    if memory is not None:
        parts.append(f"{size(memory)} free")
    if isinstance(busy, Mapping):
        parts.extend(
            f"{harmless(name.partition('#')[0])} {'+'.join(map(plain, taken))}"
            for name, taken in busy.items()
            if isinstance(taken, list)
        )
    temperature = value.get("temperature_c")
    if isinstance(temperature, int | float):
        parts.append(f"{temperature:.0f} °C")
    parts.extend(
        word for word in ("draining", "throttled", "on_battery") if value.get(word) is True
    )
    return ", ".join(parts) or plain(None)


def harmless(text: str) -> str:
    """The text on one line without control characters: a name from elsewhere must not drive a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def harmless_text(text: str) -> str:
    """The same for running text: line ends and tabs stay."""
    if text.isprintable():
        return text
    kept = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "" for c in text)
    return "".join(kept)


def cell_width(text: str) -> int:
    """Columns that the text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def tally_text(counts: Mapping[str, Value], words: Sequence[str]) -> str:
    """`1 error, 2 warnings`: of these words, in the plural, those that were counted."""
    told = [(counts.get(word), word) for word in words]
    return ", ".join(
        f"{plain(count)} {word if count != 1 else word.removesuffix('s')}"
        for count, word in told
        if count
    )


def rows_of(view: Mapping[str, Value], key: str) -> list[Mapping[str, Value]]:
    """The rows that an answer has under a key; none where it has something else."""
    rows = view.get(key)
    return cast("list[Mapping[str, Value]]", rows) if isinstance(rows, list) else []


def _fit(cell: str, width: int, *, right: bool) -> str:
    if cell_width(cell) > width:
        kept = cell
        while cell_width(kept) > width - 1:
            kept = kept[:-1]
        cell = kept + "…"
    padding = " " * (width - cell_width(cell))
    return padding + cell if right else cell + padding


def _label(key: str) -> str:
    if key.endswith("_per_s"):
        return (
            harmless(key.removesuffix("_per_s").replace("tokens", "tok").replace("_", " ")) + "/s"
        )
    for unit in ("_s", "_bytes"):
        key = key.removesuffix(unit)
    return harmless(key.replace("_", " "))


def _of_key(key: str, value: Value) -> str:
    if key.endswith("_per_s"):
        return plain(value)
    if key.endswith("_s"):
        return duration(value)
    return size(value) if key.endswith("_bytes") else plain(value)
