"""`meshd keys`: the key that seals datagrams between nodes. API keys are `meshd key`."""

from __future__ import annotations

import click

from meshd.cli.render import plain, rows_of, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json
from meshd.cli.trust import KEYS

ROTATE_S = 15.0  # the new key goes to the disk first


@click.group()
def keys() -> None:
    """Look at the key that seals datagrams between nodes, or change it."""


@keys.command("list")
@json_option
@pass_settings
def list_keys(settings: Settings) -> None:
    """List the generations that this node holds, by fingerprint, and which peers seal with each."""
    view = settings.client().get("trust")
    if settings.as_json:
        print_json(view["keys"])
        return
    click.echo(table(rows_of(view, "keys"), KEYS, terminal_width()))


@keys.command()
@json_option
@pass_settings
def rotate(settings: Settings) -> None:
    """Put a new datagram key in force, while everything runs. Only on an issuer."""
    told = settings.client().post("trust/rotate", {}, timeout_s=ROTATE_S)
    if settings.as_json:
        print_json(told)
        return
    click.echo(
        f"generation {plain(told.get('key_generation'))} is in force; nodes fetch it from each other, and "
        "`meshd keys list` shows who uses it"
    )
