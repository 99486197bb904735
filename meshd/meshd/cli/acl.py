"""`meshd acl`: who may use what, and why somebody may or may not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from meshd.cli import complete
from meshd.cli.failures import Exit
from meshd.cli.render import Column, harmless, plain, rows_of, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

CLASSES: Final = ("local", "lan", "mesh", "cloud")
_RULES: Final = (
    Column("rule", "#", right=True),
    Column("effect", "effect"),
    Column("name", "capabilities"),
    Column("callers", "callers"),
    Column("privacy", "classes"),
    Column("decided", "decided", right=True, optional=True),
    Column("about_here", "of this node", optional=True),
    Column("comment", "comment", optional=True),
)
_STEPS: Final = (
    Column("verdict", ""),
    Column("at", "at"),
    Column("question", "question"),
    Column("why", "why"),
)


@click.group()
def acl() -> None:
    """Look at the access rules, and ask why."""


@acl.command("list")
@json_option
@pass_settings
def acl_list(settings: Settings) -> None:
    """List the rules of this node, in the order in which they are looked at."""
    view = settings.client().get("access")
    if settings.as_json:
        print_json(view)
        return
    rules = rows_of(view, "rules")
    if rules:
        shown = [{**rule, "privacy": _classes(rule.get("privacy"))} for rule in rules]
        click.echo(table(shown, _RULES, terminal_width()))
    else:
        click.echo("no rules: every member and every client may use everything")
    click.echo(f"\na request that names no class is {plain(view.get('default_privacy'))}", err=True)


@acl.command("check")
@click.argument("name", shell_complete=complete.names)
@click.option(
    "--caller",
    default="local",
    show_default=True,
    help="local, loopback or key:NAME; with @NODE: at another node; or a NODE.",
)
@click.option(
    "--privacy", type=click.Choice(CLASSES), help="Class of the request; else the node's default."
)
@click.option("--at", default="", metavar="NODE", help="The node that would serve; else this one.")
@json_option
@click.pass_context
def acl_check(ctx: click.Context, name: str, caller: str, privacy: str | None, at: str) -> None:
    """Explain whether a caller may use the capability NAME: which rule decides, and at which node.

    Ends with status 5 when it is refused.
    """
    settings = ctx.ensure_object(Settings)
    view = settings.client().get(
        "access/check", timeout_s=8.0, name=name, caller=caller, privacy=privacy or "", at=at
    )
    if settings.as_json:
        print_json(view)
    else:
        word = "allowed" if view.get("allowed") else "refused"
        about = f"{plain(view.get('name'))} for {plain(view.get('caller'))}, {plain(view.get('privacy'))}"
        click.echo(f"{word}: {about}: {plain(view.get('why'))}")
        steps = [
            {**step, "verdict": "✓" if step.get("allowed") else "✗"}
            for step in rows_of(view, "steps")
        ]
        click.echo(table(steps, _STEPS, terminal_width()))
    if not view.get("allowed"):
        ctx.exit(Exit.REFUSED)


def _classes(value: Value) -> str:
    words = [harmless(str(word)) for word in value] if isinstance(value, list) else []
    return "all" if len(words) == len(CLASSES) else ", ".join(words)
