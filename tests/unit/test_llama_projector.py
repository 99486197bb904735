"""Projectors: what their headers say, whether they go with a model, and what they take of memory."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import pytest
from tests.unit.support_gguf import (
    ENTRIES,
    F32,
    decimals,
    entry,
    flag,
    gguf,
    number,
    text,
    word,
)

from meshd_plugins.api import PluginConfigError, Value
from meshd_plugins.builtin.llama.arguments import Arguments, Projector
from meshd_plugins.builtin.llama.config import ModelConfig, read_config
from meshd_plugins.builtin.llama.models.digest import Mark
from meshd_plugins.builtin.llama.models.facts import (
    describe_model,
    facts_from_wire,
    facts_to_wire,
    modalities_from_wire,
)
from meshd_plugins.builtin.llama.models.gguf import Gguf, parse_gguf
from meshd_plugins.builtin.llama.models.projector import (
    ProjectorMismatch,
    check_projector,
    encoders_of,
    modalities_of,
)
from meshd_plugins.builtin.llama.running.fit import (
    GIB,
    MEDIA_BYTES,
    MIB,
    DoesNotFit,
    Room,
    Wish,
    choose,
    need,
    shape_of,
)
from meshd_plugins.builtin.llama.running.launch import files_seen

WIDTH = 64
MARK = Mark(1, 2, 3, 4, 5)


def parse(data: bytes) -> Gguf:
    return parse_gguf(BytesIO(data), len(data))


def model(width: int = WIDTH, *more: bytes) -> Gguf:
    return parse(gguf((*ENTRIES, number("llama.embedding_length", width), *more)))


def projector(*entries: bytes, tensors: Mapping[str, tuple[int, ...]] | None = None) -> Gguf:
    """A header with these entries and tensors of 32-bit floats."""
    rows: list[bytes] = []
    offset = 0
    for name, shape in (tensors or {"v.patch_embd.weight": (64,)}).items():
        rows.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, F32, offset))
        size = 4
        for each in shape:
            size *= each
        offset += -(-size // 32) * 32
    return parse(
        gguf((word("general.architecture", "clip"), *entries), tuple(rows), data_bytes=offset)
    )


def seeing(width: int = WIDTH, kind: str = "idefics3") -> tuple[bytes, ...]:
    return (
        flag("clip.has_vision_encoder", True),
        word("clip.projector_type", kind),
        number("clip.vision.projection_dim", width),
        number("clip.vision.embedding_length", 32),
        number("clip.vision.feed_forward_length", 128),
        number("clip.vision.attention.head_count", 4),
        number("clip.vision.image_size", 64),
        number("clip.vision.patch_size", 16),
        decimals("clip.vision.image_mean", (0.5, 0.5, 0.5)),
    )


def hearing(width: int = WIDTH) -> tuple[bytes, ...]:
    return (
        flag("clip.has_audio_encoder", True),
        word("clip.audio.projector_type", "ultravox"),
        number("clip.audio.projection_dim", width),
        number("clip.audio.embedding_length", 32),
        number("clip.audio.feed_forward_length", 64),
    )


def test_what_a_model_reads_is_in_the_header() -> None:
    assert modalities_of(projector(*seeing())) == ("text", "image")
    assert modalities_of(projector(*hearing())) == ("text", "audio")
    both = projector(*hearing(), *seeing())
    assert modalities_of(both) == ("text", "image", "audio"), "in one order, whatever the file's is"
    assert [each.kind for each in encoders_of(both)] == ["idefics3", "idefics3"]
    unused = flag("clip.has_audio_encoder", False)
    assert modalities_of(projector(*seeing(), unused)) == ("text", "image")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (model(), "no projector but a model of the architecture 'llama'"),
        (model(WIDTH, word("general.type", "adapter")), "no projector but a LoRA adapter"),
        (projector(), "neither pictures nor sounds"),
        (projector(number("clip.has_vision_encoder", 1)), "neither pictures nor sounds"),
    ],
)
def test_another_file_is_refused_with_what_it_is(header: Gguf, words: str) -> None:
    with pytest.raises(ProjectorMismatch, match=words):
        modalities_of(header)
    with pytest.raises(ProjectorMismatch, match=words):
        check_projector(model(), header)


def test_a_projector_for_another_width_is_refused_with_both_widths() -> None:
    check_projector(model(), projector(*seeing(), *hearing()))
    named = model(WIDTH, word("general.name", "SmolLM2\n135M"))
    with pytest.raises(ProjectorMismatch) as refused:
        check_projector(named, projector(*seeing(2048)))
    assert str(refused.value) == (
        "it is for models with 2,048 values an embedding, and SmolLM2135M has 64"
    )
    with pytest.raises(ProjectorMismatch, match=r"32 values an embedding, and the model has 64"):
        check_projector(model(), projector(*seeing(), *hearing(32)))
    with pytest.raises(ProjectorMismatch, match="itself a projector"):
        check_projector(projector(*seeing()), projector(*seeing()))


def test_old_types_of_projectors_are_as_wide_as_their_last_tensor() -> None:
    """Their keys give the width of the encoder's own projection (768 for CLIP), or nothing."""
    old = seeing(768, "mlp")
    check_projector(model(), projector(*old, tensors={"mm.2.weight": (256, WIDTH)}))
    with pytest.raises(ProjectorMismatch, match="128 values"):
        check_projector(model(), projector(*old, tensors={"mm.2.weight": (256, 128)}))
    check_projector(model(), projector(*seeing(768, "resampler")))  # llama.cpp compares it then


def test_the_facts_of_a_model_say_what_it_reads() -> None:
    header = model()
    bare = describe_model(header, Path("a.gguf"), "ab" * 32)
    assert bare.modalities == ("text",)
    facts = describe_model(header, Path("a.gguf"), "ab" * 32, projector=projector(*seeing()))
    assert facts.modalities == ("text", "image")
    assert facts_from_wire(facts_to_wire(facts), "ab" * 32) == facts


@pytest.mark.parametrize(
    "said", [None, "text", [], ["image"], ["text", "smell"], ["text", "text"], {"text": 1}, [1]]
)
def test_a_worker_that_says_nonsense_of_what_is_read_is_not_believed(said: Value) -> None:
    with pytest.raises(ValueError, match="says that the model reads"):
        modalities_from_wire(said)


def test_a_projector_is_counted_with_its_encoder_and_what_it_reads() -> None:
    tensors = {"v.patch_embd.weight": (1024, 256)}  # 1 MiB
    shape = shape_of(model(), projector=projector(*seeing(), tensors=tensors))
    activations = 4 * 4096 * (4 * 32 + 2 * 128)  # of more patches than these pictures have
    assert shape.projector_bytes == MIB + activations
    assert need(shape, 512, 1, 512).projector == MIB + activations + MEDIA_BYTES
    scores = 4 * 4096**2 * 4
    assert need(shape, 512, 1, 512, flash=False).projector == (
        MIB + activations + scores + MEDIA_BYTES
    )
    large = (
        *seeing()[:-3],
        number("clip.vision.image_size", 448),
        number("clip.vision.image_max_pixels", 2048 * 2048),
        number("clip.vision.patch_size", 16),
    )
    shape = shape_of(model(), projector=projector(*large, tensors=tensors))
    assert shape.projector_bytes == MIB + 4 * 128 * 128 * (4 * 32 + 2 * 128)
    assert need(shape_of(model()), 512, 1, 512).projector == 0
    qwen = shape_of(model(), projector=projector(*seeing(WIDTH, "qwen2vl_merger"), tensors=tensors))
    assert qwen.projector_bytes == MIB + 4 * activations, "its pictures are as large as they come"
    lying = (*seeing()[:-3], number("clip.vision.image_size", 2**32 - 1))
    assert shape_of(model(), projector=projector(*lying)).projector_bytes <= 2**50


def test_a_model_that_does_not_fit_with_its_projector_is_refused_with_the_sum() -> None:
    tensors = {"v.patch_embd.weight": (1024, 1024, 256)}  # 1 GiB
    with_it = shape_of(model(), projector=projector(*seeing(), tensors=tensors))
    assert choose(with_it, Wish(512, 1), Room(2 * GIB)).need.projector > GIB
    with pytest.raises(DoesNotFit, match=r"projector 1\.3\); 1\.0 GiB are free; no context"):
        choose(with_it, Wish(512, 1), Room(GIB))
    assert choose(shape_of(model()), Wish(512, 1), Room(GIB)).need.projector == 0


def test_on_a_gpu_the_projector_takes_memory_there() -> None:
    layers = {f"blk.{n}.attn_k.weight": (64, 64) for n in range(4)}
    base = projector(*seeing())
    rows = tuple(
        text(name) + struct.pack("<I2QIQ", 2, *shape, F32, n * 64 * 64 * 4)
        for n, (name, shape) in enumerate(layers.items())
    )
    entries = (
        *ENTRIES,
        number("llama.embedding_length", 64),
        number("llama.attention.head_count", 1),
    )
    header = parse(gguf(entries, rows, data_bytes=4 * 64 * 64 * 4))
    room = Room(4 * GIB, 4 * GIB)
    bare = choose(shape_of(header), Wish(512, 1), room).need
    both = choose(shape_of(header, projector=base), Wish(512, 1), room).need
    assert both.device - bare.device == both.projector > 0


def table(**more: Value) -> dict[str, Value]:
    model: dict[str, Value] = {"path": "/m.gguf", "names": ["knowledge.gpt/x"], **more}
    return {"models": [model]}


def config(**more: Value) -> ModelConfig:
    [found] = read_config(table(**more))
    return found


def test_a_projector_is_configured_by_its_file() -> None:
    found = config(projector="/p.gguf", projector_sha256="AB" * 32)
    assert (found.projector, found.projector_sha256) == ("/p.gguf", "ab" * 32)
    assert config(projector="pypi:some-package").projector == "pypi:some-package"
    assert config().projector == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"projector": "p.gguf"}, "absolute path, or pypi:PACKAGE"),
        ({"projector": 1}, "absolute path, or pypi:PACKAGE"),
        ({"projector": "/p.gguf", "projector_sha256": "ab"}, r"projector_sha256 is 'ab'"),
        ({"projector_sha256": "ab" * 32}, "the digest of no projector"),
        ({"projector": "/p.gguf", "embeddings": True}, "makes vectors of texts"),
        ({"projector": "/p.gguf", "pooling": "mean"}, "makes vectors of texts"),
        ({"projector": "/p.gguf", "split": ["b"]}, "a split model reads text only"),
        ({"projector": "/p.gguf", "split": "auto"}, "a split model reads text only"),
    ],
)
def test_what_cannot_have_a_projector_is_refused_with_the_reason(
    more: dict[str, Value], words: str
) -> None:
    with pytest.raises(PluginConfigError, match=words):
        config(**more)


def test_a_worker_is_told_of_the_verified_file() -> None:
    given = Arguments(3, "/m.gguf", MARK, "ab", "", 1, 512, 1, 0)
    assert Arguments.from_text(given.to_text()) == given
    told = Projector(4, "/p.gguf", MARK, "cd")
    both = Arguments(3, "/m.gguf", MARK, "ab", "", 1, 512, 1, 0, projector=told)
    assert Arguments.from_text(both.to_text()) == both


def test_a_projector_that_is_mended_has_its_model_tried_again(tmp_path: Path) -> None:
    """What was left out is looked at again when one of its files changes: all of them count."""
    names = ("m", "lora", "p")
    places = {name: tmp_path / f"{name}.gguf" for name in names}
    for place in places.values():
        place.write_bytes(b"GGUF")
    lora: Value = [{"path": str(places["lora"])}]
    [found] = read_config(table(path=str(places["m"]), lora=lora, projector=str(places["p"])))
    states = [files_seen(found)]
    for place in places.values():
        place.write_bytes(b"GGUF and more")
        states.append(files_seen(found))
    places["p"].unlink()
    states.append(files_seen(found))
    assert len(set(states)) == len(states)
    assert files_seen(found) == states[-1]


def test_the_entry_of_no_type_is_none() -> None:
    """A key that is there with another type counts as not there."""
    odd = entry("clip.projector_type", 4, struct.pack("<I", 7))
    [encoder] = encoders_of(projector(flag("clip.has_vision_encoder", True), odd))
    assert (encoder.kind, encoder.embedding) == ("", 0)
