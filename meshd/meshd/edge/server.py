"""Serves the application on the edge's sockets: Hypercorn's connections under an accept loop of ours.

Hypercorn's own `worker_serve` is not used (decision 0012): in it an error in one connection ends the
server, a client that stops reading holds its connection, and a stopping daemon, for ever, and the
application cannot learn which socket a request came in by.

On a port that others can reach, the first byte of a connection tells TLS from plain HTTP. Plain HTTP is for this
machine only: whoever else speaks it is told so.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.worker_context import WorkerContext

from meshd.edge.connection import Connection, Stream
from meshd.edge.context import UNIX_KEY, description_of
from meshd.edge.counters import EdgeCounters
from meshd.edge.errors import EdgeError, RequestError, problem_of
from meshd.edge.http import to_json
from meshd.edge.limits import ConnectionLimits
from meshd.edge.sockets import EdgeSockets, open_edge_sockets
from meshd.edge.sources import is_loopback, source_of

if TYPE_CHECKING:
    import ssl

    from starlette.types import ASGIApp, Receive, Scope, Send

    from meshd_plugins.api import Logger

__all__ = ["EdgeError", "EdgeSockets", "open_edge_sockets", "serve_edge"]

_REQUESTS_A_CONNECTION_MAX: Final = 1_000_000
_TLS_RECORD: Final = b"\x16"  # a handshake, with which every TLS connection begins
_FAREWELL_S: Final = 0.25  # for a client that is turned away

log = cast("Logger", structlog.get_logger("meshd.edge"))


async def serve_edge(
    app: ASGIApp,
    sockets: EdgeSockets,
    *,
    graceful_s: float,
    limits: ConnectionLimits | None = None,
    tls: ssl.SSLContext | None = None,
    counters: EdgeCounters | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; then stop accepting, and give open requests `graceful_s` to finish.

    The sockets are closed on return. With `tls`, only this machine may speak plain HTTP on the TCP port.
    """
    connections = _Connections(
        sockets,
        graceful_s=graceful_s,
        limits=limits or ConnectionLimits(),
        tls=tls,
        counters=counters or EdgeCounters(),
    )
    try:
        async with trio.open_nursery() as nursery:
            holding = cast("trio.Nursery", await nursery.start(connections.hold))
            try:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(connections.accept_tcp, app, sockets.tcp, holding)
                    unix = _marked_unix(app)
                    accepting.start_soon(connections.accept_unix, unix, sockets.unix, holding)
                    task_status.started()
            finally:
                connections.stopped.set()
    finally:
        sockets.close()


class _Connections:
    """All open connections of one server."""

    def __init__(
        self,
        sockets: EdgeSockets,
        *,
        graceful_s: float,
        limits: ConnectionLimits,
        tls: ssl.SSLContext | None,
        counters: EdgeCounters,
    ) -> None:
        self.stopped = trio.Event()
        self._emptied = trio.Event()
        self._live: set[trio.SocketStream] = set()
        self._of_source: dict[str, int] = {}
        self._connections_max = sockets.connections_max
        self._graceful_s = graceful_s
        self._limits = limits
        self._tls = tls
        self._counters = counters
        self._config = _hypercorn_config(sockets.keep_alive_s, limits)
        self._context = WorkerContext(None)

    async def hold(self, *, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """Own the connections' nursery. It outlives the accepting by at most `graceful_s`."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                task_status.started(nursery)
                await self.stopped.wait()
                await self._context.terminated.set()  # ends idle connections, and others after use
                if self._live:
                    with trio.move_on_after(self._graceful_s):
                        await self._emptied.wait()
                for stream in tuple(self._live):  # wakes a write that waits for its client to read
                    await trio.aclose_forcefully(stream)
                nursery.cancel_scope.cancel()

    async def accept_tcp(
        self, app: ASGIApp, listening: socket.socket, nursery: trio.Nursery
    ) -> None:
        """Accept until cancelled; above the bound further connections wait in the backlog."""
        await self._accept(
            partial(self._serve_tcp, ASGIWrapper(cast("Any", app))), listening, nursery
        )

    async def accept_unix(
        self, app: ASGIApp, listening: socket.socket, nursery: trio.Nursery
    ) -> None:
        """The same, with a bound of its own: whatever happens on TCP, an operator gets through."""
        await self._accept(partial(self._serve, ASGIWrapper(cast("Any", app))), listening, nursery)

    async def _accept(
        self,
        serve: Callable[[trio.SocketStream], Awaitable[None]],
        listening: socket.socket,
        nursery: trio.Nursery,
    ) -> None:
        room = trio.Semaphore(self._connections_max)
        sockets = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        handler = partial(self._handle, serve, room)
        await trio.serve_listeners(
            handler, [_RoomyListener(sockets, room)], handler_nursery=nursery
        )

    async def _handle(
        self,
        serve: Callable[[trio.SocketStream], Awaitable[None]],
        room: trio.Semaphore,
        stream: trio.SocketStream,
    ) -> None:
        self._live.add(stream)
        self._counters.accepted += 1
        self._counters.open += 1
        try:
            await serve(stream)
        except* OSError:
            pass  # the client went
        except* Exception as group:  # noqa: BLE001 - the per-connection boundary
            log.error("connection.failed", **description_of(group))
        finally:
            self._counters.open -= 1
            self._live.discard(stream)
            room.release()
            if not self._live and self.stopped.is_set():
                self._emptied.set()

    async def _serve_tcp(self, wrapper: ASGIWrapper, stream: trio.SocketStream) -> None:
        address = str(stream.socket.getpeername()[0])
        source = source_of(address)
        held = self._of_source.get(source, 0)
        if held >= self._limits.per_source_max:
            await self._turn_away(stream, _too_many(self._limits.per_source_max))
            return
        self._of_source[source] = held + 1
        try:
            secured = await self._secured(stream, address)
            if secured is not None:
                await self._serve(wrapper, secured)
        finally:
            self._of_source[source] -= 1
            if not self._of_source[source]:
                del self._of_source[source]

    async def _serve(self, wrapper: ASGIWrapper, stream: Stream) -> None:
        await Connection(
            wrapper, self._config, self._context, stream, self._limits, self._counters
        ).run()

    async def _secured(self, stream: trio.SocketStream, address: str) -> Stream | None:
        """The stream to speak HTTP on; None when nothing is to be spoken with this client."""
        if self._tls is None:
            return stream
        with trio.move_on_after(self._limits.head_s):
            first = await stream.socket.recv(1, socket.MSG_PEEK)
            if first != _TLS_RECORD:
                if first and not is_loopback(address):
                    await self._turn_away(stream, _https_required())
                    return None
                return stream
            encrypted = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
            with suppress(trio.BrokenResourceError):
                await encrypted.do_handshake()
                return encrypted
        self._counters.refuse("tls_failed")
        return None

    async def _turn_away(self, stream: trio.SocketStream, error: RequestError) -> None:
        """Tell a client that is not served why, if it listens."""
        self._counters.refuse(error.code)
        problem = problem_of(error)
        body = to_json(problem.body())
        head = (
            f"HTTP/1.1 {problem.status} Refused\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with trio.move_on_after(_FAREWELL_S), suppress(trio.BrokenResourceError):
            # To close over what was not read would take the answer away.
            await stream.receive_some()
            await stream.send_all(head.encode() + body)
            await stream.send_eof()
            await stream.receive_some()


class _RoomyListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts only while there is room."""

    def __init__(self, listener: trio.SocketListener, room: trio.Semaphore) -> None:
        self._listener = listener
        self._room = room

    async def accept(self) -> trio.SocketStream:
        """Wait for room, then for a connection. Whoever gets the stream gives the room back."""
        await self._room.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self._room.release()
            raise

    async def aclose(self) -> None:
        """Stop listening."""
        await self._listener.aclose()


def _too_many(per_source_max: int) -> RequestError:
    return RequestError(
        f"Your address has {per_source_max} connections open, as many as it may "
        "(http.connections_per_source_max)",
        code="too_many_connections",
        status=429,
        retry_after_s=1,
    )


def _https_required() -> RequestError:
    return RequestError(
        "This port speaks HTTPS: use https:// in the URL. If you sent an API key, it crossed the network in "
        "the clear: revoke it",
        code="https_required",
    )


def _hypercorn_config(keep_alive_s: float, limits: ConnectionLimits) -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    config.errorlog = None  # what an application raises is caught and logged in its own front
    config.include_server_header = False
    config.h11_max_incomplete_size = limits.header_bytes_max
    config.keep_alive_timeout = keep_alive_s
    config.keep_alive_max_requests = _REQUESTS_A_CONNECTION_MAX
    return config


def _marked_unix(app: ASGIApp) -> ASGIApp:
    """The application, told that its requests come in by the Unix socket."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        scope[UNIX_KEY] = True
        await app(scope, receive, send)

    return marked
