"""The command line. Each command's module imports what is heavy inside the command: help is instant."""

from __future__ import annotations

from pathlib import Path

import click

from meshd import __version__
from meshd.cli import ask, complete, look, node
from meshd.cli.failures import Exit
from meshd.cli.settings import Settings

__all__ = ["cli", "main"]


class _Group(click.Group):
    """Ctrl-C ends any command with the status that shells expect of it, and without a word."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(Exit.INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="MESHD_SOCKET",
    help="The daemon's Unix socket. Otherwise found from the configuration.",
)
@click.option(
    "--config",
    "config_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Configuration file; may be given more than once, later ones win.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
@click.version_option(__version__, prog_name="meshd")
@click.pass_context
def cli(
    ctx: click.Context,
    socket: Path | None,
    config_paths: tuple[Path, ...],
    as_json: bool,
) -> None:
    """One place to ask for all your small computers."""
    ctx.obj = Settings(socket=socket, config_paths=config_paths, as_json=as_json)


for command in (
    ask.ask,
    look.status,
    look.peers,
    look.caps,
    look.resolve,
    look.plugins,
    look.config,
    node.run,
    node.init,
    node.leave,
    complete.completion,
):
    cli.add_command(command)


def main() -> None:
    """The `meshd` command."""
    cli(prog_name="meshd")
