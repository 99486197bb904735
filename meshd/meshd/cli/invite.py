"""`meshd invite`: let another device into the mesh, list what was given out, take it back."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.render import Column, duration, plain, rows_of, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

_SPAN: Final = re.compile(r"(\d{1,6})(s|m|h|d)")
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_ROLES: Final = ("member", "issuer", "observer", "client")


class _Span(click.ParamType[float]):
    """`10m` as seconds."""

    name = "span"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        found = _SPAN.fullmatch(str(value))
        if found is None or int(found[1]) == 0:
            self.fail(f"{value!r} is no time: such as 90s, 10m, 2h or 1d", param, ctx)
        return float(int(found[1]) * _UNITS_S[found[2]])


def _left(value: Value) -> str:
    if not isinstance(value, int | float):
        return plain(value)
    left_s = value - time.time()
    return f"in {duration(left_s)}" if left_s > 0 else "has ended"


def _used_by(value: Value) -> str:
    if not isinstance(value, list) or not value:
        return "-"
    uses = [each for each in value if isinstance(each, Mapping)]
    return ", ".join(plain(each.get("name")) or plain(each.get("node"))[:8] for each in uses)


_INVITES: Final = (
    Column("id", "id"),
    Column("role", "role"),
    Column("state", "state"),
    Column("uses_max", "for", right=True),
    Column("uses", "used by", _used_by),
    Column("expires_at_s", "ends", _left),
)


@click.group(invoke_without_command=True)
@click.option(
    "--uses",
    default=1,
    show_default=True,
    type=click.IntRange(1, 256),
    help="For how many devices.",
)
@click.option(
    "--ttl",
    type=_Span(),
    metavar="SPAN",
    help="Until when: 90s, 10m, 2h, 1d. Default 10m (a PIN: 5m).",
)
@click.option(
    "--role",
    type=click.Choice(_ROLES),
    default="member",
    show_default=True,
    help="member asks and serves; issuer may invite too; observer serves nothing; client is no node.",
)
@click.option("--pin", is_flag=True, help="Six digits to type, for a device on the same network.")
@click.option("--qr", is_flag=True, help="Show the token as a QR code too, whatever the output is.")
@json_option
@pass_settings
@click.pass_context
def invite(
    ctx: click.Context,
    settings: Settings,
    uses: int,
    ttl: float | None,
    role: str,
    pin: bool,
    qr: bool,
) -> None:
    """Make a token with which another device joins: `meshd join TOKEN` there.

    It is secret: whoever has it first, gets in. It works once, for ten minutes, unless you say otherwise.
    """
    if ctx.invoked_subcommand is not None:
        return
    wanted: dict[str, Value] = {"role": role}
    if pin:
        if uses != 1:
            raise click.UsageError("a PIN is for one device: leave out --uses")
        wanted["pin"] = True
    else:
        wanted["uses"] = uses
    if ttl is not None:
        wanted["ttl_s"] = ttl
    made = settings.client().post("invites", wanted)
    if settings.as_json:
        print_json(made)
    elif pin:
        _show_pin(made)
    else:
        _show_token(made, with_code=qr or sys.stdout.isatty())


def _show_token(made: Mapping[str, Value], *, with_code: bool) -> None:
    """The token alone on standard output; what a person needs besides goes to standard error."""
    token = str(made["token"])
    click.echo(token)
    if with_code:
        click.echo(_code(token))
    uses = made.get("uses_max")
    many = "one device" if uses == 1 else f"{plain(uses)} devices"
    click.echo(
        f"for {many}, as {plain(made.get('role'))}, until {duration(made.get('ttl_s'))} from now. There: "
        f"meshd join {token[:12]}...   To take it back: meshd invite revoke {plain(made.get('id'))}",
        err=True,
    )


def _show_pin(made: Mapping[str, Value]) -> None:
    pin = str(made["pin"])
    click.echo(pin)
    addresses = made.get("addresses")
    at = ""
    if isinstance(addresses, list) and addresses and isinstance(addresses[0], list):
        host, port = (plain(each) for each in addresses[0])
        at = f" (where mDNS does not reach: --at {f'[{host}]' if ':' in host else host}:{port})"
    click.echo(
        f"for one device on this network, as {plain(made.get('role'))}, until "
        f"{duration(made.get('ttl_s'))} from now or {plain(made.get('attempts'))} wrong attempts. There: "
        f"meshd join --pin {pin}{at}",
        err=True,
    )


def _code(token: str) -> str:
    """The QR code, two modules a character."""
    import io

    import segno

    out = io.StringIO()
    segno.make_qr(token, error="m").terminal(out=out, border=2, compact=True)
    return out.getvalue().rstrip("\n")


@invite.command("list")
@json_option
@pass_settings
def list_invites(settings: Settings) -> None:
    """List what was given out here, and who used it. The tokens themselves are not kept."""
    view = settings.client().get("invites")
    if settings.as_json:
        print_json(view)
        return
    rows = rows_of(view, "invites")
    current = view.get("pin")
    if isinstance(current, Mapping):
        left = plain(current.get("attempts_left"))
        click.echo(f"a PIN is shown, for {plain(current.get('role'))}, with {left} attempts left")
    if rows:
        click.echo(table(rows, _INVITES, terminal_width()))
    elif not isinstance(current, Mapping):
        click.echo("no invitations")


@invite.command()
@click.argument("identifier", metavar="ID")
@json_option
@pass_settings
def revoke(settings: Settings, identifier: str) -> None:
    """Make an invitation void, by its ID (`pin`: the PIN). Who has joined stays; see `meshd revoke`."""
    told = settings.client().delete("invites", identifier)
    if settings.as_json:
        print_json(told)
    else:
        click.echo(f"invitation {plain(told.get('id'))} lets nobody in any more")
