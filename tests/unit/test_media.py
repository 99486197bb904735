"""Images and sound in messages: which there are, what they are, and what is none."""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Generator, Mapping
from typing import TypeVar

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

from meshd_plugins.api import BadRequest, Value
from meshd_plugins.checking import check_media, read_medium
from meshd_plugins.media import (
    SLICE,
    UNSUPPORTED,
    BadMedium,
    Medium,
    Modality,
    decoded,
    format_of,
    media_in,
    media_parts,
    medium_of,
    modalities_of,
)

PNG = "data:image/png;base64,"
IMAGE, AUDIO = Modality.IMAGE, Modality.AUDIO
T = TypeVar("T")


def finished(steps: Generator[None, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: T = end.value
            return found


def checked(part: Mapping[str, Value], slice_chars: int = SLICE) -> Medium:
    medium = medium_of(part, "here")
    finished(medium.check(slice_chars))
    return medium


def file_of(part: Mapping[str, Value], slice_chars: int = SLICE) -> bytes:
    return finished(medium_of(part, "here").decode(slice_chars))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (png(), "png"),
        (wav(), "wav"),
        (jpeg(40), "jpeg"),
        (b"GIF89a\1\0", "gif"),
        (b"BM\x46\0", "bmp"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "webp"),
        (b"fLaC\0\0\0\x22", "flac"),
        (b"ID3\4\0", "mp3"),
        (b"\xff\xfb\x90\x44", "mp3"),
        (b"\xff\xf1\x50\x80", ""),  # AAC, whose frames begin alike
        (b"RIFF\x10\0\0\0AVI LIST", ""),
        (b"%PDF-1.7", ""),
        (b"\xff", ""),
        (b"", ""),
    ],
)
def test_a_file_is_known_by_its_first_bytes(data: bytes, found: str) -> None:
    assert format_of(data) == found


def test_what_a_chat_needs_is_what_is_in_it() -> None:
    spoken = {"role": "user", "content": [text_part("and?"), audio_part(wav())]}
    shown = {"role": "user", "content": [image_part(png())]}
    assert modalities_of([{"role": "user", "content": "hi"}]) == ()
    assert modalities_of([shown]) == (IMAGE,)
    assert modalities_of([spoken, shown, shown]) == (IMAGE, AUDIO)
    assert len(list(media_parts([spoken, shown]))) == 2


plain: st.SearchStrategy[Value] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "content", "image_url", "input_audio", "url", "data", "x"]),
            inner | st.sampled_from(["image_url", "input_audio", "data:image/png;base64,AA=="]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(plain)
def test_nothing_that_is_sent_breaks_the_reading(value: Value) -> None:
    modalities_of(value)
    modalities_of([{"role": "user", "content": value}])
    for messages in (value, [value], [{"role": "user", "content": value}]):
        try:
            assert list(media_in(messages)) == []
        except BadRequest:
            assert list(media_parts(messages))
    for part in media_parts([{"content": [value]}]):
        with pytest.raises(BadRequest):
            medium_of(part, "here")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_what_was_sent_is_what_arrives(rest: bytes) -> None:
    data = png() + rest
    medium = checked(image_part(data))
    assert (medium.modality, medium.format, file_of(image_part(data))) == (IMAGE, "png", data)
    assert b64encode(data).decode()[:20] not in repr(medium)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 400),
    st.sampled_from(["", "=", "==", "-", "_", " ", "\n", "\u0130", "A", "!!!!", "A===", "\ud800"]),
    st.integers(1, 150),
    st.integers(0, 2),
)
def test_only_whole_and_plain_base64_is_read(
    cut: int, at: int, put: str, fours: int, more: int
) -> None:
    whole = b64encode(png() + bytes(300 + more)).decode()
    text = whole[:at] + put + whole[at:]
    text = text[: len(text) - cut]
    try:  # Python's decoder takes a "=" too many
        expected = None if len(text) % 4 else b64decode(text, validate=True)
    except ValueError:
        expected = None
    part: dict[str, Value] = {"type": "image_url", "image_url": {"url": PNG + text}}
    if expected is None or format_of(expected) != "png":
        with pytest.raises(BadMedium):
            checked(part, fours)
        with pytest.raises(BadMedium):
            file_of(part, 4 * fours)
    else:
        checked(part, fours)
        assert file_of(part, 4 * fours) == expected


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 120))
def test_decoding_in_slices_is_decoding(data: bytes, fours: int) -> None:
    text = b64encode(data).decode()
    assert finished(decoded(text, 4 * fours)) == data
    assert finished(decoded(f"data:,{text}", 4 * fours, begin=6)) == data


@settings(max_examples=100, deadline=None)
@given(st.text("AQgz+/=! ", max_size=40), st.integers(1, 10))
def test_what_binascii_refuses_is_refused_in_slices_too(text: str, fours: int) -> None:
    try:
        expected = binascii.a2b_base64(text, strict_mode=True) if len(text) % 4 == 0 else None
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(ValueError, match=r"."):
            finished(decoded(text, 4 * fours))
    else:
        assert finished(decoded(text, 4 * fours)) == expected


def test_others_have_their_turn_while_a_photo_is_gone_through() -> None:
    photo = image_part(jpeg(2_000_000), "jpeg")
    slices = len(b64encode(jpeg(2_000_000))) // SLICE
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def main() -> None:
        nonlocal turns
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await check_media([{"role": "user", "content": [text_part("?"), photo]}])
            assert turns > slices // 2
            turns = 0
            assert await read_medium(medium_of(photo, "here")) == jpeg(2_000_000)
            assert turns > slices // 2
            nursery.cancel_scope.cancel()

    assert slices > 8
    trio.run(main)


def test_what_is_no_base64_far_behind_is_said_with_where_it_is() -> None:
    photo = image_part(jpeg(1_000_000), "jpeg")
    url = str(photo["image_url"]["url"])  # type: ignore[index,call-overload]
    broken = shown(url[:-400] + "-" + url[-399:])
    messages: list[Value] = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [text_part("?"), photo, broken]},
    ]
    assert medium_of(broken, "here").format == "jpeg"
    with pytest.raises(BadMedium, match="is not base64 as RFC 4648 has it") as caught:
        trio.run(check_media, messages)
    assert caught.value.where == "messages[1].content[2].image_url.url"
    assert (caught.value.code, len(caught.value.message) < 300) == ("bad_request", True)


def test_its_first_bytes_count_and_not_what_it_is_called() -> None:
    assert medium_of(image_part(jpeg(64), "png"), "here").format == "jpeg"
    assert medium_of(image_part(png(), "JPG"), "here").format == "png"
    assert medium_of(audio_part(wav(), "mp3"), "here").format == "wav"
    assert medium_of(audio_part(b"ID3\4", "flac"), "here").format == "mp3"


def shown(url: Value) -> dict[str, Value]:
    return {"type": "image_url", "image_url": {"url": url}}


def heard(**inner: Value) -> dict[str, Value]:
    return {"type": "input_audio", "input_audio": inner}


@pytest.mark.parametrize(
    ("part", "where", "words", "code"),
    [
        ({"type": "image_url"}, "image_url", "must be an object", "bad_request"),
        (shown(None), "image_url.url", "must be a string", "bad_request"),
        (shown("https://example.org/a.png"), "image_url.url", "fetches nothing", UNSUPPORTED),
        (shown("file:///etc/passwd"), "image_url.url", "fetches nothing", UNSUPPORTED),
        (shown("data:image/svg+xml;base64,AA=="), "image_url.url", "must begin", UNSUPPORTED),
        (shown("data:image/png,AA"), "image_url.url", "must begin", UNSUPPORTED),
        (shown("data:image/png;base64,iVB Rw0K"), "image_url.url", "not base64", "bad_request"),
        (shown("data:image/png;base64,iVBORw0"), "image_url.url", "not base64", "bad_request"),
        (shown("data:image/png;base64,\u0130"), "image_url.url", "not base64", "bad_request"),
        (shown("data:image/png;base64,"), "image_url.url", "none that is known", UNSUPPORTED),
        (image_part(b"<svg></svg>"), "image_url.url", "none that is known", UNSUPPORTED),
        (image_part(wav()), "image_url.url", "is wav", UNSUPPORTED),
        (audio_part(png()), "input_audio.data", "is png", UNSUPPORTED),
        (audio_part(wav(), "opus"), "input_audio.format", "wav, mp3, flac", UNSUPPORTED),
        (heard(data=b"RIFF", format="wav"), "input_audio.data", "a string", "bad_request"),
        (heard(format="wav"), "input_audio.data", "a string", "bad_request"),
    ],
)
def test_what_is_wrong_is_said_with_where_it_is(
    part: Mapping[str, Value], where: str, words: str, code: str
) -> None:
    with pytest.raises(BadMedium, match=words) as caught:
        medium_of(part, "messages[0].content[1]")
    assert caught.value.where == f"messages[0].content[1].{where}"
    assert (caught.value.code, len(caught.value.message) < 300) == (code, True)
