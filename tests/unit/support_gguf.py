"""Builds small GGUF files by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

STRING, ARRAY, UINT32, BOOL = 8, 9, 4, 7
FLOAT32, INT32 = 6, 5
F32, F16, Q4_1 = 0, 1, 3
ALIGNMENT = 32


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return entry(key, UINT32, struct.pack("<I", value))


def decimal(key: str, value: float) -> bytes:
    return entry(key, FLOAT32, struct.pack("<f", value))


def decimals(key: str, values: tuple[float, ...]) -> bytes:
    listed = struct.pack(f"<IQ{len(values)}f", FLOAT32, len(values), *values)
    return entry(key, ARRAY, listed)


def flag(key: str, value: bool) -> bytes:
    return entry(key, BOOL, struct.pack("<?", value))


def word(key: str, value: str) -> bytes:
    return entry(key, STRING, text(value))


ENTRIES = (
    entry("general.architecture", STRING, text("llama")),
    entry("general.license", STRING, text("apache-2.0")),
    entry("general.file_type", UINT32, struct.pack("<I", 3)),
    entry("llama.context_length", UINT32, struct.pack("<I", 8192)),
    entry("tokenizer.ggml.add_bos_token", BOOL, b"\x00"),
    entry("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("ü")),
    entry("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", 6, 3) + struct.pack("<3f", 1, 2, 3)),
    entry("tokenizer.chat_template", STRING, text("{{ messages }}")),
)
TENSORS = (
    text("token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 2, Q4_1, 0),  # 128 weights: 80 bytes
    text("output_norm.weight") + struct.pack("<IQIQ", 1, 64, F32, 96),  # 256 bytes
)
DATA_BYTES = 96 + 256


def gguf(
    entries: tuple[bytes, ...] = ENTRIES,
    tensors: tuple[bytes, ...] = TENSORS,
    magic: bytes = b"GGUF",
    version: int = 3,
    data_bytes: int = DATA_BYTES,
) -> bytes:
    header = magic + struct.pack("<IQQ", version, len(tensors), len(entries))
    head = header + b"".join(entries) + b"".join(tensors)
    padding = -len(head) % 32
    return head + b"\x00" * (padding + data_bytes)


def write_gguf(
    path: Path,
    entries: Iterable[bytes],
    weights: Mapping[str, npt.NDArray[np.float32 | np.float16]],
) -> None:
    """Write a file that llama.cpp loads; weights are kept as 16 or 32 bits, as they come."""
    listed = tuple(entries)
    heads: list[bytes] = []
    blobs: list[bytes] = []
    offset = 0
    for name, values in weights.items():
        sizes = values.shape[::-1]
        kind = F16 if values.dtype.itemsize == 2 else F32
        heads.append(
            text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        )
        blob = values.tobytes()
        blob += b"\x00" * (-len(blob) % ALIGNMENT)
        blobs.append(blob)
        offset += len(blob)
    magic = b"GGUF" + struct.pack("<IQQ", 3, len(heads), len(listed))
    header = magic + b"".join(listed) + b"".join(heads)
    path.write_bytes(header + b"\x00" * (-len(header) % ALIGNMENT) + b"".join(blobs))
