"""Reads the header of a GGUF model file: metadata, tensor shapes, and whether the file is all there.

Source: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3, little endian.

What is true of `read_gguf`, whatever the bytes: it returns or raises a `GgufError` (or the `OSError` of
the file itself); it reads no tensor data; its memory and time are bounded by the bounds below, not by what
the file claims; and no length is believed before it was compared with what is left of the file. llama.cpp
aborts the process on some broken files, so nothing is given to it that has not passed here.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ENTRIES_MAX: Final = 65_536  # metadata keys
TENSORS_MAX: Final = 65_536
KEY_BYTES_MAX: Final = 65_535  # of the specification
STRING_BYTES_MAX: Final = 16 * 1024 * 1024
ARRAY_ITEMS_MAX: Final = 16 * 1024 * 1024
ARRAY_DEPTH_MAX: Final = 2
WALKED_MAX: Final = (
    4 * 1024 * 1024
)  # texts and arrays in arrays, of the whole file: each costs a step
KEPT_BYTES_MAX: Final = 64 * 1024 * 1024  # of keys, names and texts, of the whole file
DIMENSIONS_MAX: Final = 4
ALIGNMENT_DEFAULT: Final = 32
READ_AHEAD_BYTES: Final = 1024 * 1024


class GgufError(Exception):
    """The file cannot be used. The message is for people.

    GgufError
      NotGguf          something else entirely
      TruncatedGguf    it begins well and ends too soon: a broken download
      MalformedGguf    it contradicts itself or the specification
      UnsupportedGguf  valid, and we or llama.cpp cannot use it
    """

    code = "gguf_error"


class NotGguf(GgufError):
    """The first bytes are not those of a GGUF file."""

    code = "not_gguf"


class TruncatedGguf(GgufError):
    """The file ends before what it says it holds."""

    code = "truncated_gguf"

    def __init__(self, needed_bytes: int, size_bytes: int) -> None:
        super().__init__(
            f"the file is cut short: it needs at least {needed_bytes:,} bytes and has {size_bytes:,}"
        )
        self.needed_bytes = needed_bytes
        self.size_bytes = size_bytes


class MalformedGguf(GgufError):
    """The file contradicts itself or the specification."""

    code = "malformed_gguf"

    def __init__(self, what: str) -> None:
        super().__init__(f"the file is damaged: {what}")


class UnsupportedGguf(GgufError):
    """A version or tensor type that is not known here."""

    code = "unsupported_gguf"


class _Type(IntEnum):
    """Types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS: Final[Mapping[_Type, struct.Struct]] = {
    _Type.UINT8: struct.Struct("<B"),
    _Type.INT8: struct.Struct("<b"),
    _Type.UINT16: struct.Struct("<H"),
    _Type.INT16: struct.Struct("<h"),
    _Type.UINT32: struct.Struct("<I"),
    _Type.INT32: struct.Struct("<i"),
    _Type.FLOAT32: struct.Struct("<f"),
    _Type.BOOL: struct.Struct("<?"),
    _Type.UINT64: struct.Struct("<Q"),
    _Type.INT64: struct.Struct("<q"),
    _Type.FLOAT64: struct.Struct("<d"),
}

TENSOR_BLOCKS: Final[Mapping[int, tuple[int, int]]] = {
    # ggml type -> (weights in a block, bytes of a block); a test compares them with libggml's own
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
    42: (64, 18),  # Q2_0
}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata; its items (often the vocabulary) are walked over, not kept."""

    item_type: int
    count: int


GgufValue: TypeAlias = "int | float | bool | str | GgufArray"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape and place of one tensor."""

    name: str
    shape: tuple[int, ...]
    type: int  # ggml type
    offset: int  # from the start of the data section
    size_bytes: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Gguf:
    """All that the header says."""

    version: int
    metadata: Mapping[str, GgufValue]
    tensors: tuple[Tensor, ...]
    data_offset: int
    size_bytes: int  # of the file
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Where each entry of the metadata begins and ends in the file, its key included."""

    @property
    def parameters(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.weights for tensor in self.tensors)

    def text(self, key: str) -> str:
        """Return a string of the metadata, "" where it is missing or no string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int:
        """Return an integer of the metadata, 0 where it is missing or no integer."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0


def read_gguf(file: Path | int) -> Gguf:
    """Read and check the header of a file, or of one that is open. Raises GgufError, OSError."""
    with open(file, "rb", buffering=READ_AHEAD_BYTES, closefd=isinstance(file, Path)) as opened:
        opened.seek(0)
        return parse_gguf(opened, os.fstat(opened.fileno()).st_size)


def parse_gguf(file: BinaryIO, size_bytes: int, *, part_allowed: bool = False) -> Gguf:
    """Read and check the header of an open file of that size. Raises GgufError.

    Args:
        file: at its beginning.
        size_bytes: of the whole file.
        part_allowed: it may be one of several parts of a model.
    """
    reader = _Reader(file, size_bytes)
    if size_bytes < len(MAGIC) or reader.take(len(MAGIC)) != MAGIC:
        raise NotGguf("this is no GGUF model file: it does not begin with 'GGUF'")
    version = reader.scalar(_Type.UINT32)
    if version not in VERSIONS:
        hint = " (big endian?)" if version & 0xFFFF == 0 else ""
        raise UnsupportedGguf(
            f"GGUF version {version}{hint}; known are {', '.join(map(str, VERSIONS))}"
        )
    tensor_count = reader.count("tensors", TENSORS_MAX)
    entry_count = reader.count("metadata entries", ENTRIES_MAX)
    metadata: dict[str, GgufValue] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(entry_count):
        begin = reader.position
        key = reader.text(KEY_BYTES_MAX, "key")
        if key in metadata:
            raise MalformedGguf(f"metadata key {key!r} is there twice")
        metadata[key] = reader.value(reader.value_type())
        places[key] = (begin, reader.position)
    alignment = metadata.get("general.alignment", ALIGNMENT_DEFAULT)
    if (
        not isinstance(alignment, int)
        or alignment < 8
        or alignment & (alignment - 1)
        or alignment > 65_536
    ):
        raise MalformedGguf(f"general.alignment is {alignment!r}: no power of two from 8 to 65536")
    # 0 is what `llama-gguf-split --merge` leaves behind.
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1) and not part_allowed:
        raise UnsupportedGguf(
            f"this is one of {parts} parts of a model; `meshd model add` joins them, where all "
            "lie beside each other"
        )
    tensors = _read_tensors(reader, tensor_count, alignment)
    data_offset = -(-reader.position // alignment) * alignment
    end = max((tensor.offset + tensor.size_bytes for tensor in tensors), default=0)
    if data_offset + end > size_bytes:
        raise TruncatedGguf(data_offset + end, size_bytes)
    return Gguf(version, metadata, tensors, data_offset, size_bytes, places)


def _read_tensors(reader: _Reader, count: int, alignment: int) -> tuple[Tensor, ...]:
    tensors: dict[str, Tensor] = {}
    for _ in range(count):
        name = reader.text(KEY_BYTES_MAX, "tensor name")
        if name in tensors:
            raise MalformedGguf(f"tensor {name!r} is there twice")
        dimensions = reader.scalar(_Type.UINT32)
        if dimensions > DIMENSIONS_MAX:
            raise MalformedGguf(
                f"tensor {name!r} has {dimensions} dimensions; the most is {DIMENSIONS_MAX}"
            )
        shape = tuple(reader.scalar(_Type.UINT64) for _ in range(dimensions))
        kind, offset = reader.scalar(_Type.UINT32), reader.scalar(_Type.UINT64)
        if kind not in TENSOR_BLOCKS:
            raise UnsupportedGguf(f"tensor {name!r} has the unknown type {kind}")
        block_weights, block_bytes = TENSOR_BLOCKS[kind]
        if 0 in shape or math.prod(shape) >= 2**62 or (shape[0] if shape else 1) % block_weights:
            raise MalformedGguf(f"tensor {name!r} has the impossible shape {shape}")
        if offset % alignment:
            raise MalformedGguf(f"tensor {name!r} is not aligned to {alignment} bytes")
        size = math.prod(shape) // block_weights * block_bytes
        tensors[name] = Tensor(name, shape, kind, offset, size)
    return tuple(tensors.values())


class _Reader:
    """A position in the file that knows how much is left."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._walked = 0
        self._kept_bytes = 0
        self.position = 0

    def take(self, count: int) -> bytes:
        """Return exactly that many bytes. Raises TruncatedGguf."""
        self._require(count)
        data = self._file.read(count)
        if len(data) != count:  # it shrank while we read
            raise TruncatedGguf(self.position + count, self.position + len(data))
        self.position += count
        return data

    def skip(self, count: int) -> None:
        """Pass over that many bytes. Raises TruncatedGguf."""
        self._require(count)
        self._file.seek(count, os.SEEK_CUR)
        self.position += count

    def _require(self, count: int) -> None:
        if self.position + count > self._size_bytes:
            raise TruncatedGguf(self.position + count, self._size_bytes)

    def scalar(self, kind: _Type) -> int:
        """Return one integer (the callers ask for integer types only)."""
        layout = _SCALARS[kind]
        (value,) = layout.unpack(self.take(layout.size))
        assert isinstance(value, int)
        return value

    def count(self, what: str, most: int) -> int:
        value = self.scalar(_Type.UINT64)
        if value > most:
            raise MalformedGguf(f"{value:,} {what}; the most is {most:,}")
        return value

    def text(self, bytes_max: int, what: str) -> str:
        length = self.count(f"bytes in a {what}", bytes_max)
        self._kept_bytes += length
        if self._kept_bytes > KEPT_BYTES_MAX:
            raise MalformedGguf(f"more than {KEPT_BYTES_MAX:,} bytes of keys, names and texts")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise MalformedGguf(f"a {what} is not UTF-8") from None

    def value_type(self) -> _Type:
        number = self.scalar(_Type.UINT32)
        try:
            return _Type(number)
        except ValueError:
            raise MalformedGguf(f"unknown metadata type {number}") from None

    def value(self, kind: _Type) -> GgufValue:
        if kind is _Type.STRING:
            return self.text(STRING_BYTES_MAX, "string")
        if kind is _Type.ARRAY:
            return self._array(1)
        layout = _SCALARS[kind]
        (value,) = layout.unpack(self.take(layout.size))
        assert isinstance(value, int | float)
        return value

    def _array(self, depth: int) -> GgufArray:
        kind = self.value_type()
        count = self.count("items in an array", ARRAY_ITEMS_MAX)
        if kind in (_Type.ARRAY, _Type.STRING):
            self._walked += count
            if self._walked > WALKED_MAX:
                raise MalformedGguf(f"more than {WALKED_MAX:,} texts and arrays in arrays")
        if kind is _Type.ARRAY:
            if depth >= ARRAY_DEPTH_MAX:
                raise MalformedGguf("arrays within arrays within arrays")
            for _ in range(count):
                self._array(depth + 1)
        elif kind is _Type.STRING:
            for _ in range(count):
                self.skip(self.count("bytes in a string", STRING_BYTES_MAX))
        else:
            self.skip(count * _SCALARS[kind].size)
        return GgufArray(int(kind), count)
