"""What a chat with images and sound becomes on its way to the worker of a model."""

from base64 import b64encode
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

from meshd_plugins.api import BadRequest, Operation, Value
from meshd_plugins.builtin.llama.serving.requests import (
    MESSAGE_BYTES_MAX,
    packed_bytes_max,
    worker_message,
)
from meshd_plugins.workerkit import FRAME_BYTES_MAX, pack_frame

SEES = ("text", "image")
ALL = ("text", "image", "audio")


def ask(
    *messages: Mapping[str, Value], modalities: Sequence[str] = ALL, **body: Value
) -> dict[str, Value]:
    return worker_message(Operation.CHAT, {"messages": list(messages), **body}, modalities)


def of_user(*parts: Value) -> dict[str, Value]:
    return {"role": "user", "content": list(parts)}


def test_media_leave_the_messages_and_are_counted_through() -> None:
    red, blue = png(), png(colour=(0, 0, 255))
    message = ask(
        {"role": "system", "content": "Look."},
        of_user(text_part("What is "), image_part(red), text_part("?")),
        {"role": "assistant", "content": "Red."},
        of_user(image_part(blue), audio_part(wav())),
    )
    assert message["messages"] == [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"text": "What is "}, {"media": 0}, {"text": "?"}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [{"media": 1}, {"media": 2}]},
    ]
    sent = [f"data:image/png;base64,{b64encode(data).decode()}" for data in (red, blue)]
    assert message["media"] == [*sent, b64encode(wav()).decode()]


def test_without_media_all_stays_as_it_was() -> None:
    message = ask(of_user(text_part("a"), text_part("b")))
    assert message["messages"] == [{"role": "user", "content": "ab"}]
    assert "media" not in message


@pytest.mark.parametrize(
    ("part", "modalities", "words"),
    [
        (image_part(png()), ("text",), "this model reads text only"),
        (audio_part(wav()), SEES, "this model reads text and image only"),
        (image_part(b"RIFF\x04\0\0\0WEBP", "webp"), ALL, "no webp; send PNG or JPEG"),
        ({"type": "video_url"}, ALL, "text, image_url or input_audio"),
        ({"type": ["image_url"]}, ALL, "text, image_url or input_audio"),
    ],
)
def test_what_a_model_cannot_take_in_is_said(
    part: Value, modalities: Sequence[str], words: str
) -> None:
    with pytest.raises(BadRequest, match=rf"messages\[0\].content\[1\].*{words}") as caught:
        ask(of_user(text_part("Look:"), part), modalities=modalities)
    assert caught.value.code == "unsupported_modality"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "system", "content": [image_part(png())]}, "only messages of the user"),
        (of_user("x"), "must be an object with a type"),
        (of_user({"type": "image_url", "image_url": {"url": "http://a"}}), "fetches nothing"),
        (of_user(*[image_part(png())] * 17), r"content\[16\]: more than 16"),
    ],
)
def test_what_no_model_takes_is_said(message: Mapping[str, Value], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        ask(message)


def test_what_would_not_fit_a_frame_is_refused_before_it_is_sent() -> None:
    half = jpeg(MESSAGE_BYTES_MAX // 8 * 3 - 4096)  # and in base64 a third more
    message = ask(of_user(image_part(half), image_part(half)))
    assert len(pack_frame({"type": "call", "id": 1, "message": message})) <= FRAME_BYTES_MAX
    with pytest.raises(BadRequest, match="on its way to the model") as caught:
        ask(of_user(image_part(half), image_part(half), text_part("x" * 12_000)))
    assert caught.value.code == "too_large"


values: st.SearchStrategy[Value] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=40), inner, max_size=20)
    ),
    max_leaves=40,
)


@settings(max_examples=100, deadline=None)
@given(values)
def test_what_is_packed_is_never_longer_than_was_reckoned(value: Value) -> None:
    bare = len(pack_frame({"message": None}))
    assert len(pack_frame({"message": value})) - bare <= packed_bytes_max(value)
