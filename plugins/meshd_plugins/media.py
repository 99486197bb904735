"""Images and sound in a chat's messages, as OpenAI has them: which there are, and what is in them.

A message's content is a text, or a list of parts. A part of type `image_url` holds a picture as a `data:` URL,
one of type `input_audio` a sound as base64. Nothing is ever fetched. What a file is, is told by its first
bytes; what the client calls it is only checked for being of the right kind.

A photo has some million characters, and events wait for whoever goes through them. So `medium_of` looks at its
beginning and its end only, and the rest is gone through in slices: by `checking.check_media` where nobody needs the
file, by `checking.read_medium` where somebody does.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
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
NOT_BASE64: Final = "is not base64 as RFC 4648 has it"
BASE64: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
SLICE: Final = 1 << 18
"""Characters of base64 that are gone through at once, in fours: to check them takes 0.2 ms, to decode them 1.3 ms."""
_BEGINNING: Final = 64  # characters, in fours: enough to know a format by
_SHOWN: Final = 40  # characters of what is wrong: never a whole picture
_DATA_URL: Final = re.compile(r"data:image/(png|jpe?g|gif|bmp|webp);base64,", re.IGNORECASE)


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


def media_in(messages: Value) -> Iterator[Medium]:
    """The media in messages, as `medium_of` reads them.

    Raises:
        BadMedium: a part that should hold one holds none.
    """
    for number, message in enumerate(_listed(messages)):
        content = message.get("content") if isinstance(message, Mapping) else None
        for index, part in enumerate(_listed(content)):
            if isinstance(part, Mapping) and is_medium(part):
                yield medium_of(part, f"messages[{number}].content[{index}]")


def is_medium(part: Mapping[str, Value]) -> bool:
    """Whether a part holds a medium, or should."""
    kind = part.get("type")
    return isinstance(kind, str) and kind in MEDIA_TYPES


@dataclass(frozen=True, slots=True)
class Medium:
    """One image or sound, of which only the beginning and the end were looked at."""

    modality: Modality
    format: str  # one of FORMATS, by its first bytes
    where: str  # in the request, for people
    text: str = field(repr=False)  # as it came: base64, or a `data:` URL
    begin: int = 0  # of the base64 in it, which goes on to its end

    def check(self, slice_chars: int = SLICE) -> Generator[None, None, None]:
        """Check that it is base64 to its end; between two slices of it others can have their turn.

        Raises:
            BadMedium: it is not.
        """
        end = len(self.text) - _padding(self.text)
        for at in range(self.begin, end, slice_chars):
            piece = self.text[at : min(at + slice_chars, end)].encode("ascii", "replace")
            if piece.translate(None, BASE64):
                raise BadMedium(self.where, NOT_BASE64)
            yield

    def decode(self, slice_chars: int = SLICE) -> Generator[None, None, bytes]:
        """The file; between two slices of it others can have their turn.

        Raises:
            BadMedium: it is no base64.
        """
        try:
            return (yield from decoded(self.text, slice_chars, self.begin))
        except ValueError:
            raise BadMedium(self.where, NOT_BASE64) from None


def decoded(text: str, slice_chars: int = SLICE, begin: int = 0) -> Generator[None, None, bytes]:
    """What base64 stands for; pauses after each slice of so many characters, a multiple of four.

    Args:
        text: with the base64.
        slice_chars: decoded at once.
        begin: of the base64, which goes on to the end of the text.

    Raises:
        ValueError: it is no base64 as RFC 4648 has it.
    """
    assert slice_chars > 0
    assert slice_chars % 4 == 0
    parts: list[bytes] = []
    for at in range(begin, len(text), slice_chars):
        parts.append(binascii.a2b_base64(text[at : at + slice_chars]))
        yield
    whole, chars = b"".join(parts), len(text) - begin
    # What is not of the alphabet was passed over, and padding ended a slice: either has left too little.
    if chars % 4 or len(whole) != chars // 4 * 3 - _padding(text):
        raise ValueError(NOT_BASE64)
    return whole


def medium_of(part: Mapping[str, Value], where: str) -> Medium:
    """Read a part that `is_medium`, but for what lies between its beginning and its end.

    Raises:
        BadMedium: it holds none; `where` and the field say which part.
    """
    kind = str(part.get("type"))
    inner, where = part.get(kind), f"{where}.{kind}"
    if not isinstance(inner, Mapping):
        raise BadMedium(where, "must be an object")
    modality = MEDIA_TYPES[kind]
    begin = 0
    if modality is Modality.IMAGE:
        where = f"{where}.url"
        text = _text(inner.get("url"), where)
        begin = _begin_of(text, where)
    else:
        form = inner.get("format")
        if form is not None and FORMATS.get(str(form)) is not modality:
            raise BadMedium(
                f"{where}.format", f"must be one of {_names(modality)}", code=UNSUPPORTED
            )
        where = f"{where}.data"
        text = _text(inner.get("data"), where)
    try:
        if (len(text) - begin) % 4:
            raise ValueError
        beginning = binascii.a2b_base64(text[begin : begin + _BEGINNING], strict_mode=True)
    except ValueError:
        raise BadMedium(where, NOT_BASE64) from None
    found = format_of(beginning)
    if FORMATS.get(found) is not modality:
        told = f"is {found}" if found else "is none that is known here"
        raise BadMedium(
            where,
            f"what it holds {told}, by its first bytes; {modality} is taken as {_names(modality)}",
            code=UNSUPPORTED,
        )
    return Medium(modality, found, where, text, begin)


def _padding(text: str) -> int:
    return 2 if text.endswith("==") else int(text.endswith("="))


def _begin_of(url: str, where: str) -> int:
    """Where the base64 of a `data:` URL begins."""
    if found := _DATA_URL.match(url):
        return found.end()
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
