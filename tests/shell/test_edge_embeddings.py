"""`/v1/embeddings` and `/v1/rerank` over a mesh that plays scripts: what comes of honest and of other rows."""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from tests.shell.support_fake_mesh import FakeMesh, planned, routed, serving

from meshd.edge.exposure import Exposure
from meshd.edge.limits import EdgeLimits
from meshd.orchestrate.events import ANSWER, Answered, Ask, AskEvent, Piece, SubtaskDone
from meshd.trust.api_keys import ApiKeys
from meshd_plugins.api import Operation, Privacy, Refused, Usage, Value
from meshd_plugins.vectors import ROWS_TYPE

T = TypeVar("T")
EMBED, RERANK = "computation.gpt/embed", "computation.gpt/rerank"


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def rows(position: int, *numbers: float, content_type: str = ROWS_TYPE) -> Piece:
    return Piece(ANSWER, data=floats(*numbers), position=position, content_type=content_type)


class VectorMesh(FakeMesh):
    """Answers every ask with the same pieces."""

    def __init__(
        self, *pieces: Piece, dimensions: Value = 2, error: Exception | None = None
    ) -> None:
        super().__init__()
        self._script: Sequence[Piece] = pieces
        self._dimensions = dimensions
        self._error = error

    async def _events(self, ask: Ask) -> AsyncGenerator[AskEvent, None]:
        await trio.lowlevel.checkpoint()
        yield planned(ask)
        if self._error is not None:
            raise self._error
        yield routed(ask)
        for piece in self._script:
            yield piece
        if ask.target.endswith("silent"):
            await trio.sleep_forever()
        detail: Mapping[str, Value] = {"dimensions": self._dimensions, "model": "MiniLM#ab"}
        part = SubtaskDone("t1", "pi", EMBED, 0.1, 0.2, Usage(7, 0), "stop", detail)
        yield Answered("stop", Usage(7, 0), (part,), 0.2)


def asked(
    folder: Path,
    mesh: FakeMesh,
    endpoint: str,
    payload: Mapping[str, Any],
    exposure: Exposure | None = None,
    key: str = "",
) -> tuple[int, Any, Mapping[str, str]]:
    """One request; status, body and headers."""

    def use(port: int) -> tuple[int, Any, Mapping[str, str]]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            headers = {"Content-Type": "application/json"}
            if key:
                headers["Authorization"] = f"Bearer {key}"
            connection.request("POST", f"/v1/{endpoint}", json.dumps(payload), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), dict(answer.headers)

    async def main() -> tuple[int, Any, Mapping[str, str]]:
        limits = EdgeLimits(require_key=exposure is not None)
        async with serving(mesh, folder, limits, exposure=exposure) as sockets:
            assert sockets.port is not None
            return await trio.to_thread.run_sync(use, sockets.port)

    return trio.run(main)


TWO = {"model": EMBED, "input": ["a", "b"]}


def test_vectors_in_pieces_come_as_one_list(tmp_path: Path) -> None:
    mesh = VectorMesh(rows(0, 1, 0), rows(1, 0.6, 0.8))
    status, body, headers = asked(tmp_path, mesh, "embeddings", TWO)
    assert status == 200
    assert [(row["object"], row["index"]) for row in body["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    packed = [floats(*row["embedding"]) for row in body["data"]]
    assert packed == [floats(1, 0), floats(0.6, 0.8)]
    assert (body["object"], body["model"]) == ("list", EMBED)
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert body["meshd"]["parts"][0]["detail"]["model"] == "MiniLM#ab"
    assert headers["x-meshd-served-by"] == "pi"
    [ask] = mesh.asks
    assert (ask.target, ask.operation) == (EMBED, Operation.EMBED)
    assert ask.body == {"input": ["a", "b"], "truncate": False}


def test_the_best_document_comes_first_and_equals_in_their_order(tmp_path: Path) -> None:
    mesh = VectorMesh(rows(0, -1.5, 2.0, 0.25, 2.0), dimensions=1)
    payload = {"model": RERANK, "query": "q", "documents": ["a", "b", "c", "d"], "top_n": 3}
    status, body, _ = asked(tmp_path, mesh, "rerank", payload)
    assert status == 200
    results = [(row["index"], row["relevance_score"]) for row in body["results"]]
    assert results == [(1, 2.0), (3, 2.0), (2, 0.25)]
    assert "document" not in body["results"][0]


@pytest.mark.parametrize(
    ("pieces", "dimensions"),
    [
        ((), 2),
        ((rows(0, 1, 0),), 2),
        ((rows(0, 1, 0), rows(1, 0, 1), rows(2, 1, 1)), 2),
        ((rows(1, 1, 0), rows(0, 0, 1)), 2),
        ((rows(0, 1, 0), rows(1, float("nan"), 1)), 2),
        ((rows(0, 1, 0, 0, float("inf")),), 2),
        ((rows(0, 1, 0, 0, 1),), 4),
        ((rows(0, 1, 0, 0, 1),), None),
        ((rows(0, 1, 0, 0, 1, content_type="text/plain"),), 2),
        ((Piece(ANSWER, text="[1, 0]"),), 2),
        ((Piece(ANSWER, data=b"\0" * 7, content_type=ROWS_TYPE),), 2),
    ],
)
def test_rows_that_make_no_sense_are_the_peers_fault(
    tmp_path: Path, pieces: tuple[Piece, ...], dimensions: Value
) -> None:
    mesh = VectorMesh(*pieces, dimensions=dimensions)
    status, body, _ = asked(tmp_path, mesh, "embeddings", TWO)
    assert (status, body["error"]["code"]) == (502, "peer_fault")


def test_a_refusal_has_its_status(tmp_path: Path) -> None:
    mesh = VectorMesh(error=Refused("too many texts wait for this model", code="busy"))
    status, body, headers = asked(tmp_path, mesh, "embeddings", TWO)
    assert (status, body["error"]["code"], headers["retry-after"]) == (429, "busy", "1")


def test_a_key_opens_what_it_opens(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    _, embeds = keys.create("embeds", models=(EMBED,), privacy=Privacy.LAN)
    exposure = Exposure(keys, None)
    mesh = VectorMesh(rows(0, 1, 0, 0, 1))
    assert asked(tmp_path, mesh, "embeddings", TWO, exposure)[0] == 401
    assert asked(tmp_path, mesh, "embeddings", TWO, exposure, embeds)[0] == 200
    [ask] = mesh.asks
    assert (ask.principal, ask.privacy_max) == ("key:embeds", Privacy.LAN)
    elsewhere = {**TWO, "model": "computation.gpt/other"}
    status, body, _ = asked(tmp_path, mesh, "embeddings", elsewhere, exposure, embeds)
    assert (status, body["error"]["code"]) == (403, "model_not_permitted")


def test_a_client_that_leaves_ends_its_request(tmp_path: Path) -> None:
    mesh = VectorMesh()

    async def main() -> None:
        async with serving(mesh, tmp_path) as sockets:
            assert sockets.port is not None
            stream = await trio.open_tcp_stream("127.0.0.1", sockets.port)
            body = json.dumps({**TWO, "model": "computation.gpt/silent"}).encode()
            head = (
                "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            await stream.send_all(head.encode() + body)
            await mesh.started.wait()
            await stream.aclose()
            with trio.fail_after(5):
                await mesh.cancelled.wait()

    trio.run(main)
