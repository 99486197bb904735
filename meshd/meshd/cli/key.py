"""`meshd key`: API keys for programs and people that are no nodes of the mesh."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.failures import CommandError, Exit
from meshd.cli.render import Column, duration, harmless, plain, rows_of, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd.trust.api_keys import ApiKeys
    from meshd_plugins.api import Value


def _ago(value: Value) -> str:
    """How long ago a unix time was."""
    return f"{duration(max(0.0, time.time() - value))} ago" if isinstance(value, int) else "never"


def _left(value: Value) -> str:
    """How long it is until a unix time."""
    if not isinstance(value, int):
        return "never"
    left_s = value - time.time()
    return f"in {duration(left_s)}" if left_s > 0 else "has ended"


def _listed(value: Value) -> str:
    return ", ".join(str(each) for each in value) if isinstance(value, list) and value else "any"


_KEYS: Final = (
    Column("name", "key"),
    Column("scopes", "scopes", _listed),
    Column("models", "models", _listed, optional=True),
    Column("rate", "rate", optional=True),
    Column("privacy", "privacy", optional=True),
    Column("uses", "uses", right=True),
    Column("last_used_s", "last used", _ago),
    Column("created_s", "made", _ago, optional=True),
    Column("expires_s", "ends", _left),
)


@click.group()
def key() -> None:
    """API keys: let programs ask over HTTP from outside, and take that back."""


@key.command("create")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    default="ask",
    show_default=True,
    help="What it opens: ask, read (status, metrics, ...), admin (change things); commas between.",
)
@click.option(
    "--models",
    help="Only what these patterns match may be asked for, such as knowledge.gpt/**; commas between.",
)
@click.option("--rate", help="Requests, such as 60/min, 5/s or 1000/day.")
@click.option(
    "--privacy",
    type=click.Choice(["local", "lan", "mesh", "cloud"]),
    help="The farthest that its questions may travel.",
)
@click.option(
    "--expires", help="Until when, such as 12h, 90d or 1y. Otherwise until it is revoked."
)
@json_option
@pass_settings
def create(settings: Settings, /, name: str, **options: str | None) -> None:
    """Make an API key called NAME, and show it: this once, and never again."""
    wanted: dict[str, Value] = {"name": name}
    wanted.update({field: value for field, value in options.items() if value is not None})
    made = _made(settings, wanted)
    if settings.as_json:
        print_json(made)
        return
    click.echo(str(made["api_key"]))
    click.echo(
        f"key {name} ({_listed(made.get('scopes'))}): keep it now, it is not shown again; "
        f"`meshd key revoke {name}` ends it",
        err=True,
    )
    if made.get("http_pin"):
        click.echo(f"fingerprint of this node: {plain(made['http_pin'])}", err=True)


@key.command("list")
@json_option
@pass_settings
def list_keys(settings: Settings) -> None:
    """List the keys, what they open, and when they were used last."""
    view = _from_daemon_or_file(
        settings, lambda: settings.client().get("keys"), lambda keys: {"keys": _rows(keys)}
    )
    if settings.as_json:
        print_json(view["keys"])
        return
    rows = rows_of(view, "keys")
    if not rows:
        click.echo("no keys: `meshd key create NAME` makes one", err=True)
        return
    click.echo(table(rows, _KEYS, terminal_width()))


@key.command("revoke")
@click.argument("name")
@json_option
@pass_settings
def revoke(settings: Settings, name: str) -> None:
    """End the key NAME, at once."""
    done = _from_daemon_or_file(
        settings,
        lambda: settings.client().delete("keys", name),
        lambda keys: {"revoked": keys.revoke(name).name, "left": len(keys)},
    )
    if settings.as_json:
        print_json(done)
    else:
        click.echo(f"revoked {harmless(str(done['revoked']))}")
        if done.get("left") == 0:
            click.echo(
                "that was the last key: with http.host beyond loopback the node does not start without one",
                err=True,
            )


def _made(settings: Settings, wanted: Mapping[str, Value]) -> Mapping[str, Value]:
    def offline(keys: ApiKeys) -> Mapping[str, Value]:
        from meshd.edge.keys_api import create_key, key_value
        from meshd.trust.api_keys import KeyUse

        made, text = create_key(keys, wanted)
        return {**key_value(made, KeyUse()), "api_key": text}

    return _from_daemon_or_file(settings, lambda: settings.client().post("keys", wanted), offline)


def _rows(keys: ApiKeys) -> list[Value]:
    from meshd.edge.keys_api import key_value

    return [key_value(each, use) for each, use in keys.listed()]


def _from_daemon_or_file(
    settings: Settings,
    ask: Callable[[], Mapping[str, Value]],
    do: Callable[[ApiKeys], Mapping[str, Value]],
) -> Mapping[str, Value]:
    """Through the daemon, which then knows at once; on its file where there is none on this machine.

    The first key of a node that listens beyond loopback has to be there before it starts.
    """
    try:
        return ask()
    except CommandError as error:
        stopped = isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError)
        if not stopped or settings.url or settings.key_file is not None:
            raise
    from meshd.trust.api_keys import ApiKeyError, ApiKeys

    try:
        keys = ApiKeys(settings.config().node.state_dir)
        if keys.damage:
            raise CommandError(keys.damage, Exit.FAILED)
        return do(keys)
    except ApiKeyError as error:
        raise CommandError(str(error), Exit.FAILED) from error
