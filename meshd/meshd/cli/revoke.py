"""`meshd revoke`: shut a node out of the mesh, for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from meshd.cli import complete
from meshd.cli.render import harmless, plain
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshd_plugins.api import Value

REVOKE_S = 15.0  # the new key goes to the disk first


@click.command()
@click.argument("node", shell_complete=complete.nodes)
@click.option("--reason", default="", metavar="TEXT", help="Why, for people; at most 64 bytes.")
@click.option(
    "--keep-key", is_flag=True, help="Leave the datagram key as it is, which the node knows."
)
@click.option("--force", is_flag=True, help="Also this node itself, even if it is the last issuer.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_settings
def revoke(
    settings: Settings, node: str, reason: str, keep_key: bool, force: bool, yes: bool
) -> None:
    """Shut NODE (its name, its id or the beginning of that) out of the mesh. Only on an issuer.

    Every node that can be reached knows within a second; one that cannot, as soon as it is back.
    """
    client = settings.client()
    asked: dict[str, Value] = {
        "node": node,
        "reason": reason,
        "keep_key": keep_key,
        "force": force,
    }
    if not yes and not settings.as_json:
        told = client.post("trust/revoke", {**asked, "dry_run": True})
        click.echo(_consequences(told), err=True)
        click.confirm("Revoke it?", abort=True, err=True)
    told = client.post("trust/revoke", asked, timeout_s=REVOKE_S)
    if settings.as_json:
        print_json(told)
        return
    key = told.get("key_generation")
    rotated = "" if key is None else f"; datagram key generation {plain(key)} is in force"
    click.echo(f"{_called(told)} is revoked{rotated}")


def _consequences(told: Mapping[str, Value]) -> str:
    lines = [
        f"{_called(told)}, {plain(told.get('role'))}, {plain(told.get('address'))}:",
        "  its connections are closed, its record is dropped, and it stops;",
        "  it cannot come back under this identity, and revoking cannot be undone;",
    ]
    if told.get("role") == "issuer":
        lines.append("  nodes that it let in have their certificates renewed by other issuers;")
    if told.get("rotates"):
        lines.append("  the datagram key is changed, so that it cannot read or forge what comes.")
    else:
        lines.append("  the datagram key stays: it can still read datagrams that it can record.")
    return "\n".join(lines)


def _called(told: Mapping[str, Value]) -> str:
    name, node = told.get("name"), plain(told.get("node"))
    return f"{harmless(str(name))} ({node})" if name else node
