"""Which models embed, what a request may hold, and what of a worker is believed."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from tests.unit.support_encoder import (
    CLS,
    LAST,
    MEAN,
    NONE,
    RANK,
    EncoderShape,
    make_encoder,
    write_encoder,
)
from tests.unit.support_gguf import gguf

from meshd_plugins.api import (
    BadRequest,
    Descriptor,
    Failed,
    ModelFacts,
    Operation,
    PluginConfigError,
    Privacy,
    Value,
    Worker,
    WorkerSpec,
)
from meshd_plugins.builtin.llama.config import ModelConfig, read_config
from meshd_plugins.builtin.llama.models.facts import facts_to_wire
from meshd_plugins.builtin.llama.models.gguf import Gguf, read_gguf
from meshd_plugins.builtin.llama.models.pooling import NoClassifier, Pooling, pooling_of
from meshd_plugins.builtin.llama.serving.describe import Standing, describe
from meshd_plugins.builtin.llama.serving.embedding import (
    CALLS_MAX,
    TEXT_BYTES_MAX,
    EmbeddingCapability,
    EmbeddingHello,
    describe_embedding,
    embedding_message,
)
from meshd_plugins.builtin.llama.worker.embed_service import EmbeddingPace
from meshd_plugins.testing import FakeWorker, check_capability, make_request
from meshd_plugins.vectors import INPUTS_MAX

NAME = "computation.gpt/embed"
FACTS = ModelFacts("ab" * 32, "MiniLM", "bert", 22_000_000, "F16", 512, 44_000_000, pooling="mean")
HELLO: Mapping[str, Value] = {
    "embedding": {"dimensions": 2, "tokens_per_s": 900.04, "texts_per_s": 30.0},
    "context_tokens": 512,
    "load_s": 1.5,
}


def encoder(folder: Path, shape: EncoderShape) -> Gguf:
    write_encoder(folder / "m.gguf", make_encoder(shape))
    return read_gguf(folder / "m.gguf")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (MEAN, Pooling.MEAN),
        (CLS, Pooling.CLS),
        (LAST, Pooling.LAST),
        (NONE, Pooling.MEAN),
        (None, Pooling.MEAN),
        (99, Pooling.MEAN),
    ],
)
def test_an_encoder_embeds_as_its_file_says(
    tmp_path: Path, said: int | None, expected: Pooling
) -> None:
    header = encoder(tmp_path, EncoderShape(pooling=said))
    assert pooling_of(header, wanted=False, override="") is expected
    assert pooling_of(header, wanted=False, override="cls") is Pooling.CLS


def test_a_model_that_writes_embeds_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "llama.gguf").write_bytes(gguf())
    header = read_gguf(tmp_path / "llama.gguf")
    assert pooling_of(header, wanted=False, override="") is None
    assert pooling_of(header, wanted=True, override="") is Pooling.MEAN
    assert pooling_of(header, wanted=False, override="last") is Pooling.LAST


def test_only_a_classifier_ranks(tmp_path: Path) -> None:
    with_one = encoder(tmp_path, EncoderShape(pooling=RANK, classifier=True))
    assert pooling_of(with_one, wanted=False, override="") is Pooling.RANK
    without = encoder(tmp_path, EncoderShape())
    with pytest.raises(NoClassifier, match="set pooling to"):
        pooling_of(without, wanted=False, override="rank")


@pytest.mark.parametrize("setting", [{"pooling": "median"}, {"pooling": 1}, {"embeddings": "yes"}])
def test_a_wrong_setting_is_named(setting: Mapping[str, Value]) -> None:
    [name] = setting
    with pytest.raises(PluginConfigError, match=name):
        read_config({"models": [{"path": "/m.gguf", "names": [NAME], **setting}]})


@pytest.mark.parametrize(
    ("operation", "body", "words"),
    [
        (Operation.EMBED, {}, "input must be"),
        (Operation.EMBED, {"input": []}, "input must be"),
        (Operation.EMBED, {"input": ["a", ""]}, r"input\[1\]"),
        (Operation.EMBED, {"input": ["a", 5]}, r"input\[1\]"),
        (Operation.EMBED, {"input": ["a"] * (INPUTS_MAX + 1)}, "the most is"),
        (Operation.EMBED, {"input": ["a" * (TEXT_BYTES_MAX + 1)]}, "the most is"),
        (Operation.EMBED, {"input": ["\ud800"]}, "surrogate"),
        (Operation.EMBED, {"input": ["a"], "dimensions": 0}, "dimensions"),
        (Operation.EMBED, {"input": ["a"], "dimensions": True}, "dimensions"),
        (Operation.EMBED, {"input": ["a"], "truncate": "yes"}, "truncate"),
        (Operation.RERANK, {"documents": ["a"]}, "query"),
        (Operation.RERANK, {"query": "", "documents": ["a"]}, "query"),
        (Operation.RERANK, {"query": "q"}, "documents"),
        (Operation.RERANK, {"query": "q", "documents": [{}]}, r"documents\[0\]"),
        (Operation.RERANK, {"query": "q" * TEXT_BYTES_MAX, "documents": ["a"]}, "the most is"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(
    operation: Operation, body: Mapping[str, Value], words: str
) -> None:
    with pytest.raises(BadRequest, match=words):
        embedding_message(operation, body)


def test_a_request_in_the_workers_words() -> None:
    body: dict[str, Value] = {"input": "a", "dimensions": 2, "user": "u"}
    assert embedding_message(Operation.EMBED, body) == {
        "operation": "embed",
        "input": ["a"],
        "dimensions": 2,
        "truncate": False,
    }
    ranked: dict[str, Value] = {"query": "q", "documents": ("a", "b"), "truncate": True}
    assert embedding_message(Operation.RERANK, ranked) == {
        "operation": "rerank",
        "query": "q",
        "documents": ["a", "b"],
        "truncate": True,
    }


@dataclass
class Source:
    """A worker that answers from a script, and that is always there."""

    replies: Sequence[Mapping[str, Value]]

    @asynccontextmanager
    async def use(self, deadline_s: float) -> AsyncGenerator[Worker, None]:
        assert deadline_s > 0
        await trio.lowlevel.checkpoint()
        yield FakeWorker(WorkerSpec("w", ()), lambda _message: self.replies, HELLO)


def described(facts: ModelFacts = FACTS, slots: int = 0) -> Descriptor:
    hello = EmbeddingHello.read(HELLO)
    assert hello is not None
    [descriptor] = describe_embedding([NAME], slots, Privacy.LAN, facts, hello)
    return descriptor


def capability(*replies: Mapping[str, Value], facts: ModelFacts = FACTS) -> EmbeddingCapability:
    return EmbeddingCapability(described(facts), Source(replies))


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


DONE: Mapping[str, Value] = {"done": {"dimensions": 2, "prompt_tokens": 7, "texts": 2}}


def test_what_is_announced() -> None:
    embeds = described()
    assert (embeds.operations, embeds.slots, embeds.privacy) == (
        (Operation.EMBED,),
        CALLS_MAX,
        Privacy.LAN,
    )
    assert embeds.fields == {
        "context": 512,
        "pooling": "mean",
        "texts_per_s": 30.0,
        "dimensions": 2,
    }
    assert embeds.rates is not None
    assert (embeds.rates.prefill_tokens_per_s, embeds.rates.decode_tokens_per_s) == (900.0, 0.0)
    ranks = described(replace(FACTS, pooling="rank"), slots=3)
    assert (ranks.operations, ranks.slots) == ((Operation.RERANK,), 3)
    assert "dimensions" not in ranks.fields


def test_it_keeps_the_contract() -> None:
    rows = floats(1, 0, 0.6, 0.8)
    embeds = capability({"position": 0, "data": rows}, DONE)
    request = make_request(Operation.EMBED, {"input": ["a", "b"]})
    checked = trio.run(check_capability, embeds, request)
    assert checked.data == rows
    assert checked.done.usage.prompt_tokens == 7
    assert checked.done.detail == {
        "dimensions": 2,
        "texts": 2,
        "model": "MiniLM#abababababababab",
    }


@pytest.mark.parametrize(
    "replies",
    [
        [DONE],
        [{"position": 0, "data": floats(1, 0)}, DONE],
        [{"position": 1, "data": floats(1, 0, 1, 0)}, DONE],
        [{"position": 0, "data": floats(1, 0, 1, float("nan"))}, DONE],
        [{"position": 0, "data": "text"}],
        [{"text": "Hello"}],
        [{"position": 0, "data": floats(1, 0, 1, 0)}, {"done": {}}],
        [{"position": 0, "data": floats(1, 0, 1, 0)}],
    ],
)
def test_a_worker_that_makes_no_sense_is_a_failure(replies: list[Mapping[str, Value]]) -> None:
    request = make_request(Operation.EMBED, {"input": ["a", "b"]})
    with pytest.raises(Failed):
        trio.run(lambda: check_capability(capability(*replies), request, cancel=False))


@pytest.mark.parametrize(
    "hello",
    [
        {**HELLO, "context_tokens": 0},
        {**HELLO, "context_tokens": "many"},
        {**HELLO, "embedding": {"dimensions": 0}},
        {**HELLO, "embedding": {"dimensions": 2**40}},
        {**HELLO, "embedding": {"dimensions": 2, "tokens_per_s": float("nan")}},
        {**HELLO, "embedding": {"dimensions": 2, "tokens_per_s": 1.0, "texts_per_s": -1}},
    ],
)
def test_a_hello_that_makes_no_sense_is_refused(hello: Mapping[str, Value]) -> None:
    with pytest.raises(ValueError, match="the worker says"):
        EmbeddingHello.read(hello)
    assert EmbeddingHello.read({"context_tokens": 512}) is None


def test_the_rate_of_late_is_announced_with_the_texts_that_go_with_it() -> None:
    hello = EmbeddingHello.read(HELLO)
    assert hello is not None
    slower = hello.lately(450.02)
    assert slower.tokens_per_s == 450.02
    assert slower.texts_per_s == pytest.approx(15.0)
    assert hello.lately(0.0) == hello, "it is not known"
    unmeasured = replace(hello, tokens_per_s=0.0)
    assert unmeasured.lately(100.0) == unmeasured
    said = {**HELLO, "model": facts_to_wire(FACTS)}
    model = ModelConfig("/m.gguf", (NAME,))
    [descriptor] = describe(model, FACTS.digest, said, Standing(True, prefill_tokens_per_s=450.02))
    assert descriptor.rates is not None
    assert descriptor.rates.prefill_tokens_per_s == 450.0
    assert descriptor.fields["texts_per_s"] == 15.0


def test_only_batches_that_are_half_full_say_how_fast_a_device_is() -> None:
    pace = EmbeddingPace(1000.0, batch_tokens=256)
    for _ in range(100):
        pace.stepped(8, 0.1)
    assert pace.tokens_per_s == 1000.0
    pace.stepped(128, 0.0)
    assert pace.tokens_per_s == 1000.0
    for _ in range(100):
        pace.stepped(200, 0.5)
    assert pace.tokens_per_s == pytest.approx(400.0, rel=0.01)
