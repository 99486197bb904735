"""The arithmetic of memory: what a header says, what is chosen, and what is said when it does not fit."""

import re
import struct
from dataclasses import replace
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_gguf import F32, STRING, UINT32, entry, gguf, text

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.models.gguf import Gguf, parse_gguf
from meshd_plugins.builtin.llama.running import fit
from meshd_plugins.builtin.llama.running.fit import (
    GIB,
    MIB,
    DoesNotFit,
    Need,
    Plan,
    Room,
    Shape,
    Wish,
    choose,
    need,
    shape_of,
    text_tokens_max,
)
from meshd_plugins.builtin.llama.worker import embedding

DEMO = Shape(
    weights_bytes=96_576_768,
    block_bytes=66_493_440,
    layers=30,
    kv_row_bytes=23_040,
    state_bytes=0,
    embedding=576,
    feed_forward=1536,
    heads=9,
    vocabulary=49_152,
    context_tokens=8192,
)
"""SmolLM2-135M-Instruct, Q4_1."""

SEVEN = Shape(
    weights_bytes=4 * GIB,
    block_bytes=3800 * MIB,
    layers=32,
    kv_row_bytes=32 * 8 * 128 * 2 * 2,
    state_bytes=0,
    embedding=4096,
    feed_forward=14_336,
    heads=32,
    vocabulary=128_256,
    context_tokens=131_072,
)


def header(numbers: dict[str, int], tensors: dict[str, tuple[int, ...]]) -> Gguf:
    """A file of one architecture, with tensors of 32-bit floats."""
    entries = [entry("general.architecture", STRING, text("llama"))]
    entries += [
        entry(f"llama.{key}", UINT32, struct.pack("<I", value)) for key, value in numbers.items()
    ]
    rows: list[bytes] = []
    offset = 0
    for name, shape in tensors.items():
        count = 1
        for size in shape:
            count *= size
        rows.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, F32, offset))
        offset += -(-4 * count // 32) * 32
    data = gguf(tuple(entries), tuple(rows), data_bytes=offset)
    return parse_gguf(BytesIO(data), len(data))


@pytest.mark.parametrize(
    ("context", "slots", "resident_mib"),
    [(4096, 1, 237), (4096, 4, 510), (8192, 8, 1608)],
)
def test_the_demo_model_takes_what_was_measured_on_a_real_device(
    context: int, slots: int, resident_mib: int
) -> None:
    """Resident memory of a process with llama.cpp, its context full, in MiB."""
    assert need(DEMO, context, slots, 512).total / MIB == pytest.approx(resident_mib, rel=0.1)


@pytest.mark.parametrize(
    ("logit_rows", "vocabulary", "context", "resident_mib"),
    [
        (2, 49_152, 1024, 557),  # the demo model, made to embed
        (2, 49_152, 4096, 1252),  # a text of 2,730 tokens, for whose logits there is room
    ],
)
def test_a_model_that_makes_vectors_takes_what_its_longest_text_takes(
    logit_rows: int, vocabulary: int, context: int, resident_mib: int
) -> None:
    """Resident memory of a process after one such text, in MiB."""
    shape = replace(DEMO, logit_rows=logit_rows, vocabulary=vocabulary)
    taken = need(shape, context, 1, 512)
    assert taken.total / MIB == pytest.approx(resident_mib, rel=0.1)
    assert need(shape, context, 8, 512) == taken, "what comes at once shares one context"


def test_an_encoder_keeps_a_row_of_logits_for_each_token_and_a_writer_two() -> None:
    numbers = {"embedding_length": 64, "context_length": 8192}
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (64, 1000),
        "blk.0.attn_k.weight": (64, 64),
    }
    assert shape_of(header(numbers, tensors)).logit_rows == 0
    assert shape_of(header(numbers, tensors), vectors=True).logit_rows == 2
    encoder = replace(DEMO, logit_rows=1, vocabulary=250_000)
    bound = 512 * MIB // (4 * 250_000)
    needs = [need(encoder, context, 1, 512) for context in (512, 8192)]
    assert needs[1].buffers - needs[0].buffers < 100 * MIB, "the text is bounded"
    assert needs[0].buffers > 4 * 250_000 * 512
    longer = need(encoder, 8192, 1, 4096)
    assert longer.buffers > 4 * 250_000 * 4096, "a larger batch takes a longer text"
    assert text_tokens_max(250_000, 8192, 512) == bound
    assert text_tokens_max(250_000, 128, 512) == 128


def test_the_worker_bounds_texts_as_the_arithmetic_does() -> None:
    assert fit.LOGITS_BYTES_MAX == embedding.LOGITS_BYTES_MAX
    assert fit.VECTOR_ROWS == embedding.TEXTS_MAX
    assert max(embedding.BATCH_TOKENS, embedding.BATCH_TOKENS_GPU) == fit.VECTOR_BATCH_TOKENS


def test_a_model_that_makes_vectors_and_does_not_fit_says_what_would() -> None:
    shape = replace(DEMO, logit_rows=2)
    assert choose(shape, Wish(), Room(16 * GIB)).slots == 1
    with pytest.raises(DoesNotFit, match=r"with context = 1024 .* it would fit"):
        choose(shape, Wish(context=4096), Room(800 * MIB))


def test_keys_and_values_are_counted_layer_by_layer() -> None:
    shape = shape_of(
        header(
            {"embedding_length": 64, "attention.head_count": 8, "context_length": 2048},
            {
                "token_embd.weight": (64, 100),
                "blk.0.attn_k.weight": (64, 16),  # two heads of eight: grouped
                "blk.0.attn_v.weight": (64, 16),
                "blk.0.ffn_up.weight": (64, 256),
                "blk.1.attn_qkv.weight": (64, 64 + 2 * 32),  # in one, with four heads
                "blk.2.ssm_out.weight": (64, 64),  # attends to nothing
                "blk.3.attn_kv_a_mqa.weight": (64, 24),  # latent
            },
        )
    )
    assert shape.kv_row_bytes == 2 * (16 + 16 + 2 * 32 + 24)
    assert (shape.layers, shape.vocabulary, shape.feed_forward) == (4, 100, 256)
    assert shape.context_tokens == 2048
    assert shape.block_bytes == shape.weights_bytes - 4 * 6400


def test_a_recurrent_state_is_counted_a_slot_and_not_a_token() -> None:
    numbers = {
        "embedding_length": 64,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 16,
    }
    shape = shape_of(header(numbers, {"blk.0.ssm_in.weight": (64, 256)}))
    assert shape.kv_row_bytes == 0
    assert shape.state_bytes == 4 * (3 * 128 + 16 * 128)
    assert need(shape, 1024, 3, 512).kv == 3 * shape.state_bytes


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic_and_what_would_fit() -> None:
    with pytest.raises(DoesNotFit) as refused:
        choose(SEVEN, Wish(context=8192, slots=4), Room(int(5.5 * GIB)))
    assert str(refused.value) == (
        "needs 8.2 GiB (weights 4.0, KV 4.0 for 4 slots of 8,192 tokens, buffers 0.21); 5.5 GiB are free; "
        "with context = 2048 and slots = 4 it would fit"
    )
    with pytest.raises(DoesNotFit, match="take a smaller model"):
        choose(SEVEN, Wish(), Room(3 * GIB))


def test_what_is_not_configured_is_chosen_from_memory() -> None:
    assert choose(DEMO, Wish(), Room(16 * GIB)).slots == 4
    assert choose(DEMO, Wish(), Room(500 * MIB)).slots == 1
    long = choose(DEMO, Wish(slots=1), Room(16 * GIB))
    assert long.context_tokens == 8192, "as much as it was trained with"
    tight = choose(SEVEN, Wish(slots=1), Room(6 * GIB))
    assert CONTEXT_OF_SEVEN[0] <= tight.context_tokens < CONTEXT_OF_SEVEN[1]
    assert choose(DEMO, Wish(context=100_000, slots=1), Room(16 * GIB)).context_tokens == 8192


CONTEXT_OF_SEVEN = (8192, 16_384)


def test_prefixes_are_kept_only_where_all_else_fits() -> None:
    wish = Wish(context=4096, slots=1, kept_bytes=256 * MIB)
    assert choose(DEMO, wish, Room(GIB)).need.kept == 256 * MIB
    assert choose(DEMO, wish, Room(300 * MIB)).need.kept == 0


def test_layers_go_to_the_gpu_as_far_as_they_fit() -> None:
    wish = Wish(context=8192, slots=1)
    none = choose(SEVEN, wish, Room(16 * GIB))
    assert (none.gpu_layers, none.need.device) == (-1, 0), "left to llama.cpp: there is no GPU"
    some = choose(SEVEN, wish, Room(16 * GIB, 4 * GIB))
    assert 0 < some.gpu_layers < SEVEN.layers
    assert some.need.device <= 4 * GIB
    assert some.need.host + some.need.device == some.need.total
    every = choose(SEVEN, wish, Room(16 * GIB, 24 * GIB))
    assert every.gpu_layers == SEVEN.layers + 1
    assert every.need.host < GIB
    assert choose(SEVEN, replace(wish, gpu_layers=5), Room(16 * GIB, 24 * GIB)).gpu_layers == 5
    tiny = choose(SEVEN, wish, Room(16 * GIB, 256 * MIB))
    assert (tiny.gpu_layers, tiny.need.device) == (0, 0)


sizes = st.integers(1, 2**33)
shapes = st.builds(
    Shape,
    weights_bytes=sizes,
    block_bytes=st.just(0),
    layers=st.integers(0, 100),
    kv_row_bytes=st.integers(0, 2**20),
    state_bytes=st.integers(0, 2**24),
    embedding=st.integers(0, 2**14),
    feed_forward=st.integers(0, 2**16),
    heads=st.integers(1, 128),
    vocabulary=st.integers(0, 2**18),
    context_tokens=st.integers(0, 2**20),
).map(lambda shape: replace(shape, block_bytes=shape.weights_bytes // 2))
wishes = st.builds(
    Wish,
    context=st.sampled_from([0, 512, 4096, 100_000]),
    slots=st.sampled_from([0, 1, 7]),
    gpu_layers=st.sampled_from([-1, 0, 10]),
    flash_attention=st.booleans(),
    kept_bytes=st.sampled_from([0, 2**28]),
)
rooms = st.builds(Room, st.integers(0, 2**35), st.sampled_from([0, 2**30, 2**35]))


def fits(taken: Need, room: Room) -> bool:
    on_device = taken.device <= room.device_bytes if room.device_bytes else True
    return taken.host <= room.host_bytes and on_device


@settings(max_examples=100, deadline=None)
@given(shapes, wishes, rooms)
def test_what_is_chosen_fits_and_what_is_advised_is_chosen(
    shape: Shape, wish: Wish, room: Room
) -> None:
    plan: Plan | None = None
    try:
        plan = choose(shape, wish, room)
    except DoesNotFit as error:
        if advice := re.search(r"context = (\d+) and slots = (\d+)", str(error)):
            context, slots = (int(each) for each in advice.groups())
            plan = choose(shape, replace(wish, context=context, slots=slots), room)
    if plan is not None:
        assert fits(plan.need, room)
        assert plan.need.host >= 0
        assert plan.need.device >= 0


def test_a_shape_travels_and_nonsense_is_refused() -> None:
    assert Shape.from_wire(DEMO.to_wire()) == DEMO
    wrong: tuple[Value, ...] = (
        None,
        [],
        {},
        {**DEMO.to_wire(), "layers": -1},
        {**DEMO.to_wire(), "heads": True},
    )
    for nonsense in wrong:
        with pytest.raises(ValueError, match="the worker says"):
            Shape.from_wire(nonsense)
