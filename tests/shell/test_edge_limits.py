"""What one client may cost the edge, through real sockets: every bound holds, says so, and is counted."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from tests.shell.support_fake_mesh import FakeMesh, serving

from meshd.edge.counters import EdgeCounters
from meshd.edge.limits import ConnectionLimits, EdgeLimits
from meshd.edge.server import EdgeSockets

TIME_S = 15.0
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
LAST = b"Connection: close\r\n\r\n"
QUESTION = json.dumps(
    {"model": "knowledge.gpt/general", "messages": [{"role": "user", "content": "Hi"}]}
).encode()
WELL = POST + b"Content-Length: %d\r\n" % len(QUESTION)

Test = Callable[[FakeMesh, EdgeSockets, EdgeCounters], Awaitable[None]]


def run(
    folder: Path,
    test: Test,
    limits: ConnectionLimits | None = None,
    edge_limits: EdgeLimits | None = None,
    **options: float,
) -> None:
    async def main() -> None:
        mesh, counters = FakeMesh(), EdgeCounters()
        keep_alive_s = options.get("keep_alive_s", 60.0)
        connections_max = int(options.get("connections_max", 64))
        with trio.fail_after(TIME_S):
            async with serving(
                mesh,
                folder,
                edge_limits,
                connection_limits=limits or ConnectionLimits(),
                counters=counters,
                keep_alive_s=keep_alive_s,
                connections_max=connections_max,
            ) as sockets:
                await test(mesh, sockets, counters)

    trio.run(main)


async def connect(sockets: EdgeSockets) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", sockets.port)


async def read_all(stream: trio.SocketStream) -> bytes:
    data = b""
    with suppress(trio.BrokenResourceError):  # a reset ends it as well
        async for part in stream:
            data += part
    return data


async def read_answer(stream: trio.SocketStream) -> tuple[bytes, bytes]:
    """Head and body of one answer that says how long it is, or of what comes until the end."""
    data = b""
    with suppress(trio.BrokenResourceError):
        async for part in stream:
            data += part
            head, _, body = data.partition(b"\r\n\r\n")
            _, _, length = head.lower().partition(b"content-length: ")
            if length and len(body) >= int(length.split(b"\r\n")[0]):
                break
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


async def answer_to(sockets: EdgeSockets, request: bytes) -> tuple[int, str]:
    """Status and error code of the one answer to what is sent."""
    async with await connect(sockets) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(request)
        head, body = await read_answer(stream)
    assert head.startswith(b"HTTP/1.1 "), head
    assert b"connection: close" in head.lower()
    status = int(head.split()[1])
    if status == 200:
        return status, ""
    error = json.loads(body)["error"]
    assert error["message"]
    assert error["type"]
    return status, error["code"]


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (GET + LAST, 200, ""),
        (WELL + LAST + QUESTION, 200, ""),
        # the head: how many headers, how large, how long a target
        (GET + b"".join(b"X-%d: y\r\n" % i for i in range(98)) + LAST, 200, ""),
        (GET + b"".join(b"X-%d: y\r\n" % i for i in range(99)) + LAST, 431, "head_too_large"),
        (GET + b"X: " + b"y" * 17_000 + b"\r\n" + LAST, 431, "head_too_large"),
        (GET + b"X: " + b"y" * 200_000, 431, "head_too_large"),
        (GET + (b"X: " + b"y" * 1000 + b"\r\n") * 17 + LAST, 431, "head_too_large"),
        (
            b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n" + LAST,
            414,
            "target_too_long",
        ),
        (b"GET /" + b"a" * 90_000, 431, "head_too_large"),
        # two lengths for one body
        (WELL + b"Content-Length: 3\r\n" + LAST + QUESTION, 400, "malformed_request"),
        (WELL + b"Transfer-Encoding: chunked\r\n" + LAST + b"0\r\n\r\n", 400, "malformed_request"),
        (POST + b"Content-Length: 3, 5\r\n" + LAST + b"{}", 400, "malformed_request"),
        (POST + b"Content-Length: -1\r\n" + LAST, 400, "malformed_request"),
        (POST + b"Content-Length: +2\r\n" + LAST + b"{}", 400, "malformed_request"),
        (POST + b"Content-Length: 0x2\r\n" + LAST + b"{}", 400, "malformed_request"),
        (POST + b"Content-Length : 2\r\n" + LAST + b"{}", 400, "malformed_request"),
        (POST + b"Content-Length: " + b"9" * 30 + b"\r\n" + LAST, 400, "malformed_request"),
        (POST + b"Transfer-Encoding: gzip\r\n" + LAST, 501, "transfer_not_supported"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n" + LAST, 501, "transfer_not_supported"),
        (POST + b"Transfer-Encoding: chunked\r\n" * 2 + LAST, 501, "transfer_not_supported"),
        (
            POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Transfer-Encoding: chunked\r\n" + LAST,
            400,
            "malformed_request",
        ),
        (GET + b"Host: evil.example\r\n" + LAST, 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\n" + LAST, 400, "malformed_request"),
        (b"GET /\x01 HTTP/1.1\r\nHost: localhost\r\n" + LAST, 400, "malformed_request"),
        (GET + b"X: a\x00b\r\n" + LAST, 400, "malformed_request"),
        (b"GET / HTTP/3.0\r\nHost: localhost\r\n" + LAST, 505, "version_not_supported"),
        # no HTTP/2, by whichever way, and no WebSockets
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "version_not_supported"),
        (
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
            b"Connection: Upgrade, HTTP2-Settings, close\r\n\r\n",
            200,
            "",
        ),
        (
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nConnection: Upgrade, close\r\n\r\n",
            200,
            "",
        ),
        # methods and content types
        (GET.replace(b"GET", b"TRACE") + LAST, 405, "method_not_allowed"),
        (GET.replace(b"GET", b"BREW") + LAST, 405, "method_not_allowed"),
        (POST.replace(b"POST", b"OPTIONS") + LAST, 405, "method_not_allowed"),
        (
            WELL.replace(b"application/json", b"text/plain") + LAST + QUESTION,
            415,
            "content_type_not_allowed",
        ),
        (
            WELL.replace(b"Content-Type: application/json\r\n", b"") + LAST + QUESTION,
            415,
            "content_type_not_allowed",
        ),
        (
            WELL.replace(b"/json", b"/x-www-form-urlencoded") + LAST + QUESTION,
            415,
            "content_type_not_allowed",
        ),
        (WELL.replace(b"/json", b"/JSON; charset=utf-8") + LAST + QUESTION, 200, ""),
    ],
    ids=lambda value: value[:12].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_what_a_request_may_be(
    tmp_path: Path, request_bytes: bytes, status: int, code: str
) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        assert await answer_to(sockets, request_bytes) == (status, code)
        if code:
            assert counters.refused[code] == 1
        assert sum(counters.refused.values()) == (1 if code else 0)
        assert len(mesh.asks) == (1 if status == 200 and b"POST" in request_bytes else 0)

    run(tmp_path, test)


def test_a_second_request_cannot_hide_in_the_first(tmp_path: Path) -> None:
    """Where a length is doubtful nothing after it is read as a request."""

    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        hidden = WELL + b"\r\n" + QUESTION
        async with await connect(sockets) as stream:
            doubtful = POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            await stream.send_all(doubtful + hidden)
            answer = await read_all(stream)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b"}}")
        assert answer.count(b"content-length") == 1
        assert mesh.asks == []
        assert counters.requests == 0

    run(tmp_path, test)


@pytest.mark.parametrize(
    "begun",
    [b"G", GET, WELL[:-2], b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"],
    ids=["a letter", "some headers", "no end of a line", "half a line"],
)
def test_a_slow_head_is_given_up(tmp_path: Path, begun: bytes) -> None:
    """However often a byte comes: what counts is when the first one came."""

    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        async with await connect(sockets) as stream, trio.open_nursery() as nursery:

            async def drip() -> None:
                await stream.send_all(begun)
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while True:
                        await stream.send_all(b"X: y\r\n" if begun == GET else b"x")
                        await trio.sleep(0.01)

            nursery.start_soon(drip)
            answer = await read_all(stream)
            nursery.cancel_scope.cancel()
        assert b" 408 " in answer
        assert b"head_too_slow" in answer
        assert counters.refused["head_too_slow"] == 1
        assert mesh.asks == []

    run(tmp_path, test, ConnectionLimits(head_s=0.15))


def test_the_second_head_on_a_connection_has_its_time_too(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        async with await connect(sockets) as stream:
            await stream.send_all(GET + b"\r\n")
            assert b" 200 " in await stream.receive_some()
            await stream.send_all(GET)
            assert b" 408 " in await read_all(stream)
        assert counters.refused["head_too_slow"] == 1

    run(tmp_path, test, ConnectionLimits(head_s=0.1))


def test_idle_connections_end_without_a_word(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        async with await connect(sockets) as never_used, await connect(sockets) as used:
            await used.send_all(GET + b"\r\n")
            assert b" 200 " in await used.receive_some()
            assert await read_all(used) == b""
            assert await read_all(never_used) == b""
        while counters.idle_closed < 2:
            await trio.lowlevel.checkpoint()
        assert sum(counters.refused.values()) == 0

    run(tmp_path, test, keep_alive_s=0.1)


def test_slow_bodies_and_endless_ones(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        assert await answer_to(sockets, WELL + b"\r\n" + QUESTION[:-5]) == (408, "body_too_slow")
        endless = (
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 4
        )
        assert await answer_to(sockets, endless) == (413, "request_too_large")
        announced = POST + b"Content-Length: 99999999\r\n\r\n"
        assert await answer_to(sockets, announced) == (413, "request_too_large")
        crumbs = POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 20_000
        async with await connect(sockets) as stream:  # an extension of a chunk without end
            with suppress(trio.BrokenResourceError):
                await stream.send_all(crumbs)
            await read_all(stream)
        assert mesh.asks == []
        assert counters.refused["body_too_slow"] >= 1
        assert counters.refused["request_too_large"] == 2
        assert counters.refused["head_too_large"] == 1

    run(tmp_path, test, edge_limits=EdgeLimits(body_deadline_s=0.1, request_bytes_max=2000))


def test_a_client_that_does_not_read_holds_little_and_not_for_long(tmp_path: Path) -> None:
    """The next part is made when the system took the last one, and the system takes little."""

    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        question = QUESTION.replace(b"general", b"endless").replace(b"{", b'{"stream": true, ', 1)
        client = trio.socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        await client.connect(("127.0.0.1", sockets.port))
        await client.send(POST + b"Content-Length: %d\r\n\r\n" % len(question) + question)
        await mesh.cancelled.wait()
        client.close()
        assert mesh.pieces * 4096 < 600_000  # http.send_buffer_bytes, twice for its bookkeeping
        assert counters.stalled_closed == 1

    run(tmp_path, test, ConnectionLimits(stalled_s=0.3))


def test_one_source_cannot_take_all_connections(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        async with AsyncExitStack() as held:
            for _ in range(3):
                await held.enter_async_context(await connect(sockets))
            while counters.open < 3:
                await trio.lowlevel.checkpoint()
            assert await answer_to(sockets, GET + b"\r\n") == (429, "too_many_connections")
            other = await trio.open_tcp_stream("127.0.0.1", sockets.port, local_address="127.0.0.9")
            async with other:
                await other.send_all(GET + LAST)
                assert b" 200 " in await read_all(other)
        while counters.open:
            await trio.lowlevel.checkpoint()
        assert await answer_to(sockets, GET + LAST) == (200, "")
        assert counters.refused["too_many_connections"] == 1

    run(tmp_path, test, ConnectionLimits(per_source_max=3))


def test_a_full_port_leaves_the_unix_socket_free(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        async with AsyncExitStack() as held:
            for _ in range(4):
                await held.enter_async_context(await connect(sockets))
            async with await trio.open_unix_socket(sockets.path) as unix:
                await unix.send_all(b"GET /mesh/v1/status HTTP/1.1\r\nHost: meshd\r\n" + LAST)
                assert b" 200 " in await read_all(unix)

    run(tmp_path, test, connections_max=2)


@pytest.mark.parametrize("when", ["at once", "in the head", "in the body", "in the answer"])
def test_connections_that_are_reset_leave_nothing(tmp_path: Path, when: str) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets, counters: EdgeCounters) -> None:
        stream = await connect(sockets)
        question = QUESTION.replace(b"general", b"endless").replace(b"{", b'{"stream": true, ', 1)
        whole = POST + b"Content-Length: %d\r\n\r\n" % len(question) + question
        sent = {"at once": 0, "in the head": 50, "in the body": len(whole) - 10}
        await stream.send_all(whole[: sent.get(when, len(whole))])
        if when == "in the answer":
            await mesh.started.wait()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()
        while counters.open or mesh.running or not counters.accepted:
            await trio.lowlevel.checkpoint()
        assert await answer_to(sockets, GET + LAST) == (200, "")

    run(tmp_path, test)
