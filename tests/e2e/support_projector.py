"""Writes small projectors with random weights as GGUF files, and pictures and sounds for them.

What they make of a picture means nothing, but it is deterministic, differs clearly from picture to picture, and has the
length of a token's embedding, so that a text model takes it in its stride. Encoding one takes milliseconds.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tests.unit.support_gguf import decimal, decimals, flag, number, word, write_gguf

Array = npt.NDArray[np.float32]

TOKEN_NORM = 3.2
"""Length of an embedding: about that of the demo model's tokens."""
FRAMES = 1500
"""Positions of a whisper encoder: 30 s of sound."""
MEL_BINS = 80
STACKED = 20
"""Positions of a sound that become one embedding."""


@dataclass
class _Weights:
    """Random weights by name."""

    random: np.random.Generator
    named: dict[str, Array]

    def draw(self, name: str, *size: int, scale: float) -> None:
        self.named[name] = self.random.normal(0, scale, size).astype(np.float32)

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        self.draw(f"{name}.weight", outputs, inputs, scale=1.5 / np.sqrt(inputs))
        self.draw(f"{name}.bias", outputs, scale=0.1)

    def norm(self, name: str, width: int) -> None:
        self.named[f"{name}.weight"] = np.ones(width, np.float32)
        self.draw(f"{name}.bias", width, scale=0.1)

    def last(self, name: str, outputs: int, inputs: int) -> None:
        """A projection whose rows come out as long as a token's embedding, from values of about 1."""
        self.draw(name, outputs, inputs, scale=TOKEN_NORM / np.sqrt(outputs * inputs))

    def layers(self, prefix: str, layers: int, width: int) -> None:
        for layer in range(layers):
            name = f"{prefix}.blk.{layer}"
            for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
                self.linear(f"{name}.{part}", width, width)
            self.norm(f"{name}.ln1", width)
            self.norm(f"{name}.ln2", width)
            self.linear(f"{name}.ffn_up", 2 * width, width)
            self.linear(f"{name}.ffn_down", width, 2 * width)
        self.norm(f"{prefix}.post_ln", width)


def write_projector(
    path: Path,
    kind: str = "phi4",
    *,
    n_embd: int = 576,
    image_size: int = 64,
    patch_size: int = 16,
    merge: int = 2,
    layers: int = 1,
    width: int = 32,
    seed: int = 0,
) -> None:
    """Write one for a text model with `n_embd` values an embedding.

    Args:
        path: Where to.
        kind: What llama.cpp takes it for.
            `phi4`: a picture keeps its aspect and becomes `n` embeddings by its size, 4 to
            `(image_size / patch_size)²`, with nothing around them.
            `gemma3`: `(image_size / patch_size / merge)²` embeddings, which attend to each other (not causal), between
            two marks in text.
            `idefics3`: an overview and tiles, each of as many; around them tokens that the demo model has not, which
            come as token -1.
            `qwen2vl_merger`: `merge**2` patches an embedding, laid out in two dimensions; for models like that of
            `support_text_model`.
            `ultravox`: sound, 75 embeddings for each begun 30 s.
            `phi4+ultravox`: pictures and sound.
        n_embd: Values of an embedding.
        image_size: Pixels of a side to which a picture is scaled, at most.
        patch_size: Pixels of a patch's side.
        merge: Patches of a side that become one embedding, but for `phi4`.
        layers: Of the encoder.
        width: Values of a patch inside the encoder; a multiple of 4.
        seed: Of the weights.
    """
    weights = _Weights(np.random.default_rng(seed), {})
    entries = [flag("clip.use_gelu", True)]
    for encoder in kind.split("+"):
        sees = encoder != "ultravox"
        key = "clip" if encoder == kind else "clip.vision" if sees else "clip.audio"
        entries.append(word(f"{key}.projector_type", encoder))
        if sees:
            entries += _see(weights, encoder, n_embd, layers, width, image_size, patch_size, merge)
        else:
            entries += _hear(weights, n_embd, layers, width)
    write_gguf(path, [*_general(), *entries], weights.named)


def _general() -> list[bytes]:
    return [
        word("general.architecture", "clip"),
        word("general.type", "mmproj"),
        word("general.name", "Tiny Projector"),
        number("general.file_type", 0),
    ]


def _sizes(encoder: str, n_embd: int, layers: int, width: int) -> list[bytes]:
    return [
        number(f"clip.{encoder}.projection_dim", n_embd),
        number(f"clip.{encoder}.embedding_length", width),
        number(f"clip.{encoder}.feed_forward_length", 2 * width),
        number(f"clip.{encoder}.block_count", layers),
        number(f"clip.{encoder}.attention.head_count", 4),
        decimal(f"clip.{encoder}.attention.layer_norm_epsilon", 1e-6),
    ]


def _see(
    weights: _Weights,
    kind: str,
    n_embd: int,
    layers: int,
    width: int,
    image_size: int,
    patch_size: int,
    merge: int,
) -> list[bytes]:
    weights.draw("v.patch_embd.weight", width, 3, patch_size, patch_size, scale=1 / patch_size)
    if kind == "qwen2vl_merger":  # it reads films: two frames, and positions only as angles
        second = (width, 3, patch_size, patch_size)
        weights.draw("v.patch_embd.weight.1", *second, scale=1 / patch_size)
    else:
        weights.draw("v.patch_embd.bias", width, scale=0.1)
        weights.draw("v.position_embd.weight", (image_size // patch_size) ** 2, width, scale=0.1)
    weights.layers("v", layers, width)
    match kind:
        case "qwen2vl_merger":
            weights.linear("mm.0", width * merge**2, width * merge**2)
            weights.last("mm.2.weight", n_embd, width * merge**2)
            weights.draw("mm.2.bias", n_embd, scale=0.01)
        case "phi4":
            weights.linear("mm.0", width, width)
            weights.last("mm.2.weight", n_embd, width)
            weights.draw("mm.2.bias", n_embd, scale=0.01)
        case "gemma3":
            weights.last("mm.input_projection.weight", width, n_embd)
            weights.named["mm.soft_emb_norm.weight"] = np.ones(width, np.float32)
        case "idefics3":
            weights.last("mm.model.fc.weight", n_embd, width * merge**2)
        case _:
            raise ValueError(f"no projector of kind {kind!r} is known here")
    return [
        flag("clip.has_vision_encoder", True),
        *_sizes("vision", n_embd, layers, width),
        number("clip.vision.image_size", image_size),
        number("clip.vision.preproc_image_size", image_size),
        number("clip.vision.patch_size", patch_size),
        number("clip.vision.projector.scale_factor", merge),
        number("clip.vision.image_min_pixels", (2 * patch_size) ** 2),
        number("clip.vision.image_max_pixels", image_size**2),
        decimals("clip.vision.image_mean", (0.5, 0.5, 0.5)),
        decimals("clip.vision.image_std", (0.5, 0.5, 0.5)),
    ]


def _hear(weights: _Weights, n_embd: int, layers: int, width: int) -> list[bytes]:
    weights.draw("a.conv1d.1.weight", width, MEL_BINS, 3, scale=1 / np.sqrt(3 * MEL_BINS))
    weights.draw("a.conv1d.1.bias", width, 1, scale=0.1)
    weights.draw("a.conv1d.2.weight", width, width, 3, scale=1 / np.sqrt(3 * width))
    weights.draw("a.conv1d.2.bias", width, 1, scale=0.1)
    weights.draw("a.position_embd.weight", FRAMES, width, scale=0.1)
    weights.layers("a", layers, width)
    for layer in range(layers):  # whisper's keys have no bias
        del weights.named[f"a.blk.{layer}.attn_k.bias"]
    stacked = width * STACKED
    weights.named["mm.a.norm_pre.weight"] = np.ones(stacked, np.float32)
    weights.draw("mm.a.mlp.1.weight", 2 * width, stacked, scale=1.5 / np.sqrt(stacked))
    weights.named["mm.a.norm_mid.weight"] = np.ones(width, np.float32)
    weights.last("mm.a.mlp.2.weight", n_embd, width)
    return [
        flag("clip.has_audio_encoder", True),
        *_sizes("audio", n_embd, layers, width),
        number("clip.audio.num_mel_bins", MEL_BINS),
        number("clip.audio.projector.stack_factor", STACKED),
    ]


def png(width: int, height: int, pixels: Callable[[int, int], tuple[int, int, int]]) -> bytes:
    """A picture; `pixels(x, y)` gives red, green and blue, 0 to 255."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = (
        b"\x00" + bytes(part for x in range(width) for part in pixels(x, y)) for y in range(height)
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a colour, no alpha
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"".join(rows))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wav(seconds: float, hertz: float, rate_hz: int = 16_000) -> bytes:
    """A sine tone, mono, 16 bits."""
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    data = (np.sin(2 * np.pi * hertz * times) * 20_000).astype("<i2").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate_hz, 2 * rate_hz, 2, 16)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body
