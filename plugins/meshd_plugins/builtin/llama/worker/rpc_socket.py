"""How a loopback connection of ggml's RPC leaves the process: as an open socket, handed to the daemon.

ggml speaks TCP to an address. In the worker's own network namespace that reaches nobody; so the worker's
half of each connection is passed to the daemon over a socket that the worker was started with, and the
daemon carries the bytes. The worker copies nothing.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Final

from meshd_plugins.workerkit import Message
from meshd_plugins.workersandbox import LOOPBACK_STEP, SHARED_LOOPBACK

LOOPBACK: Final = "127.0.0.1"
PRIVATE_PORT: Final = 50052
CONNECT_DEADLINE_S: Final = 10.0
_RETRY_S: Final = 0.005
_WAYS: Final = ("private", SHARED_LOOPBACK)


class NoLoopback(Exception):
    """This process may not use loopback. The message is for people."""


def check_loopback(isolation: Message) -> bool:
    """Whether the loopback that may be used is this process's own. Raises NoLoopback: there is none."""
    how = isolation.get(LOOPBACK_STEP)
    if how not in _WAYS:
        why = str(how or "the sandbox is off").removeprefix("no: ")
        raise NoLoopback(
            f"no network namespace for the connection between the parts of a model ({why}): run meshd as root "
            f"or allow user namespaces; or set plugins.llama.rpc.allow_loopback = true, which lets every "
            f"program of this machine reach it"
        )
    return how == "private"


def free_port() -> int:
    """A port of the shared loopback that nobody has now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
        asking.bind((LOOPBACK, 0))
        return int(asking.getsockname()[1])


def hand_out_connection(port: int, control: int) -> None:
    """Connect to a server of this process that is about to listen, and hand the connection to the daemon.

    Raises OSError: it does not come up.
    """
    deadline_s = time.monotonic() + CONNECT_DEADLINE_S
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            try:
                connection.connect((LOOPBACK, port))
                _hand_over(connection, control)
                return
            except ConnectionRefusedError:
                if time.monotonic() > deadline_s:
                    raise
        time.sleep(_RETRY_S)


def listen_for_own(control: int) -> int:
    """Listen for one connection of this process, which is handed to the daemon; the port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((LOOPBACK, 0))
    listener.listen(1)

    def accept() -> None:
        with listener:
            connection, _ = listener.accept()
        with connection:
            _hand_over(connection, control)

    threading.Thread(target=accept, name="accept", daemon=True).start()
    return int(listener.getsockname()[1])


def _hand_over(connection: socket.socket, control: int) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with socket.socket(fileno=control) as channel:
        socket.send_fds(channel, [b"\0"], [connection.fileno()])
