"""Streams of many requests, read by one thread without a library: the client's time is in every figure.

Both clients do the same: `send` starts a request, `receive` tells what came of any of them and when. The
clock is read once a read of a socket or pipe, before anything is decoded.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, cast

from meshd_plugins.api import Privacy
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.workerkit import FrameDecoder, pack_frame

READ_BYTES: Final = 256 * 1024
SEND_DEADLINE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: greedy, its end-of-text tokens forbidden so that its length is known."""

    prompt: str
    tokens: int  # to generate
    forbidden: tuple[int, ...] = ()
    reuse: bool = False  # a prefix that was computed before may be used


class Arrival(NamedTuple):
    """Something came for a request."""

    request: int
    at_s: float
    tokens: int = 0
    ended: bool = False
    error: str = ""  # its code; then it has ended


class Client(Protocol):
    """One way to reach an engine."""

    def send(self, ask: Ask) -> int:
        """Start a request and return its number."""
        ...

    def cancel(self, request: int) -> None:
        """Do not wait for it any more."""
        ...

    def receive(self, wait_s: float) -> list[Arrival]:
        """Return what came within that time, at least one unless none did."""
        ...

    def close(self) -> None:
        """Read no more. The pipes of a worker belong to whoever started it."""
        ...


# -- the worker's pipe -----------------------------------------------------------------------------------


def worker_message(ask: Ask) -> dict[str, Any]:
    """Return what the daemon would send the worker for it."""
    sampling = Sampling(
        seed=1,
        max_tokens=ask.tokens,
        temperature=0.0,
        repeat_penalty=1.0,
        logit_bias=tuple((token, -100.0) for token in ask.forbidden),
    )
    # Another caller shares no prefix: that is how a request that must be computed anew is told apart.
    caller = "bench" if ask.reuse else f"bench {time.monotonic_ns()}"
    return {
        "operation": "complete",
        "prompt": ask.prompt,
        "sampling": sampling.to_wire(),
        "caller": caller,
        "privacy": int(Privacy.MESH),
        "tags": [],
    }


class PipeClient:
    """The daemon's end of a worker's pipe, for a process that was started without a supervisor."""

    def __init__(self, write_fd: int, read_fd: int) -> None:
        self._write_fd = write_fd
        self._read_fd = read_fd
        os.set_blocking(read_fd, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(read_fd, selectors.EVENT_READ)
        self._decoder = FrameDecoder()
        self._last = 0
        self._open: set[int] = set()
        self.hello: Mapping[str, Any] = {}

    def wait_for_hello(self, deadline_s: float) -> None:
        """Raises TimeoutError; EOFError when the worker ended."""
        until_s = time.monotonic() + deadline_s
        while not self.hello:
            if time.monotonic() > until_s:
                raise TimeoutError("the worker does not say hello")
            self.receive(1.0)

    def send(self, ask: Ask) -> int:
        self._last += 1
        self._open.add(self._last)
        self._write({"type": "call", "id": self._last, "message": worker_message(ask)})
        return self._last

    def cancel(self, request: int) -> None:
        self._open.discard(request)
        self._write({"type": "cancel", "id": request})

    def _write(self, frame: Mapping[str, Any]) -> None:
        view = memoryview(pack_frame(frame))
        while view:
            view = view[os.write(self._write_fd, view) :]

    def receive(self, wait_s: float) -> list[Arrival]:
        if not self._selector.select(wait_s):
            return []
        data = os.read(self._read_fd, READ_BYTES)
        at_s = time.perf_counter()
        if not data:
            raise EOFError("the worker ended")
        arrivals: list[Arrival] = []
        for frame in self._decoder.feed(data):
            if frame["type"] == "hello":
                self.hello = frame
            elif frame.get("id") in self._open:
                arrivals += self._arrived(frame, at_s)
        return arrivals

    def _arrived(self, frame: Mapping[str, Any], at_s: float) -> list[Arrival]:
        request = int(frame["id"])
        if frame["type"] == "item":
            tokens = frame["message"].get("token_ids")
            return [Arrival(request, at_s, len(tokens))] if tokens else []
        self._open.discard(request)
        return [Arrival(request, at_s, ended=True, error=str(frame.get("code", "")))]

    def close(self) -> None:
        self._selector.close()


# -- HTTP --------------------------------------------------------------------------------------------------


class Dialect(Protocol):
    """How one kind of server is asked, and what its events mean."""

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Return path and body."""
        ...

    def tokens_so_far(self, event: Mapping[str, Any], counted: int) -> int:
        """Return the tokens of the answer with this event."""
        ...


class ServerDialect:
    """llama-server's own: leaner than its OpenAI face, so it is the one to beat."""

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        body = {
            "prompt": ask.prompt,
            "n_predict": ask.tokens,
            "stream": True,
            "temperature": 0.0,
            "samplers": ["top_k"],  # greedy, in the fewest passes over the vocabulary
            "top_k": 1,
            "seed": 1,
            "ignore_eos": bool(ask.forbidden),
            "cache_prompt": ask.reuse,
        }
        return "/completion", body

    def tokens_so_far(self, event: Mapping[str, Any], counted: int) -> int:
        return max(counted, int(event.get("tokens_predicted", counted)))


class OpenAiDialect:
    """Ours, as any OpenAI client speaks it. An event is a token until the usage tells better."""

    def __init__(self, model: str) -> None:
        self._model = model

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        body = {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "repeat_penalty": 1,
            "seed": 1,
            "logit_bias": {str(token): -100 for token in ask.forbidden},
        }
        return "/v1/completions", body

    def tokens_so_far(self, event: Mapping[str, Any], counted: int) -> int:
        if event.get("usage"):
            return int(event["usage"]["completion_tokens"])
        return counted + sum(1 for choice in event.get("choices", ()) if choice.get("text"))


@dataclass(slots=True)
class _Exchange:
    """One connection with one request."""

    request: int
    socket: socket.socket
    raw: bytearray = field(default_factory=bytearray)  # not yet taken apart
    body: bytearray = field(default_factory=bytearray)
    status: int = 0
    chunked: bool = False
    tokens: int = 0
    error: str = ""
    complete: bool = False  # the last event or chunk is here

    def feed(self, data: bytes) -> None:
        """Take bytes; `body` grows by what of them is content."""
        self.raw += data
        if not self.status:
            head, mark, rest = bytes(self.raw).partition(b"\r\n\r\n")
            if not mark:
                return
            self.status = int(head[9:12])
            self.chunked = b"transfer-encoding: chunked" in head.lower()
            self.raw = bytearray(rest)
        if not self.chunked:
            self.body += self.raw
            self.raw.clear()
            return
        while (end := self.raw.find(b"\r\n")) > 0:
            size = int(self.raw[:end], 16)
            if len(self.raw) < end + size + 4:
                return
            self.body += self.raw[end + 2 : end + 2 + size]
            del self.raw[: end + size + 4]
            self.complete = self.complete or size == 0

    def events(self) -> list[dict[str, Any]]:
        """Take the whole events out of the body."""
        found: list[dict[str, Any]] = []
        while (end := self.body.find(b"\n\n")) >= 0:
            line = bytes(self.body[:end])
            del self.body[: end + 2]
            if line == b"data: [DONE]":
                self.complete = True
            elif line.startswith(b"data: "):
                found.append(json.loads(line[6:]))
        return found


class HttpClient:
    """A connection a request, all of them read by whoever calls `receive`."""

    def __init__(self, host: str, port: int, dialect: Dialect) -> None:
        self._address = (host, port)
        self._dialect = dialect
        self._selector = selectors.DefaultSelector()
        self._exchanges: dict[int, _Exchange] = {}
        self._last = 0

    def send(self, ask: Ask) -> int:
        path, body = self._dialect.request(ask)
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        connection = socket.create_connection(self._address, SEND_DEADLINE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode() + content)
        connection.setblocking(False)
        self._last += 1
        exchange = _Exchange(self._last, connection)
        self._exchanges[self._last] = exchange
        self._selector.register(connection, selectors.EVENT_READ, exchange)
        return self._last

    def cancel(self, request: int) -> None:
        if request in self._exchanges:
            self._end(self._exchanges[request])

    def _end(self, exchange: _Exchange) -> None:
        self._selector.unregister(exchange.socket)
        exchange.socket.close()
        del self._exchanges[exchange.request]

    def receive(self, wait_s: float) -> list[Arrival]:
        arrivals: list[Arrival] = []
        for key, _ in self._selector.select(wait_s):
            exchange: _Exchange = key.data
            try:
                data = exchange.socket.recv(READ_BYTES)
            except ConnectionResetError:
                data = b""
            arrivals += self._arrived(exchange, data, time.perf_counter())
        return arrivals

    def _arrived(self, exchange: _Exchange, data: bytes, at_s: float) -> list[Arrival]:
        exchange.feed(data)
        arrivals: list[Arrival] = []
        if exchange.status == 200:
            for event in exchange.events():
                if "error" in event:
                    exchange.error = _code(event["error"])
                tokens = self._dialect.tokens_so_far(event, exchange.tokens)
                if tokens > exchange.tokens:
                    arrivals.append(
                        Arrival(exchange.request, at_s, tokens=tokens - exchange.tokens)
                    )
                    exchange.tokens = tokens
        if not data or exchange.complete:
            error = exchange.error
            if exchange.status != 200:
                error = _refusal(exchange)
            elif not exchange.complete:
                error = error or "cut_short"
            arrivals.append(Arrival(exchange.request, at_s, ended=True, error=error))
            self._end(exchange)
        return arrivals

    def close(self) -> None:
        for exchange in tuple(self._exchanges.values()):
            self._end(exchange)
        self._selector.close()


def _refusal(exchange: _Exchange) -> str:
    """Status and code of an answer that is an error."""
    try:
        error = json.loads(bytes(exchange.body))["error"]
        return f"{exchange.status} {_code(error)}"
    except (ValueError, LookupError, TypeError):
        return f"{exchange.status}"


def _code(error: Any) -> str:
    if not isinstance(error, Mapping):
        return str(error)
    fields = cast("Mapping[str, Any]", error)
    return str(fields.get("code") or fields.get("type") or "error")
