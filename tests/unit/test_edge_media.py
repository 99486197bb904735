"""Images and sound in OpenAI's request bodies: what is passed on, and what is refused with a way out."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

from meshd.edge.errors import RequestError, problem_of
from meshd.edge.openai_messages import check_to_the_end, messages_of

URL: Any = "https://example.org/cat.png"


def user(*parts: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": list(parts)}]


def test_parts_are_passed_on_as_they_came() -> None:
    parts = [text_part("What is this?"), image_part(png()), audio_part(wav())]
    assert messages_of(user(*parts)) == user(*parts)
    detailed: Any = image_part(png())
    detailed["image_url"] |= {"detail": "low", "unheard_of": 1}
    detailed["cache_control"] = {"type": "ephemeral"}
    [[kept]] = [message["content"] for message in messages_of(user(detailed))]  # type: ignore[misc]
    assert kept["image_url"] == {**image_part(png())["image_url"], "detail": "low"}  # type: ignore[dict-item,index,call-overload]
    assert set(kept) == {"type", "image_url"}  # type: ignore[arg-type]


def test_text_alone_stays_a_plain_string() -> None:
    assert messages_of(user(text_part("a"), text_part("b"))) == [{"role": "user", "content": "ab"}]


def test_a_photo_of_five_megabytes_is_taken() -> None:
    photo = image_part(jpeg(5_000_000), "jpeg")
    assert messages_of(user(photo)) == user(photo)


@pytest.mark.parametrize(
    ("part", "param", "code", "words"),
    [
        (
            {"type": "image_url", "image_url": {"url": URL}},
            "messages[0].content[1].image_url.url",
            "unsupported_parameter",
            "send the picture itself",
        ),
        (
            {"type": "image_url", "image_url": URL},
            "messages[0].content[1].image_url",
            "invalid_value",
            "must be an object",
        ),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}},
            "messages[0].content[1].image_url.url",
            "invalid_value",
            "not base64",
        ),
        (
            {
                "type": "image_url",
                "image_url": {**image_part(png())["image_url"], "detail": "sharp"},  # type: ignore[dict-item]
            },
            "messages[0].content[1].image_url.detail",
            "invalid_value",
            "auto, low, high",
        ),
        (
            audio_part(wav(), "pcm16"),
            "messages[0].content[1].input_audio.format",
            "unsupported_parameter",
            "wav, mp3, flac",
        ),
        (
            {"type": "input_image", "image_url": URL},
            "messages[0].content[1]",
            "unsupported_modality",
            "come as 'image_url'",
        ),
        (
            {"type": "video_url", "video_url": {"url": URL}},
            "messages[0].content[1]",
            "unsupported_modality",
            "are not taken",
        ),
        ({"type": "poem"}, "messages[0].content[1]", "unsupported_parameter", "only parts of type"),
    ],
)
def test_what_is_refused_is_named_with_a_way_out(
    part: Any, param: str, code: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        messages_of(user(text_part("Look:"), part))
    problem = problem_of(caught.value)
    assert (problem.status, problem.param, problem.code) == (400, param, code)
    assert f"`{param}`" in problem.message
    assert len(problem.message) < 300


def test_base64_is_checked_to_its_end() -> None:
    photo: Any = image_part(jpeg(1_000_000), "jpeg")
    broken = {
        "type": "image_url",
        "image_url": {"url": photo["image_url"]["url"][:-8] + "-AAAAAA="},
    }
    messages = messages_of(user(text_part("Look:"), photo, broken))
    trio.run(check_to_the_end, {"messages": user(photo)})
    with pytest.raises(RequestError, match="is not base64 as RFC 4648 has it") as caught:
        trio.run(check_to_the_end, {"messages": messages})
    problem = problem_of(caught.value)
    param = "messages[0].content[2].image_url.url"
    assert (problem.status, problem.param, problem.code) == (400, param, "invalid_value")
    assert f"`{param}`" in problem.message


@pytest.mark.parametrize("role", ["system", "assistant", "tool", "developer"])
def test_only_users_show_and_say(role: str) -> None:
    with pytest.raises(RequestError, match="only messages of the user") as caught:
        messages_of(user(image_part(png()), role=role))
    assert caught.value.param == "messages[0].content[0]"


def test_sixteen_go_together_and_no_more() -> None:
    image = image_part(png())
    assert len(messages_of(user(*[image] * 8) + user(*[image] * 8))) == 2
    with pytest.raises(RequestError, match="more than 16") as caught:
        messages_of(user(*[image] * 8) + user(*[image] * 9))
    assert caught.value.param == "messages[1].content[8]"
