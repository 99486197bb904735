"""Images and sound in a chat's messages, as OpenAI has them: which there are, and what is in them.

A message's content is a text, or a list of parts. A part of type `image_url` holds a picture as a `data:` URL,
one of type `input_audio` a sound as base64. Nothing is ever fetched. What a file is, is told by its first
bytes; what the client calls it is only checked for being of the right kind.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from meshd_plugins.api import BadRequest, Value

MEDIA_MAX: Final = 16  # of one request
TOKENS_PER_MEDIUM: Final = 512
"""What an image or a sound is taken for where only an estimate is wanted: models make 64 to some thousand."""


class Modality(StrEnum):
    """What a model can take in; the value travels in records and requests."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"


FORMATS: Final[Mapping[str, Modality]] = {
    "png": Modality.IMAGE,
    "jpeg": Modality.IMAGE,
    "gif": Modality.IMAGE,
    "bmp": Modality.IMAGE,
    "webp": Modality.IMAGE,
    "wav": Modality.AUDIO,
    "mp3": Modality.AUDIO,
    "flac": Modality.AUDIO,
}
MEDIA_TYPES: Final[Mapping[str, Modality]] = {
    "image_url": Modality.IMAGE,
    "input_audio": Modality.AUDIO,
}
"""Types of parts that hold a medium, and what a model must be able to take in for them."""
DETAILS: Final = ("auto", "low", "high")  # how closely a picture is to be looked at

UNSUPPORTED: Final = "unsupported_parameter"
_BASE64: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BEGINNING: Final = 64  # characters, in fours: enough to know a format by
_SHOWN: Final = 40  # characters of what is wrong: never a whole picture
_DATA_URL: Final = re.compile(r"data:image/(png|jpe?g|gif|bmp|webp);base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Medium:
    """One image or sound."""

    modality: Modality
    format: str  # one of FORMATS, by its first bytes
    data: bytes = field(repr=False)


class BadMedium(BadRequest):
    """A part that holds no medium. State: nothing was done.

    Codes: bad_request, unsupported_parameter (it is to be fetched, or of a kind that nobody reads).
    """

    def __init__(self, where: str, message: str, *, code: str | None = None) -> None:
        super().__init__(f"{where}: {message}", code=code)
        self.where = where
        self.reason = message


def format_of(data: bytes) -> str:
    """What a file is, by its first bytes: one of FORMATS; "" if it is none of them."""
    match data[:4]:
        case b"\x89PNG":
            return "png"
        case b"GIF8":
            return "gif"
        case b"fLaC":
            return "flac"
        case b"RIFF":
            return {b"WAVE": "wav", b"WEBP": "webp"}.get(data[8:12], "")
        case _:
            pass
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:2] == b"BM":
        return "bmp"
    is_frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2  # MPEG audio, layer III
    return "mp3" if is_frame or data[:3] == b"ID3" else ""


def modalities_of(messages: Value) -> tuple[Modality, ...]:
    """What a model must be able to take in beside text to read these messages; of no messages, nothing."""
    found = {MEDIA_TYPES[str(part["type"])] for part in media_parts(messages)}
    return tuple(each for each in Modality if each in found)


def media_parts(messages: Value) -> Iterator[Mapping[str, Value]]:
    """The parts of messages that hold a medium, or should."""
    for message in _listed(messages):
        for part in _listed(message.get("content") if isinstance(message, Mapping) else None):
            if isinstance(part, Mapping) and is_medium(part):
                yield part


def is_medium(part: Mapping[str, Value]) -> bool:
    """Whether a part holds a medium, or should."""
    kind = part.get("type")
    return isinstance(kind, str) and kind in MEDIA_TYPES


def medium_of(part: Mapping[str, Value], where: str) -> Medium:
    """Read a part that `is_medium`.

    Raises:
        BadMedium: it holds none; `where` and the field say which part.
    """
    text, found = _read(part, where)
    return Medium(FORMATS[found], found, binascii.a2b_base64(text))


def check_medium(part: Mapping[str, Value], where: str) -> None:
    """Whether `medium_of` would read it, for a tenth of the time: photos are checked where events wait.

    Raises:
        BadMedium: it would not.
    """
    _read(part, where)


def _read(part: Mapping[str, Value], where: str) -> tuple[bytes, str]:
    """The base64 in a part, checked, and the format of what it stands for."""
    kind = str(part.get("type"))
    inner, where = part.get(kind), f"{where}.{kind}"
    if not isinstance(inner, Mapping):
        raise BadMedium(where, "must be an object")
    modality = MEDIA_TYPES[kind]
    if modality is Modality.IMAGE:
        where = f"{where}.url"
        text = _data_of(inner.get("url"), where)
    else:
        form = inner.get("format")
        if form is not None and FORMATS.get(str(form)) is not modality:
            raise BadMedium(
                f"{where}.format", f"must be one of {_names(modality)}", code=UNSUPPORTED
            )
        where = f"{where}.data"
        text = _text(inner.get("data"), where)
    encoded = text.encode("ascii", "replace")
    padding = encoded.translate(None, _BASE64)
    if len(encoded) % 4 or padding not in (b"", b"=", b"==") or not encoded.endswith(padding):
        raise BadMedium(where, "is not base64 as RFC 4648 has it")
    found = format_of(binascii.a2b_base64(encoded[:_BEGINNING]))
    if FORMATS.get(found) is not modality:
        told = f"is {found}" if found else "is none that is known here"
        raise BadMedium(
            where,
            f"what it holds {told}, by its first bytes; {modality} is taken as {_names(modality)}",
            code=UNSUPPORTED,
        )
    return encoded, found


def _data_of(url: Value, where: str) -> str:
    """The base64 of a `data:` URL."""
    url = _text(url, where)
    if found := _DATA_URL.match(url):
        return url[found.end() :]
    if url[:5].lower() == "data:":
        raise BadMedium(
            where,
            f"must begin with 'data:image/png;base64,', with png, jpeg, gif, bmp or webp; "
            f"it begins with {url.partition(',')[0][:_SHOWN]!r}",
            code=UNSUPPORTED,
        )
    raise BadMedium(
        where,
        "this mesh fetches nothing: send the picture itself, as a 'data:image/png;base64,...' URL",
        code=UNSUPPORTED,
    )


def _text(value: Value, where: str) -> str:
    if not isinstance(value, str):
        raise BadMedium(where, "must be a string")
    return value


def _names(modality: Modality) -> str:
    return ", ".join(name for name, each in FORMATS.items() if each is modality)


def _listed(value: Value) -> Sequence[Value]:
    return value if isinstance(value, list | tuple) else ()
