"""`meshd audit`: what left this node, what it did for others, who was let in; never what was in it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.failures import CommandError, Exit
from meshd.cli.render import Column, plain, rows_of, size, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

CLASSES: Final = ("local", "lan", "mesh", "cloud")
FOLLOW_S: Final = 1.0
READ_S: Final = 15.0  # a whole trail is read for what is rare
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_LINES: Final = (
    Column("when", "when"),
    Column("kind", "what"),
    Column("to_name", "whom"),
    Column("capability", "capability"),
    Column("privacy", "class"),
    Column("caller", "for", optional=True),
    Column("bytes", "bytes", size, right=True),
    Column("outcome", "outcome"),
    Column("request", "request", optional=True),
    Column("more", ""),
)
_SHOWN: Final = frozenset(
    {"n", "at", "kind", "to", "to_name", "capability", "privacy", "caller", "bytes", "pieces"}
    | {"outcome", "request"}
)


class Span(click.ParamType[float]):
    """A length of time: `90s`, `15m`, `1h`, `2d`."""

    name = "span"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds."""
        found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", str(value))
        if found is None:
            self.fail(f"{value!r} is no length of time: write 90s, 15m, 1h or 2d", param, ctx)
        return float(found[1]) * _UNITS[found[2] or "s"]


@click.group(invoke_without_command=True)
@click.option("--since", type=Span(), help="How far back, such as 90s, 15m, 1h or 2d.")
@click.option(
    "--to", default="", metavar="NODE", help="Only what concerns a node (name or id), or cloud."
)
@click.option("--class", "privacy", type=click.Choice(CLASSES), help="Only requests of this class.")
@click.option("--kind", default="", help="Only lines of this kind: left, served, ...")
@click.option("--follow", is_flag=True, help="Go on with new lines as they come.")
@json_option
@click.pass_context
def audit(
    ctx: click.Context,
    since: float | None,
    to: str,
    privacy: str | None,
    kind: str,
    follow: bool,
) -> None:
    """Show what left this node and what it did for others: to whom, for whom, in which class, how much.

    What was in it is not kept. With --json, one object a line.
    """
    if ctx.invoked_subcommand is not None:
        return
    settings = ctx.ensure_object(Settings)
    client = settings.client()
    wanted = {"to": to, "class": privacy or "", "kind": kind}
    if since is not None:
        wanted["since"] = f"{time.time() - since:.3f}"
    lines = rows_of(client.get("audit", timeout_s=READ_S, **wanted), "audit")
    _show(settings, lines, head=True)
    after = _last(lines, 0)
    while follow:
        time.sleep(FOLLOW_S)
        lines = rows_of(client.get("audit", timeout_s=READ_S, after=str(after), **wanted), "audit")
        _show(settings, lines, head=False)
        after = _last(lines, after)


@audit.command("verify")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Look at these files instead of asking the daemon.",
)
@json_option
@pass_settings
def audit_verify(settings: Settings, folder: Path | None) -> None:
    """Check that nothing in the trail was changed, taken out or cut off.

    It prints the chain value of the last line. Noted elsewhere, it shows later whether all of it was
    written anew.
    """
    if folder is None:
        found = settings.client().get("audit/verify", timeout_s=30.0)
    else:
        from meshd.orchestrate.audit_files import AuditFiles

        try:
            found = AuditFiles(folder, 0).verify().to_value()
        except OSError as error:
            raise CommandError(f"cannot read {folder}: {error.strerror}", Exit.FAILED) from error
    problems = found.get("problems")
    if settings.as_json:
        print_json(found)
    elif problems:
        for problem in problems if isinstance(problems, list) else ():
            click.echo(plain(problem), err=True)
    else:
        lines, last, chain = (plain(found.get(key)) for key in ("lines", "last", "chain"))
        click.echo(f"whole: {lines} lines, the last is number {last} with chain {chain}")
    if problems:
        raise CommandError("the trail is not as it was written", Exit.FAILED)


def _show(settings: Settings, lines: list[Mapping[str, Value]], *, head: bool) -> None:
    if settings.as_json:
        for line in lines:
            click.echo(json.dumps(line, ensure_ascii=False))
        return
    if not lines:
        if head:
            click.echo("nothing is recorded that fits", err=True)
        return
    rows = [
        {**line, "when": _when(line.get("at")), "caller": _caller(line), "more": _more(line)}
        for line in lines
    ]
    text = table(rows, _LINES, terminal_width())
    click.echo(text if head else text.partition("\n")[2])


def _when(at: Value) -> str:
    if not isinstance(at, int | float):
        return plain(None)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _caller(line: Mapping[str, Value]) -> str:
    """`key:phone@abcdefgh`: who, and where by the beginning of its id."""
    node, _, principal = str(line.get("caller") or "").partition("/")
    return f"{principal}@{node[:8]}" if principal else node


def _more(line: Mapping[str, Value]) -> str:
    """What only some kinds of lines say."""
    rest = {key: value for key, value in line.items() if key not in _SHOWN}
    return plain(rest) if rest else ""


def _last(lines: list[Mapping[str, Value]], before: int) -> int:
    number = lines[-1].get("n") if lines else None
    return number if isinstance(number, int) else before
