"""`meshd trust`: this node's certificate, keys and clock, and who is out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.render import Column, facts, plain, rows_of, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

KEYS: Final = (
    Column("generation", "generation", right=True),
    Column("fingerprint", "fingerprint"),
    Column("state", "state"),
    Column("used_by", "used by"),
)
_REVOKED: Final = (
    Column("name", "revoked"),
    Column("node", "id"),
    Column("by", "by"),
    Column("at", "on"),
    Column("reason", "why"),
)


@click.command()
@json_option
@pass_settings
def trust(settings: Settings) -> None:
    """Show this node's role and certificate, the mesh's keys and clock, and who was revoked."""
    view = settings.client().get("trust")
    if settings.as_json:
        print_json(view)
        return
    certificate, clock = _inside(view, "certificate"), _inside(view, "clock")
    far_off = _inside(clock, "far_off")
    shown: dict[str, Value] = {
        "role": view.get("role"),
        "certificate": certificate.get("standing"),
        "until": certificate.get("until"),
        "renews": certificate.get("renews"),
        "renewed by": certificate.get("renewed_by"),
        "issuers": view.get("issuers"),
        "mesh clock": clock.get("mesh"),
        "own clock": f"{plain(clock.get('ahead_s'))} s ahead",
    }
    if certificate.get("why"):
        shown["certificate"] = (
            f"{plain(certificate.get('standing'))}: {plain(certificate.get('why'))}"
        )
    if certificate.get("last_error"):
        shown["not renewed"] = certificate.get("last_error")
    if far_off:
        shown["clocks far off"] = ", ".join(
            f"{name} by {plain(s)} s" for name, s in far_off.items()
        )
    click.echo(facts(shown))
    click.echo("\n" + table(rows_of(view, "keys"), KEYS, terminal_width()))
    revoked = rows_of(view, "revoked")
    if revoked:
        click.echo("\n" + table(revoked, _REVOKED, terminal_width()))


def _inside(value: Mapping[str, Value], key: str) -> Mapping[str, Value]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}
