"""Where a request may come from: keeps out the pages that a browser on this machine, or near it, shows.

A page can make a browser send requests to any address. What the browser adds to them tells:

- **Host** must be a name that means this node. A page that rebinds its own DNS name to our address sends its own
  name. Address literals are let through where the connection came in by that very address: rebinding takes a name.
- **Origin** must be absent or this node's own, port included. Browsers add it to POSTs, to fetches across
  origins and to WebSockets; `null` is what sandboxed frames and files send.
- **Sec-Fetch-Site** must be absent, `none` (typed by a person) or `same-origin`. Browsers add it to all requests,
  also to those without an Origin (images, scripts, frames, links), when they hold the address trustworthy, which
  loopback and TLS are.
- **Content-Type** of what has a body must be JSON, which a page cannot send without asking first; and there are
  no answers to such a question (CORS preflight).

`X-Forwarded-*` and the like are not read: anybody can write them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from meshd.edge.errors import RequestError

_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST: Final = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(:[0-9]{1,5})?")
_KNOWN_MAX: Final = 256
_SHOWN_CHARS_MAX: Final = 80
_OWN_SITES: Final = frozenset({"", "none", "same-origin"})


class Sources:
    """Judges the headers of requests that come over TCP.

    Args:
        names: names beyond loopback's that mean this node.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = _LOOPBACK_NAMES | {name.lower().rstrip(".") for name in names}
        # Pairs that were found good: the same few come again.
        self._known: set[tuple[str, str]] = set()

    def check(self, headers: Mapping[bytes, bytes], local_address: str) -> None:
        """Raise RequestError for what a page of somebody else's may have sent.

        Args:
            headers: the last of each lower-case name.
            local_address: the address of ours that the connection came in by.
        """
        host = headers.get(b"host", b"").decode("latin-1").strip().lower()
        if (host, local_address) not in self._known:
            self._check_host(host, local_address)
        if origin := headers.get(b"origin"):
            self._check_origin(origin.decode("latin-1").strip().lower(), host)
        site = headers.get(b"sec-fetch-site", b"").decode("latin-1").strip().lower()
        if site not in _OWN_SITES:
            raise RequestError(
                "Requests that web pages of other sites make are not served",
                code="origin_not_allowed",
                status=403,
            )
        if has_body(headers):
            _check_content_type(headers.get(b"content-type", b"").decode("latin-1"))

    def _check_host(self, host: str, local_address: str) -> None:
        name = host_name(host)
        if name is None or not (name in self._names or name == plain_address(local_address)):
            raise RequestError(
                f"Host {host[:_SHOWN_CHARS_MAX]!r} is not a name of this node; use its address or, on this "
                "machine, localhost; http.allowed_hosts takes further names",
                code="host_not_allowed",
                status=403,
            )
        if len(self._known) < _KNOWN_MAX:
            self._known.add((host, local_address))

    def _check_origin(self, origin: str, host: str) -> None:
        scheme, _, authority = origin.partition("://")
        if scheme not in ("http", "https") or authority != host:
            raise RequestError(
                f"Requests from web pages of {origin[:_SHOWN_CHARS_MAX]!r} are not served",
                code="origin_not_allowed",
                status=403,
            )


def host_name(host: str) -> str | None:
    """The name or address in a lower-case Host header, without port, brackets and final dot; None if malformed."""
    found = _HOST.fullmatch(host)
    if found is None:
        return None
    name = found[1]
    if name.startswith("["):
        try:
            return str(ipaddress.IPv6Address(name[1:-1]))
        except ValueError:
            return None
    return name.removesuffix(".")


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request announces a body."""
    return (
        b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip(b"0") != b""
    )


def _check_content_type(text: str) -> None:
    kind = text.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"The body must be JSON, with Content-Type: application/json, not {kind[:_SHOWN_CHARS_MAX]!r}",
            code="content_type_not_allowed",
            status=415,
        )


@lru_cache(maxsize=1024)
def plain_address(address: str) -> str:
    """An address literal in its one spelling; an IPv4 one that a socket for both shows as IPv6 is IPv4 again."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


@lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """Whether only this machine can have it."""
    try:
        return ipaddress.ip_address(plain_address(address)).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=1024)
def source_of(address: str) -> str:
    """Whom to count together: an IPv4 address, or the /64 that one IPv6 host may choose its addresses from."""
    plain = plain_address(address)
    if ":" not in plain:
        return plain
    return str(ipaddress.IPv6Network((plain, 64), strict=False).network_address)
