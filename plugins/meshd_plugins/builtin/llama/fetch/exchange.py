"""One GET over HTTP: redirects followed by hand, everything bounded.

What is true of an answer that `open_exchange` returns: at most `REDIRECTS_MAX` redirects led to it, none
of them from https to http, and its body is as the server keeps it (no content coding).
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from meshd_plugins.builtin.llama.fetch.errors import FetchBroken, FetchRefused

REDIRECTS_MAX: Final = 5
CONNECT_S: Final = 20.0
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_WAIT_S_MAX: Final = 60.0


@dataclass(slots=True)
class Exchange:
    """An answer whose body has not been read, and the connection that it comes on."""

    response: http.client.HTTPResponse
    origin_headers: Mapping[str, str]  # of the host that was asked first; keys in small letters
    _connection: http.client.HTTPConnection

    def header(self, name: str) -> str:
        """A header of the answer, "" when absent."""
        return self.response.getheader(name) or ""

    def close(self) -> None:
        """Give the connection back."""
        self.response.close()
        self._connection.close()


class Line:
    """The connection in use, which another thread may cut."""

    def __init__(self) -> None:
        self._descriptor = -1
        self.was_cut = False

    def hold(self, sock: socket.socket) -> None:
        """This one is in use now."""
        self.drop()
        self._descriptor = os.dup(sock.fileno())

    def cut(self) -> None:
        """End it under whoever reads from it.

        Through a descriptor of our own: `shutdown` of a TLS socket of Python forgets the TLS, and what is
        read after it would be ciphertext.
        """
        self.was_cut = True
        if self._descriptor >= 0:
            with suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as sock:
                sock.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """None is in use."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def open_exchange(url: str, headers: Mapping[str, str], line: Line, stall_s: float) -> Exchange:
    """Ask for a URL and return the answer, whatever its status but a redirect.

    Raises:
        FetchRefused: redirected, insecure, tls.
        FetchBroken: unreachable, server_error.
    """
    origin, said = urlsplit(url).netloc, dict[str, str]()
    for _ in range(REDIRECTS_MAX + 1):
        try:
            connection, response = _ask(urlsplit(url), headers, line, stall_s)
        except ssl.SSLCertVerificationError as error:
            raise FetchRefused(
                f"{_host(url)} shows a certificate that is not good for it: {error.verify_message}",
                "tls",
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchBroken(
                f"{_host(url)}: {str(error) or type(error).__name__}", "unreachable"
            ) from error
        if urlsplit(url).netloc == origin:
            said |= {key.lower(): value for key, value in response.getheaders()}
        if response.status not in _REDIRECTS:
            return Exchange(response, said, connection)
        target = response.getheader("location") or ""
        response.close()
        connection.close()
        url = _redirected(url, target)
    raise FetchRefused(
        f"more than {REDIRECTS_MAX} redirects; the last to {_host(url)}", "redirected"
    )


def refuse_status(response: http.client.HTTPResponse, url: str) -> NoReturn:
    """Raise what a status means that is neither 200 nor 206 nor 416."""
    where, status = _host(url), response.status
    if status in _AGAIN:
        after = response.getheader("retry-after") or ""
        wait_s = min(float(after), _WAIT_S_MAX) if after.isdecimal() and len(after) < 9 else 0.0
        raise FetchBroken(
            f"{where} answers {status} {response.reason}", "server_error", wait_s=wait_s
        )
    if status in (401, 403, 451):
        raise FetchRefused(
            f"{where} answers {status}: the file is not there, or not for everybody. Where a licence must be "
            "accepted first, do that in a browser, fetch the file there, and add it by its path",
            "forbidden",
        )
    if status in (404, 410):
        raise FetchRefused(
            f"{where} has no such file ({status}): check owner, name and revision", "not_found"
        )
    raise FetchRefused(f"{where} answers {status} {response.reason}", "refused")


def _ask(
    url: SplitResult, headers: Mapping[str, str], line: Line, stall_s: float
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection, target = _connection(url)
    try:
        connection.connect()
        line.hold(connection.sock)
        connection.sock.settimeout(stall_s)
        connection.request("GET", target, headers={**headers, "Accept-Encoding": "identity"})
        return connection, connection.getresponse()
    except BaseException:
        connection.close()
        raise


def _connection(url: SplitResult) -> tuple[http.client.HTTPConnection, str]:
    """A connection that is not open yet, and the target of the request; through a proxy where one is set."""
    host, port = url.hostname or "", url.port
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    proxy = None if proxy_bypass(host) else getproxies().get(url.scheme)
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
    if url.scheme == "https":
        context = ssl.create_default_context()
        if through is None:
            return http.client.HTTPSConnection(
                host, port, timeout=CONNECT_S, context=context
            ), target
        tunnel = http.client.HTTPSConnection(
            through.hostname or "", through.port, timeout=CONNECT_S, context=context
        )
        tunnel.set_tunnel(host, port)
        return tunnel, target
    if through is None:
        return http.client.HTTPConnection(host, port, timeout=CONNECT_S), target
    plain = http.client.HTTPConnection(through.hostname or "", through.port, timeout=CONNECT_S)
    return plain, url.geturl()


def _redirected(url: str, target: str) -> str:
    """Where a redirect leads. Raises FetchRefused."""
    try:
        found = urlsplit(urljoin(url, target))
        host, _ = found.hostname, found.port
    except ValueError:
        host, found = None, urlsplit("")
    if (
        not target
        or not host
        or found.scheme not in ("http", "https")
        or not found.geturl().isascii()
    ):
        raise FetchRefused(
            f"{_host(url)} redirects to {target[:100]!r}, which is no address", "redirected"
        )
    if url.startswith("https:") and found.scheme != "https":
        raise FetchRefused(
            f"{_host(url)} redirects from https to http, where anybody on the way can change the file",
            "insecure",
        )
    return found._replace(fragment="").geturl()


def _host(url: str) -> str:
    """For messages: paths and queries of URLs may hold tokens."""
    return urlsplit(url).netloc or "the server"
