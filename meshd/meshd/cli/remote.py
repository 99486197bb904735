"""A daemon on another machine: its URL, the API key, and how to be sure that it is that daemon.

    ~/.config/meshd/client.toml, mode 0600:

        url = "https://192.168.1.10:8642"
        key = "sk-meshd-..."
        fingerprint = "sha256//..."

The fingerprint is of the key in the daemon's certificate, as `meshd key create` and `meshd status` on the node show it;
without one the certificate must be good for the machine's own authorities. The API key is sent to nobody before
that is settled, and never in the clear over a network.
"""

from __future__ import annotations

import hmac
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from meshd.cli.failures import CommandError, Exit

PORT: Final = 8642
_KEYS: Final = ("url", "key", "fingerprint")
_FILE_BYTES_MAX: Final = 65_536


@dataclass(frozen=True, slots=True)
class Remote:
    """Where the daemon is, and what to show it."""

    url: str  # http or https, host and port
    key: str = field(default="", repr=False)
    fingerprint: str = ""

    def connection(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is not open yet.

        Raises:
            CommandError: the URL cannot be used.
        """
        parts = urlsplit(self.url)
        try:
            host, port = parts.hostname, parts.port or PORT
        except ValueError:
            host, port = None, PORT
        if parts.scheme not in ("http", "https") or not host or parts.path.strip("/"):
            raise CommandError(
                f"{self.url!r} is no URL of a daemon: such as https://192.168.1.10:{PORT}",
                Exit.USAGE,
            )
        if parts.scheme == "https":
            return _PinnedConnection(host, port, timeout_s, self.fingerprint)
        if not _is_loopback(host):
            raise CommandError(
                f"{self.url} would show the API key to the network: use https://", Exit.USAGE
            )
        return http.client.HTTPConnection(host, port, timeout=timeout_s)


class _PinnedConnection(http.client.HTTPSConnection):
    """TLS to a daemon whose key is known beforehand."""

    def __init__(self, host: str, port: int, timeout_s: float, fingerprint: str) -> None:
        context = ssl.create_default_context()
        if fingerprint:  # the pin says more than any authority, and than dates
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        super().__init__(host, port, timeout=timeout_s, context=context)
        self._fingerprint = fingerprint

    def connect(self) -> None:
        """Connect; nothing is sent to a daemon with another key."""
        super().connect()
        if not self._fingerprint:
            return
        from meshd.trust.web_certificate import certificate_pin

        assert isinstance(self.sock, ssl.SSLSocket)
        found = certificate_pin(self.sock.getpeercert(binary_form=True) or b"")
        if not hmac.compare_digest(found.encode(), self._fingerprint.encode()):
            self.close()
            raise CommandError(
                f"{self.host} is not the daemon that is known: its fingerprint is {found}, not "
                f"{self._fingerprint}. If its key was made anew, `meshd status` on the node shows the same one: "
                "put it into your client.toml; otherwise somebody is in between. Nothing was sent",
                Exit.UNREACHABLE,
            )


def config_file() -> Path:
    """Where a client that is no node keeps what it knows."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "meshd" / "client.toml"


def read_config(path: Path) -> Remote | None:
    """What the file says; None if there is none.

    Raises:
        CommandError: it cannot be used, or others can read it.
    """
    try:
        raw = _read_secret(path)
    except FileNotFoundError:
        return None
    try:
        table = tomllib.loads(raw)
    except ValueError as error:
        raise CommandError(f"{path} is no TOML: {error}", Exit.USAGE) from error
    unknown = [name for name in table if name not in _KEYS]
    if unknown or not all(isinstance(value, str) for value in table.values()) or "url" not in table:
        raise CommandError(
            f"{path} takes texts named {', '.join(_KEYS)}, url among them"
            + (f"; not {unknown[0]!r}" if unknown else ""),
            Exit.USAGE,
        )
    return Remote(table["url"], table.get("key", ""), table.get("fingerprint", ""))


def read_key(path: Path) -> str:
    """The API key in a file that holds nothing else.

    Raises:
        CommandError: it cannot be read, or others can read it.
    """
    try:
        return _read_secret(path).strip()
    except FileNotFoundError as error:
        raise CommandError(f"there is no key file {path}", Exit.USAGE) from error


def _read_secret(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(_FILE_BYTES_MAX)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", Exit.USAGE) from error
    if mode & 0o077:
        raise CommandError(f"others can read {path}: run `chmod 600 {path}`", Exit.USAGE)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is no text", Exit.USAGE) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def unreachable(url: str, error: OSError) -> CommandError:
    """Nobody there, or somebody who is not what we look for."""
    match error:
        case ssl.SSLCertVerificationError():
            why = (
                f"its certificate is not to be trusted ({error.verify_message}): give the fingerprint that `meshd "
                "status` on the node shows"
            )
        case ssl.SSLError():
            why = f"no TLS with it: {error.reason or error}"
        case socket.gaierror():
            why = "its name is not known"
        case _:
            why = error.strerror or type(error).__name__
    return CommandError(f"no daemon at {url}: {why}", Exit.UNREACHABLE)
