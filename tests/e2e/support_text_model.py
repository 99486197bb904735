"""Writes a small text model with random weights that counts positions in two dimensions, as Qwen2-VL does."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from tests.unit.support_gguf import (
    ARRAY,
    FLOAT32,
    INT32,
    STRING,
    decimal,
    entry,
    number,
    text,
    word,
    write_gguf,
)

EMBEDDING = 64
HEADS = 2
LAYERS = 2
FEED_FORWARD = 128
SECTIONS = (4, 6, 6, 0)
"""Pairs of values of a head that turn with time, row, column and a fourth."""

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_ALONE = [("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL)]
_AROUND = [(name, _CONTROL) for name in ("<|vision_start|>", "<|vision_end|>")]
_WORDS = [(letter, _NORMAL) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]


def write_text_model(path: Path, seed: int = 0) -> None:
    """One that answers any text with any other, always the same."""
    random = np.random.default_rng(seed)
    tokens = [*_ALONE, *((f"<0x{n:02X}>", _BYTE) for n in range(256)), *_AROUND, *_WORDS]
    arch = "qwen2vl"
    entries = [
        word("general.architecture", arch),
        word("general.name", "Tiny Qwen"),
        number("general.file_type", 0),
        number(f"{arch}.context_length", 4096),
        number(f"{arch}.embedding_length", EMBEDDING),
        number(f"{arch}.block_count", LAYERS),
        number(f"{arch}.feed_forward_length", FEED_FORWARD),
        number(f"{arch}.attention.head_count", HEADS),
        number(f"{arch}.attention.head_count_kv", HEADS),
        decimal(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6),
        decimal(f"{arch}.rope.freq_base", 10_000.0),
        entry(f"{arch}.rope.dimension_sections", ARRAY, struct.pack("<IQ4i", INT32, 4, *SECTIONS)),
        word("tokenizer.ggml.model", "llama"),
        entry(
            "tokenizer.ggml.tokens",
            ARRAY,
            struct.pack("<IQ", STRING, len(tokens)) + b"".join(text(name) for name, _ in tokens),
        ),
        entry(
            "tokenizer.ggml.scores",
            ARRAY,
            struct.pack(
                f"<IQ{len(tokens)}f", FLOAT32, len(tokens), *(-1.0 * n for n in range(len(tokens)))
            ),
        ),
        entry(
            "tokenizer.ggml.token_type",
            ARRAY,
            struct.pack(f"<IQ{len(tokens)}i", INT32, len(tokens), *(kind for _, kind in tokens)),
        ),
        number("tokenizer.ggml.bos_token_id", 1),
        number("tokenizer.ggml.eos_token_id", 2),
    ]

    def drawn(outputs: int, inputs: int) -> np.typing.NDArray[np.float32]:
        return random.normal(0, 1.5 / np.sqrt(inputs), (outputs, inputs)).astype(np.float32)

    weights = {
        "token_embd.weight": random.normal(0, 0.4, (len(tokens), EMBEDDING)).astype(np.float32),
        "output_norm.weight": np.ones(EMBEDDING, np.float32),
    }
    for layer in range(LAYERS):
        name = f"blk.{layer}"
        weights[f"{name}.attn_norm.weight"] = np.ones(EMBEDDING, np.float32)
        weights[f"{name}.ffn_norm.weight"] = np.ones(EMBEDDING, np.float32)
        for part in ("attn_q", "attn_k", "attn_v"):
            weights[f"{name}.{part}.weight"] = drawn(EMBEDDING, EMBEDDING)
            weights[f"{name}.{part}.bias"] = np.zeros(EMBEDDING, np.float32)
        weights[f"{name}.attn_output.weight"] = drawn(EMBEDDING, EMBEDDING)
        weights[f"{name}.ffn_gate.weight"] = drawn(FEED_FORWARD, EMBEDDING)
        weights[f"{name}.ffn_up.weight"] = drawn(FEED_FORWARD, EMBEDDING)
        weights[f"{name}.ffn_down.weight"] = drawn(EMBEDDING, FEED_FORWARD)
    write_gguf(path, entries, weights)
