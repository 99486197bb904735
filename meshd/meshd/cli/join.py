"""`meshd join`: make this device a node of a mesh, or a client of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from meshd.cli.failures import CommandError, Exit
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd.config import Config
    from meshd.core.effects import Address
    from meshd.shell.joining_client import Admission, ClientAdmission, Joiner
    from meshd.trust.certificates import Role
    from meshd.trust.identity import Identity
    from meshd.trust.join_token import JoinToken

_UNIT: Final = "meshd.service"
_START_S: Final = 30.0
_TOKEN_CHARACTERS_MAX: Final = 4_096
_NAME_BYTES_MAX: Final = 63
_SEARCH_S: Final = 6.0
_SETTLE_S: Final = 0.5
_INVITERS_MAX: Final = 3


@click.command()
@click.argument("token", required=False)
@click.option("--pin", help="The six digits that `meshd invite --pin` shows, in place of a token.")
@click.option(
    "--at", metavar="HOST:PORT", help="With --pin: the inviter, where mDNS does not reach it."
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the token: arguments can be seen by other users of this machine.",
)
@click.option("--name", help="What the inviter sees of this device. Default: node.name.")
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Where this node keeps its keys."
)
@json_option
@pass_settings
def join(
    settings: Settings,
    token: str | None,
    pin: str | None,
    at: str | None,
    token_file: Path | None,
    name: str | None,
    state_dir: Path | None,
) -> None:
    """Join a mesh, with the TOKEN that `meshd invite` printed on one of its nodes.

    TOKEN may be -, to read it from standard input.
    """
    if [token is None, pin is None, token_file is None].count(False) != 1:
        raise click.UsageError("one of TOKEN, --token-file FILE or --pin PIN is wanted")
    if at is not None and pin is None:
        raise click.UsageError("--at goes with --pin; a token knows where its inviter is")
    config = settings.config()
    folder = state_dir or config.node.state_dir
    from meshd.shell.joining_client import Admission, Joiner
    from meshd.trust.identity_errors import IdentityError
    from meshd.trust.join_errors import InviterUnreachable, JoinError, TokenWrong

    joiner = Joiner(_checked_name(name or config.node.name))
    try:
        if pin is not None:
            admission = _by_pin(pin, at, joiner, folder, config)
        else:
            admission = _by_token(_read(token, token_file), joiner, folder)
        if not isinstance(admission, Admission):
            _become_client(settings, admission)
            return
        identity = _settled(folder, admission)
    except TokenWrong as error:
        raise CommandError(error.message, Exit.USAGE) from error
    except InviterUnreachable as error:
        raise CommandError(error.message, Exit.UNREACHABLE) from error
    except JoinError as error:
        raise CommandError(error.message, Exit.REFUSED) from error
    except IdentityError as error:
        raise CommandError(str(error), Exit.FAILED) from error
    # Only where the keys went to where the unit looks for them.
    is_service = state_dir is None and not settings.config_paths
    _tell(settings, identity, folder, started=is_service and _start_service())


def _checked_name(name: str) -> str:
    if not name.isprintable() or len(name.encode("utf-8", "replace")) > _NAME_BYTES_MAX:
        raise click.BadParameter(
            f"at most {_NAME_BYTES_MAX} bytes, and no control characters", param_hint="'--name'"
        )
    return name


def _read(token: str | None, file: Path | None) -> str:
    try:
        if file is not None:
            with file.open(encoding="utf-8", errors="replace") as opened:
                return opened.read(_TOKEN_CHARACTERS_MAX)
        if token == "-":  # noqa: S105 - standard input
            return sys.stdin.read(_TOKEN_CHARACTERS_MAX)
    except OSError as error:
        raise CommandError(f"{file or '-'}: {error.strerror}", Exit.FAILED) from error
    return token or ""


def _by_token(text: str, joiner: Joiner, folder: Path) -> Admission | ClientAdmission:
    """Raises JoinError, IdentityError."""
    import trio

    from meshd.shell.joining_client import join_by_token
    from meshd.trust.join_errors import InviterUnreachable
    from meshd.trust.join_token import decode_token

    token = decode_token(text)
    _check_may_be(token.role, folder)
    try:
        return trio.run(join_by_token, token, joiner)
    except InviterUnreachable as error:
        raise InviterUnreachable(_with_expiry(error.message, token)) from error


def _with_expiry(message: str, token: JoinToken) -> str:
    """Its end is judged by the inviter's clock; where that cannot be asked, ours may tell why."""
    if time.time() < token.expires_at_s:
        return message
    ended = time.strftime("%Y-%m-%d %H:%M", time.localtime(token.expires_at_s))
    return f"{message}. By this device's clock, the token ended at {ended}: make another one"


def _by_pin(
    text: str, at: str | None, joiner: Joiner, folder: Path, config: Config
) -> Admission | ClientAdmission:
    """Try each inviter once: a guess is all that one that is none can make of it.

    Raises:
        JoinError, IdentityError: what the last one said.
    """
    import trio

    from meshd.shell.joining_client import join_by_pin
    from meshd.trust.join_errors import JoinError
    from meshd.trust.pins import parse_pin

    def may_be(role: Role) -> None:
        _check_may_be(role, folder)

    pin = parse_pin(text)
    inviters = [_address(at)] if at is not None else trio.run(_inviters, config)
    for index, addresses in enumerate(inviters):
        try:
            return trio.run(join_by_pin, pin, addresses, joiner, may_be)
        except JoinError:
            if index == len(inviters) - 1:
                raise
    raise AssertionError("there is one")


async def _inviters(config: Config) -> tuple[tuple[Address, ...], ...]:
    """Who shows a PIN on this network. Raises InviterUnreachable."""
    from zeroconf import Error as ZeroconfError

    from meshd.shell.addresses import ListenError, multicast_interfaces
    from meshd.shell.discovery import find_inviters
    from meshd.trust.join_errors import InviterUnreachable

    try:
        interfaces = multicast_interfaces(config.listen.host, config.discovery.interfaces)
        found = await find_inviters(interfaces, longest_s=_SEARCH_S, settle_s=_SETTLE_S)
    except (OSError, ZeroconfError, ListenError) as error:
        raise InviterUnreachable(
            f"mDNS does not work here ({error}): name the inviter with --at HOST:PORT"
        ) from error
    if not found:
        raise InviterUnreachable(
            "no node on this network shows a PIN: run `meshd invite --pin` on one, see that both are on the "
            "same network, or name it with --at HOST:PORT"
        )
    if len(found) > _INVITERS_MAX:
        raise InviterUnreachable(
            f"{len(found)} nodes on this network say that they show a PIN, and each could guess at this one: "
            "name the right one with --at HOST:PORT"
        )
    return found


def _address(text: str) -> tuple[Address, ...]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise click.BadParameter(f"{text!r} is not HOST:PORT", param_hint="'--at'")
    return ((host, int(port)),)


def _check_may_be(role: Role, folder: Path) -> None:
    """See that nothing here is in the way, before the invitation is spent. Raises IdentityError."""
    from meshd.shell.joining_files import check_may_join
    from meshd.trust.certificates import Role

    if role is not Role.CLIENT:
        check_may_join(folder)


def _settled(folder: Path, admission: Admission) -> Identity:
    from meshd.shell.joining_files import settle

    return settle(folder, admission, _Quiet())


class _Quiet:
    """A log for what a person need not hear of: a hint that could not be kept."""

    def _drop(self, event: str, **fields: Any) -> None:
        """Say nothing."""

    debug = info = warning = error = _drop


def _become_client(settings: Settings, admission: ClientAdmission) -> None:
    from meshd.cli.remote import config_file
    from meshd.shell.joining_files import write_client

    path = config_file()
    try:
        write_client(path, admission)
    except OSError as error:
        _cannot_write(path, error)
    if settings.as_json:
        print_json({"mesh": admission.mesh_name, "role": "client", "url": admission.url})
        return
    click.echo(f"client of mesh {admission.mesh_name} at {admission.url}, settings in {path}")
    click.echo("try: meshd ask auto 'what is 17 + 25?'")


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    raise CommandError(f"{path}: {error.strerror or error}", Exit.FAILED) from error


def _start_service() -> bool:
    """Start the service where there is one and we may; whether it runs."""
    systemctl = shutil.which("systemctl")
    units = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"))
    installed = any((folder / _UNIT).exists() for folder in units)
    if os.geteuid() != 0 or systemctl is None or not installed:
        return False
    if not Path("/run/systemd/system").is_dir():
        return False
    try:
        done = subprocess.run(  # noqa: S603 - a path of the system's, and a constant
            [systemctl, "restart", _UNIT], capture_output=True, timeout=_START_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _tell(settings: Settings, identity: Identity, folder: Path, *, started: bool) -> None:
    from meshd_cms import node_id_text

    node = node_id_text(identity.node_id)
    if settings.as_json:
        print_json(
            {
                "mesh": identity.mesh_name,
                "mesh_id": identity.mesh_id.hex(),
                "node": node,
                "role": identity.role.value,
                "state_dir": str(folder),
                "started": started,
            }
        )
        return
    click.echo(f"{identity.role.value} of mesh {identity.mesh_name}, node {node}, keys in {folder}")
    if started:
        click.echo("the service runs: meshd status")
    else:
        click.echo(
            "next: `sudo systemctl start meshd` where it is installed as a service, or `meshd run`"
        )
