"""A small HTTP/1.1 client over trio and h11: one request a connection, and everything bounded.

h11 bounds a head that is not whole and checks lengths and codings; bytes arrive in pieces of `PIECE_BYTES`, so
a head is never longer than both together. How long a wait may take is the caller's to say (`within`); nothing
here waits for anything but the network. Redirects are not followed, proxies of the environment are not used,
and a server that is meant to be on this machine is one: the address that was reached is looked at.

Leaving `exchange` closes the connection, whatever the state: that is how a server learns to stop generating.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias, cast

import h11
import trio

from meshd_plugins.api import HOP_HEADER
from meshd_plugins.builtin.adopt.config import Address
from meshd_plugins.builtin.adopt.errors import Broken, Slow, TooLarge, Unreachable

HEAD_BYTES_MAX: Final = 32 * 1024
PIECE_BYTES: Final = 16 * 1024
SEND_BYTES: Final = 256 * 1024  # in one go: what is encrypted at once
INFORMATIONAL_MAX: Final = 4  # answers of the 1xx kind before the real one
KEY_BYTES_MAX: Final = 4096

_Stream: TypeAlias = "trio.SocketStream | trio.SSLStream[trio.SocketStream]"


@contextmanager
def within(seconds: float, what: str) -> Generator[None]:
    """Raise Slow when the block takes longer. Never around a `yield` of a generator."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Slow(f"{what} took longer than {seconds:g} s")


@dataclass(slots=True)
class Response:
    """An answer whose head has come; its body is read piece by piece."""

    status: int
    headers: Mapping[str, str]  # names in lower case; the last of several wins
    _wire: h11.Connection = field(repr=False)
    _stream: _Stream = field(repr=False)

    async def receive(self) -> bytes:
        """Return the next bytes of the body, b"" at its end. Raises Broken when it ends too early."""
        while True:
            event = await _next_event(self._wire, self._stream)
            match event:
                case h11.Data():
                    if event.data:
                        return bytes(event.data)
                case h11.EndOfMessage():
                    return b""
                case _:
                    raise Broken("the server's answer ended before its end")

    async def read(self, bytes_max: int) -> bytes:
        """Return the whole body. Raises TooLarge, Broken."""
        body = bytearray()
        while piece := await self.receive():
            body += piece
            if len(body) > bytes_max:
                raise TooLarge(f"the server sent more than {bytes_max} bytes")
        return bytes(body)


class Client:
    """Asks one server.

    Args:
        address: where it is.
        key: for the Authorization header; "": none is sent.
        tls: for https; None: the system's authorities.
    """

    def __init__(self, address: Address, key: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.address = address
        self._headers = [
            ("Host", address.authority),
            ("User-Agent", "meshd"),
            ("Accept", "*/*"),
            ("Connection", "close"),
            (HOP_HEADER, "1"),
            *([("Authorization", f"Bearer {key}")] if key else []),
        ]
        self._tls = tls
        self.has_key = bool(key)

    @asynccontextmanager
    async def exchange(
        self, method: str, path: str, body: bytes | None = None
    ) -> AsyncGenerator[Response]:
        """Send a request; the response once its head is there. Leaving closes the connection.

        Raises:
            Unreachable: nothing listens there, or it is no server of the kind the URL names.
            Broken: it ended the connection, or what it sent is not HTTP.
        """
        stream = await self._connect()
        try:
            yield await self._ask(stream, method, path, body)
        finally:
            await trio.aclose_forcefully(stream)

    async def _connect(self) -> _Stream:
        address = self.address
        try:
            tcp = await trio.open_tcp_stream(address.host, address.port)
        except (OSError, UnicodeError) as error:  # a host's name may be none that DNS knows
            raise Unreachable(f"{address} does not answer: {_why(error)}") from error
        try:
            if address.is_loopback and not _is_loopback(tcp):
                raise Unreachable(f"{address} is not on this machine")
            if address.scheme == "http":
                return tcp
            context = self._tls or ssl.create_default_context()
            stream = trio.SSLStream(tcp, context, server_hostname=address.host)
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            await trio.aclose_forcefully(tcp)
            raise Unreachable(f"{address} did not agree on TLS: {error.__cause__}") from error
        except BaseException:
            await trio.aclose_forcefully(tcp)
            raise
        return stream

    async def _ask(self, stream: _Stream, method: str, path: str, body: bytes | None) -> Response:
        wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        headers = list(self._headers)
        if body is not None:
            headers += [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
            ]
        request = h11.Request(method=method, target=self.address.path + path, headers=headers)
        out = wire.send(request) or b""
        sent = wire.send(h11.Data(data=body)) if body is not None else None
        rest = memoryview(sent or b"")
        wire.send(h11.EndOfMessage())  # which is nothing, behind a body with its length
        with suppress(trio.BrokenResourceError):  # it may have refused without reading all of it
            await stream.send_all(out + rest[:SEND_BYTES])
            for at in range(SEND_BYTES, len(rest), SEND_BYTES):
                await stream.send_all(rest[at : at + SEND_BYTES])
        for _ in range(INFORMATIONAL_MAX + 1):
            event = await _next_event(wire, stream)
            if isinstance(event, h11.Response):
                found = {
                    name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers
                }
                return Response(event.status_code, found, wire, stream)
            if not isinstance(event, h11.InformationalResponse):
                break
        raise Broken(f"{self.address} did not answer")


async def _next_event(wire: h11.Connection, stream: _Stream) -> h11.Event | None:
    """The next event of an answer; None where there is none to come. Raises Broken."""
    while True:
        try:
            event = wire.next_event()
        except h11.RemoteProtocolError as error:
            raise Broken(f"the connection to the server broke: {error}") from error
        if isinstance(event, h11.Event):
            return event
        if event is h11.PAUSED:  # it speaks another protocol from here on
            return None
        try:
            piece = await stream.receive_some(PIECE_BYTES)
        except trio.BrokenResourceError as error:
            raise Broken("the connection to the server broke") from error
        wire.receive_data(bytes(piece))


def make_client(address: Address, key_file: str, ca_file: str) -> Client:
    """Make a client with the key and the authorities that files hold. Blocks. Raises OSError, ValueError."""
    key = ""
    if key_file:
        with Path(key_file).open("rb") as file:
            key = file.read(KEY_BYTES_MAX).decode().partition("\n")[0].strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(f"{key_file} holds no key in its first line")
    tls = ssl.create_default_context(cafile=ca_file or None) if address.scheme == "https" else None
    return Client(address, key, tls)


def _is_loopback(stream: trio.SocketStream) -> bool:
    try:
        return ipaddress.ip_address(stream.socket.getpeername()[0]).is_loopback
    except OSError:  # it is gone again
        return True


def _why(error: Exception) -> str:
    """The reason of the last attempt: trio puts those of all addresses below its own error."""
    inner: BaseException = error.__cause__ or error
    while isinstance(inner, BaseExceptionGroup):
        inner = cast("BaseExceptionGroup[BaseException]", inner).exceptions[-1]
    if not isinstance(inner, OSError):
        return "no connection"
    known = (
        inner.errno if inner.errno and inner.errno > 0 else 0
    )  # those of name servers are negative
    return os.strerror(known) if known else inner.strerror or "no connection"
