"""Images and sound in messages: which there are, what they are, and what is none."""

from base64 import b64decode, b64encode
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

from meshd_plugins.api import BadRequest, Value
from meshd_plugins.media import (
    UNSUPPORTED,
    BadMedium,
    Modality,
    check_medium,
    format_of,
    media_parts,
    medium_of,
    modalities_of,
)

PNG = "data:image/png;base64,"
IMAGE, AUDIO = Modality.IMAGE, Modality.AUDIO


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
    for part in media_parts([{"content": [value]}]):
        for read in (check_medium, medium_of):
            with pytest.raises(BadRequest):
                read(part, "here")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_what_was_sent_is_what_arrives(rest: bytes) -> None:
    data = png() + rest
    check_medium(image_part(data), "here")
    medium = medium_of(image_part(data), "here")
    assert (medium.modality, medium.format, medium.data) == (IMAGE, "png", data)
    assert "PNG" not in repr(medium)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 400),
    st.sampled_from(["", "=", "-", "_", " ", "\n", "\u0130", "A"]),
)
def test_only_whole_and_plain_base64_is_read(cut: int, at: int, put: str) -> None:
    whole = b64encode(png() + bytes(300)).decode()
    text = whole[:at] + put + whole[at:]
    text = text[: len(text) - cut]
    try:
        expected = b64decode(text, validate=True)
    except ValueError:
        expected = None
    part: dict[str, Value] = {"type": "image_url", "image_url": {"url": PNG + text}}
    if expected is None or format_of(expected) != "png":
        with pytest.raises(BadMedium):
            medium_of(part, "here")
    else:
        assert medium_of(part, "here").data == expected


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
