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
@click.argument("name", required=False)
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Where this node keeps its keys."
)
@click.option(
    "--enrolment",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a file with which other nodes can join. It is secret.",
)
@click.option(
    "--enrol",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Join the mesh that this enrolment file is of.",
)
@json_option
@pass_settings
def init(
    settings: Settings,
    name: str | None,
    state_dir: Path | None,
    enrolment: Path | None,
    enrol: Path | None,
) -> None:
    """Found a mesh called NAME, or join one.

    The first node: meshd init home --enrolment home.enrol

    Other nodes, with that file: meshd init --enrol home.enrol

    Another file later, on the first node: meshd init --enrolment more.enrol
    """
    if (name is None and enrolment is None) == (enrol is None):
        raise click.UsageError(
            "either NAME founds a mesh, or --enrolment FILE writes an enrolment file, "
            "or --enrol FILE joins a mesh"
        )
    if state_dir is None:
        state_dir = settings.config().node.state_dir
    from meshd.trust import enrolment as enrolling
    from meshd.trust.identity import init_mesh, load_identity
    from meshd.trust.identity_errors import IdentityError
    from meshd_cms import node_id_text

    try:
        if enrol is not None:
            identity = enrolling.enrol(state_dir, enrol)
        else:
            identity = load_identity(state_dir) if name is None else init_mesh(state_dir, name)
        if enrolment is not None:
            enrolling.write_enrolment(state_dir, enrolment)
    except IdentityError as error:
        raise CommandError(str(error), Exit.FAILED) from error
    node = node_id_text(identity.node_id)
    if settings.as_json:
        print_json(
            {
                "mesh": identity.mesh_name,
                "node": node,
                "state_dir": str(state_dir),
                "enrolment": None if enrolment is None else str(enrolment),
            }
        )
        return
    click.echo(f"mesh {identity.mesh_name}, node {node}, keys in {state_dir}")
    if enrolment is not None:
        click.echo(
            f"{enrolment}: copy it to another device, run `meshd init --enrol {enrolment.name}` there, "
            "then delete the copies"
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
