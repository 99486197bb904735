"""Serves the application on the edge's sockets: Hypercorn's connections under an accept loop of ours.

Hypercorn's own `worker_serve` is not used (decision 0012): in it an error in one connection ends the
server, a client that stops reading holds its connection, and a stopping daemon, for ever, and the
application cannot learn which socket a request came in by.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from meshd.edge.context import UNIX_KEY, description_of
from meshd.edge.errors import EdgeError
from meshd.edge.sockets import EdgeSockets, open_edge_sockets

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp, Receive, Scope, Send

    from meshd_plugins.api import Logger

__all__ = ["EdgeError", "EdgeSockets", "open_edge_sockets", "serve_edge"]

_STALLED_S: Final = 30.0
_HEADER_BYTES_MAX: Final = 16 * 1024
_REQUESTS_A_CONNECTION_MAX: Final = 1_000_000

log = cast("Logger", structlog.get_logger("meshd.edge"))


async def serve_edge(
    app: ASGIApp,
    sockets: EdgeSockets,
    *,
    graceful_s: float,
    stalled_s: float = _STALLED_S,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; then stop accepting, and give open requests `graceful_s` to finish.

    The sockets are closed on return. A client that takes no byte for `stalled_s` loses its connection.
    """
    connections = _Connections(sockets, graceful_s=graceful_s, stalled_s=stalled_s)
    try:
        async with trio.open_nursery() as nursery:
            holding = cast("trio.Nursery", await nursery.start(connections.hold))
            try:
                async with trio.open_nursery() as accepting:
                    for application, listening in (
                        (app, sockets.tcp),
                        (_marked_unix(app), sockets.unix),
                    ):
                        accepting.start_soon(connections.accept, application, listening, holding)
                    task_status.started()
            finally:
                connections.stopped.set()
    finally:
        sockets.close()


class _Connections:
    """All open connections of one server."""

    def __init__(self, sockets: EdgeSockets, *, graceful_s: float, stalled_s: float) -> None:
        self.stopped = trio.Event()
        self._emptied = trio.Event()
        self._live: set[trio.SocketStream] = set()
        self._room = trio.Semaphore(sockets.connections_max)
        self._graceful_s = graceful_s
        self._stalled_s = stalled_s
        self._config = _hypercorn_config(sockets.keep_alive_s)
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

    async def accept(self, app: ASGIApp, listening: socket.socket, nursery: trio.Nursery) -> None:
        """Accept until cancelled; above the bound further connections wait in the backlog."""
        sockets = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        listener = _RoomyListener(sockets, self._room)
        wrapper = ASGIWrapper(cast("Any", app))
        handler = partial(self._handle, wrapper)
        await trio.serve_listeners(handler, [listener], handler_nursery=nursery)

    async def _handle(self, wrapper: ASGIWrapper, stream: trio.SocketStream) -> None:
        self._live.add(stream)
        try:
            await _Connection(wrapper, self._config, self._context, stream, self._stalled_s).run()
        except* Exception as group:  # noqa: BLE001 - the per-connection boundary
            log.error("connection.failed", **description_of(group))
        finally:
            self._live.discard(stream)
            self._room.release()
            if not self._live and self.stopped.is_set():
                self._emptied.set()


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


class _Connection(TCPServer):
    """A Hypercorn connection with four differences.

    - A write has a deadline. Hypercorn shields writes from cancellation, rightly (half a chunk on the wire
      would spoil all that follows), and without end; here the deadline closes the connection.
    - The head of a response goes out with the first part of its body: one system call, one packet.
    - Idle time is watched by one task a connection, where Hypercorn starts one a request.
    - That task ends with the connection. Hypercorn's holds a closed connection until its idle time is up.
    """

    def __init__(
        self,
        wrapper: ASGIWrapper,
        config: HypercornConfig,
        context: WorkerContext,
        stream: trio.SocketStream,
        stalled_s: float,
    ) -> None:
        super().__init__(wrapper, config, context, ConnectionState({}), cast("Any", stream))
        self._stalled_s = stalled_s
        self._head = b""
        self._idle_until_s = trio.current_time() + config.keep_alive_timeout

    async def protocol_send(self, event: Event) -> None:
        """Carry out what the protocol wants sent or closed."""
        match event:
            case RawData(data=data) if not self._head and _is_head(data):
                self._head = data  # something always follows: a part of the body, or its end
            case RawData(data=data):
                data, self._head = self._head + data, b""
                if data:
                    await self._write(data)
            case Updated(idle=idle):
                now_s = trio.current_time()
                self._idle_until_s = now_s + self.config.keep_alive_timeout if idle else math.inf
            case _:
                await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        async with self.send_lock:
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + self._stalled_s
                try:
                    await self.stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    await self.protocol.handle(Closed())
            if scope.cancelled_caught:
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        while not self.context.terminated.is_set():
            # While a request runs there is no deadline; look again after the shortest that may follow.
            latest_s = trio.current_time() + self.config.keep_alive_timeout
            with trio.move_on_at(min(self._idle_until_s, latest_s)):
                await self.context.terminated.wait()
            if self._idle_until_s <= trio.current_time():
                break
        if self._idle_until_s < math.inf:  # a connection in use ends after its response
            with trio.CancelScope(shield=True):
                await self._initiate_server_close()


def _is_head(data: bytes) -> bool:
    """Whether it is the head of a response, and not of an interim one (100 Continue)."""
    return data.startswith(b"HTTP/1.1 ") and data[9:10] != b"1" and data.endswith(b"\r\n\r\n")


def _hypercorn_config(keep_alive_s: float) -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    config.errorlog = None  # what an application raises is caught and logged in its own front
    config.include_server_header = False
    config.h11_max_incomplete_size = _HEADER_BYTES_MAX
    config.keep_alive_timeout = keep_alive_s
    config.keep_alive_max_requests = _REQUESTS_A_CONNECTION_MAX
    return config


def _marked_unix(app: ASGIApp) -> ASGIApp:
    """The application, told that its requests come in by the Unix socket."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        scope[UNIX_KEY] = True
        await app(scope, receive, send)

    return marked
