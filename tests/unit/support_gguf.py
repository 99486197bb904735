"""Builds small GGUF files by hand."""

import struct

STRING, ARRAY, UINT32, BOOL = 8, 9, 4, 7
F32, Q4_1 = 0, 3


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


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
