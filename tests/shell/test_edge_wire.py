"""The edge over raw sockets: clients that leave, send too much, too little, or nonsense."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.shell.support_fake_mesh import FakeMesh, serving

from meshd.config import HttpSection
from meshd.edge.errors import EdgePortInUse, EdgeSocketDenied, EdgeSocketInUse
from meshd.edge.limits import EdgeLimits
from meshd.edge.server import EdgeSockets, open_edge_sockets

CHAT = "/v1/chat/completions"
TIME_S = 10.0


def post(
    path: str, body: bytes, *, host: str = "localhost", extra: str = "", close: bool = True
) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: application/json\r\n{'Connection: close' if close else 'X-Y: z'}\r\n{extra}\r\n"
    )
    return head.encode() + body


def chat(label: str, *, stream: bool) -> bytes:
    messages = [{"role": "user", "content": "Hi"}]
    payload = {"model": f"knowledge.gpt/{label}", "messages": messages, "stream": stream}
    return json.dumps(payload).encode()


async def connect(sockets: EdgeSockets) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", sockets.port)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    async for part in stream:
        data += part
    return data


async def exchange(stream: trio.SocketStream, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send a request, read until the connection ends; status, headers, body (still chunked)."""
    async with stream:
        await stream.send_all(data)
        head, _, body = (await read_all(stream)).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


def run(
    folder: Path,
    test: Callable[[FakeMesh, EdgeSockets], Awaitable[None]],
    limits: EdgeLimits | None = None,
    *,
    graceful_s: float = 0.2,
    stalled_s: float = 5.0,
) -> None:
    async def main() -> None:
        mesh = FakeMesh()
        with trio.fail_after(TIME_S):
            async with serving(
                mesh, folder, limits, graceful_s=graceful_s, stalled_s=stalled_s
            ) as sockets:
                await test(mesh, sockets)

    trio.run(main)


@pytest.mark.parametrize("path", [CHAT, "/mesh/v1/ask"])
@pytest.mark.parametrize(
    ("label", "stream"), [("silent", False), ("silent", True), ("endless", True)]
)
def test_a_client_that_leaves_cancels_its_ask(
    tmp_path: Path, path: str, label: str, stream: bool
) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        client = await connect(sockets)
        body = chat(label, stream=stream)
        if path != CHAT:
            body = json.dumps({"target": f"knowledge.gpt/{label}", "prompt": "Hi"}).encode()
        await client.send_all(post(path, body))
        await mesh.started.wait()
        if label == "endless":
            await client.receive_some(100)
        await client.aclose()
        await mesh.cancelled.wait()
        while mesh.running:
            await trio.lowlevel.checkpoint()
        other = await connect(sockets)
        status, _, _ = await exchange(other, post(CHAT, chat("general", stream=False)))
        assert status == 200

    run(tmp_path, test)


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_refused_unread(tmp_path: Path, declared: bool) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        client = await connect(sockets)
        head = "Content-Length: 500000000" if declared else "Transfer-Encoding: chunked"
        kind = "Content-Type: application/json"
        request = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n{head}\r\n\r\n".encode()
        if not declared:
            request += b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
        status, headers, body = await exchange(client, request)
        assert status == 413
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["code"] == "request_too_large"
        assert mesh.asks == []

    run(tmp_path, test, EdgeLimits(request_bytes_max=2000))


def test_a_slow_body_is_given_up(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        client = await connect(sockets)
        status, _, body = await exchange(client, post(CHAT, b"{}" * 50)[:-10])
        assert status == 408
        assert json.loads(body)["error"]["code"] == "body_too_slow"

    run(tmp_path, test, EdgeLimits(body_deadline_s=0.05))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "column 1"),
        (b'{"model": "auto",\n  "messages": [}', "line 2 column 16"),
        (b"[1]", "object"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a":' + b"[" * 100_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_json_is_named(tmp_path: Path, body: bytes, says: str) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        status, _, answer = await exchange(await connect(sockets), post(CHAT, body))
        error = json.loads(answer)["error"]
        assert (status, error["code"], error["type"]) == (
            400,
            "invalid_json",
            "invalid_request_error",
        )
        assert says in error["message"]

    run(tmp_path, test)


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x00\xa5\x01", b"GET\r\n\r\n", b"\r\n" * 9000])
def test_noise_leaves_the_server_up(tmp_path: Path, noise: bytes) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        async with await connect(sockets) as client:
            await client.send_all(noise)
            await client.send_eof()
            with suppress(trio.BrokenResourceError):
                await read_all(client)
        status, _, _ = await exchange(
            await connect(sockets),
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        )
        assert status == 200

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("host", "extra", "status", "code"),
    [
        ("localhost:8642", "", 200, None),
        ("127.0.0.1", "", 200, None),
        ("[::1]:8642", "Origin: http://[::1]:8642\r\n", 200, None),
        ("LOCALHOST.:8642", "X-Forwarded-Host: evil.example\r\n", 200, None),
        ("[0:0:0:0:0:0:0:1]", "Sec-Fetch-Site: none\r\n", 200, None),
        ("localhost:8642", "Sec-Fetch-Site: same-origin\r\n", 200, None),
        ("evil.example", "", 403, "host_not_allowed"),
        ("localhost.evil.example:8642", "", 403, "host_not_allowed"),
        ("127.0.0.1.evil.example", "", 403, "host_not_allowed"),
        ("evil.localhost", "", 403, "host_not_allowed"),
        ("localhost..", "", 403, "host_not_allowed"),
        ("evil.example@localhost", "", 403, "host_not_allowed"),
        ("localhost:8642:1", "", 403, "host_not_allowed"),
        ("localhost:", "", 403, "host_not_allowed"),
        ("0.0.0.0:8642", "", 403, "host_not_allowed"),
        ("2130706433", "", 403, "host_not_allowed"),
        ("[::ffff:c0a8:101]", "", 403, "host_not_allowed"),
        ("[::1%eth0]", "", 403, "host_not_allowed"),
        ("", "", 403, "host_not_allowed"),
        ("evil.example", "X-Forwarded-Host: localhost\r\n", 403, "host_not_allowed"),
        ("localhost", "Origin: https://evil.example\r\n", 403, "origin_not_allowed"),
        ("localhost:8642", "Origin: http://localhost:3000\r\n", 403, "origin_not_allowed"),
        ("localhost:8642", "Origin: http://127.0.0.1:8642\r\n", 403, "origin_not_allowed"),
        ("localhost", "Origin: app://localhost\r\n", 403, "origin_not_allowed"),
        ("localhost", "Sec-Fetch-Site: cross-site\r\n", 403, "origin_not_allowed"),
        ("localhost", "Sec-Fetch-Site: same-site\r\n", 403, "origin_not_allowed"),
        ("localhost", "Origin: null\r\n", 403, "origin_not_allowed"),
    ],
)
def test_web_pages_are_kept_out(
    tmp_path: Path, host: str, extra: str, status: int, code: str | None
) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        request = post(CHAT, chat("general", stream=False), host=host, extra=extra)
        got, headers, body = await exchange(await connect(sockets), request)
        assert got == status
        assert json.loads(body).get("error", {}).get("code") == code
        assert len(mesh.asks) == (1 if status == 200 else 0)
        assert "access-control-allow-origin" not in headers

    run(tmp_path, test)


def test_leaving_takes_the_unix_socket_or_a_key(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        request = post("/mesh/v1/leave", b"")
        status, _, body = await exchange(await connect(sockets), request)
        assert (status, json.loads(body)["error"]["code"]) == (403, "scope_missing")
        assert not mesh.left
        unix = await trio.open_unix_socket(sockets.path)
        status, _, _ = await exchange(unix, post("/mesh/v1/leave", b"", host="meshd"))
        assert status == 200
        assert mesh.left

    run(tmp_path, test)


def test_silence_is_filled_with_comments(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        client = await connect(sockets)
        await client.send_all(post(CHAT, chat("silent", stream=True)))
        seen = b""
        while seen.count(b": waiting\n\n") < 3:
            seen += await client.receive_some()
        assert b" 200 " in seen
        await client.aclose()
        await mesh.cancelled.wait()

    run(tmp_path, test, EdgeLimits(heartbeat_s=0.02))


@pytest.mark.parametrize("stream", [False, True])
def test_the_edge_ends_an_ask_that_the_mesh_forgot(tmp_path: Path, stream: bool) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        request = post(CHAT, chat("silent", stream=stream))
        status, _, body = await exchange(await connect(sockets), request)
        assert status == 504
        assert json.loads(body)["error"]["code"] == "deadline_exceeded"
        assert mesh.running == 0

    run(tmp_path, test, EdgeLimits(deadline_default_s=0.05, deadline_grace_s=0.01))


def test_a_broken_stream_has_no_end_marks(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        request = post(CHAT, chat("torn", stream=True))
        status, _, body = await exchange(await connect(sockets), request)
        assert status == 200
        assert b'"error":{"message":"the peer died"' in body
        assert b"[DONE]" not in body
        assert b'"finish_reason":"stop"' not in body
        assert body.endswith(b"0\r\n\r\n")

    run(tmp_path, test)


def test_unknown_places_and_methods_answer_in_json(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        for request, status, code in (
            (post("/v1/nothing", b"{}"), 404, "unknown_url"),
            (post("/healthz", b""), 405, "method_not_allowed"),
        ):
            got, headers, body = await exchange(await connect(sockets), request)
            assert got == status
            assert json.loads(body)["error"]["code"] == code
            assert headers["x-request-id"] == headers["x-meshd-request-id"]

    run(tmp_path, test)


@pytest.mark.parametrize("path", ["/v1/nothing", "/healthz"])
def test_an_error_reaches_a_client_that_is_still_sending(tmp_path: Path, path: str) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        request = post(path, b"x" * 300_000)
        async with await connect(sockets) as client:
            await client.send_all(request[:1000])
            await trio.testing.wait_all_tasks_blocked(0.05)
            await client.send_all(request[1000:])
            assert b'"error"' in await read_all(client)

    run(tmp_path, test)


def test_request_ids_are_taken_over_when_fit(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        trace = f"00-{'a' * 32}-{'b' * 16}-01"
        for given, kept in (("my-id.1", True), ("bad id", False), ("x" * 65, False)):
            extra = f"X-Request-Id: {given}\r\nTraceparent: {trace}\r\nIdempotency-Key: k1\r\n"
            request = post(CHAT, chat("general", stream=False), extra=extra)
            _, headers, _ = await exchange(await connect(sockets), request)
            assert (headers["x-request-id"] == given) == kept
            ask = mesh.asks[-1]
            assert (ask.request_id, ask.trace, ask.idempotency_id) == (
                headers["x-request-id"],
                trace,
                "k1",
            )

    run(tmp_path, test)


def test_an_open_answer_may_finish_when_the_server_stops(tmp_path: Path) -> None:
    async def main() -> None:
        mesh = FakeMesh(gap_s=0.1)
        with trio.fail_after(TIME_S):
            async with trio.open_nursery() as nursery:
                answers: list[bytes] = []

                async def client(sockets: EdgeSockets) -> None:
                    _, _, body = await exchange(
                        await connect(sockets),
                        post(CHAT, chat("general", stream=True), close=False),
                    )
                    answers.append(body)

                async with serving(mesh, tmp_path, graceful_s=5) as sockets:
                    nursery.start_soon(client, sockets)
                    await mesh.started.wait()
            assert b"[DONE]" in answers[0]
            assert not sockets.path.exists()

    trio.run(main)


def test_a_client_that_stops_reading_does_not_hold_the_server(tmp_path: Path) -> None:
    """Neither while it runs (the write's deadline) nor when it stops (the abort)."""

    async def full(mesh: FakeMesh, sockets: EdgeSockets) -> trio.SocketStream:
        client = await connect(sockets)
        await client.send_all(post(CHAT, chat("endless", stream=True)))
        await mesh.started.wait()
        return client

    async def stalls(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        client = await full(mesh, sockets)
        await mesh.cancelled.wait()
        await client.aclose()

    run(tmp_path, stalls, stalled_s=0.3)

    async def stops() -> None:
        mesh = FakeMesh()
        with trio.fail_after(TIME_S):
            async with serving(mesh, tmp_path, graceful_s=0.1, stalled_s=3600) as sockets:
                client = await full(mesh, sockets)
                await trio.testing.wait_all_tasks_blocked(0.2)
            await client.aclose()

    trio.run(stops)


def test_connections_that_ended_make_room(tmp_path: Path) -> None:
    """However they end: by the client, idle or used, or by the server after the idle time."""

    async def main() -> None:
        mesh = FakeMesh()
        with trio.fail_after(TIME_S):
            async with serving(mesh, tmp_path, connections_max=3, keep_alive_s=60) as sockets:
                for _ in range(3):
                    idle = await connect(sockets)
                    await idle.aclose()
                    used = await connect(sockets)
                    await used.send_all(post(CHAT, chat("general", stream=False), close=False))
                    assert b" 200 " in await used.receive_some()
                    await used.aclose()
                    await exchange(await connect(sockets), post(CHAT, chat("general", stream=True)))
            async with serving(mesh, tmp_path, connections_max=2, keep_alive_s=0.05) as sockets:
                for _ in range(3):
                    async with await connect(sockets) as idle:
                        assert await idle.receive_some() == b""

    trio.run(main)


def test_a_long_answer_outlives_the_idle_time(tmp_path: Path) -> None:
    async def main() -> None:
        mesh = FakeMesh(gap_s=0.1)
        with trio.fail_after(TIME_S):
            async with serving(mesh, tmp_path, keep_alive_s=0.05) as sockets:
                request = post(CHAT, chat("general", stream=True), close=False)
                _, _, body = await exchange(await connect(sockets), request)
                assert b"[DONE]" in body

    trio.run(main)


def test_requests_follow_each_other_on_one_connection(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        async with await connect(sockets) as client:
            for stream in (False, True, False):
                await client.send_all(post(CHAT, chat("general", stream=stream), close=False))
                seen = b""
                while not seen.endswith(b"\r\n0\r\n\r\n" if stream else b"}"):
                    seen += await client.receive_some()
                assert seen.startswith(b"HTTP/1.1 200")
        assert len(mesh.asks) == 3

    run(tmp_path, test)


def test_the_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        http = HttpSection(port=holder.getsockname()[1], socket=tmp_path / "a.sock")
        with pytest.raises(EdgePortInUse, match=r"in use.*http\.port"):
            open_edge_sockets(http)
    assert not (tmp_path / "a.sock").exists()


def test_the_unix_socket_is_for_the_group_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "meshd.sock"
    sockets = open_edge_sockets(HttpSection(port=0, socket=path, socket_group="no-such-group"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    sockets.close()
    assert not path.exists()


def test_a_socket_file_without_a_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "meshd.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(os.fspath(path))
    first = open_edge_sockets(HttpSection(port=0, socket=path))
    with pytest.raises(EdgeSocketInUse, match="another meshd answers"):
        open_edge_sockets(HttpSection(port=0, socket=path))
    path.unlink()
    second = open_edge_sockets(HttpSection(port=0, socket=path))
    first.close()
    assert path.exists(), "the file of the second must survive the first"
    second.close()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(EdgeSocketDenied, match="no socket"):
        open_edge_sockets(HttpSection(port=0, socket=path))
    assert path.read_text() == "precious"
    with pytest.raises(EdgeSocketDenied, match="107 bytes"):
        open_edge_sockets(HttpSection(port=0, socket=tmp_path / ("x" * 120)))


def test_the_mesh_api_streams_events(tmp_path: Path) -> None:
    async def test(mesh: FakeMesh, sockets: EdgeSockets) -> None:
        for target, last in (
            ("knowledge.gpt/general", "answered"),
            ("knowledge.gpt/busy", "error"),
        ):
            body = json.dumps({"target": target, "prompt": "Hi", "max_tokens": 3}).encode()
            stream = await trio.open_unix_socket(sockets.path)
            status, headers, raw = await exchange(
                stream, post("/mesh/v1/ask", body, extra="X-Request-Id: abc\r\n")
            )
            assert status == 200
            assert headers["x-request-id"] == "abc"
            lines = [json.loads(line) for line in raw.split(b"\r\n") if line.startswith(b"{")]
            assert lines[0]["event"] == "planned"
            assert lines[-1]["event"] == last
        assert lines[-1]["status"] == 429
        assert lines[-1]["retry_after_s"] == 1
        assert mesh.asks[0].body["max_tokens"] == 3

    run(tmp_path, test)
