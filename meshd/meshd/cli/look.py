"""Commands that look: status, caps, resolve, plugins, config show."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from meshd.cli import complete
from meshd.cli.failures import Exit
from meshd.cli.render import (
    Column,
    duration,
    facts,
    harmless,
    load_text,
    plain,
    rows_of,
    size,
    table,
    tally_text,
    terminal_width,
)
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value


_TELLING: Final = {
    "rumours_sent": "rumours sent",
    "exchanges": "repairs begun",
    "suspicions_raised": "suspicions raised",
    "suspicions_refuted": "refuted",
    "deaths_declared": "deaths declared",
    "stalls": "stalls",
}
_LONG: Final = ("counters", "load_ages_s", "workers")  # for --json and --verbose

_CAPABILITIES: Final = (
    Column("name", "name"),
    Column("node_name", "node"),
    Column("operations", "operations", optional=True),
    Column("model", "model"),
    Column("modalities", "takes in", optional=True),
    Column("slots", "busy", right=True),
    Column("decode_tokens_per_s", "tok/s", right=True),
    Column("privacy", "privacy", optional=True),
    Column("state", "state"),
    Column("age_s", "age", duration, right=True, optional=True),
)
_CANDIDATES: Final = (
    Column("place", "#", right=True),
    Column("node_name", "node"),
    Column("capability", "capability"),
    Column("match", "match", optional=True),  # the reason says it too, and the age
    Column("weight", "weight", right=True, optional=True),
    Column("age_s", "age", duration, right=True, optional=True),
    Column("reason", "why"),
)
_LEFT_OUT: Final = (
    Column("node_name", "node"),
    Column("capability", "capability"),
    Column("reason", "why not"),
)
_PLUGINS: Final = (
    Column("name", "plugin"),
    Column("state", "state"),
    Column("version", "version"),
    Column("capabilities", "capabilities"),
    Column("reason", "why"),
)
_CONFIG: Final = (Column("key", "key"), Column("value", "value"), Column("origin", "origin"))


@click.command()
@click.option("-v", "--verbose", is_flag=True, help="Show the counters too.")
@json_option
@pass_settings
def status(settings: Settings, verbose: bool) -> None:
    """Show this node: its mesh, its members, its load."""
    view = settings.client().get("status")
    if settings.as_json:
        print_json(view)
        return
    shown = {**view, "load": load_text(view.get("load")), "gossip": _gossip(view)}
    if "health" in view:
        shown["health"] = _health(view.get("health"))
    click.echo(facts(shown, skip=_LONG))
    for row in rows_of(view, "workers"):
        click.echo(f"worker {_worker(row)}")
    counters = view.get("counters")
    if verbose and isinstance(counters, Mapping):
        click.echo("\ncounters\n" + textwrap.indent(facts(counters), "  "))


def _health(value: Value) -> str:
    """`2 warnings: run `meshd doctor``; what needs asking around is not in it."""
    told = tally_text(value if isinstance(value, Mapping) else {}, ("errors", "warnings"))
    return f"{told}: run `meshd doctor`" if told else "well, as far as is known here"


def _worker(row: Mapping[str, Value]) -> str:
    """`llama:small (pid 123, 130 MB): locked in; not held: ...`."""
    isolation = _inside(row, "isolation")
    steps, missing = _inside(isolation, "steps"), isolation.get("missing")
    if not row.get("ready"):
        how = "starting"
    elif not isolation.get("applied"):
        how = "not locked in"
    else:
        how = f"files: {plain(steps.get('keys_out_of_reach'))}, network: {plain(steps.get('no_network'))}"
        how += f"; does not hold: {plain(missing)}" if missing else "; every step holds"
    return f"{plain(row.get('name'))} (pid {plain(row.get('pid'))}, {size(row.get('resident_bytes'))}): {how}"


def _gossip(view: Mapping[str, Value]) -> str:
    """The few counters that tell a person something."""
    counters = _inside(view, "counters")
    gossip, dropped = _inside(counters, "gossip"), _inside(counters, "dropped")
    parts = [f"{words} {plain(gossip[key])}" for key, words in _TELLING.items() if gossip.get(key)]
    reasons = [
        f"{plain(n)} {why}" for why, n in dropped.items() if n and not why.startswith("opened")
    ]
    if reasons:
        parts.append(f"dropped {', '.join(reasons)}")
    return ", ".join(parts) or plain(None)


def _inside(value: Mapping[str, Value], key: str) -> Mapping[str, Value]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


@click.command()
@json_option
@pass_settings
def caps(settings: Settings) -> None:
    """List what the mesh can do, and who does it."""
    view = settings.client().get("capabilities")
    if settings.as_json:
        print_json(view["capabilities"])
        return
    shown: list[Mapping[str, Value]] = []
    for row in rows_of(view, "capabilities"):
        busy = "?" if row.get("busy") is None else plain(row.get("busy"))
        shown.append({**row, "slots": f"{busy}/{plain(row.get('slots'))}"})
    click.echo(table(shown, _CAPABILITIES, terminal_width()))


@click.command()
@json_option
@pass_settings
def plugins(settings: Settings) -> None:
    """List the plugins of this node."""
    _list(settings, "plugins", _PLUGINS)


@click.command()
@click.argument("name", shell_complete=complete.names)
@click.argument("constraints", nargs=-1)
@click.option("--explain", is_flag=True, help="Show those left out too, and why.")
@json_option
@click.pass_context
def resolve(
    ctx: click.Context,
    name: str,
    constraints: tuple[str, ...],
    explain: bool,
) -> None:
    """Show who would serve NAME, best first, and why.

    Constraints may follow as words, and need no quotes when their operators are written as letters:

        meshd resolve knowledge.gpt/general context.ge=8192 zone=lab
    """
    settings = ctx.ensure_object(Settings)
    query = with_constraints(name, constraints)
    view = settings.client().get("resolve", name=query)
    candidates, left_out = rows_of(view, "candidates"), rows_of(view, "left_out")
    if settings.as_json:
        print_json(view)
    elif candidates:
        placed = [{"place": i, **row} for i, row in enumerate(candidates, start=1)]
        click.echo(table(placed, _CANDIDATES, terminal_width()))
    if not settings.as_json and left_out and (explain or not candidates):
        more = view.get("left_out_more")
        click.echo(f"{chr(10) if candidates else ''}left out:")
        click.echo(table(left_out, _LEFT_OUT, terminal_width()))
        if more:
            click.echo(f"and {plain(more)} more")
    if not candidates:
        near = view.get("nearest")
        hint = f"; nearest: {plain(near)}" if near else ""
        click.echo(f"meshd: nobody serves {harmless(query)} now{hint}", err=True)
        ctx.exit(Exit.NOT_SERVED)


@click.group()
def config() -> None:
    """Look at the configuration."""


@config.command("show")
@json_option
@pass_settings
def config_show(settings: Settings) -> None:
    """Show every setting of the running daemon, its value and where that comes from."""
    _list(settings, "config", _CONFIG)


def with_constraints(name: str, words: tuple[str, ...]) -> str:
    """The name with further words as constraints."""
    if not words:
        return name
    separator = "&" if "?" in name or "," in name else "?"
    return name + separator + "&".join(words)


def _list(settings: Settings, key: str, columns: tuple[Column, ...]) -> None:
    view = settings.client().get(key)
    if settings.as_json:
        print_json(view[key])
        return
    click.echo(table(rows_of(view, key), columns, terminal_width()))
