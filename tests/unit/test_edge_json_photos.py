"""Reading requests with photos in them: what is read is what Python's own reader reads."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_media import image_part, jpeg, text_part

from meshd.edge.errors import RequestError
from meshd.edge.http import from_json
from meshd.edge.json_photos import LONG, photos_in, read_json
from meshd_plugins.api import Value

PHOTO = f"data:image/jpeg;base64,{b64encode(jpeg(LONG)).decode()}"
OTHER = f"data:image/png;base64,{b64encode(jpeg(LONG + 1)).decode()}"
SHORT = "data:image/png;base64,AAAA"


def read(reader: Callable[[bytes], dict[str, Value]], raw: bytes) -> tuple[object, object]:
    try:
        return reader(raw), None
    except RequestError as error:
        return str(error), error.code


def same(raw: bytes) -> None:
    """Both read the same, or say the same."""
    assert read(partial(trio.run, read_json), raw) == read(from_json, raw)


texts = st.sampled_from(
    [PHOTO, OTHER, SHORT, "", "a", 'say "', '"data:image/', f'x"{PHOTO}', PHOTO + "\n", "\\", "é"]
)
values: st.SearchStrategy[Any] = st.recursive(
    texts | st.integers() | st.none() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["url", "image_url", "x", PHOTO]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "model", PHOTO]), values), st.booleans())
def test_what_is_read_is_what_was_written(payload: dict[str, Any], ascii_only: bool) -> None:
    raw = json.dumps(payload, ensure_ascii=ascii_only).encode()
    assert trio.run(read_json, raw) == payload


@settings(max_examples=60, deadline=None)
@given(values, st.integers(0, 400), st.sampled_from(["", '"', "\\", "\n", "{", ",", "\x00", "é"]))
def test_what_is_broken_is_said_as_ever(value: Any, at: int, put: str) -> None:
    text = json.dumps({"m": value, "photo": PHOTO})
    at = len(text) * at // 400
    same((text[:at] + put + text[at + 1 :]).encode())


@pytest.mark.parametrize(
    "text",
    [
        f'{{"a": "{PHOTO}", "a": "{OTHER}"}}',  # the last one counts
        f'{{"a": ["{PHOTO}"]}}',
        f'["{PHOTO}"]',
        f'"{PHOTO}"',
        f'{{"a": "\\"{PHOTO}"}}',
        f'{{"a": "{PHOTO}\\n"}}',
        f'{{"a": "{PHOTO}',
        f'{{"a": "{PHOTO}"',
        f'{{"a": "{PHOTO}"}} x',
        f'{{"a": "{PHOTO}\n"}}',
        f'{{"a": NaN, "b": "{PHOTO}"}}',
        f'{{"a": "{PHOTO.replace("/", chr(92) + "/")}"}}',  # as some write it
        "[" * 100_000 + f'"{PHOTO}"',
    ],
)
def test_strange_bodies_are_read_as_ever(text: str) -> None:
    same(text.encode())
    same(text.encode("utf-16"))
    same(b"\xef\xbb\xbf" + text.encode())


def test_photos_are_found_and_nothing_else() -> None:
    photos = [f'"{PHOTO}"', f'"{OTHER}"', f'"{PHOTO}"']
    raw = f'{{{photos[0]},{SHORT},{photos[1]},"{PHOTO}-",{photos[2]}'.encode()
    found = trio.run(photos_in, raw)
    assert [raw[begin - 1 : end + 1].decode() for begin, end in found] == photos


def test_a_request_with_photos_is_read() -> None:
    parts = [text_part("?"), image_part(jpeg(500_000), "jpeg"), image_part(jpeg(90_000), "jpeg")]
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": parts}] * 2}
    same(json.dumps(body).encode())
