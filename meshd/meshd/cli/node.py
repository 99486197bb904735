"""Commands that act on this node: run, init, leave."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import click

from meshd.cli.failures import CommandError, Exit
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

_STATE_DIR_KEY = "node.state_dir"


@click.command()
@click.option(
    "--config",
    "config_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Configuration file; the same as `meshd --config FILE run`.",
)
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="A setting, such as node.name=kitchen; wins over files and environment.",
)
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Short for --set node.state_dir=."
)
@pass_settings
@click.pass_context
def run(
    ctx: click.Context,
    settings: Settings,
    config_paths: tuple[Path, ...],
    assignments: tuple[str, ...],
    state_dir: Path | None,
) -> None:
    """Run the daemon in the foreground, until SIGTERM or Ctrl-C."""
    overrides: dict[str, object] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or "." not in key:
            raise click.BadParameter(
                f"{assignment!r} is not SECTION.KEY=VALUE", param_hint="'--set'"
            )
        overrides[key.strip()] = value.strip()
    if state_dir is not None:
        overrides[_STATE_DIR_KEY] = str(state_dir.absolute())
    if settings.socket is not None:
        overrides["http.socket"] = str(settings.socket.absolute())
    settings = replace(settings, config_paths=(*settings.config_paths, *config_paths))
    config = settings.config(overrides)
    # What importing makes lives for ever: looking through it again and again costs a tenth of the start.
    # `run_daemon` enables the collector once the node is up.
    gc.disable()
    from meshd.app import run_daemon

    ctx.exit(run_daemon(config))


@click.command()
@click.argument("name")
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Where this node keeps its keys."
)
@json_option
@pass_settings
def init(settings: Settings, name: str, state_dir: Path | None) -> None:
    """Found a mesh called NAME, with this node as its first.

    Every other device joins it: `meshd invite` here, then `meshd join TOKEN` there.
    """
    if state_dir is None:
        state_dir = settings.config().node.state_dir
    from meshd.trust.identity import init_mesh
    from meshd.trust.identity_errors import IdentityError
    from meshd_cms import node_id_text

    try:
        identity = init_mesh(state_dir, name)
    except IdentityError as error:
        raise CommandError(str(error), Exit.FAILED) from error
    node = node_id_text(identity.node_id)
    if settings.as_json:
        print_json(
            {
                "mesh": identity.mesh_name,
                "mesh_id": identity.mesh_id.hex(),
                "node": node,
                "state_dir": str(state_dir),
            }
        )
        return
    click.echo(f"mesh {identity.mesh_name}, node {node}, keys in {state_dir}")
    click.echo(
        f"{state_dir / 'identity' / 'root.key'} is the root of the mesh: keep a copy off this device"
    )


@click.command()
@json_option
@pass_settings
def leave(settings: Settings) -> None:
    """Tell the mesh that this node goes, and stop the daemon."""
    settings.client().leave()
    if settings.as_json:
        print_json({"left": True})
    else:
        click.echo("left the mesh; the daemon stops")
