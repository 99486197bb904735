"""`meshd doctor`: what is wrong, asked of the daemon, or found out here when there is none."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.failures import CommandError, Exit
from meshd.cli.render import harmless, plain, rows_of, tally_text, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

DOCTOR_S: Final = 30.0  # the daemon gives its peers 12 s and the network 1.5 s
WIDTH_MAX: Final = 100
STATUSES: Final = {"error": 2, "warning": 1}
"""The exit statuses that monitoring programs expect of a check; notes are no reason to be woken."""
_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}
_INDENT: Final = "    "


@click.command()
@json_option
@pass_settings
@click.pass_context
def doctor(ctx: click.Context, settings: Settings) -> None:
    """Find out what is wrong with this node, its network and its mesh.

    The daemon tests multicast on each interface, asks every peer, and looks at its own counters; that takes
    some seconds. Without a daemon, this command looks at the configuration, the keys, the ports, the
    state folder and the network itself. docs/operate.md explains every code.

    Status 0: all is well, or there are notes only. 1: warnings. 2: errors.
    """
    view = _report(settings)
    if settings.as_json:
        print_json(view)
    else:
        _show(view)
    ctx.exit(STATUSES.get(str(view.get("worst")), Exit.OK))


def _report(settings: Settings) -> Mapping[str, Value]:
    """From the daemon, or from here when it cannot be reached."""
    elsewhere = False
    try:
        client = settings.client()
        elsewhere = client.remote is not None
        try:
            return {"daemon": True, **client.get("doctor", timeout_s=DOCTOR_S)}
        except CommandError as error:
            if elsewhere or error.exit_code != Exit.UNREACHABLE:
                raise
            denied = error.message if isinstance(error.__cause__, PermissionError) else ""
            path = str(client.path)
    except CommandError as error:
        if elsewhere or error.exit_code not in (Exit.UNREACHABLE, Exit.USAGE):
            raise
        denied, path = "", str(settings.socket or "")
    from meshd.cli.standstill import report_without_daemon

    return {"daemon": False, **report_without_daemon(settings, path, denied)}


def _show(view: Mapping[str, Value]) -> None:
    width = min(WIDTH_MAX, terminal_width())
    findings = rows_of(view, "findings")
    for finding in findings:
        severity = str(finding.get("severity"))
        head = click.style(severity, fg=_COLOURS.get(severity), bold=True)
        click.echo(f"{head}  {plain(finding.get('code'))}")
        for text in (finding.get("says"), finding.get("do")):
            click.echo(
                textwrap.indent(textwrap.fill(harmless(str(text)), width - len(_INDENT)), _INDENT)
            )
        click.echo()
    tally = view.get("tally")
    told = tally_text(tally if isinstance(tally, Mapping) else {}, ("errors", "warnings", "notes"))
    click.echo(told or "all is well")
