"""What the author of a worker process uses: framing, the link to the daemon, and the sandbox.

A worker is a process that the daemon's supervisor starts and talks to over its stdin and stdout. Every
message is a frame: four bytes of length (big endian, at most `FRAME_BYTES_MAX`), then one msgpack map.

    daemon to worker   {"type": "call", "id", "message"}     a request
                       {"type": "cancel", "id"}              nobody waits for it any more
    worker to daemon   {"type": "hello", ...}                ready; the first frame, once
                       (its "step_s": seconds that its longest step takes; silence beyond some of these
                       while calls are open is taken for a hang)
                       {"type": "heartbeat"}                 alive although it has nothing to say
                       {"type": "item", "id", "message"}     a part of an answer
                       {"type": "end", "id"}                 the answer is complete
                       {"type": "error", "id", "kind", "code", "message"}

End of file on stdin means that the daemon is gone or wants this process to end. The process is put into
its sandbox by itself, in `main`, before it loads anything: code run between fork and exec in a process
with threads is not safe (decision 0010).

This module imports no trio, so that a worker starts fast and stays small.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from meshd_plugins.api import Value
from meshd_plugins.workersandbox import ORDER_VARIABLE, Order, apply_sandbox

FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
HEARTBEAT_INTERVAL_S: Final = 1.0
INBOX_MESSAGES_MAX: Final = 1024  # beyond it the daemon's writes wait, and it refuses calls itself
READ_BYTES: Final = 256 * 1024
CLOSING_S: Final = 1.0  # for the main thread to end after stdin was closed

EXIT_STDIN_CLOSED: Final = 0
EXIT_NO_MEMORY: Final = 71  # EX_OSERR
EXIT_BAD_FRAME: Final = 76  # EX_PROTOCOL: what came from the daemon is not our protocol

_HEADER: Final = struct.Struct(">I")
_msgpack: Any = importlib.import_module("msgpack")  # ships no types

Message: TypeAlias = "Mapping[str, Value]"


class FrameError(Exception):
    """What arrived is not a frame of this protocol. State: the stream is of no further use."""


def pack_frame(message: Message) -> bytes:
    """Encode one message. Raises FrameError when it is larger than `FRAME_BYTES_MAX`."""
    packer = _msgpack.Packer(autoreset=False)
    packer.pack(message)
    with packer.getbuffer() as payload:  # a photo is copied once from here, and not twice
        if len(payload) > FRAME_BYTES_MAX:
            raise FrameError(f"message of {len(payload)} bytes; the bound is {FRAME_BYTES_MAX}")
        return b"".join((_HEADER.pack(len(payload)), payload))


class FrameDecoder:
    """Bytes in, messages out; holds at most one incomplete frame."""

    def __init__(self, bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._bytes_max = bytes_max
        self.frame_bytes = 0  # of the message that was yielded last

    @property
    def pending_bytes(self) -> int:
        """Bytes of an incomplete frame; not 0 at end of file means that it was cut short."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[dict[str, Value]]:
        """Yield the messages that `data` completes. Raises FrameError."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                (length,) = _HEADER.unpack_from(self._buffer, start)
                if length > self._bytes_max:
                    raise FrameError(f"frame of {length} bytes; the bound is {self._bytes_max}")
                end = start + _HEADER.size + length
                if len(self._buffer) < end:
                    break
                with (
                    memoryview(self._buffer) as whole,
                    whole[start + _HEADER.size : end] as payload,
                ):
                    message = _unpack(payload)
                start = end
                self.frame_bytes = length
                yield message
        finally:
            del self._buffer[:start]


def _unpack(payload: memoryview) -> dict[str, Value]:
    try:
        decoded: Any = _msgpack.unpackb(payload)
    except Exception as error:  # noqa: BLE001  msgpack lets several unrelated types escape on noise
        raise FrameError(f"not msgpack: {type(error).__name__}") from None
    if not isinstance(decoded, dict) or not isinstance(decoded.get("type"), str):  # pyright: ignore[reportUnknownMemberType]
        raise FrameError("not a map with a type")
    return decoded  # pyright: ignore[reportUnknownVariableType]


@dataclass(frozen=True, slots=True)
class Call:
    """The daemon asks for something; answer with items, then `end` or `error`."""

    id: int
    message: Message


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this call any more: stop, and send nothing further for it."""

    id: int


@dataclass(frozen=True, slots=True)
class Woken:
    """A thread of this process has something for the main thread."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The daemon wants the process to end, or is gone."""


Incoming: TypeAlias = Call | Cancel | Woken | Closed


class Link:
    """The worker's end of the conversation. Used from the main thread only, but for `wake`.

    What is sent is gathered until `flush`, so that one step of a batch costs one system call.
    """

    def __init__(self, read_fd: int, write_fd: int, isolation: Message | None = None) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._isolation = isolation or {}
        self._inbox: queue.Queue[Incoming] = queue.Queue(INBOX_MESSAGES_MAX)
        self._out = bytearray()
        self._sent_at_s = time.monotonic()
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    @property
    def isolation(self) -> Message:
        """How this process is locked in, step by step; empty where nobody asked for it."""
        return self._isolation

    def hello(self, fields: Message) -> None:
        """Say that the worker is ready, and what the daemon should know. Once, first."""
        self._send({**fields, "type": "hello", "isolation": self._isolation})
        self.flush()

    def receive(self, wait_s: float | None) -> Incoming | None:
        """Return what came next; None after `wait_s` (None: as long as it takes) without anything."""
        try:
            return self._inbox.get(block=wait_s != 0.0, timeout=wait_s or None)
        except queue.Empty:
            return None

    def wake(self) -> None:
        """Let `receive` return `Woken`. For other threads; the main thread looks for their work itself."""
        with suppress(queue.Full):  # it has enough to wake up for
            self._inbox.put_nowait(Woken())

    def item(self, call_id: int, message: Message) -> None:
        """Send a part of the answer."""
        self._send({"type": "item", "id": call_id, "message": message})

    def end(self, call_id: int) -> None:
        """Say that the answer is complete."""
        self._send({"type": "end", "id": call_id})

    def error(self, call_id: int, kind: str, code: str, message: str) -> None:
        """Say that there is no answer, or no more of it. `kind`: bad_request, refused or failed."""
        self._send({"type": "error", "id": call_id, "kind": kind, "code": code, "message": message})

    def heartbeat(self) -> None:
        """Call it in every turn of the main loop: it sends only when nothing was sent for a while."""
        if time.monotonic() - self._sent_at_s >= HEARTBEAT_INTERVAL_S:
            self._send({"type": "heartbeat"})
            self.flush()

    def flush(self) -> None:
        """Write what was gathered; blocks while the pipe is full (the daemon always reads)."""
        if not self._out:
            return
        view = memoryview(bytes(self._out))
        self._out.clear()
        while view:
            view = view[os.write(self._write_fd, view) :]
        self._sent_at_s = time.monotonic()

    def _send(self, message: Message) -> None:
        self._out += pack_frame(message)

    def _read(self) -> None:
        """Body of the thread that owns stdin."""
        status = (
            EXIT_BAD_FRAME  # also for what we did not foresee: a dead reader would look like a hang
        )
        decoder = FrameDecoder()
        try:
            while data := os.read(self._read_fd, READ_BYTES):
                for message in decoder.feed(data):
                    self._inbox.put(_incoming(message))
            # The main thread may be deep in native code: it has a moment to end in order.
            status = EXIT_STDIN_CLOSED
            self._inbox.put(Closed(), timeout=CLOSING_S)
            time.sleep(CLOSING_S)
        except FrameError as error:
            os.write(2, f"worker: bad frame on stdin: {error}\n".encode())
        finally:
            os._exit(status)


def _incoming(message: Mapping[str, Value]) -> Incoming:
    call_id = message.get("id")
    body = message.get("message")
    if not isinstance(call_id, int):
        raise FrameError("no id")
    if message["type"] == "call" and isinstance(body, Mapping):
        return Call(call_id, body)
    if message["type"] == "cancel":
        return Cancel(call_id)
    raise FrameError("unknown type")


def main(serve: Callable[[Link], None]) -> None:
    """Run a worker process: sandbox first, then `serve(link)` until it returns; never returns.

    `serve` loads what it needs, calls `link.hello`, and handles what `link.receive` gives until `Closed`.
    stdout is the daemon's: anything that native code prints there goes to stderr instead.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the terminal's group: the daemon decides
    read_fd, write_fd = os.dup(0), os.dup(1)
    null_fd = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null_fd, 0)
    os.close(null_fd)
    os.dup2(2, 1)
    order = os.environ.pop(ORDER_VARIABLE, "")
    isolation = apply_sandbox(Order.from_text(order)) if order else {}
    link = Link(read_fd, write_fd, isolation)
    try:
        serve(link)
        link.flush()
    except BrokenPipeError:
        os._exit(EXIT_STDIN_CLOSED)
    except MemoryError:
        limit = isolation.get("memory", "that of the system")
        os.write(2, f"worker: out of memory: its limit is {limit}\n".encode())
        os._exit(EXIT_NO_MEMORY)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # native threads and atexit handlers of libraries have nothing to add
