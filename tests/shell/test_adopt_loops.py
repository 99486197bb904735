"""A mesh never asks itself through a server that it adopts."""

from __future__ import annotations

import json
from pathlib import Path

import trio
from tests.shell.support_adopt import MESSAGES, keeping
from tests.shell.support_fake_mesh import FakeMesh, serving

from meshd_plugins.builtin.adopt.keeper import State


def test_a_meshd_is_never_adopted(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(FakeMesh(), tmp_path) as sockets:
            url = f"http://127.0.0.1:{sockets.port}"
            async with keeping(url, tmp_path) as adopted:
                await adopted.until(lambda: adopted.keeper.state is State.REFUSED)
                [complaint] = adopted.keeper.complaints()
                assert "would be a loop" in complaint.message
                assert not adopted.capabilities.added

    trio.run(main)


def test_what_left_a_mesh_does_not_come_back(tmp_path: Path) -> None:
    """Behind a proxy that hides the edge's headers, the marker on the request is what stops it."""
    mesh = FakeMesh()

    async def main() -> None:
        async with serving(mesh, tmp_path) as sockets:
            body = json.dumps({"model": "auto", "messages": MESSAGES}).encode()
            stream = await trio.open_tcp_stream("127.0.0.1", sockets.port)
            async with stream:
                await stream.send_all(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % sockets.port
                    + b"Content-Type: application/json\r\nX-Meshd-Hop: 1\r\nConnection: close\r\n"
                    + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                )
                answer = b""
                while piece := await stream.receive_some():
                    answer += piece
            assert answer.startswith(b"HTTP/1.1 502")
            assert b"hop_limit" in answer
            assert not mesh.asks

    trio.run(main)
