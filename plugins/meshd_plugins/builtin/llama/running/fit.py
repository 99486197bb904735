"""Whether a model fits: what it takes of memory by arithmetic, before anything is loaded.

    weights  what the file holds of tensors, mapped into memory
    KV       bytes of one token (K and V of every layer that attends, f16) times context times slots, and
             for layers with a recurrent state its size times slots
    buffers  of one step: the activations of a batch, the mask, the logits; and the process itself
    projector  what its file holds of tensors, which is copied into memory; the activations of its encoder for the
             largest picture; and room for pictures and sounds while they are decoded and scaled

How wide K and V are is read from the shapes of the tensors that make them, layer by layer: that covers
grouped heads and layers that differ. A sliding window saves nothing here, since llama.cpp keeps the whole
context of such layers unless it is told otherwise, which would cost warm prefixes.

A model that makes vectors has one context for all that it does, computes a whole text in one step, and keeps a row
of logits for each of its tokens: how long a text may be is decided here, and slots take nothing.

Pure. The shape comes from the worker, which reads the header, and is checked like a peer's word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.models.gguf import Gguf
from meshd_plugins.builtin.llama.models.pooling import ENCODERS
from meshd_plugins.builtin.llama.models.projector import MODALITIES

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB
KV_VALUE_BYTES: Final = 2  # f16
LOGIT_BYTES: Final = 4  # f32
STATE_VALUE_BYTES: Final = 4  # f32
CONTEXT_PAD: Final = 256  # llama.cpp rounds the context of a slot up to this
CONTEXT_MIN: Final = 512  # chosen by itself; below it no conversation fits
CONTEXT_USUAL: Final = 4096  # slots are chosen for it
SLOTS_CHOICES: Final = (4, 2, 1)
AUTOMATIC_SHARE: Final = 0.5  # of what is free, that a value chosen by itself may fill
BATCH_TOKENS: Final = 512
PROCESS_BYTES: Final = (
    40 * MIB
)  # interpreter and libraries (measured: 37 with the demo model's vocabulary)
VOCABULARY_ENTRY_BYTES: Final = 400  # in llama.cpp's tables, beside the file (measured: 340)
LOGITS_BYTES_MAX: Final = 512 * MIB
"""One row for each token of the longest text of a model that makes vectors. With a large vocabulary it bounds how
long a text may be, unless a larger batch is configured."""
VECTOR_BATCH_TOKENS: Final = 512  # of short texts in one step, at most: on a GPU; 256 elsewhere
VECTOR_ROWS: Final = 64  # texts of a batch
PATCHES_USUAL: Final = 4096
"""Patches of a picture where the projector does not say to what size it is scaled: llama.cpp's own bound for most such
types is 1,024 embeddings of four patches each."""
PATCHES_LARGE: Final = 4 * PATCHES_USUAL
LARGE_PICTURES: Final = frozenset(
    {
        "glm4v",
        "hunyuanvl",
        "kimik25",
        "ling3vl",
        "muse-glimmer",
        "qwen2.5o",
        "qwen2.5vl_merger",
        "qwen2vl_merger",
        "qwen3vl_merger",
        "youtuvl",
    }
)
"""Types of projectors for which that bound is 4,096 embeddings or more (clip.cpp, set_limit_image_tokens)."""
SOUND_POSITIONS: Final = 1500  # of an encoder of sound: 30 s at a time
MEDIA_BYTES: Final = 256 * MIB
"""For pictures and sounds on their way to the encoder, and what is kept of them: one of 40 million pixels takes 120 MB
decoded (as does half an hour of sound), what was encoded of former ones 64 MiB, what waits as it came the rest."""
DEVICE_RESERVE_BYTES: Final = 512 * MIB  # of a GPU, for its driver and the screen
NUMBER_MAX: Final = 2**50

_BLOCK: Final = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much memory a model takes. All from its header."""

    weights_bytes: int
    block_bytes: int  # of these, in the repeated layers
    layers: int
    kv_row_bytes: int  # of one token, over all layers
    state_bytes: int  # recurrent state of one slot, over all layers
    embedding: int
    feed_forward: int
    heads: int
    vocabulary: int
    context_tokens: int  # trained; 0: the header does not say
    logit_rows: int = 0
    """Kept for each token of a text by a model that makes vectors or scores: 1, and 2 where it could write (one is
    computed, one copied). 0: it writes."""
    projector_bytes: int = 0  # of its projector: tensors and activations
    projector_scores_bytes: int = 0  # of its encoder's attention, where that is not fused

    def to_wire(self) -> dict[str, Value]:
        """For the worker's hello."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_wire(cls, value: Value) -> Shape:
        """Read what a worker says. Raises ValueError: it is not what ours says."""
        raw: Mapping[str, Value] = value if isinstance(value, Mapping) else {}
        numbers: dict[str, int] = {}
        for field in fields(cls):
            number = raw.get(field.name)
            if (
                isinstance(number, bool)
                or not isinstance(number, int)
                or not 0 <= number <= NUMBER_MAX
            ):
                raise ValueError(
                    f"the worker says that the model's {field.name} is {str(number)[:80]}"
                )
            numbers[field.name] = number
        return cls(**numbers)


def shape_of(header: Gguf, *, vectors: bool = False, projector: Gguf | None = None) -> Shape:
    """Return what a header says, of a model that makes vectors or has a projector too."""
    architecture = header.text("general.architecture")

    def number(key: str) -> int:
        return header.number(f"{architecture}.{key}")

    blocks: dict[int, dict[str, tuple[int, ...]]] = {}
    block_bytes = 0
    for tensor in header.tensors:
        if found := _BLOCK.fullmatch(tensor.name):
            block_bytes += tensor.size_bytes
            blocks.setdefault(int(found[1]), {})[found[2]] = tensor.shape
    embedding = number("embedding_length")
    heads = max(number("attention.head_count"), 1)
    query = heads * (number("attention.key_length") or embedding // heads)
    caches = header.metadata.get(f"{architecture}.attention.causal") is not False
    kv = sum(_kv_values(tensors, query) for tensors in blocks.values()) if caches else 0
    state = (number("ssm.conv_kernel") or 1) - 1
    state *= number("ssm.inner_size") + 2 * number("ssm.group_count") * number("ssm.state_size")
    state += number("ssm.state_size") * number("ssm.inner_size")
    recurrent = sum(1 for tensors in blocks.values() if any(n.startswith("ssm_") for n in tensors))
    embedded = [tensor for tensor in header.tensors if tensor.name == "token_embd.weight"]
    tensors_bytes, scores_bytes = (0, 0) if projector is None else _projector_bytes(projector)
    wide = [shape[1] for each in blocks.values() for shape in _feeding(each)]
    return Shape(
        weights_bytes=sum(tensor.size_bytes for tensor in header.tensors),
        block_bytes=block_bytes,
        layers=len(blocks),
        kv_row_bytes=kv * KV_VALUE_BYTES,
        state_bytes=recurrent * state * STATE_VALUE_BYTES,
        embedding=embedding,
        feed_forward=max(wide, default=4 * embedding),
        heads=heads,
        vocabulary=embedded[0].shape[-1] if embedded else 0,
        context_tokens=min(number("context_length"), NUMBER_MAX),
        logit_rows=(1 if architecture in ENCODERS else 2) if vectors else 0,
        projector_bytes=min(tensors_bytes, NUMBER_MAX),
        projector_scores_bytes=min(scores_bytes, NUMBER_MAX),
    )


def _projector_bytes(header: Gguf) -> tuple[int, int]:
    """Tensors and activations of a projector; and the scores of its attention, where that is not fused.

    Compared with what llama.cpp reserves: 5 to 5.6 times the width of an encoder with a feed-forward of twice that,
    for each patch, one layer at a time; here it is counted as 8 times.
    """
    activations, scores = 0, 0
    for name in MODALITIES:
        width = header.number(f"clip.{name}.embedding_length")
        wide = header.number(f"clip.{name}.feed_forward_length")
        patches = _patches(header) if name == "vision" else SOUND_POSITIONS
        activations = max(activations, 4 * patches * (4 * width + 2 * wide))
        scores = max(scores, 4 * patches**2 * header.number(f"clip.{name}.attention.head_count"))
    return sum(tensor.size_bytes for tensor in header.tensors) + activations, scores


def _patches(header: Gguf) -> int:
    """Of the largest picture that is encoded at once."""
    kinds = (header.text("clip.projector_type"), header.text("clip.vision.projector_type"))
    usual = PATCHES_USUAL if LARGE_PICTURES.isdisjoint(kinds) else PATCHES_LARGE
    side = header.number("clip.vision.image_size")
    pixels = max(side * side, header.number("clip.vision.image_max_pixels"))
    return max(usual, pixels // max(header.number("clip.vision.patch_size") ** 2, 1))


def _kv_values(tensors: Mapping[str, tuple[int, ...]], query: int) -> int:
    """Values that one layer keeps of a token."""
    rows = {name: shape[1] for name, shape in tensors.items() if len(shape) == 2}
    if (latent := rows.get("attn_kv_a_mqa.weight")) is not None:
        return latent  # of latent attention: K, and V is computed from it
    if (fused := rows.get("attn_qkv.weight")) is not None:
        return max(fused - query, 0)
    return rows.get("attn_k.weight", 0) + rows.get("attn_v.weight", rows.get("attn_k.weight", 0))


def _feeding(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    return (s for name, s in tensors.items() if name.startswith("ffn_up") and len(s) >= 2)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is configured; 0: chosen here."""

    context: int = 0  # tokens of one slot
    slots: int = 0
    batch: int = 0
    gpu_layers: int = -1  # -1: what fits
    flash_attention: bool = True
    kept_bytes: int = 0  # for prefixes that are kept outside of the context, where there is room


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes, in bytes."""

    weights: int
    kv: int
    buffers: int
    device: int = 0  # of all that, on GPUs with memory of their own
    kept: int = 0  # beside them, for prefixes
    projector: int = 0  # of what reads pictures and sounds

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.buffers + self.kept + self.projector

    @property
    def host(self) -> int:
        """What is taken of the machine's memory."""
        return self.total - self.device


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is loaded."""

    context_tokens: int  # of one slot
    slots: int
    batch_tokens: int
    gpu_layers: int
    need: Need


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that may be used."""

    host_bytes: int
    device_bytes: int = 0  # of GPUs with memory of their own; 0: there is none
    limit: str = ""  # the setting that allows no more of the machine's memory; "": there is no more


class DoesNotFit(Exception):
    """There is not enough memory. The message shows the arithmetic."""


def need(
    shape: Shape, context: int, slots: int, batch: int, *, flash: bool = True, kept: int = 0
) -> Need:
    """What a model takes on the machine's memory alone."""
    if shape.logit_rows:
        return _need_of_vectors(shape, context, batch, flash=flash)
    padded = -(-context // CONTEXT_PAD) * CONTEXT_PAD
    activations = 4 * batch * (3 * shape.feed_forward + 4 * shape.embedding)
    mask = 2 * batch * padded
    scores = 0 if flash else 4 * batch * padded * shape.heads
    logits = LOGIT_BYTES * shape.vocabulary * (slots + 1)
    own = PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * shape.vocabulary
    return Need(
        weights=shape.weights_bytes,
        kv=(shape.kv_row_bytes * padded + shape.state_bytes) * slots,
        buffers=activations + mask + scores + logits + own,
        kept=kept,
        projector=_need_of_projector(shape, flash=flash),
    )


def _need_of_projector(shape: Shape, *, flash: bool) -> int:
    if not shape.projector_bytes:
        return 0
    return shape.projector_bytes + MEDIA_BYTES + (0 if flash else shape.projector_scores_bytes)


def text_tokens_max(vocabulary: int, context: int, batch: int) -> int:
    """Tokens of one text that a model makes a vector of: `context`, as far as the logits of it may be kept."""
    logits = LOGITS_BYTES_MAX // (LOGIT_BYTES * max(vocabulary, 1))
    return max(1, min(context, max(logits, batch)))


def _need_of_vectors(shape: Shape, context: int, batch: int, *, flash: bool) -> Need:
    """The same for a model that makes vectors: one context, as long as its longest text or its batch."""
    longest = text_tokens_max(shape.vocabulary, context, batch)
    tokens = max(longest, min(batch, VECTOR_BATCH_TOKENS))
    tokens = -(-tokens // VECTOR_ROWS) * VECTOR_ROWS
    padded = -(-tokens // CONTEXT_PAD) * CONTEXT_PAD
    activations = 4 * tokens * (3 * shape.feed_forward + 4 * shape.embedding)
    mask = 2 * tokens * padded
    scores = 0 if flash else 4 * tokens * padded * shape.heads
    logits = LOGIT_BYTES * shape.vocabulary * shape.logit_rows * tokens
    own = PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * shape.vocabulary
    return Need(
        weights=shape.weights_bytes,
        kv=shape.kv_row_bytes * padded + shape.state_bytes * VECTOR_ROWS,
        buffers=activations + mask + scores + logits + own,
    )


def choose(shape: Shape, wish: Wish, room: Room) -> Plan:
    """How to load a model into that room. Raises DoesNotFit.

    What is configured is taken as it is, but for a context beyond the trained one. What is not takes at
    most half of the room, as far as it has a choice: another model may be wanted beside it. Prefixes are
    kept only where all else fits.
    """
    plan = _best(shape, wish, room)
    if _share(plan, room) > 1.0:
        wish = replace(wish, kept_bytes=0)
        plan = _best(shape, wish, room)
    if _share(plan, room) > 1.0:
        raise DoesNotFit(_refusal(shape, wish, plan, room))
    return plan


def _best(shape: Shape, wish: Wish, room: Room) -> Plan:
    """The largest plan that takes its share; the smallest where none does."""
    trained = shape.context_tokens or CONTEXT_USUAL
    usual = min(wish.context or CONTEXT_USUAL, trained)
    plans = [_place(shape, wish, usual, slots, room) for slots in _slots(shape, wish)]
    plan = next((p for p in plans if _share(p, room) <= AUTOMATIC_SHARE), plans[-1])
    if wish.context:
        return plan
    limit = AUTOMATIC_SHARE if _share(plan, room) <= AUTOMATIC_SHARE else 1.0
    longer = [_place(shape, wish, context, plan.slots, room) for context in _halvings(trained)]
    return next((p for p in longer if _share(p, room) <= limit), longer[-1])


def _slots(shape: Shape, wish: Wish) -> tuple[int, ...]:
    """Numbers of slots to choose from, the best one first."""
    if shape.logit_rows:
        return (1,)  # what comes at once shares batches
    return (wish.slots,) if wish.slots else SLOTS_CHOICES


def _place(shape: Shape, wish: Wish, context: int, slots: int, room: Room) -> Plan:
    """A plan, with as many layers on the GPU as are wished for or fit there."""
    batch = wish.batch or BATCH_TOKENS
    whole = need(shape, context, slots, batch, flash=wish.flash_attention, kept=wish.kept_bytes)
    if not room.device_bytes or not shape.layers or not wish.gpu_layers:
        layers = 0 if room.device_bytes else wish.gpu_layers
        return Plan(context, slots, batch, layers, whole)
    own = PROCESS_BYTES + VOCABULARY_ENTRY_BYTES * shape.vocabulary
    step = whole.buffers - own + whole.projector
    layer = (shape.block_bytes + whole.kv) // shape.layers
    rest = whole.weights - shape.block_bytes
    left = room.device_bytes - DEVICE_RESERVE_BYTES - step
    fitting = max(0, min(shape.layers, left // max(layer, 1)))
    if fitting == shape.layers and left >= layer * shape.layers + rest:
        fitting += 1  # and what stands after the last layer
    layers = fitting if wish.gpu_layers < 0 else min(wish.gpu_layers, shape.layers + 1)
    device = step + layer * min(layers, shape.layers) + (rest if layers > shape.layers else 0)
    return Plan(context, slots, batch, layers, replace(whole, device=device if layers else 0))


def _share(plan: Plan, room: Room) -> float:
    """Of the scarcest memory, how much a plan takes; above 1.0 it does not fit."""
    host = plan.need.host / max(room.host_bytes, 1)
    device = plan.need.device / room.device_bytes if room.device_bytes else 0.0
    return max(host, device)


def _halvings(context: int) -> Iterator[int]:
    while context > CONTEXT_MIN:
        yield context
        context //= 2
    yield context


def _refusal(shape: Shape, wish: Wish, plan: Plan, room: Room) -> str:
    free = f"{_gib(room.host_bytes)} GiB are {f'allowed by {room.limit}' if room.limit else 'free'}"
    if room.device_bytes:
        free += f", and {_gib(room.device_bytes)} on the GPU"
    for slots in (plan.slots, *(each for each in SLOTS_CHOICES if each < plan.slots)):
        for context in _halvings(plan.context_tokens):
            if (context, slots) == (plan.context_tokens, plan.slots):
                continue
            if _share(_place(shape, wish, context, slots, room), room) <= 1.0:
                hint = f"with context = {context} and slots = {slots} it would fit"
                return f"{explain(plan)}; {free}; {hint}"
    return f"{explain(plan)}; {free}; no context and number of slots makes it fit: take a smaller model"


def explain(plan: Plan) -> str:
    """The arithmetic, for people."""
    taken = plan.need
    slots = f"{plan.slots} slots of " if plan.slots > 1 else ""
    kept = f", kept prefixes {_gib(taken.kept)}" if taken.kept else ""
    reads = f", projector {_gib(taken.projector)}" if taken.projector else ""
    on_gpu = f", {_gib(taken.device)} of it on the GPU" if taken.device else ""
    return (
        f"needs {_gib(taken.total)} GiB (weights {_gib(taken.weights)}, KV {_gib(taken.kv)} for "
        f"{slots}{plan.context_tokens:,} tokens, buffers {_gib(taken.buffers)}{reads}{kept}{on_gpu})"
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}" if count >= GIB // 2 else f"{count / GIB:.2f}"
