"""Our record: what is written is what others read, and it fits; what others write is read with distrust."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.core.prefixes import unpack_warm
from meshd.core.scheduler import Load
from meshd.orchestrate.decoding import Malformed, count, mapping, number
from meshd.orchestrate.records import (
    HELD_S_MAX,
    LICENCE_CHARS_MAX,
    SUMMARY_CHARS_MAX,
    capability_key,
    capability_value,
    check_fits,
    descriptor_from,
    load_for_people,
    load_from,
    load_value,
    model_from,
    model_key,
    model_value,
)
from meshd_cms import ENTRY_BYTES_MAX, Entry, Version
from meshd_cms.entries import UNSIGNED, entry_size_bytes, pack_value
from meshd_cms.packing import pack, unpack
from meshd_cms.soft import SOFT_VALUE_BYTES_MAX
from meshd_cms.types import COUNTER_MAX
from meshd_plugins.api import Descriptor, ModelFacts, Operation, Privacy, Rates, Value
from meshd_plugins.builtin.arithmetic import ArithmeticCapability

SHA256 = "0123456789abcdef" * 4
MODEL = ModelFacts(
    digest=SHA256,
    family="Meta-Llama-3.1-70B-Instruct-Distilled-Coder-Long-Context",
    architecture="llama",
    parameters=70_553_706_496,
    quantisation="IQ4_XS",
    context_tokens=131_072,
    size_bytes=42_520_393_728,
    licence="the text of a licence, which some files carry where its name belongs " * 20,
    modalities=("text", "image", "audio"),
    chat_template_digest=SHA256,
    kv_key=SHA256,
)
RATES = Rates(
    prefill_tokens_per_s=12_345.67,
    decode_tokens_per_s=123.45,
    decode_tokens_per_s_by_batch={size: 1234.5 * size for size in (1, 2, 4, 8, 16, 32)},
    load_s=12.34,
)
RICH = Descriptor(
    name="knowledge.gpt/engineering/electronics/microcontrollers",
    operations=tuple(Operation),
    summary="A model for questions about boards, sensors and the code that runs on them. " * 5,
    slots=16,
    privacy=Privacy.LAN,
    model=MODEL,
    rates=RATES,
    fields={"domains": ["electronics", "c", "python"], "quality": 0.71, "tools": True},
)
CALCULATORS = [
    ArithmeticCapability(name, tuple(Operation)).descriptor
    for name in ("computation.gpt/arithmetic", "knowledge.gpt/arithmetic")
]

texts = st.text(st.characters(codec="utf-8"), max_size=12)
counts = st.integers(0, 2**40)
figures = st.floats(0, 1e6)
models = st.builds(
    ModelFacts,
    digest=st.text("0123456789abcdef", min_size=16, max_size=64),
    family=texts,
    architecture=texts,
    parameters=counts,
    quantisation=texts,
    context_tokens=counts,
    size_bytes=counts,
    licence=texts,
    modalities=st.lists(texts, max_size=3).map(tuple),
    chat_template_digest=texts,
    kv_key=texts,
)
rates = st.builds(
    Rates,
    figures.map(lambda rate: round(rate, 1)),
    figures.map(lambda rate: round(rate, 1)),
    st.dictionaries(st.integers(1, 64), figures.map(lambda rate: round(rate, 1)), max_size=5),
    figures.map(lambda seconds: round(seconds, 2)),
)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | texts
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)
descriptors = st.builds(
    Descriptor,
    name=texts,
    operations=st.lists(st.sampled_from(Operation), min_size=1, unique=True).map(tuple),
    summary=texts,
    slots=st.integers(1, 1000),
    privacy=st.sampled_from(Privacy),
    model=st.none() | models,
    rates=st.none() | rates,
    fields=st.dictionaries(texts, st.integers() | texts, max_size=3),
)


def carried(value: Value) -> Value:
    """As a peer reads it."""
    return unpack(pack(value))  # type: ignore[return-value]


def entry_bytes(key: str, value: Value) -> int:
    return entry_size_bytes(Entry(key, pack_value(value), Version(COUNTER_MAX), UNSIGNED))


@settings(max_examples=100, deadline=None)
@given(descriptors)
def test_a_capability_is_read_as_it_was_written(descriptor: Descriptor) -> None:
    descriptor = replace(descriptor, fields=dict.fromkeys(descriptor.fields, 1))
    value = carried(capability_value(descriptor))
    model = carried(model_value(descriptor.model)) if descriptor.model else None
    assert descriptor_from(value, model) == descriptor


@pytest.mark.parametrize("descriptor", [RICH, *CALCULATORS], ids=lambda one: str(one.name))
def test_what_capabilities_say_fits_an_entry(descriptor: Descriptor) -> None:
    check_fits(descriptor)
    value = capability_value(descriptor)
    assert entry_bytes(capability_key(descriptor.id), value) <= ENTRY_BYTES_MAX
    if descriptor.model is not None:
        key = model_key(descriptor.model.digest)
        assert entry_bytes(key, model_value(descriptor.model)) <= ENTRY_BYTES_MAX


def test_what_is_for_people_is_cut() -> None:
    read = descriptor_from(capability_value(RICH), model_value(MODEL))
    assert len(read.summary) == SUMMARY_CHARS_MAX
    assert RICH.summary.startswith(read.summary[:-1])
    assert read.model is not None
    assert len(read.model.licence) == LICENCE_CHARS_MAX


@pytest.mark.parametrize(
    "descriptor",
    [
        replace(RICH, fields={"topics": "x" * 1000}),
        replace(RICH, fields={"count": 2**64}),
        replace(RICH, name="knowledge.gpt/" + "x" * 200),
        replace(RICH, model=replace(MODEL, family="x" * 1000)),
    ],
)
def test_what_does_not_fit_is_told(descriptor: Descriptor) -> None:
    with pytest.raises(ValueError, match="cannot be announced"):
        check_fits(descriptor)


@settings(max_examples=100, deadline=None)
@given(plain, plain)
def test_any_values_are_a_descriptor_or_malformed(value: Value, model: Value) -> None:
    try:
        descriptor_from(value, model)
    except Malformed:
        return
    raise AssertionError("nothing that is made here is a descriptor")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(capability_value(RICH))), plain)
def test_any_one_wrong_value_is_read_or_malformed(key: str, wrong: Value) -> None:
    value = {**capability_value(RICH), key: wrong}
    try:
        found = descriptor_from(value, model_value(MODEL))
    except Malformed:
        return
    assert found.slots >= 1
    assert found.operations


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(model_value(MODEL))), plain)
def test_any_one_wrong_fact_of_a_model_is_read_or_malformed(key: str, wrong: Value) -> None:
    try:
        found = model_from({**model_value(MODEL), key: wrong})
    except Malformed:
        return
    assert found.context_tokens >= 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": 0},
        {"slots": True},
        {"slots": 2**64},
        {"operations": []},
        {"operations": ["dance"]},
        {"operations": "chat"},
        {"privacy": 9},
        {"privacy": -1},
        {"model": "another"},
        {"fields": {1: 2}},
        {"rates": None},
        {"rates": {"decode_tokens_per_s": float("nan")}},
        {"rates": {"decode_tokens_per_s": float("inf")}},
        {"rates": {"decode_tokens_per_s": -1.0}},
        {"rates": {"decode_tokens_per_s": 10**400}},
        {"rates": {"decode_by_batch": [[0, 1.0]]}},
        {"rates": {"decode_by_batch": [[True, 1.0]]}},
        {"rates": {"decode_by_batch": [[1]]}},
    ],
    ids=repr,
)
def test_malformed(wrong: dict[str, Value]) -> None:
    with pytest.raises(Malformed):
        descriptor_from({**capability_value(RICH), **wrong}, model_value(MODEL))


def test_a_capability_without_its_model_is_malformed() -> None:
    with pytest.raises(Malformed):
        descriptor_from(capability_value(RICH), None)


def test_what_a_later_release_adds_is_passed_over() -> None:
    value = {**capability_value(RICH), "operations": ["sing", "chat"], "mood": "good"}
    assert descriptor_from(value, model_value(MODEL)).operations == (Operation.CHAT,)


def test_readers_tell_truth_values_from_numbers() -> None:
    for read in (count, number):
        with pytest.raises(Malformed):
            read(True, "here")
    with pytest.raises(Malformed, match="here"):
        mapping([], "here")
    assert number(3, "here") == 3.0


busy = st.dictionaries(st.text(min_size=1, max_size=40), st.tuples(counts, counts), max_size=30)


@settings(max_examples=100, deadline=None)
@given(
    busy,
    st.floats(0.0, 10_000.0),
    st.dictionaries(texts, plain, max_size=5),
    st.integers(0, 64),
    st.booleans(),
)
def test_load_fits_a_datagram_and_says_of_the_busiest_how_busy(
    taken: dict[str, tuple[int, int]],
    each_s: float,
    device: dict[str, Value],
    queue_max: int,
    draining: bool,
) -> None:
    held_s = dict.fromkeys(taken, each_s)
    load = load_value(taken, held_s, queue_max=queue_max, draining=draining, figures=device)
    assert len(pack_value(load)) <= SOFT_VALUE_BYTES_MAX
    read = carried(load)
    assert isinstance(read, dict)
    assert read["draining"] is draining
    listed = mapping(read["capabilities"], "load")
    for key, (running, waiting) in taken.items():
        if key in listed:
            told = load_from(read, key)
            assert (told.busy, told.queued, told.queue_max) == (running, waiting, queue_max)
            assert told.held_s == pytest.approx(min(each_s, HELD_S_MAX), rel=0.25, abs=0.05)
    left_out = [sum(pair) for key, pair in taken.items() if key not in listed]
    assert max(left_out, default=0) <= min((sum(taken[key]) for key in listed), default=2**64)


def test_usual_load_keeps_the_figures_of_the_device() -> None:
    taken = {"knowledge.gpt/general#01234567": (2, 1), "computation.gpt/arithmetic": (0, 0)}
    held_s = {"knowledge.gpt/general#01234567": 24.0}
    load = load_value(taken, held_s, queue_max=8, draining=False, figures={"cpu": 0.5})
    assert load["cpu"] == 0.5
    assert load_from(load, "computation.gpt/arithmetic") == Load(0, queue_max=8)
    there = load_from(load, "knowledge.gpt/general#01234567")
    assert there == Load(2, queued=1, queue_max=8, held_s=25.6)


def test_what_is_warm_is_told_beside_the_load() -> None:
    warm = [(b"%04d-tag" % number, 1_000 + number) for number in range(20)]
    load = load_value({}, {}, queue_max=8, draining=False, figures={"cpu": 0.5}, warm=warm)
    assert load["cpu"] == 0.5
    told = unpack_warm(carried(load)["warm"])  # type: ignore[call-overload, index]
    assert told is not None
    assert told.tokens(b"0003-tag") == 992
    assert told.is_full


def test_who_keeps_nothing_warm_tells_nothing_and_who_keeps_none_now_tells_that() -> None:
    assert "warm" not in load_value({}, {}, queue_max=8, draining=False, figures={})
    assert load_value({}, {}, queue_max=8, draining=False, figures={}, warm=())["warm"] == b""


def test_the_device_gives_way_to_what_is_warm_and_that_to_who_is_busy() -> None:
    warm = [(b"%04d-tag" % number, 1_000) for number in range(16)]
    many = {f"knowledge.gpt/a-rather-long-name-{number:03}": (1, 0) for number in range(8)}
    load = load_value(many, {}, queue_max=8, draining=False, figures={"x": "y" * 90}, warm=warm)
    assert "x" not in load
    assert "warm" in load
    more = {f"knowledge.gpt/a-rather-long-name-{number:03}": (1, 0) for number in range(11)}
    load = load_value(more, {}, queue_max=8, draining=False, figures={}, warm=warm)
    assert "warm" not in load
    assert len(mapping(load["capabilities"], "load")) == 11


@pytest.mark.parametrize(
    "load",
    [
        {},
        {"capabilities": []},
        {"capabilities": {"a": 1}},
        {"capabilities": {"a": [1]}},
        {"capabilities": {"a": [1, 0]}},
        {"capabilities": {"a": [1, -1, 0]}},
        {"capabilities": {"a": [1, 0, -1]}},
        {"capabilities": {}, "queue_max": "many"},
    ],
)
def test_malformed_load(load: dict[str, Value]) -> None:
    with pytest.raises(Malformed):
        load_from(load, "a")


def test_people_are_shown_how_many_prefixes_are_warm() -> None:
    warm = [(b"%04d-tag" % number, 1_000) for number in range(3)]
    load = load_value({}, {}, queue_max=8, draining=False, figures={"cpu": 0.5}, warm=warm)
    shown = load_for_people(load)
    assert shown == {
        "cpu": 0.5,
        "queue_max": 8,
        "draining": False,
        "capabilities": {},
        "warm_prefixes": 3,
    }
    assert "warm" in load
    assert load_for_people({"warm": "nonsense"}) == {}
