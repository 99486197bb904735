"""What the options before the command say, and the client that follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from meshd.cli.failures import CommandError, Exit

if TYPE_CHECKING:
    from meshd.cli.client import Client
    from meshd.cli.remote import Remote
    from meshd.config import Config

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Settings:
    """Options of the whole command line."""

    socket: Path | None = None
    url: str = ""
    key_file: Path | None = None
    fingerprint: str = ""
    config_paths: tuple[Path, ...] = ()
    as_json: bool = False

    def config(self, overrides: dict[str, object] | None = None) -> Config:
        """The configuration.

        Raises:
            CommandError: it is wrong; the message says where.
        """
        from meshd.config import ConfigError, load

        try:
            return load(self.config_paths, overrides=overrides)
        except ConfigError as error:
            raise CommandError(str(error), Exit.USAGE) from error

    def client(self) -> Client:
        """A client of the daemon that the options mean.

        The one on this machine by its socket; where there is none, the one that client.toml names.

        Raises:
            CommandError: the configuration is wrong.
        """
        from meshd.cli.client import Client

        if self.url or self.key_file is not None:
            return Client((), self._remote())
        if self.socket is not None:
            return Client((self.socket,))
        from meshd.config import Config, ConfigUnreadable, socket_candidates

        try:
            config = self.config()
        except CommandError as error:
            # The service's file is not for everybody to read; its socket may be.
            if self.config_paths or not isinstance(error.__cause__, ConfigUnreadable):
                raise
            config = Config()
        local = Client(socket_candidates(config))
        if local.has_socket or self.config_paths:
            return local
        from meshd.cli.remote import config_file, read_config

        remote = read_config(config_file())
        return local if remote is None else Client((), remote)

    def _remote(self) -> Remote:
        """What the options say, filled up from client.toml as far as that is about the same daemon."""
        from meshd.cli.remote import Remote, config_file, read_config, read_key

        known = read_config(config_file())
        if self.url and known is not None and known.url.rstrip("/") != self.url.rstrip("/"):
            known = None  # a key goes to nobody but the daemon that it is for
        url = self.url or ("" if known is None else known.url)
        if not url:
            raise CommandError("which daemon? Give --url", Exit.USAGE)
        key = "" if known is None else known.key
        if self.key_file is not None:
            key = read_key(self.key_file)
        return Remote(url, key, self.fingerprint or ("" if known is None else known.fingerprint))


pass_settings = click.make_pass_decorator(Settings, ensure=True)


def json_option(command: F) -> F:
    """`--json` after the command, as well as before it."""

    def set_json(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Settings).as_json = True

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=set_json,
        help="Print JSON for scripts.",
    )(command)


def print_json(value: object) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
