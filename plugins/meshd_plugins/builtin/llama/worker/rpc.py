"""The process that lends this machine's memory and arithmetic: `python -m ...llama.worker.rpc`.

It lives for one session: a model of another node, or none, is held until the connection ends. So what one
model left in memory is never seen by the next, and whoever upsets this process has upset only their own.
Its configuration is one JSON argument. Its hello comes when ggml's server listens on its own loopback and the
connection to it was handed to the daemon; or with {"refused"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from meshd_plugins.builtin.llama.worker.rpc_binding import Device, RpcLibrary, RpcUnavailable
from meshd_plugins.builtin.llama.worker.rpc_socket import (
    PRIVATE_PORT,
    NoLoopback,
    check_loopback,
    free_port,
    hand_out_connection,
)
from meshd_plugins.workerkit import Call, Closed, Link, main

MEASURE_BYTES: Final = 32 * 1024 * 1024
MEASURE_ROUNDS: Final = 4
WAIT_S: Final = 0.5
EXIT_SERVER_ENDED: Final = 6


@dataclass(frozen=True, slots=True)
class RpcArguments:
    """What the process is started with."""

    control: (
        int  # the socket over which the connection goes to the daemon; -1: only say what there is
    )
    threads: int  # 0: one for each processor it may use
    gpu: bool  # lend the GPU's memory instead of the machine's

    def to_text(self) -> str:
        """As JSON, for the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> RpcArguments:
        """Read it back."""
        raw: dict[str, Any] = json.loads(text)
        return cls(**raw)


def serve(link: Link) -> None:
    """Say what there is, and serve one session."""
    arguments = RpcArguments.from_text(sys.argv[1])
    try:
        is_private = check_loopback(link.isolation)
        library = RpcLibrary()
        device = _pick(library.devices(), gpu=arguments.gpu)
    except (NoLoopback, RpcUnavailable) as error:
        link.hello({"refused": str(error)})
        _wait(link)
        return
    if arguments.control >= 0:
        _silence()
        port = PRIVATE_PORT if is_private else free_port()
        threads = arguments.threads or len(os.sched_getaffinity(0))

        def compute() -> None:
            library.serve(port, threads, device)
            os.write(2, b"the RPC server ended: its port is taken\n")
            os._exit(EXIT_SERVER_ENDED)

        threading.Thread(target=compute, name="rpc", daemon=True).start()
        hand_out_connection(port, arguments.control)
    link.hello(
        {
            "build": library.build,
            "device": device.description,
            "gpu": device.is_gpu,
            "free_bytes": device.free_bytes,
            "total_bytes": device.total_bytes,
            "copies_gb_per_s": _measure() if arguments.control < 0 else 0.0,
        }
    )
    _wait(link)


def _silence() -> None:
    """Ggml's server prints what it does; on stderr are only errors then, and what a dead one said last."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _pick(devices: Sequence[Device], *, gpu: bool) -> Device:
    """Raises RpcUnavailable: there is no such device."""
    for device in devices:
        if device.is_gpu == gpu:
            return device
    raise RpcUnavailable("no GPU that this build of llama.cpp can use" if gpu else "no device")


def _measure() -> float:
    """How fast memory is read and written here: what bounds a token's time on most devices. GB/s."""
    source, target = (ctypes.create_string_buffer(MEASURE_BYTES) for _ in range(2))
    ctypes.memmove(target, source, MEASURE_BYTES)  # the pages are there now
    began_s = time.monotonic()
    for _ in range(MEASURE_ROUNDS):
        ctypes.memmove(target, source, MEASURE_BYTES)
    return round(2 * MEASURE_ROUNDS * MEASURE_BYTES / 1e9 / (time.monotonic() - began_s), 1)


def _wait(link: Link) -> None:
    """Show that this process lives until the daemon ends it. A call is open while the session lasts."""
    while not isinstance(incoming := link.receive(WAIT_S), Closed):
        if isinstance(incoming, Call):
            link.item(incoming.id, {})
        link.flush()
        link.heartbeat()


if __name__ == "__main__":
    main(serve)
