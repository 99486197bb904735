"""Tags of conversations: what they tell apart, what they do not tell, and the list of what is warm."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_media import image_part, jpeg, text_part

from meshd.core.prefixes import (
    SECRET_BYTES,
    TAG_BYTES,
    TAGS_MAX,
    TOKENS_STEP,
    WARM_MAX,
    Tagger,
    pack_tags,
    pack_warm,
    unpack_tags,
    unpack_warm,
)
from meshd_plugins.api import Operation, Value

ANNA, BERT = "n1/key:anna", "n1/key:bert"
MODEL, OTHER = "model-a/build-1/f16", "model-b/build-1/f16"
TAGGER = Tagger(b"s" * SECRET_BYTES)
texts = st.lists(st.text(max_size=20), min_size=1, max_size=2 * TAGS_MAX)


def chat(messages: list[str], **more: Value) -> dict[str, Value]:
    roles = ("user", "assistant")
    listed: list[Value] = [
        {"role": roles[number % 2], "content": text} for number, text in enumerate(messages)
    ]
    return {"messages": listed, **more}


def tags(
    messages: list[str],
    *,
    caller: str = ANNA,
    model: str = MODEL,
    tagger: Tagger = TAGGER,
    **more: Value,
) -> tuple[bytes, ...]:
    return tagger.conversation(caller, Operation.CHAT, chat(messages, **more)).tags(model)


@settings(max_examples=100, deadline=None)
@given(texts)
def test_the_tag_of_a_whole_conversation_is_found_again_when_it_goes_on(
    messages: list[str],
) -> None:
    before = tags(messages)
    after = tags([*messages, "an answer", "a new question"])
    assert len(before) == min(len(messages), TAGS_MAX)
    assert after[-3] == before[-1]
    assert all(len(tag) == TAG_BYTES for tag in after)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(0, 2 * TAGS_MAX))
def test_a_message_that_was_changed_changes_all_tags_from_there_on(
    messages: list[str], place: int
) -> None:
    place %= len(messages)
    changed = [*messages]
    changed[place] += "!"
    first = max(0, len(messages) - TAGS_MAX)
    same = [one == other for one, other in zip(tags(messages), tags(changed), strict=True)]
    assert same == [number < place for number in range(first, len(messages))]


def test_a_tag_is_of_one_caller_one_model_one_life_and_one_set_of_tools() -> None:
    usual = tags(["a", "b", "c"])
    others = (
        tags(["a", "b", "c"], caller=BERT),
        tags(["a", "b", "c"], model=OTHER),
        tags(["a", "b", "c"], tagger=Tagger(b"t" * SECRET_BYTES)),
        tags(["a", "b", "c"], tools=[{"type": "function"}]),
    )
    assert len({*usual}.union(*others)) == 3 * 5


def test_messages_are_not_run_together() -> None:
    assert tags(["ab", "c"])[-1] != tags(["a", "bc"])[-1]


def test_the_order_of_keys_does_not_count() -> None:
    one = TAGGER.conversation(
        ANNA, Operation.CHAT, {"messages": [{"role": "user", "content": "a"}]}
    )
    other = TAGGER.conversation(
        ANNA, Operation.CHAT, {"messages": [{"content": "a", "role": "user"}]}
    )
    assert one.tags(MODEL) == other.tags(MODEL)


def test_a_completion_has_one_tag() -> None:
    conversation = TAGGER.conversation(ANNA, Operation.COMPLETE, {"prompt": "Once upon a time"})
    assert len(conversation.tags(MODEL)) == 1


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        (Operation.EMBED, {"input": ["a"]}),
        (Operation.RUN, {"input": "1 + 1"}),
        (Operation.CHAT, {}),
        (Operation.CHAT, {"messages": "hello"}),
        (Operation.CHAT, {"messages": [2**70]}),
        (Operation.COMPLETE, {"prompt": 7}),
    ],
)
def test_what_has_no_prefixes_has_no_tags(operation: Operation, body: dict[str, Value]) -> None:
    assert TAGGER.conversation(ANNA, operation, body).tags(MODEL) == ()


def test_what_nests_too_deep_has_no_tags() -> None:
    deep: Value = "end"
    for _ in range(40):
        deep = [deep]
    assert TAGGER.conversation(ANNA, Operation.CHAT, {"messages": [deep]}).tags(MODEL) == ()


@given(st.lists(st.binary(min_size=TAG_BYTES, max_size=TAG_BYTES), max_size=TAGS_MAX))
def test_tags_travel(some: list[bytes]) -> None:
    assert unpack_tags(pack_tags(some)) == tuple(some)


@pytest.mark.parametrize("length", [1, TAG_BYTES + 1, TAG_BYTES * (TAGS_MAX + 1)])
def test_what_are_no_tags_is_not_read(length: int) -> None:
    with pytest.raises(ValueError, match="no tags"):
        unpack_tags(bytes(length))


@given(
    st.lists(
        st.tuples(st.binary(min_size=TAG_BYTES, max_size=TAG_BYTES), st.integers(1, 2**22)),
        max_size=2 * WARM_MAX,
        unique_by=lambda pair: pair[0][:4],
    )
)
def test_what_is_told_to_be_warm_is_read(some: list[tuple[bytes, int]]) -> None:
    packed = pack_warm(some)
    warm = unpack_warm(packed)
    assert warm is not None
    assert len(packed) <= 6 * WARM_MAX
    assert warm.is_full == (len(some) >= WARM_MAX)
    for tag, tokens in some[:WARM_MAX]:
        told = warm.tokens(tag)
        assert told <= tokens
        assert told > tokens - TOKENS_STEP or told == (2**16 - 1) * TOKENS_STEP
    assert all(warm.tokens(tag) == 0 for tag, _ in some[WARM_MAX:])


@given(st.one_of(st.none(), st.integers(), st.text(), st.binary(max_size=120), st.lists(st.none())))
def test_whatever_another_node_tells_is_read_or_passed_over(told: Value) -> None:
    warm = unpack_warm(told)
    assert warm is None or warm.count <= WARM_MAX


def test_a_message_with_an_image_is_told_apart_by_the_image() -> None:
    def of(image: bytes, text: str = "What is it?") -> tuple[bytes, ...]:
        parts: list[Value] = [text_part(text), image_part(image)]
        body: dict[str, Value] = {
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
        }
        return TAGGER.conversation(ANNA, Operation.CHAT, body).tags(MODEL)

    photo = jpeg(4_000_000)
    assert of(photo) == of(bytes(photo))
    assert not set(of(photo)) & set(of(photo[:-1] + b"\1"))
    assert not set(of(photo)) & set(of(photo, "Who is it?"))


def of_photo(url: str) -> bytes:
    part: Value = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    body: dict[str, Value] = {"messages": [{"role": "user", "content": [text_part("?"), part]}]}
    return TAGGER.conversation(ANNA, Operation.CHAT, body).tags(MODEL)[-1]


def test_photos_are_told_apart_by_samples() -> None:
    part = image_part(jpeg(2_000_000), "jpeg")["image_url"]
    assert isinstance(part, dict)
    url = str(part["url"])
    assert of_photo(url) == of_photo(url)
    others = {
        url[:-1] + ("A" if url[-1] != "A" else "B"),  # its end
        url + "AAAA",
        url[:1_000_000] + "/" * 64 + url[1_000_064:],  # a run in its middle
        url.replace("image/jpeg", "image/jpg", 1),
        str(image_part(jpeg(2_000_000)[:-1] + b"!", "jpeg")["image_url"]),
    }
    assert len({of_photo(url), *(of_photo(other) for other in others)}) == 1 + len(others)


def test_of_a_short_picture_every_character_counts() -> None:
    url = "data:image/png;base64," + "A" * 1_000
    changed = {of_photo(url[:at] + "B" + url[at + 1 :]) for at in range(22, 1_022, 7)}
    assert len(changed | {of_photo(url)}) == len(range(22, 1_022, 7)) + 1


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.text(max_size=3) | st.integers(0, 9) | st.none(),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "image_url", "url"]), x | st.just("image_url"), max_size=3
            )
        ),
        max_leaves=8,
    )
)
def test_parts_that_are_none_are_hashed_as_they_are(part: Value) -> None:
    body: dict[str, Value] = {"messages": [{"role": "user", "content": [part]}, part]}
    assert len(TAGGER.conversation(ANNA, Operation.CHAT, body).tags(MODEL)) == 2
