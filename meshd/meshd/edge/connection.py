"""One client's connection: Hypercorn's machinery with the bounds that it lacks. Knows Hypercorn, as `server` does.

What a connection may cost, and what bounds it (`ConnectionLimits`, docs/decisions/0023):

    line and headers    bytes and count here, h11 for what is not yet whole; time: `head_s` from their first byte
    a body              bytes and time in `http.read_body`; what is not read is not asked for
    an answer           one part at a time: the next is not made before the system took this one, which has
                        `stalled_s`; the system holds `http.send_buffer_bytes`
    idling              `http.keep_alive_s`
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from meshd.edge.errors import RequestError, problem_of
from meshd.edge.http import JSON_TYPE, to_json

if TYPE_CHECKING:
    from meshd.edge.counters import EdgeCounters
    from meshd.edge.limits import ConnectionLimits

Stream: TypeAlias = "trio.SocketStream | trio.SSLStream[trio.SocketStream]"

_CLOSE_S: Final = 1.0  # for the last words of TLS
_LINGER_S: Final = 0.5
_LINGER_BYTES_MAX: Final = 256 * 1024
_VERSIONS: Final = frozenset({b"1.0", b"1.1"})
_READ_BYTES: Final = 65_536


class Connection(TCPServer):
    """A Hypercorn connection with these differences.

    - A write has a deadline. Hypercorn shields writes from cancellation, rightly (half a chunk on the wire
      would spoil all that follows), and without end; here the deadline closes the connection.
    - The head of a response goes out with the first part of its body: one system call, one packet.
    - One task a connection watches the time, where Hypercorn starts one a request; and it watches the heads of
      requests too. It ends with the connection.
    - It speaks HTTP/1.1 and nothing else: no HTTP/2, with or without TLS, and no WebSockets.
    """

    def __init__(
        self,
        wrapper: ASGIWrapper,
        config: HypercornConfig,
        context: WorkerContext,
        stream: Stream,
        limits: ConnectionLimits,
        counters: EdgeCounters,
    ) -> None:
        super().__init__(wrapper, config, context, ConnectionState({}), cast("Any", stream))
        self._wire = stream
        self._limits = limits
        self._counters = counters
        self._head = b""
        self._until_s = trio.current_time() + config.keep_alive_timeout
        self._watch: trio.CancelScope | None = None
        self._in_head = False  # of a request: its first byte is there, its end is not

    async def run(self) -> None:
        """Serve until either side closes."""
        wire = self._wire
        transport = wire if isinstance(wire, trio.SocketStream) else wire.transport_stream
        encrypted, sock = transport is not wire, transport.socket
        try:
            client, server = _address(sock.getpeername()), _address(sock.getsockname())
            async with TaskGroup() as task_group:
                self._task_group = task_group
                protocol = _Http1(
                    self.app,
                    self.config,
                    self.context,
                    cast("Any", task_group),
                    ConnectionState(self.state),
                    encrypted,
                    client,
                    server,
                    self.protocol_send,
                )
                protocol.bound(self.stream, self._limits, self._counters)
                self._http = protocol
                # Where Hypercorn has one that may change to HTTP/2.
                self.protocol = cast("Any", protocol)
                await cast("Any", self.idle_task).restart(task_group, self._idle_timeout)
                await self._read_data()
        except OSError:
            pass
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
                await self._close()

    async def protocol_send(self, event: Event) -> None:
        """Carry out what the protocol wants sent or closed."""
        match event:
            case RawData(data=data) if not self._head and _is_head(data):
                self._head = data  # something always follows: a part of the body, or its end
            case RawData(data=data):
                data, self._head = self._head + data, b""
                if data:
                    await self._write(data)
            case Updated(idle=False):
                self._in_head = False
                self._watch_until(math.inf)
            case Updated():
                # The next one may have begun before the last answer was done.
                self._in_head = self._http.has_begun
                patience_s = (
                    self._limits.head_s if self._in_head else self.config.keep_alive_timeout
                )
                self._watch_until(trio.current_time() + patience_s)
            case _:
                await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        async with self.send_lock:
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + self._limits.stalled_s
                try:
                    await self.stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    await self.protocol.handle(Closed())
            if scope.cancelled_caught:
                self._counters.stalled_closed += 1
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        while True:
            try:
                data = await self.stream.receive_some(_READ_BYTES)
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                break
            if data and self._until_s < math.inf and not self._in_head:
                self._in_head = True
                self._watch_until(trio.current_time() + self._limits.head_s)
            await self.protocol.handle(RawData(bytes(data)))
            if data == b"":
                break
        await self.protocol.handle(Closed())
        await self.idle_task.stop()

    def _watch_until(self, deadline_s: float) -> None:
        self._until_s = deadline_s
        if self._watch is not None:
            self._watch.deadline = deadline_s

    async def _idle_timeout(self) -> None:
        with trio.CancelScope(deadline=self._until_s) as self._watch:
            await self.context.terminated.wait()
        self._watch = None
        if (
            self._until_s == math.inf
        ):  # the daemon stops: a connection in use ends after its response
            return
        with trio.CancelScope(shield=True):
            if self._in_head and not self.context.terminated.is_set():
                await self._http.refuse(
                    RequestError(
                        f"The head of the request did not arrive within {self._limits.head_s:g} s",
                        code="head_too_slow",
                        status=408,
                    )
                )
            else:
                self._counters.idle_closed += 1
            await self._initiate_server_close()

    async def _initiate_server_close(self) -> None:
        await self.protocol.handle(Closed())
        await self._close()

    async def _close(self) -> None:
        """Close, with last words where they can be said at once."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
            if isinstance(self._wire, trio.SocketStream):
                with suppress(
                    trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError
                ):
                    await self._wire.send_eof()
            await self._wire.aclose()


class _Http1(H11Protocol):
    """Hypercorn's HTTP/1.1, without the ways out of it, and strict about what it takes for a request."""

    def bound(self, stream: Stream, limits: ConnectionLimits, counters: EdgeCounters) -> None:
        """Say what it reads from, its bounds, and where refusals are counted; before anything else."""
        self._stream = stream
        self._limits = limits
        self._counters = counters

    @property
    def has_begun(self) -> bool:
        """Whether there is something of a request that is not whole yet."""
        return self.connection.trailing_data[0] != b""

    async def refuse(self, error: RequestError) -> None:
        """Answer what is not passed on to the application; the connection is to be closed then."""
        self._counters.refuse(error.code)
        problem = problem_of(error)
        body = to_json(problem.body())
        headers = [
            (b"content-type", JSON_TYPE),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        await self._send_h11_event(h11.Response(status_code=problem.status, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())

    async def _check_protocol(self, event: h11.Request) -> None:
        """No upgrade to HTTP/2: RFC 9110 (7.8) lets a server ignore one."""

    async def _create_stream(self, request: h11.Request) -> None:
        error = fault_of(request, self._limits)
        if error is not None:
            await self.refuse(error)
            await self._linger()
            await self.send(Closed())
            return
        # An upgrade to WebSockets is ignored likewise: the request is judged as the GET that it is.
        headers = [item for item in request.headers if item[0] != b"upgrade"]
        plain = h11.Request(
            method=request.method,
            target=request.target,
            headers=headers,
            http_version=request.http_version,
        )
        await super()._create_stream(plain if len(headers) < len(request.headers) else request)

    async def _send_error_response(self, status_code: int) -> None:
        await self.refuse(_MALFORMED.get(status_code, _MALFORMED[400])())
        await self._linger()

    async def _linger(self) -> None:
        """Take a little of what still comes: to close at once would take the answer away from the client."""
        taken = 0
        with (
            trio.move_on_after(_LINGER_S),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError),
        ):
            if isinstance(self._stream, trio.SocketStream):
                await self._stream.send_eof()
            while taken < _LINGER_BYTES_MAX and (
                data := await self._stream.receive_some(_READ_BYTES)
            ):
                taken += len(data)


def fault_of(request: h11.Request, limits: ConnectionLimits) -> RequestError | None:
    """What is wrong with the head of a request that h11 took for one; None if nothing is."""
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    if len(request.target) > limits.target_bytes_max:
        return RequestError(
            f"The path and query are longer than {limits.target_bytes_max} bytes",
            code="target_too_long",
            status=414,
        )
    if size > limits.header_bytes_max or len(request.headers) > limits.headers_max:
        return _MALFORMED[431]()
    if request.http_version not in _VERSIONS:
        return RequestError(
            "Only HTTP/1.1 is spoken here (and 1.0)", code="version_not_supported", status=505
        )
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and (
        b"content-length" in names or request.http_version == b"1.0"
    ):
        return _MALFORMED[
            400
        ]()  # two lengths for one body: who reads which is how requests are smuggled
    return None


def _malformed() -> RequestError:
    return RequestError("This is not HTTP/1.1 as meshd reads it", code="malformed_request")


def _head_too_large() -> RequestError:
    return RequestError(
        "The headers are too many, or too large together", code="head_too_large", status=431
    )


def _transfer_not_supported() -> RequestError:
    return RequestError(
        "A body comes with Content-Length, or with Transfer-Encoding: chunked, once",
        code="transfer_not_supported",
        status=501,
    )


_MALFORMED: Final = {400: _malformed, 431: _head_too_large, 501: _transfer_not_supported}
"""By the status that h11 hints at."""


def _address(found: object) -> tuple[str, int] | None:
    """Of a socket, as an application gets it; None for Unix sockets."""
    match found:
        case (str(host), int(port)) | (str(host), int(port), int(), int()):  # IPv4, IPv6
            return host, port
        case _:
            return None


def _is_head(data: bytes) -> bool:
    """Whether it is the head of a response, and not of an interim one (100 Continue)."""
    return data.startswith(b"HTTP/1.1 ") and data[9:10] != b"1" and data.endswith(b"\r\n\r\n")
