"""The command line. Each command's module imports what is heavy inside the command: help is instant."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from meshd import __version__
from meshd.cli import (
    acl,
    appoint,
    ask,
    audit,
    complete,
    doctor,
    invite,
    join,
    key,
    keys,
    look,
    model,
    node,
    peers,
    revoke,
    store,
    trust,
    vectors,
)
from meshd.cli.failures import CommandError, Exit
from meshd.cli.settings import Settings

__all__ = ["cli", "main"]


# Of standard output, when it is a file. A closed pipe is click's to handle.
_CANNOT_WRITE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class _Group(click.Group):
    """How any command ends that did not end by itself.

    Ctrl-C: with the status that shells expect of it, and without a word. A full disk: with one line.
    """

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _interruptible():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(Exit.INTERRUPTED)
        except click.Abort as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise  # a person said no
            click.echo(err=True)  # the question stands in an unfinished line
            ctx.exit(Exit.INTERRUPTED)
        except BaseExceptionGroup as group:  # what was running side by side
            if group.subgroup(KeyboardInterrupt) is None:
                raise
            ctx.exit(Exit.INTERRUPTED)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            raise CommandError(f"cannot write: {error.strerror}", Exit.FAILED) from error


@contextmanager
def _interruptible() -> Generator[None, None, None]:
    """While a command runs, Ctrl-C is a KeyboardInterrupt, so that it can clean up.

    Before and after, it is what `meshd.__main__` made of it. Who started us otherwise is left alone.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="MESHD_SOCKET",
    show_envvar=True,
    help="The daemon's Unix socket. Otherwise found from the configuration.",
)
@click.option(
    "--url",
    default="",
    envvar="MESHD_URL",
    show_envvar=True,
    help="A daemon on another machine, such as https://192.168.1.10:8642.",
)
@click.option(
    "--key-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the API key for it; for nobody else to read.",
)
@click.option(
    "--fingerprint",
    default="",
    metavar="sha256//...",
    help="Of that daemon's key, as `meshd status` shows it there.",
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
    url: str,
    key_file: Path | None,
    fingerprint: str,
    config_paths: tuple[Path, ...],
    as_json: bool,
) -> None:
    """One place to ask for all your small computers."""
    ctx.obj = Settings(
        socket=socket,
        url=url,
        key_file=key_file,
        fingerprint=fingerprint,
        config_paths=config_paths,
        as_json=as_json,
    )


for command in (
    ask.ask,
    vectors.embed,
    vectors.rerank,
    look.status,
    peers.peers,
    look.caps,
    look.resolve,
    look.plugins,
    look.config,
    model.model,
    store.store,
    acl.acl,
    audit.audit,
    doctor.doctor,
    node.run,
    node.init,
    invite.invite,
    join.join,
    node.leave,
    key.key,
    trust.trust,
    appoint.appoint,
    revoke.revoke,
    keys.keys,
    complete.completion,
):
    cli.add_command(command)


def main() -> None:
    """The `meshd` command."""
    reconfigure: Callable[..., None] | None = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a terminal without UTF-8 loses signs, not answers
        reconfigure(errors="replace")
    cli(prog_name="meshd")
