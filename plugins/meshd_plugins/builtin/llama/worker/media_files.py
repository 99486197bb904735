"""What a picture or a sound will take once it is decoded, read from its header before that is done.

Decoders believe what a file says of its size: a picture of a few hundred bytes may ask for gigabytes.
"""

from __future__ import annotations

import struct
from typing import Final

PIXELS_MAX: Final = 40_000_000  # 120 MB decoded
SIDE_MAX: Final = 32_767
SECONDS_MAX: Final = 1_800  # of sound; 16 kHz decoded: 115 MB
COMPRESSED_SOUND_BYTES_MAX: Final = (
    8 * 1024 * 1024
)  # of MP3: its length is known only once it is decoded
_JPEG_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class MediumUnusable(Exception):
    """It is not what can be read here. The message is for people."""


def check_picture(data: bytes) -> None:
    """Raises MediumUnusable: it is larger than is decoded here, or no picture."""
    width, height = _size_of(data)
    if not (0 < width <= SIDE_MAX and 0 < height <= SIDE_MAX and width * height <= PIXELS_MAX):
        raise MediumUnusable(
            f"the picture is {width} by {height} pixels; send one of at most {PIXELS_MAX:,} pixels"
        )


def check_sound(data: bytes) -> None:
    """Raises MediumUnusable: it is longer than is decoded here, or no sound."""
    seconds = 0.0
    try:
        if data[:4] == b"RIFF":
            seconds = _wav_seconds(data)
        elif data[:4] == b"fLaC":
            rate = int.from_bytes(data[18:21], "big") >> 4
            samples = int.from_bytes(data[21:26], "big") & 0xF_FFFF_FFFF
            seconds = samples / rate if samples else SECONDS_MAX + 1.0  # a stream that does not say
        elif len(data) > COMPRESSED_SOUND_BYTES_MAX:
            raise MediumUnusable(
                f"the sound has {len(data)} bytes; send at most {COMPRESSED_SOUND_BYTES_MAX} of MP3"
            )
    except (struct.error, ZeroDivisionError):
        raise MediumUnusable("the sound's header is broken") from None
    if seconds > SECONDS_MAX:
        raise MediumUnusable(
            f"the sound is longer than {SECONDS_MAX // 60} minutes, or does not say"
        )


def is_sound(data: bytes) -> bool:
    """Whether llama.cpp takes it for a sound; else it takes it for a picture."""
    wav = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    mp3 = data[:3] == b"ID3" or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0)
    return wav or mp3 or data[:4] == b"fLaC"


def _size_of(data: bytes) -> tuple[int, int]:
    """Width and height. Raises MediumUnusable."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack_from(">II", data, 16)
            return int(width), int(height)
        if data[:3] == b"GIF":
            width, height = struct.unpack_from("<HH", data, 6)
            return int(width), int(height)
        if data[:2] == b"BM":
            width, height = struct.unpack_from("<ii", data, 18)
            return int(width), abs(int(height))
        if data[:2] == b"\xff\xd8":
            return _jpeg_size(data)
    except struct.error:
        raise MediumUnusable("the picture's header is broken") from None
    raise MediumUnusable("the picture is none that this model reads; send PNG or JPEG")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise MediumUnusable("the picture's header is broken")
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _JPEG_ALONE:
            at += 2
        elif marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return int(width), int(height)
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise MediumUnusable("the picture's header is broken")


def _wav_seconds(data: bytes) -> float:
    at, bytes_a_second = 12, 0
    while at + 8 <= len(data):
        name, (size,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if name == b"fmt ":
            (bytes_a_second,) = struct.unpack_from("<I", data, at + 16)
        if name == b"data":
            return min(int(size), len(data) - at - 8) / bytes_a_second
        at += 8 + int(size) + int(size) % 2
    raise MediumUnusable("the sound's header is broken")
