"""The worker of a model that embeds, with small encoders of random weights that numpy computes too.

`DISTANCE` bounds how far a vector of length 1 may be from another one of the same text: from the one that
numpy computes (llama.cpp computes attention and GELU with 16-bit floats), and from the one that the worker
makes of it in other company (other shapes of matrices, other orders of sums). Seen over 300 texts and three
kinds of pooling: 0.0014 and 0.0033. The same batch gives the same bytes (decision 0027).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio
from tests.e2e.support_embedding import Array, Embedder, embedding
from tests.e2e.support_llama import run
from tests.unit.support_encoder import (
    BEGIN,
    CLS,
    LAST,
    MASK,
    MEAN,
    RANK,
    SEPARATOR,
    WORDS,
    Encoder,
    EncoderShape,
    make_encoder,
    write_encoder,
)
from trio.testing import wait_all_tasks_blocked

from meshd_plugins.api import BadRequest, Failed, Operation, Refused
from meshd_plugins.builtin.llama.models.pooling import Pooling
from meshd_plugins.builtin.llama.running.benching import bench
from meshd_plugins.builtin.llama.serving.embedding import EmbeddingHello
from meshd_plugins.builtin.llama.worker.embed_service import CALLS_MAX, unit
from meshd_plugins.builtin.llama.worker.embedding import EmbeddingBackend, EmbeddingLoad

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

DISTANCE = 5e-3
SCORE_TOLERANCE = 1e-2


def texts(count: int, seed: int = 1, longest: int = 40) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, longest))) for _ in range(count)]


def distance(rows: Array, others: Array) -> float:
    """The largest between vectors at the same place."""
    return float(np.linalg.norm(rows - others, axis=-1).max())


def written(folder: Path, shape: EncoderShape) -> tuple[Path, Encoder]:
    encoder, path = make_encoder(shape), folder / "Tiny-Encoder-F32.gguf"
    write_encoder(path, encoder)
    return path, encoder


@pytest.mark.parametrize("pooling", [MEAN, CLS, LAST])
def test_vectors_are_those_of_the_network(tmp_path: Path, pooling: int) -> None:
    path, encoder = written(tmp_path, EncoderShape(pooling=pooling))
    asked = texts(100)

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            answer = await embedder.embed(asked)
        expected = np.stack([encoder.vector(encoder.tokens(text), pooling) for text in asked])
        assert distance(answer.rows, expected) < DISTANCE
        tokens = sum(len(encoder.tokens(text)) for text in asked)
        assert answer.done.usage.prompt_tokens == tokens
        assert answer.done.detail["dimensions"] == encoder.shape.width

    run(body, tmp_path)


def test_a_classifier_ranks_pairs(tmp_path: Path) -> None:
    path, encoder = written(tmp_path, EncoderShape(pooling=RANK, classifier=True))
    query, documents = "the cat sits", texts(30, longest=20)

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            assert embedder.descriptor.operations == (Operation.RERANK,)
            answer = await embedder.rank(query, documents)
            pairs = [encoder.pair(query, document) for document in documents]
            expected = [encoder.score(pair) for pair in pairs]
            assert np.abs(answer.rows[:, 0] - expected).max() < SCORE_TOLERANCE
            assert answer.done.usage.prompt_tokens == sum(map(len, pairs))
            with pytest.raises(BadRequest, match="66 tokens and this model takes 64"):
                await embedder.rank("cat", ["dog " * 62])
            cut = await embedder.rank("cat", ["dog " * 62], truncate=True)
            kept = encoder.pair("cat", "dog " * 60)
            assert cut.done.usage.prompt_tokens == len(kept) == 64
            assert abs(cut.rows[0, 0] - encoder.score(kept)) < SCORE_TOLERANCE
            with pytest.raises(BadRequest, match=r"shorten it$"):  # of a long query nothing is cut
                await embedder.rank("cat " * 64, ["dog"], truncate=True)
            with pytest.raises(Refused):
                await embedder.embed(["cat"])

    run(body, tmp_path)


def test_a_classifier_with_a_template_gets_pairs_in_it(tmp_path: Path) -> None:
    template = "[CLS] big {query} [SEP] {document} [MASK]"
    shape = EncoderShape(pooling=RANK, classifier=True, rerank_template=template)
    path, encoder = written(tmp_path, shape)
    documents = ["dog [SEP] runs", "the {query} moon"]

    def words(text: str) -> list[int]:
        return encoder.tokens(text)[1:-1]

    def pair(*document: int) -> list[int]:
        return [BEGIN, *words("big cat"), SEPARATOR, *document, MASK]

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            answer = await embedder.rank("cat", documents)
        unknown = words("x")
        # What a document holds of control tokens is ordinary text: cut in two, [ and SEP].
        pairs = [
            pair(*words("dog"), *unknown * 3, *words("runs")),
            pair(*words("the"), *unknown * 3, *words("moon")),
        ]
        expected = [encoder.score(tokens) for tokens in pairs]
        assert answer.done.usage.prompt_tokens == sum(map(len, pairs))
        assert np.abs(answer.rows[:, 0] - expected).max() < SCORE_TOLERANCE

    run(body, tmp_path)


def test_what_is_asked_of_vectors(tmp_path: Path) -> None:
    path, encoder = written(tmp_path, EncoderShape())

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            fields = embedder.descriptor.fields
            assert (fields["dimensions"], fields["context"], fields["pooling"]) == (32, 64, "mean")
            await cut_to_dimensions(embedder)
            await too_long(embedder, encoder)
            await alone_and_in_company(embedder)
            await special_tokens_are_text(embedder)

    run(body, tmp_path)


async def cut_to_dimensions(embedder: Embedder) -> None:
    whole = (await embedder.embed(["the cat sits"])).rows[0]
    cut = (await embedder.embed(["the cat sits"], dimensions=8)).rows[0]
    assert abs(np.linalg.norm(cut) - 1) < 1e-6
    assert distance(cut, whole[:8] / np.linalg.norm(whole[:8])) < 1e-6
    with pytest.raises(BadRequest, match="have 32"):
        await embedder.embed(["cat"], dimensions=33)


async def too_long(embedder: Embedder, encoder: Encoder) -> None:
    long = "cat " * 63
    with pytest.raises(BadRequest, match="text 1: it has 65 tokens") as caught:
        await embedder.embed(["dog", long])
    assert caught.value.code == "context_length_exceeded"
    cut = await embedder.embed(["dog", long], truncate=True)
    assert cut.done.usage.prompt_tokens == 3 + 64
    expected = encoder.vector(encoder.tokens("cat " * 62), MEAN)
    assert distance(cut.rows[1], expected) < DISTANCE


async def alone_and_in_company(embedder: Embedder) -> None:
    asked = texts(60, seed=2)
    together = (await embedder.embed(asked)).rows
    alone = np.concatenate([(await embedder.embed([text])).rows for text in asked[:20]])
    assert distance(together[:20], alone) < DISTANCE
    again = (await embedder.embed(asked)).rows
    assert again.tobytes() == together.tobytes()


async def special_tokens_are_text(embedder: Embedder) -> None:
    plain = await embedder.embed(["cat"])
    marked = await embedder.embed(["cat [SEP] dog"])
    assert marked.done.usage.prompt_tokens > plain.done.usage.prompt_tokens + 2


def test_it_is_measured_again_when_somebody_asks(tmp_path: Path) -> None:
    path, encoder = written(tmp_path, EncoderShape())

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            phase, last = [item async for item in bench(embedder.worker)]
            assert phase["phase"] == "texts of 32 tokens"
            done = last["done"]
            assert isinstance(done, dict)
            measured = EmbeddingHello.read({**embedder.worker.hello, **done})
            assert measured is not None
            assert measured.texts_per_s > 0
            answer = await embedder.embed(["the cat"])
            assert distance(answer.rows, encoder.vector(encoder.tokens("the cat"), MEAN)) < DISTANCE

    run(body, tmp_path)


def test_many_calls_share_batches_and_none_gets_anothers_rows(tmp_path: Path) -> None:
    path, encoder = written(tmp_path, EncoderShape())
    groups = [texts(7, seed=seed) for seed in range(20)]

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder, trio.open_nursery() as nursery:
            for group in groups:
                nursery.start_soon(one, embedder, group)

    async def one(embedder: Embedder, group: list[str]) -> None:
        answer = await embedder.embed(group)
        expected = np.stack([encoder.vector(encoder.tokens(text), MEAN) for text in group])
        assert distance(answer.rows, expected) < DISTANCE

    run(body, tmp_path)


def test_calls_beyond_the_bound_are_refused_and_those_that_leave_make_room(tmp_path: Path) -> None:
    path, _ = written(tmp_path, EncoderShape(layers=8, width=128, hidden=512))
    busy = texts(2000)

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            async with trio.open_nursery() as nursery:
                for _ in range(CALLS_MAX):
                    nursery.start_soon(embedder.embed, busy)
                await wait_all_tasks_blocked()
                with pytest.raises(Refused) as caught:
                    await embedder.embed(["cat"])
                assert caught.value.code == "busy"
                nursery.cancel_scope.cancel()
            # The worker computes the batch that it is at, and nothing more of 128,000 texts.
            assert (await embedder.embed(["cat"])).done.usage.prompt_tokens == 3

    run(body, tmp_path)


def test_a_model_without_a_classifier_is_refused_when_it_is_to_rank(tmp_path: Path) -> None:
    path, _ = written(tmp_path, EncoderShape())

    async def body(state: Path) -> None:
        async with embedding(path, state, pooling="rank") as embedder:
            assert embedder.worker.hello["code"] == "no_classifier"

    run(body, tmp_path)


def test_weights_that_are_no_numbers_are_a_failure_and_not_an_answer(tmp_path: Path) -> None:
    encoder, path = make_encoder(EncoderShape()), tmp_path / "broken.gguf"
    encoder.weights["token_embd.weight"][5 + WORDS.index("moon")] = np.nan
    write_encoder(path, encoder)

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            with pytest.raises(Failed, match="no finite numbers of text 1"):
                await embedder.embed(["cat", "moon", "dog"])
            assert len((await embedder.embed(["cat", "dog"])).rows) == 2

    run(body, tmp_path)


def test_a_long_text_does_not_look_like_a_hang(tmp_path: Path) -> None:
    path, encoder = written(tmp_path, EncoderShape(context=600))
    load = EmbeddingLoad(str(path), Pooling.MEAN, 0, 512, threads=1, gpu_layers=0)
    backend, beats = EmbeddingBackend(load), [0]

    def alive() -> None:
        beats[0] += 1

    backend.alive = alive
    backend.compute([encoder.tokens("cat dog")])
    assert beats == [0], "a short batch ends before anybody asks"
    [row] = backend.compute([encoder.tokens("cat " * 500)])
    told = beats[0]
    assert told > 10
    expected = encoder.vector(encoder.tokens("cat " * 500), MEAN)
    assert distance(np.array(unit(row)), expected) < DISTANCE
    backend.compute([encoder.tokens("cat dog")])
    assert beats == [told]


def test_a_worker_says_how_long_its_longest_batch_takes_and_how_it_is(tmp_path: Path) -> None:
    path, _ = written(tmp_path, EncoderShape(context=600))

    async def body(state: Path) -> None:
        async with embedding(path, state) as embedder:
            hello = embedder.worker.hello
            rate, step_s = hello["prefill_tokens_per_s"], hello["step_s"]
            assert isinstance(rate, float)
            assert step_s == pytest.approx(600 / rate)  # of a text as long as it takes
            async with embedder.worker.call({"operation": "status"}) as status:
                idle = await status.receive()
                assert idle is not None
                assert idle["prefill_tokens_per_s"] == pytest.approx(rate, rel=0.01)
                assert (idle["calls"], idle["texts_waiting"]) == (0, 0)
                async with embedder.worker.call(
                    {"operation": "embed", "input": ["cat dog " * 60] * 2000}
                ):
                    while (busy := await status.receive()) is not None and not busy["calls"]:
                        pass
                    assert busy is not None
                    assert 0 < int(str(busy["texts_waiting"])) <= 2000
                    while (later := await status.receive()) is not None:
                        if later["prefill_tokens_per_s"] != idle["prefill_tokens_per_s"]:
                            break  # it follows what is computed

    run(body, tmp_path)
