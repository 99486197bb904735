"""`meshd store show` and `meshd store diff`: the replicated store, here and at a peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.failures import Exit
from meshd.cli.render import (
    Column,
    duration,
    facts,
    plain,
    rows_of,
    size,
    table,
    terminal_width,
)
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

DIFF_S: Final = 8.0  # the daemon gives the peer 5 s

_RECORDS: Final = (
    Column("name", "node"),
    Column("state", "state"),
    Column("epoch", "epoch", right=True),
    Column("version", "version", right=True),
    Column("floor", "floor", right=True),
    Column("keys", "keys", right=True),
    Column("tombstones", "tombstones", right=True),
    Column("size_bytes", "size", size, right=True),
    Column("age_s", "age", duration, right=True),
    Column("node", "id", optional=True),
)
_ENTRIES: Final = (
    Column("key", "key"),
    Column("version", "version", right=True),
    Column("size_bytes", "size", size, right=True),
    Column("value", "value"),
)
_DIFFERENCES: Final = (
    Column("name", "owner"),
    Column("state", "state"),
    Column("behind", "behind"),
    Column("reason", "why"),
    Column("here", "here"),
    Column("there", "there"),
)


@click.group()
def store() -> None:
    """Look at the replicated store."""


@store.command()
@click.argument("node", required=False, default="")
@json_option
@pass_settings
def show(settings: Settings, node: str) -> None:
    """Show what this node holds: of everybody in short, or all that it holds of NODE.

    NODE is a name, an id, or the beginning of an id. EPOCH is the life of its owner's process, VERSION the
    last of its writes that is held here, FLOOR the version up to which deleted keys are forgotten; AGE is
    how long ago the record last moved or was confirmed.
    """
    client = settings.client()
    view = client.get("store", node=node) if node else client.get("store")
    records = rows_of(view, "records")
    if settings.as_json:
        print_json(records[0] if node else records)
    elif node:
        _show_record(records[0])
    else:
        click.echo(table([_named(row) for row in records], _RECORDS, terminal_width()))


def _show_record(record: Mapping[str, Value]) -> None:
    click.echo(facts(record, skip=("entries",)))
    entries = rows_of(record, "entries")
    shown = [
        {**entry, "value": "(deleted)"} if entry.get("tombstone") else entry for entry in entries
    ]
    if shown:
        click.echo("\n" + table(shown, _ENTRIES, terminal_width()))


@store.command()
@click.argument("node")
@json_option
@pass_settings
@click.pass_context
def diff(ctx: click.Context, settings: Settings, node: str) -> None:
    """Compare what this node holds with what NODE holds, as it says itself.

    Status 0: in step. Status 1: they differ. Something that was written just now is a difference until it
    has arrived: what lasts for more than some seconds is worth a `meshd doctor`.
    """
    view = settings.client().get("store/diff", timeout_s=DIFF_S, node=node)
    in_step = view.get("in_step") is True
    if settings.as_json:
        print_json(view)
    elif in_step:
        click.echo(
            f"in step with {plain(view.get('name'))}: {plain(view.get('records_here'))} records"
        )
    else:
        rows = [_compared(row, str(view.get("name"))) for row in rows_of(view, "differences")]
        click.echo(table(rows, _DIFFERENCES, terminal_width()))
    ctx.exit(Exit.OK if in_step else Exit.FAILED)


def _compared(row: Mapping[str, Value], peer: str) -> Mapping[str, Value]:
    behind = "this node" if row.get("behind") == "here" else peer
    sides = {side: _progress(row.get(side)) for side in ("here", "there")}
    return {**_named(row), "behind": behind, **sides}


def _progress(line: Value) -> str:
    if not isinstance(line, Mapping):
        return "nothing"
    return f"version {plain(line.get('version'))} of epoch {plain(line.get('epoch'))}"


def _named(row: Mapping[str, Value]) -> Mapping[str, Value]:
    return row if row.get("name") else {**row, "name": str(row.get("node"))[:8]}
