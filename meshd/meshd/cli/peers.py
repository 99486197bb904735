"""`meshd peers`: the members once, or with --watch for as long as somebody looks.

Watching polls the daemon, a table at a time: it survives a restart of the daemon, and costs it nothing when
nobody looks. On a terminal the table is drawn over itself; into a pipe go the changes, a line each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.changes import Change, changes
from meshd.cli.failures import CommandError, Exit
from meshd.cli.render import (
    Column,
    duration,
    harmless,
    load_text,
    plain,
    rows_of,
    table,
    terminal_size,
    terminal_width,
)
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

INTERVAL_S: Final = 1.0
_CLEAR, _HOME, _LINE_END, _BELOW = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"
_OTHER_SCREEN, _FIRST_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def _names(value: Value) -> str:
    return plain(
        [str(name).replace(".gpt/", "/") for name in value] if isinstance(value, list) else None
    )


_COLUMNS: Final = (
    Column("name", "node"),
    Column("state", "state"),
    Column("since_s", "since", duration, right=True),
    Column("address", "address"),
    Column("round_trip_ms", "rtt ms", right=True),
    Column("serves", "serves", _names, optional=True),
    Column("load", "load", load_text),
    Column("load_age_s", "load age", duration, right=True, optional=True),
    Column("heard_age_s", "heard", duration, right=True, optional=True),
)
_WIDE: Final = (
    Column("epoch", "epoch", right=True),
    Column("incarnation", "inc", right=True),
    Column("node", "id"),
)


@click.command()
@click.option(
    "--watch", is_flag=True, help="Keep showing, until Ctrl-C; into a pipe go the changes."
)
@click.option("--wide", is_flag=True, help="Show epoch, incarnation and id too.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.2, 3600),
    default=INTERVAL_S,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
@json_option
@pass_settings
def peers(settings: Settings, watch: bool, wide: bool, interval_s: float) -> None:
    """List the members of the mesh, this node first.

    SINCE is how long a node has been in its state; LOAD AGE is how long ago it sampled the load that is
    shown (it is not shown and not used after 10 s); HEARD is how long ago it last spoke to this node itself.
    """
    columns = (*_COLUMNS, *_WIDE) if wide else _COLUMNS
    if watch:
        _Watch(settings, columns, interval_s).run()
        return
    rows = rows_of(settings.client().get("peers"), "peers")
    if settings.as_json:
        print_json(rows)
    else:
        click.echo(table(rows, columns, terminal_width()))


class _Watch:
    """Shows the members again and again."""

    def __init__(self, settings: Settings, columns: Sequence[Column], interval_s: float) -> None:
        self._settings = settings
        self._columns = columns
        self._interval_s = interval_s
        self._draws = sys.stdout.isatty() and not settings.as_json
        self._rows: list[Mapping[str, Value]] | None = None
        self._lost = ""  # why the daemon does not answer

    def run(self) -> None:
        """Look until Ctrl-C, which is how this ends: without a word, with status 0.

        Raises:
            CommandError: there is no daemon at the first look.
        """
        if self._draws:
            click.echo(_OTHER_SCREEN + _CLEAR, nl=False)
        try:
            while True:
                self._look()
                time.sleep(self._interval_s)
        except KeyboardInterrupt:
            pass
        finally:
            if self._draws:
                click.echo(_FIRST_SCREEN, nl=False)

    def _look(self) -> None:
        try:
            rows = rows_of(self._settings.client().get("peers"), "peers")
        except CommandError as error:
            if self._rows is None or error.exit_code != Exit.UNREACHABLE:
                raise
            self._no_answer(error.message)
            return
        came_back, self._lost = bool(self._lost), ""
        if self._draws:
            self._draw(rows, "the daemon is back" if came_back else "")
        else:
            if came_back:
                click.echo("meshd: the daemon is back", err=True)
            self._tell(changes(self._rows or [], rows))
        self._rows = rows

    def _no_answer(self, why: str) -> None:
        if not self._lost and not self._draws:
            click.echo(f"meshd: waiting for the daemon: {why}", err=True)
        self._lost = why
        if self._draws and self._rows is not None:
            self._draw(self._rows, f"as it was; waiting for the daemon: {why}")

    def _draw(self, rows: Sequence[Mapping[str, Value]], note: str) -> None:
        width, height = terminal_size()
        lines = frame(rows, self._columns, width, height, note)
        click.echo(_HOME + "".join(f"{line}{_LINE_END}\n" for line in lines) + _BELOW, nl=False)
        sys.stdout.flush()

    def _tell(self, found: Sequence[Change]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        for change in found:
            if self._settings.as_json:
                line = json.dumps({"at": at, **change.value()}, ensure_ascii=False)
            else:
                line = f"{at}  {harmless(change.text())}"
            click.echo(line)
        sys.stdout.flush()


def frame(
    rows: Sequence[Mapping[str, Value]],
    columns: Sequence[Column],
    width: int,
    height: int,
    note: str,
) -> list[str]:
    """What fits a terminal: how many there are, the table, and what had no room."""
    states = [str(row.get("state")) for row in rows]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    head = f"{len(rows)} members: {', '.join(counted)}" + (f"  ({harmless(note)})" if note else "")
    lines = [head[:width], *table(rows, columns, width).splitlines()]
    room = max(3, height - 1)  # the cursor's own line
    if len(lines) > room:
        hidden = len(lines) - room + 1
        lines = [*lines[: room - 1], f"and {hidden} more: a larger window, or a pipe, shows them"]
    return lines
