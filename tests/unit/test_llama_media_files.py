"""What media will take once decoded, by their headers."""

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd_plugins.builtin.llama.worker.media_files import (
    COMPRESSED_SOUND_BYTES_MAX,
    PIXELS_MAX,
    SECONDS_MAX,
    MediumUnusable,
    check_picture,
    check_sound,
    is_sound,
)


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height)


def bmp(width: int, height: int) -> bytes:
    return b"BM" + bytes(16) + struct.pack("<ii", width, -height)  # rows from the top


def jpeg(width: int, height: int) -> bytes:
    comment = b"\xff\xfe" + struct.pack(">H", 6) + b"abcd"
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1)
    return b"\xff\xd8" + comment + b"\xff\xff" + frame[1:]


def flac(rate: int, samples: int) -> bytes:
    bits = rate << 44 | samples
    return b"fLaC" + struct.pack(">I", 34) + bytes(10) + bits.to_bytes(8, "big") + bytes(16)


def wav(seconds: float, claimed: int | None = None) -> bytes:
    data = bytes(int(seconds * 100))
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 50, 100, 2, 16)
    size = len(data) if claimed is None else claimed
    return b"RIFF\x00\x00\x00\x00WAVE" + head + struct.pack("<4sI", b"data", size) + data


@pytest.mark.parametrize("kind", [png, gif, bmp, jpeg])
def test_a_picture_is_taken_up_to_what_is_decoded_here(kind: Callable[[int, int], bytes]) -> None:
    check_picture(kind(640, 480))
    for width, height in ((30_000, PIXELS_MAX // 30_000 + 1), (0, 10)):
        with pytest.raises(MediumUnusable, match=f"{width} by {height} pixels"):
            check_picture(kind(width, height))


@pytest.mark.parametrize("kind", [png, gif, bmp, jpeg])
def test_a_header_that_is_cut_short_is_broken(kind: Callable[[int, int], bytes]) -> None:
    whole = kind(640, 480)
    for length in range(8, len(whole) - 2):
        with pytest.raises(MediumUnusable):
            check_picture(whole[:length])


def test_sounds_are_taken_up_to_half_an_hour() -> None:
    check_sound(wav(2.0))
    check_sound(wav(2.0, claimed=2**32 - 1))  # a recording that was cut off: what is there counts
    check_sound(flac(44_100, 44_100))
    for long in (wav(SECONDS_MAX + 1.0), flac(100, 100 * SECONDS_MAX + 100), flac(44_100, 0)):
        with pytest.raises(MediumUnusable, match="longer than 30 minutes"):
            check_sound(long)
    with pytest.raises(MediumUnusable, match="MP3"):
        check_sound(b"ID3" + bytes(COMPRESSED_SOUND_BYTES_MAX))


@given(st.binary(max_size=64), st.sampled_from([png(9, 9), jpeg(9, 9), wav(0.1), flac(8, 8), b""]))
def test_whatever_the_bytes_it_is_checked_or_refused(noise: bytes, beginning: bytes) -> None:
    for data in (beginning + noise, beginning[: len(noise)] + noise):
        with suppress(MediumUnusable):
            (check_sound if is_sound(data) else check_picture)(data)
