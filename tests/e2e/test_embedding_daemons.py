"""Two real daemons: one has an encoder and a classifier, the other is asked, by OpenAI's client and by people."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import openai
import pytest
from tests.support_daemons import HOST, Daemon, Mesh
from tests.unit.support_encoder import (
    MEAN,
    RANK,
    Encoder,
    EncoderShape,
    make_encoder,
    write_encoder,
)

from meshd.cli.failures import Exit

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

LOAD_DEADLINE_S = 90.0
DISTANCE = 5e-3  # as in test_embedding_worker
EMBED, RERANK = "computation.gpt/embed", "computation.gpt/rerank"
EMBEDDER = make_encoder(EncoderShape(pooling=MEAN))
RANKER = make_encoder(EncoderShape(pooling=RANK, classifier=True))
TEXTS = ["the cat sits beside the tree", "a dog", "the moon is not red ."]


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The one that is asked; it has no model itself."""
    folder = tmp_path_factory.mktemp("mesh")
    write_encoder(folder / "Tiny-Embedder.gguf", EMBEDDER)
    write_encoder(folder / "Tiny-Ranker.gguf", RANKER)
    table = f"""
[[plugins.llama.models]]
path = "{folder}/Tiny-Embedder.gguf"
names = ["{EMBED}", "knowledge.gpt/embeddings"]
[[plugins.llama.models]]
path = "{folder}/Tiny-Ranker.gguf"
names = ["{RERANK}"]
"""
    with Mesh(folder) as mesh:
        asked = mesh.start("entry")
        mesh.start("peer", plugins=["hardware", "llama"], tables=table)
        mesh.wait("both models", asked, partial(serves, asked, EMBED, RERANK), LOAD_DEADLINE_S)
        yield asked


def serves(daemon: Daemon, *names: str) -> bool:
    rows = daemon.get("/mesh/v1/capabilities")["capabilities"]
    return set(names) <= {row["name"] for row in rows if row["state"] == "alive"}


@pytest.fixture
def client(entry: Daemon) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://{HOST}:{entry.http_port}/v1", api_key="none", max_retries=0
    )


def expected(encoder: Encoder, texts: list[str]) -> np.ndarray[Any, Any]:
    return np.stack([encoder.vector(encoder.tokens(text), MEAN) for text in texts])


def post(entry: Daemon, endpoint: str, payload: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://{HOST}:{entry.http_port}/v1/{endpoint}",
        json.dumps(payload).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("model", [EMBED, "auto", "Tiny-Embedder", "knowledge.gpt/embeddings"])
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openais_client_gets_vectors(client: openai.OpenAI, model: str, encoding: str) -> None:
    answer = client.embeddings.create(
        model=model,
        input=TEXTS,
        encoding_format=encoding,  # type: ignore[arg-type]
    )
    assert [row.index for row in answer.data] == [0, 1, 2]
    rows = np.array([vector_of(row.embedding) for row in answer.data])
    assert np.linalg.norm(rows - expected(EMBEDDER, TEXTS), axis=1).max() < DISTANCE
    tokens = sum(len(EMBEDDER.tokens(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def vector_of(value: Any) -> Any:
    """What the client leaves in base64 when it was asked for by name."""
    if isinstance(value, str):
        import base64

        return np.frombuffer(base64.b64decode(value), np.float32)
    return value


def test_both_encodings_name_the_same_numbers(entry: Daemon) -> None:
    import base64

    whole = {"model": EMBED, "input": TEXTS[0]}
    floats = post(entry, "embeddings", whole)["data"][0]["embedding"]
    packed = post(entry, "embeddings", {**whole, "encoding_format": "base64"})
    data = base64.b64decode(packed["data"][0]["embedding"])
    assert np.array(floats, np.float32).tobytes() == data
    cut = post(entry, "embeddings", {**whole, "dimensions": 4})["data"][0]["embedding"]
    assert np.allclose(cut, np.array(floats[:4]) / np.linalg.norm(floats[:4]), atol=1e-6)


def test_what_a_model_cannot_is_said_in_openais_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="takes 64") as caught:
        client.embeddings.create(model=EMBED, input=["cat " * 100])
    assert caught.value.code == "context_length_exceeded"
    cut = client.embeddings.create(
        model=EMBED, input=["cat " * 100], extra_body={"meshd": {"truncate": True}}
    )
    assert cut.usage.prompt_tokens == 64
    with pytest.raises(openai.BadRequestError, match="tokens") as refused:
        client.embeddings.create(model=EMBED, input=[[1, 2, 3]])
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=RERANK, input=["cat"])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(
            model="Tiny-Embedder", messages=[{"role": "user", "content": "cat"}]
        )


@pytest.mark.parametrize("model", [RERANK, "auto", "Tiny-Ranker"])
def test_documents_are_ranked(entry: Daemon, model: str) -> None:
    query = "the cat"
    answer = post(
        entry,
        "rerank",
        {
            "model": model,
            "query": query,
            "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]],
            "top_n": 2,
            "return_documents": True,
        },
    )
    scores = [RANKER.score(RANKER.pair(query, text)) for text in TEXTS]
    order = sorted(range(3), key=lambda index: -scores[index])[:2]
    assert [row["index"] for row in answer["results"]] == order
    for row in answer["results"]:
        assert abs(row["relevance_score"] - scores[row["index"]]) < 1e-2
        assert row["document"] == {"text": TEXTS[row["index"]]}
    assert answer["meshd"]["parts"][0]["node"] == "peer"


def command(entry: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshd", "--socket", str(entry.socket), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_people_are_told_the_option_that_cuts_a_text(entry: Daemon) -> None:
    long = "cat " * 100
    refused = command(entry, "embed", EMBED, long)
    assert refused.returncode == Exit.USAGE
    assert refused.stderr.endswith("shorten it or give --truncate\n")
    assert command(entry, "embed", EMBED, "--truncate", long).returncode == 0


def test_people_see_how_near_texts_are(entry: Daemon) -> None:
    def meshd(*arguments: str) -> str:
        done = command(entry, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    title, *lines = meshd("embed", EMBED, *TEXTS).splitlines()
    assert title.split()[:3] == ["TO", "FIRST", "NUMBERS"]
    near = expected(EMBEDDER, TEXTS) @ expected(EMBEDDER, TEXTS)[0]
    for line, text, value in zip(lines, TEXTS, near, strict=True):
        assert line.endswith(text)
        assert abs(float(line.split()[0]) - value) < 0.01
    assert len(json.loads(meshd("embed", EMBED, TEXTS[0], "--json"))["data"][0]["embedding"]) == 32
    assert "moon" in meshd("rerank", RERANK, "the cat", *TEXTS)


def test_it_is_listed_with_what_it_can(entry: Daemon, client: openai.OpenAI) -> None:
    listed = {model.id: model.model_extra for model in client.models.list()}
    operations = {name: (extra or {})["meshd"]["operations"] for name, extra in listed.items()}
    assert operations["Tiny-Embedder"] == ["embed"]
    assert operations[RERANK] == ["rerank"]
    resolved = entry.get(f"/mesh/v1/resolve?name={EMBED}?dimensions.ge=32,pooling.eq=mean")
    assert len(resolved["candidates"]) == 1
