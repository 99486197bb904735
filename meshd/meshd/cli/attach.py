"""Images and sound of files, as parts of a message."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from meshd.cli.render import size
from meshd_plugins.media import FORMATS, MEDIA_MAX, Modality, format_of

if TYPE_CHECKING:
    from meshd_plugins.api import Value

FILES_BYTES_MAX: Final = 12_000_000
"""Of all files of one request: a little more never reaches a model, whatever a node is told to take."""
_SMALLER: Final = {
    Modality.IMAGE: "make it smaller, for instance with `magick {name} -resize 2048x2048 smaller.jpg`",
    Modality.AUDIO: "make it shorter, for instance with `ffmpeg -t 60 -i {name} -ac 1 -ar 16000 shorter.mp3`",
}
_OTHER: Final = {
    Modality.IMAGE: "make it one, for instance with `magick {name} {stem}.jpg`",
    Modality.AUDIO: "make it one, for instance with `ffmpeg -i {name} {stem}.wav`",
}


def message_of(text: str, images: Sequence[Path], sounds: Sequence[Path]) -> dict[str, Value]:
    """A message of the user with files before its text. Raises click.UsageError: a file is of no use."""
    files = [(path, Modality.IMAGE) for path in images]
    files += [(path, Modality.AUDIO) for path in sounds]
    if len(files) > MEDIA_MAX:
        raise click.UsageError(f"{len(files)} images and sounds; at most {MEDIA_MAX} go together")
    parts: list[Value] = []
    left = FILES_BYTES_MAX
    for path, modality in files:
        data = _read(path, modality, left)
        left -= len(data)
        parts.append(_part(data, path, modality))
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


def _read(path: Path, modality: Modality, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise click.UsageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > bytes_max:
        hint = _SMALLER[modality].format(name=path.name)
        raise click.UsageError(
            f"{path} is too large: the files of one request have at most {size(FILES_BYTES_MAX)}"
            f" together; {hint}"
        )
    return data


def _part(data: bytes, path: Path, modality: Modality) -> dict[str, Value]:
    found = format_of(data)
    text = base64.b64encode(data).decode("ascii")
    if FORMATS.get(found) is not modality:
        known = ", ".join(name for name, each in FORMATS.items() if each is modality)
        told = f"is {found}" if found else "is something else, by its first bytes"
        hint = _OTHER[modality].format(name=path.name, stem=path.stem)
        raise click.UsageError(f"{path} {told}; --{modality} takes {known}: {hint}")
    if modality is Modality.IMAGE:
        url = f"data:image/{found};base64,{text}"
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "input_audio", "input_audio": {"data": text, "format": found}}
