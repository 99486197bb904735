"""`meshd appoint`: have another node let devices in, too."""

from __future__ import annotations

import click

from meshd.cli import complete
from meshd.cli.render import harmless, plain
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

APPOINT_S = 15.0  # the node may have to be dialed


@click.command()
@click.argument("node", shell_complete=complete.nodes)
@json_option
@pass_settings
def appoint(settings: Settings, node: str) -> None:
    """Make NODE (its name, its id or the beginning of that) an issuer. Only on an issuer.

    It can then invite, renew certificates, revoke and rotate keys. With two issuers a mesh outlives the loss of
    either. What this node let in so outranks nobody: revoking the issuer later makes void what it decreed.
    """
    told = settings.client().post("trust/appoint", {"node": node}, timeout_s=APPOINT_S)
    if settings.as_json:
        print_json(told)
        return
    click.echo(f"{harmless(str(told.get('name')))} ({plain(told.get('node'))}) is an issuer now")
