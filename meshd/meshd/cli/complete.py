"""Shell completion: the script, and names from the running daemon.

Completion runs at every press of a key, so it is quick and silent when there is no daemon.
"""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from meshd.cli.failures import CommandError
from meshd.cli.settings import Settings

_WAIT_S: Final = 0.3
_VARIABLE: Final = "_MESHD_COMPLETE"


def names(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names that the mesh serves now."""
    socket = ctx.find_root().params.get("socket")
    settings = Settings(socket=socket)
    try:
        view = settings.client().get("capabilities", timeout_s=_WAIT_S)
    except (CommandError, OSError):
        return []
    rows = view.get("capabilities")
    if not isinstance(rows, list):
        return []
    found: dict[str, str] = {}
    for row in rows:
        if isinstance(row, dict):
            found.setdefault(str(row.get("name")), str(row.get("summary") or ""))
    return [
        CompletionItem(name, help=help_text or None)
        for name, help_text in sorted(found.items())
        if name.startswith(incomplete)
    ]


def nodes(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of members."""
    settings = Settings(socket=ctx.find_root().params.get("socket"))
    try:
        rows = settings.client().get("peers", timeout_s=_WAIT_S).get("peers")
    except (CommandError, OSError):
        return []
    if not isinstance(rows, list):
        return []
    found = sorted(str(row.get("name")) for row in rows if isinstance(row, dict))
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]


def targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`auto`, and names."""
    auto = [CompletionItem("auto", help="meshd picks")] if "auto".startswith(incomplete) else []
    return auto + names(ctx, param, incomplete)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    For bash: meshd completion bash > ~/.local/share/bash-completion/completions/meshd
    """
    made = get_completion_class(shell)
    assert made is not None  # the choices are click's own
    click.echo(made(ctx.find_root().command, {}, "meshd", _VARIABLE).source())
