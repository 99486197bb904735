"""A model server that answers at once: `python -m tests.bench.mock_upstream [--port 0]`.

What a gateway is measured against: POST /v1/chat/completions, whole or streamed, and GET /v1/models, on
loopback, keep-alive, ready-made bytes. It prints its port once it listens, and serves until it is ended.
Bodies must come with a Content-Length. HTTP is read by hand here, since every µs of it is in each figure
and takes from the same cores; this is no server for anything else.
"""

from __future__ import annotations

import argparse
import json

import trio

HOST = "127.0.0.1"
MODEL = "mock"
TEXT = "hello mesh"
HEAD_BYTES_MAX = 65_536
BODY_BYTES_MAX = 1_048_576

ANSWER = {
    "id": "chatcmpl-mock",
    "object": "chat.completion",
    "created": 0,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
}
MODELS = {
    "object": "list",
    "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "mock"}],
}


def whole(status: str, body: object) -> bytes:
    """An answer with its length."""
    content = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def chunk_of(data: bytes) -> bytes:
    """One piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(delta: dict[str, str], finish_reason: str | None) -> bytes:
    """One server-sent event."""
    body = {
        "id": "chatcmpl-mock",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


WHOLE = whole("200 OK", ANSWER)
LIST = whole("200 OK", MODELS)
NOT_FOUND = whole("404 Not Found", {"error": {"message": "only /v1/chat/completions, /v1/models"}})
# Two writes, as a server that generates would do: the first piece, then the end.
FIRST = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunk_of(event({"role": "assistant", "content": TEXT}, None))
)
REST = chunk_of(event({}, "stop")) + chunk_of(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Connection:
    """Requests of one connection, one after another."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def serve(self) -> None:
        """Answer until the client closes, or sends what is not understood here."""
        while (request := await self._request()) is not None:
            line, body = request
            match line.split(b" ")[:2]:
                case [b"POST", b"/v1/chat/completions"] if json.loads(body).get("stream"):
                    await self._stream.send_all(FIRST)
                    await self._stream.send_all(REST)
                case [b"POST", b"/v1/chat/completions"]:
                    await self._stream.send_all(WHOLE)
                case [b"GET", b"/v1/models"]:
                    await self._stream.send_all(LIST)
                case _:
                    await self._stream.send_all(NOT_FOUND)

    async def _request(self) -> tuple[bytes, bytes] | None:
        """The request line and the body; None at the end of the connection."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > HEAD_BYTES_MAX or not await self._more():
                return None
        line, *fields = self._buffer[:end].split(b"\r\n")
        length = 0
        for field in fields:
            name, _, value = field.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if length > BODY_BYTES_MAX:
            return None
        begins, ends = end + 4, end + 4 + length
        while len(self._buffer) < ends:
            if not await self._more():
                return None
        body, self._buffer = self._buffer[begins:ends], self._buffer[ends:]
        return line, body

    async def _more(self) -> bool:
        data = await self._stream.receive_some(65_536)
        self._buffer += data
        return bool(data)


async def handle(stream: trio.SocketStream) -> None:
    """Serve one connection; one that breaks or sends nonsense ends alone."""
    try:
        await Connection(stream).serve()
    except (trio.BrokenResourceError, ValueError):
        return


async def serve(port: int) -> None:
    """Listen, print the port, serve until cancelled."""
    listeners = await trio.open_tcp_listeners(port, host=HOST)
    print(listeners[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(handle, listeners)


def main() -> None:
    """Serve; ends with a signal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    trio.run(serve, parser.parse_args().port)


if __name__ == "__main__":
    main()
