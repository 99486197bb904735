"""How far this node's HTTP port is exposed: API keys, and beyond loopback a certificate, and the upkeep of both.

There is no insecure mode. A port that others can reach is not opened without a key that somebody made; the
certificate makes itself where none was given (decision 0023).
"""

from __future__ import annotations

import datetime
import ipaddress
import platform
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import structlog
import trio

from meshd.config.load import OWN_CERTIFICATE
from meshd.edge.errors import EdgeNotSecured
from meshd.edge.sources import is_loopback
from meshd.trust.api_keys import ApiKeys

if TYPE_CHECKING:
    from meshd.config import Config
    from meshd.trust.web_certificate import WebCertificate
    from meshd_plugins.api import Logger

_SAVE_INTERVAL_S: Final = 60.0
_LOOK_INTERVAL_S: Final = 600.0  # at the certificate's files, its end and our addresses
_SAVE_S: Final = 2.0  # at the end, that the disk has

log = cast("Logger", structlog.get_logger("meshd.edge"))


@dataclass(frozen=True, slots=True)
class Names:
    """What others may call this node."""

    node: str
    addresses: Callable[[], Iterable[str]]  # that it listens on, now

    def dns(self) -> tuple[str, ...]:
        """Names, lower case: the host's, with and without its domain, and the node's and host's in mDNS."""
        host = platform.node().lower().rstrip(".")
        first = host.partition(".")[0]
        named = (host, first, f"{first}.local" if first else "", f"{self.node}.local", "localhost")
        return tuple(dict.fromkeys(name for name in named if _is_dns_name(name)))

    def all(self) -> tuple[str, ...]:
        """Names and addresses."""
        return (*self.dns(), *dict.fromkeys(("127.0.0.1", "::1", *self.addresses())))


class Certificate:
    """The TLS side of the port: 1.2 or later, 1.3 where the client can, HTTP/1.1 only.

    Args:
        certificate: PEM file, chain included.
        key: PEM file.
        names: of the node, where the certificate is to be made here; None where it was given.

    Raises:
        EdgeNotSecured: it cannot be used.
    """

    def __init__(self, certificate: Path, key: Path, names: Names | None) -> None:
        self._certificate, self._key, self._names = certificate, key, names
        self._stamp: object = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        self.context.set_alpn_protocols(["http/1.1"])
        self.known = self._look()
        assert self.known is not None

    def refresh(self) -> bool:
        """Look at the files and the addresses again; whether there is a new certificate. Blocks.

        Raises:
            EdgeNotSecured: it cannot be used; the one before stays in use.
        """
        found = self._look()
        if found is None:
            return False
        self.known = found
        return True

    def _look(self) -> WebCertificate | None:
        """Load what is there now; None when that is in use already."""
        from meshd.trust.web_certificate import (
            WebCertificateError,
            ensure_certificate,
            read_certificate,
        )

        try:
            if self._names is None:
                found = read_certificate(self._certificate)
            else:
                now = datetime.datetime.now(datetime.UTC)
                found = ensure_certificate(self._certificate, self._key, self._names.all(), now)
            stamp = self._stamp_now()
            if stamp == self._stamp:
                return None
            self.context.load_cert_chain(self._certificate, self._key)
        except WebCertificateError as error:
            raise EdgeNotSecured(str(error)) from error
        except ssl.SSLError as error:
            raise EdgeNotSecured(
                f"{self._certificate} and {self._key} do not go together or are no PEM files "
                f"({error.reason or 'unreadable'}); see http.certificate and http.key"
            ) from error
        except OSError as error:
            raise EdgeNotSecured(
                f"{error.filename or self._key}: {error.strerror}; see http.certificate and http.key, and that "
                "meshd's user may read them"
            ) from error
        self._stamp = stamp
        return found

    def _stamp_now(self) -> object:
        found = [path.stat() for path in (self._certificate, self._key)]
        if self._names is None and found[1].st_mode & 0o007:
            raise EdgeNotSecured(f"others can read {self._key}: run `chmod o= {self._key}`")
        return [(each.st_ino, each.st_mtime_ns, each.st_size) for each in found]


class Exposure:
    """API keys and certificate of a running edge.

    Args:
        keys: the node's API keys.
        certificate: None on loopback.
        names: further names that requests may be for.
    """

    def __init__(
        self, keys: ApiKeys, certificate: Certificate | None = None, names: Iterable[str] = ()
    ) -> None:
        self.keys = keys
        self.certificate = certificate
        self.names = tuple(names)

    @property
    def pin(self) -> str:
        """The pin of the certificate's key, "" without one."""
        known = None if self.certificate is None else self.certificate.known
        return "" if known is None else known.pin

    def say(self) -> None:
        """Log what an operator should know of it."""
        if self.keys.damage:
            log.error("api_keys.damaged", what=self.keys.damage)
        if self.certificate is not None and (known := self.certificate.known) is not None:
            log.info("certificate.used", pin=known.pin, until=known.not_after.isoformat())

    async def run(self) -> None:
        """Write down the use of keys, and keep the certificate good, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                if self.certificate is not None:
                    nursery.start_soon(self._keep_certificate, self.certificate)
                while True:
                    await trio.sleep(_SAVE_INTERVAL_S)
                    await trio.to_thread.run_sync(self.keys.save_uses)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(_SAVE_S):
                await trio.to_thread.run_sync(self.keys.save_uses, abandon_on_cancel=True)

    async def _keep_certificate(self, certificate: Certificate) -> None:
        while True:
            await trio.sleep(_LOOK_INTERVAL_S)
            try:
                renewed = await trio.to_thread.run_sync(certificate.refresh)
            except EdgeNotSecured as error:
                log.warning("certificate.not_renewed", what=str(error))
            else:
                if renewed:
                    self.say()


def open_exposure(config: Config, addresses: Callable[[], Iterable[str]]) -> Exposure:
    """What the configuration asks for.

    Args:
        config: of the node.
        addresses: those that others may reach it at, now.

    Raises:
        EdgeNotSecured: others could reach the port, and there is no API key, or no usable certificate.
    """
    http = config.http
    keys = keys_for(config)
    if not _is_exposed(config):
        return Exposure(keys, None, http.allowed_hosts)
    listened = ipaddress.ip_address(http.host)
    names = Names(config.node.name, addresses if listened.is_unspecified else lambda: (http.host,))
    own = config.origins.get("http.certificate") == OWN_CERTIFICATE
    certificate = Certificate(http.certificate, http.key, names if own else None)
    assert certificate.known is not None
    given = certificate.known.names if not own else ()
    return Exposure(keys, certificate, (*http.allowed_hosts, *names.dns(), *given))


def keys_for(config: Config) -> ApiKeys:
    """The node's API keys; there need be none as long as only this machine can reach the port.

    A file of keys that is damaged lets nobody in, and so does not keep the node from its mesh.

    Raises:
        EdgeNotSecured: others could reach it, and nobody made a key.
    """
    keys = ApiKeys(config.node.state_dir)
    if _is_exposed(config) and not len(keys) and not keys.damage:
        raise EdgeNotSecured(
            f"http.host is {config.http.host}, where others can reach it, and there is no API key: make one "
            "with `meshd key create NAME`, or set http.host to 127.0.0.1"
        )
    return keys


def _is_exposed(config: Config) -> bool:
    return config.http.host != "localhost" and not is_loopback(config.http.host)


def _is_dns_name(name: str) -> bool:
    labels = name.split(".")
    allowed = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
    return len(name) < 254 and all(
        0 < len(label) < 64 and allowed.issuperset(label) for label in labels
    )
