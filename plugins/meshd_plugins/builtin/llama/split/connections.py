"""The daemon's side of a worker's RPC connection: taken from the worker, and joined to a tunnel."""

from __future__ import annotations

import socket
from typing import Final

import trio

from meshd_plugins.api import Failed

READ_BYTES: Final = 128 * 1024


class Control:
    """A pair of sockets: the worker hands over its connection on the one, and it comes out of the other."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)

    @property
    def theirs(self) -> int:
        """The number of the worker's end."""
        return self._theirs.fileno()

    async def receive(self) -> trio.SocketStream:
        """The connection, once the worker hands it over. Raises Failed: what it sent is none."""
        await trio.lowlevel.wait_readable(self._ours)
        flags = socket.MSG_CMSG_CLOEXEC
        _, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1, flags)
        if not descriptors:
            raise Failed("the worker ended before it was connected", code="worker_died")
        connection = socket.socket(fileno=descriptors[0])
        if (connection.family, connection.type) != (socket.AF_INET, socket.SOCK_STREAM):
            connection.close()
            raise Failed("the worker handed over something else than a connection", code="failed")
        connection.setblocking(False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(connection))

    def close(self) -> None:
        """Give both ends back; more than once does nothing."""
        self._ours.close()
        self._theirs.close()


async def read(connection: trio.SocketStream) -> bytes:
    """The next bytes, none at the end, however it came about."""
    try:
        return bytes(await connection.receive_some(READ_BYTES))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return b""


async def write(connection: trio.SocketStream, data: bytes) -> bool:
    """Write; False when nobody reads any more."""
    try:
        await connection.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    return True
