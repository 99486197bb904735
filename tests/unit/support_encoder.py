"""Writes small BERT encoders with random weights as GGUF files, and computes them with numpy."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tests.unit.support_gguf import (
    ARRAY,
    F16,
    F32,
    INT32,
    STRING,
    decimal,
    entry,
    flag,
    number,
    text,
    word,
    write_gguf,
)

Array = npt.NDArray[np.float32]

NONE, MEAN, CLS, LAST, RANK = range(5)
PAD, UNKNOWN, BEGIN, SEPARATOR, MASK = range(5)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *("the", "a", "cat", "dog", "fox", "moon", "sun", "tree", "sits", "runs", "jumps", "sleeps"),
    *("over", "under", "beside", "big", "small", "red", "old", "is", "was", "and", "not", "."),
)


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder."""

    layers: int = 2
    width: int = 32
    heads: int = 4
    hidden: int = 64
    context: int = 64
    pooling: int | None = MEAN
    classifier: bool = False
    rerank_template: str = ""
    words: tuple[str, ...] = WORDS
    weight_type: int = F32
    seed: int = 7


@dataclass
class Encoder:
    """Weights of one encoder."""

    shape: EncoderShape
    weights: dict[str, Array] = field(default_factory=dict)

    def tokens(self, words: str) -> list[int]:
        """Of a text whose words are all in the vocabulary, as llama.cpp makes them."""
        known = {word: number for number, word in enumerate(self.shape.words, len(SPECIAL))}
        return [BEGIN, *(known.get(word, UNKNOWN) for word in words.split()), SEPARATOR]

    def pair(self, query: str, document: str) -> list[int]:
        """Of a query and a document to be ranked."""
        return [*self.tokens(query), *self.tokens(document)[1:]]

    def hidden(self, tokens: list[int]) -> Array:
        """One row a token, after the last layer."""
        shape, weights = self.shape, self.weights
        x = weights["token_embd.weight"][tokens] + weights["token_types.weight"][0]
        x = self._norm(x + weights["position_embd.weight"][: len(tokens)], "token_embd_norm")
        for layer in range(shape.layers):
            x = self._layer(x, f"blk.{layer}")
        return x

    def _layer(self, x: Array, name: str) -> Array:
        heads = self.shape.heads
        split = (len(x), heads, self.shape.width // heads)
        query, key, value = (
            self._linear(x, f"{name}.attn_{part}").reshape(split).transpose(1, 0, 2)
            for part in ("q", "k", "v")
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(np.float32(split[2]))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        attended = attended.transpose(1, 0, 2).reshape(x.shape)
        x = self._norm(
            x + self._linear(attended, f"{name}.attn_output"), f"{name}.attn_output_norm"
        )
        inner = self._linear(x, f"{name}.ffn_up")
        inner = 0.5 * inner * (1 + np.tanh(0.79788456 * (inner + 0.044715 * inner**3)))
        down = self._linear(inner.astype(np.float32), f"{name}.ffn_down")
        return self._norm(x + down, f"{name}.layer_output_norm")

    def _linear(self, x: Array, name: str) -> Array:
        product: Array = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return product

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
        result: Array = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return result

    def vector(self, tokens: list[int], pooling: int) -> Array:
        """The normalised vector of a text."""
        rows = self.hidden(tokens)
        pooled = {MEAN: rows.mean(axis=0), CLS: rows[0], LAST: rows[-1]}[pooling]
        unit: Array = pooled / np.linalg.norm(pooled)
        return unit

    def score(self, tokens: list[int]) -> float:
        """What the classifier says of a pair."""
        first = self.hidden(tokens)[:1]
        head = np.tanh(self._linear(first, "cls"))
        return float(self._linear(head, "cls.output")[0, 0])


def make_encoder(shape: EncoderShape) -> Encoder:
    """Random weights, the same for the same shape."""
    random = np.random.default_rng(shape.seed)
    encoder = Encoder(shape)
    width = shape.width

    def weight(name: str, *size: int, scale: float = 0.2) -> None:
        encoder.weights[name] = random.normal(0, scale, size).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int) -> None:
        weight(f"{name}.weight", outputs, inputs, scale=1.5 / np.sqrt(inputs))
        weight(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        weight(f"{name}.weight", width)
        encoder.weights[f"{name}.weight"] += 1
        weight(f"{name}.bias", width)

    weight("token_embd.weight", len(SPECIAL) + len(shape.words), width, scale=1.0)
    weight("token_types.weight", 2, width)
    weight("position_embd.weight", shape.context, width, scale=0.5)
    norm("token_embd_norm")
    for layer in range(shape.layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"blk.{layer}.{part}", width, width)
        norm(f"blk.{layer}.attn_output_norm")
        linear(f"blk.{layer}.ffn_up", shape.hidden, width)
        linear(f"blk.{layer}.ffn_down", width, shape.hidden)
        norm(f"blk.{layer}.layer_output_norm")
    if shape.classifier:
        linear("cls", width, width)
        linear("cls.output", 1, width)
    return encoder


def write_encoder(path: Path, encoder: Encoder) -> None:
    """Write it as a GGUF file that llama.cpp loads."""
    half = encoder.shape.weight_type == F16
    write_gguf(
        path,
        _entries(encoder.shape),
        {
            name: weights.astype(np.float16)
            if half and weights.ndim == 2 and "blk" in name
            else weights
            for name, weights in encoder.weights.items()
        },
    )


def _entries(shape: EncoderShape) -> list[bytes]:
    tokens = [*SPECIAL, *("\u2581" + word for word in shape.words)]
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    listed = struct.pack("<IQ", STRING, len(tokens)) + b"".join(text(token) for token in tokens)
    typed = struct.pack(f"<IQ{len(kinds)}i", INT32, len(kinds), *kinds)
    entries = [
        word("general.architecture", "bert"),
        word("general.name", "Tiny Encoder"),
        number("bert.context_length", shape.context),
        number("bert.embedding_length", shape.width),
        number("bert.block_count", shape.layers),
        number("bert.feed_forward_length", shape.hidden),
        number("bert.attention.head_count", shape.heads),
        decimal("bert.attention.layer_norm_epsilon", 1e-12),
        flag("bert.attention.causal", False),
        word("tokenizer.ggml.model", "bert"),
        entry("tokenizer.ggml.tokens", ARRAY, listed),
        entry("tokenizer.ggml.token_type", ARRAY, typed),
        number("tokenizer.ggml.token_type_count", 2),
        number("tokenizer.ggml.bos_token_id", BEGIN),
        number("tokenizer.ggml.unknown_token_id", UNKNOWN),
        number("tokenizer.ggml.seperator_token_id", SEPARATOR),
        number("tokenizer.ggml.padding_token_id", PAD),
        number("tokenizer.ggml.cls_token_id", BEGIN),
        number("tokenizer.ggml.mask_token_id", MASK),
    ]
    if shape.rerank_template:
        entries.append(word("tokenizer.chat_template.rerank", shape.rerank_template))
    if shape.pooling is not None:
        entries.append(number("bert.pooling_type", shape.pooling))
    return entries
