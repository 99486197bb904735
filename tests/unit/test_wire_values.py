"""Events between peers: what is sent is what arrives, and what makes no sense is the peer's fault."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.orchestrate.wire import (
    chunk_from_value,
    chunk_to_value,
    done_from_value,
    done_to_value,
)
from meshd_cms.packing import pack, unpack
from meshd_plugins.api import Chunk, Done, Failed, TokenLogprob, ToolCallDelta, Usage, Value

counts = st.integers(0, 2**63 - 1)
words = st.text(max_size=20)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | words
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=16,
)
logprob = st.floats(-100, 0)
likely = st.builds(TokenLogprob, counts, logprob, st.binary(max_size=8))
chunks = st.builds(
    Chunk,
    text=words,
    token_ids=st.lists(counts, max_size=5).map(tuple),
    position=counts,
    seed=st.none() | counts,
    data=st.binary(max_size=20),
    content_type=words,
    reasoning=words,
    tool_calls=st.lists(
        st.builds(ToolCallDelta, st.integers(0, 127), words, words, words), max_size=3
    ).map(tuple),
    logprobs=st.lists(
        st.builds(
            TokenLogprob,
            counts,
            logprob,
            st.binary(max_size=8),
            st.lists(likely, max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
)
dones = st.builds(
    Done,
    finish_reason=st.sampled_from(("stop", "length", "tool_calls")),
    usage=st.builds(Usage, counts, counts, counts),
    detail=st.dictionaries(words, plain, max_size=4),
)
# Maps with the keys of the wire and any values: near misses.
near = st.dictionaries(st.sampled_from("tkpsdcruvxhflw"), plain, max_size=6)


def carried(value: Value) -> Value:
    """As a peer gets it."""
    return unpack(pack(value))  # type: ignore[return-value]


@settings(max_examples=100, deadline=None)
@given(chunks)
def test_a_chunk_arrives_as_it_was_sent(chunk: Chunk) -> None:
    assert chunk_from_value(carried(chunk_to_value(chunk))) == chunk


@settings(max_examples=100, deadline=None)
@given(dones)
def test_an_end_arrives_as_it_was_sent(done: Done) -> None:
    assert done_from_value(carried(done_to_value(done))) == done


def test_what_is_empty_costs_nothing_and_a_token_little() -> None:
    assert chunk_to_value(Chunk()) == {}
    assert done_to_value(Done()) == {"r": "stop"}
    token = Chunk(" word", token_ids=(31_999,), position=300, seed=2**32 - 1)
    assert len(pack(chunk_to_value(token))) <= 32


@settings(max_examples=100, deadline=None)
@given(plain | near)
def test_whatever_arrives_is_an_event_or_the_peers_fault(value: Value) -> None:
    codes: list[str] = []
    for decode in (chunk_from_value, done_from_value):
        try:
            decode(value)
        except Failed as error:
            codes.append(error.code)
    assert set(codes) <= {"peer_fault"}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {1: "a"},
        {"t": b"a"},
        {"k": 7},
        {"k": [True]},
        {"k": [-1]},
        {"p": -1},
        {"p": 1.0},
        {"s": 2**63},
        {"d": "text"},
        {"c": None},
    ],
)
def test_no_chunk(value: Value) -> None:
    with pytest.raises(Failed):
        chunk_from_value(value)


@pytest.mark.parametrize(
    "value",
    [None, {}, {"r": ""}, {"r": 7}, {"r": "stop", "u": -1}, {"r": "stop", "x": []}],
)
def test_no_end(value: Value) -> None:
    with pytest.raises(Failed):
        done_from_value(value)


@pytest.mark.parametrize(
    "value",
    [
        {"f": [[0, "a", "b"]]},
        {"f": [[128, "a", "b", "{}"]]},
        {"f": [[-1, "a", "b", "{}"]]},
        {"f": [[0, "a", 5, "{}"]]},
        {"f": [[0, "", "", ""]] * 129},
        {"l": [[1, 0.5, b"a", []]]},
        {"l": [[1, float("nan"), b"a", []]]},
        {"l": [[1, -1.0, "a", []]]},
        {"l": [[1, -1.0, b"a" * 1025, []]]},
        {"l": [[1, -1.0, b"a", [[1, -1.0, b"a"]] * 21]]},
        {"l": [[1, -1.0, b"a", [[1, -1.0]]]]},
        {"l": [[1, -1.0, b"a", []]] * 4097},
        {"h": 5},
    ],
)
def test_calls_and_probabilities_that_are_none_are_the_peers_fault(value: Value) -> None:
    with pytest.raises(Failed) as caught:
        chunk_from_value(value)
    assert caught.value.code == "peer_fault"
