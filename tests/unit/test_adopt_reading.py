"""What an adopted server sent is read within bounds, however it comes and whatever it is."""

from __future__ import annotations

import json
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.orchestrate.wire import chunk_from_value, chunk_to_value
from meshd_plugins.api import (
    BadRequest,
    Chunk,
    Failed,
    Operation,
    Rates,
    Refused,
    TokenLogprob,
    ToolCallDelta,
    Value,
)
from meshd_plugins.builtin.adopt.answers import OllamaAnswer, OpenAIAnswer
from meshd_plugins.builtin.adopt.calls import call_of
from meshd_plugins.builtin.adopt.config import Kind
from meshd_plugins.builtin.adopt.embeddings import read_vectors
from meshd_plugins.builtin.adopt.errors import Broken, ServerError, TooLarge
from meshd_plugins.builtin.adopt.listening import is_exposed
from meshd_plugins.builtin.adopt.models import (
    ServedModel,
    facts_of,
    family_of,
    looks_like_embedding,
)
from meshd_plugins.builtin.adopt.rates import Meter, Timing, from_llama_server, from_ollama
from meshd_plugins.builtin.adopt.untrusted import (
    LINE_BYTES_MAX,
    Lines,
    ServerSentEvents,
    clean,
    count,
    number,
    parse_json,
)

QUICK = settings(max_examples=100, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "text",
                    "finish_reason",
                    "usage",
                    "error",
                    "done",
                    "response",
                    "timings",
                    "bytes",
                    "index",
                    "done_reason",
                    "tool_calls",
                    "function",
                    "logprobs",
                    "logprob",
                    "top_logprobs",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


# -- lines and events --------------------------------------------------------------------------------------


@QUICK
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_lines_do_not_depend_on_how_they_come(stream: bytes, cuts: list[int]) -> None:
    whole = list(Lines().feed(stream + b"\n"))
    lines, found, before = Lines(), list[bytes](), 0
    for cut in [*sorted(cuts), len(stream) + 1]:
        found += lines.feed((stream + b"\n")[before:cut])
        before = max(before, cut)
    assert found == whole


def test_a_line_without_an_end_is_bounded() -> None:
    lines = Lines()
    for _ in range(LINE_BYTES_MAX // 65536):
        assert not list(lines.feed(b"x" * 65536))
    with pytest.raises(TooLarge):
        list(lines.feed(b"x"))


def events_of(*lines: bytes) -> list[bytes]:
    events = ServerSentEvents()
    return [data for data in map(events.take, lines) if data is not None]


def test_events_are_put_together() -> None:
    assert events_of(b"data: a", b"") == [b"a"]
    assert events_of(b"data:a", b"data: b", b"", b"") == [b"a\nb"]
    assert events_of(b": comment", b"event: x", b"id: 5", b"retry: 3", b"", b"data", b"") == [b""]
    assert events_of(b"data: a") == []
    assert events_of(b'error: {"code": 500}', b"") == [b'{"code": 500}']


@QUICK
@given(st.lists(st.binary(max_size=40) | JSON.map(lambda v: b"data: " + json.dumps(v).encode())))
def test_no_stream_breaks_more_than_its_own_answer(lines: list[bytes]) -> None:
    for answer in (
        OpenAIAnswer(Operation.CHAT),
        OpenAIAnswer(Operation.COMPLETE),
        OllamaAnswer(),
    ):
        try:
            for line in lines:
                for part in (line.removeprefix(b"data: "), line, b""):
                    chunk = answer.take(part)
                    if chunk is not None:
                        sent = msgpack.unpackb(msgpack.packb(chunk_to_value(chunk)))
                        assert chunk_from_value(sent) == chunk  # any node can carry it
            done = answer.done()
        except (ServerError, Failed):
            continue
        msgpack.packb(dict(done.detail))
        assert done.finish_reason in ("stop", "length", "tool_calls", "content_filter")


@QUICK
@given(JSON, st.integers(1, 3), st.integers(0, 3))
def test_no_answer_breaks_more_than_its_own_vectors(
    value: Value, texts: int, dimensions: int
) -> None:
    for raw in (value, {"data": value}, {"embeddings": value}, {"data": [{"embedding": value}]}):
        try:
            chunks, _ = read_vectors(json.dumps(raw).encode(), texts, dimensions)
        except (Broken, BadRequest):
            continue
        assert sum(len(chunk.data) for chunk in chunks) % (4 * texts) == 0


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b"NaN", b'{"a": -Infinity}', b"[" * 100_000, b"9" * 5000]
)
def test_what_is_no_json(raw: bytes) -> None:
    with pytest.raises(Broken):
        parse_json(raw)


@QUICK
@given(st.text() | st.integers() | st.none() | st.lists(st.text()), st.integers(1, 20))
def test_a_clean_text_is_one_short_line(value: Value, chars_max: int) -> None:
    text = clean(value, chars_max)
    assert len(text) <= chars_max
    assert text == text.strip()
    assert "\n" not in text
    text.encode()


def test_clean_takes_out_what_deceives() -> None:
    assert clean("a\x1b[31mb\u202ec\ud800d\u200be\r\nf") == "a [31mb c?d e f"


def test_figures_that_make_no_sense_are_none() -> None:
    assert [count(v) for v in (5, -1, 2**60, 1.5, True, "5", None)] == [5, 0, 0, 0, 0, 0, 0]
    assert [number(v) for v in (5, 0.5, -1, float("inf"), float("nan"), 10**400, True)] == [
        5.0,
        0.5,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]


# -- models ------------------------------------------------------------------------------------------------


def test_names_of_models() -> None:
    assert family_of("/models/Small-Q4.gguf") == "Small-Q4"
    assert family_of(r"C:\models\Small-Q4.GGUF") == "Small-Q4"
    assert family_of("org/model-7b") == "org/model-7b"
    assert family_of("llama3.2:latest") == "llama3.2:latest"
    embed = ["nomic-embed-text:latest", "BAAI/bge-m3", "intfloat/e5-large", "all-minilm:22m"]
    assert all(map(looks_like_embedding, embed))
    assert not any(map(looks_like_embedding, ["llama3.2", "qwen2.5-coder", "phi-3.5", "glm-e5x"]))


def test_a_digest_is_of_what_is_said_and_never_that_of_a_file() -> None:
    said = ServedModel("m", digest="a" * 64)
    digest = facts_of(said, Kind.OLLAMA).digest
    assert len(digest) == 64
    assert digest != said.digest
    assert digest == facts_of(ServedModel("m", digest="a" * 64), Kind.OLLAMA).digest
    assert digest != facts_of(ServedModel("n", digest="a" * 64), Kind.OLLAMA).digest  # ollama cp
    assert facts_of(said, Kind.OLLAMA).kv_key == ""


# -- calls -------------------------------------------------------------------------------------------------


def test_parameters_go_on_and_nothing_else_does() -> None:
    body: dict[str, Value] = {
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.0,
        "repeat_penalty": 1.2,
        "tools": [{"type": "function"}],
        "response_format": {"type": "json_object"},
        "seed": None,
        "meshd": {"privacy": "lan"},
        "model": "another",
        "stream": False,
    }
    asked = json.loads(call_of(Kind.VLLM, "m", Operation.CHAT, body).body)
    assert asked == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "tools": [{"type": "function"}],
        "response_format": {"type": "json_object"},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    asked = json.loads(call_of(Kind.LLAMA_SERVER, "m", Operation.CHAT, body).body)
    assert asked["repeat_penalty"] == 1.2


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        (Operation.CHAT, {}),
        (Operation.CHAT, {"messages": []}),
        (Operation.CHAT, {"messages": "x"}),
        (Operation.CHAT, {"messages": [b"x"]}),
        (Operation.CHAT, {"messages": [float("nan")]}),
        (Operation.COMPLETE, {"prompt": ""}),
        (Operation.COMPLETE, {"prompt": 5}),
    ],
)
def test_what_nobody_could_answer(operation: Operation, body: dict[str, Value]) -> None:
    with pytest.raises(BadRequest):
        call_of(Kind.OPENAI, "m", operation, body)


@pytest.mark.parametrize(
    ("kind", "operation", "more"),
    [
        (Kind.OPENAI, Operation.FETCH, {}),
        (Kind.OPENAI, Operation.CHAT, {"grammar": 'root ::= "a"'}),
        (Kind.VLLM, Operation.COMPLETE, {"grammar": 'root ::= "a"'}),
        (Kind.OLLAMA, Operation.CHAT, {"logit_bias": {"1": 5}}),
        (Kind.OLLAMA, Operation.CHAT, {"tool_choice": "required"}),
        (Kind.OLLAMA, Operation.COMPLETE, {"logprobs": 1}),
    ],
)
def test_what_a_server_does_not_do(
    kind: Kind, operation: Operation, more: dict[str, Value]
) -> None:
    body: dict[str, Value] = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(Refused) as refused:
        call_of(kind, "m", operation, {**body, **more})
    assert refused.value.code == "unsupported"


# -- rates -------------------------------------------------------------------------------------------------


def test_what_servers_say_of_their_time() -> None:
    told = from_llama_server(
        {"prompt_n": 64, "prompt_ms": 320, "predicted_n": 10, "predicted_ms": 500}
    )
    assert told is not None
    assert (told.prefill_rate, told.decode_rate) == (200.0, 20.0)
    told = from_ollama({"eval_count": 10, "eval_duration": 500_000_000, "load_duration": 3 * 10**9})
    assert told is not None
    assert (told.prefill_rate, told.decode_rate, told.load_s) == (0.0, 20.0, 3.0)
    assert from_llama_server(None) is None
    assert from_ollama({"eval_count": 5}) is None


def test_too_little_says_nothing() -> None:
    assert Timing(decode_tokens=7, decode_s=0.1).decode_rate == 0.0
    assert Timing(decode_tokens=10**9, decode_s=0.001).decode_rate == 0.0
    assert Timing(decode_tokens=50, decode_s=0.0).decode_rate == 0.0
    meter = Meter()
    meter.note(Timing(decode_tokens=1, decode_s=1.0))
    assert meter.rates is None
    assert not meter.differs(None)


def test_a_rate_is_announced_anew_when_it_has_changed_by_a_fifth() -> None:
    meter = Meter()
    meter.note(Timing(decode_tokens=100, decode_s=1.0))
    announced = meter.rates
    assert announced == Rates(decode_tokens_per_s=100.0)
    assert meter.differs(None)
    assert not meter.differs(announced)
    meter.note(Timing(decode_tokens=50, decode_s=1.0))  # 85 now
    assert not meter.differs(announced)
    meter.note(Timing(decode_tokens=50, decode_s=1.0))  # 74.5 now
    assert meter.differs(announced)


# -- who else can reach it ----------------------------------------------------------------------------------

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue\n"


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        ("0100007F:2CAA", False),
        ("0200007F:2CAA", False),
        ("00000000:2CAA", True),
        ("0A0200C0:2CAA", True),
        ("00000000:2CAB", False),  # another port
        ("00000000000000000000000001000000:2CAA", False),
        ("00000000000000000000000000000000:2CAA", True),
        ("0000000000000000FFFF00000100007F:2CAA", False),
        ("0000000000000000FFFF00000A0200C0:2CAA", True),
    ],
)
def test_who_listens_beyond_loopback(tmp_path: Path, address: str, *, exposed: bool) -> None:
    table = tmp_path / "tcp"
    table.write_text(f"{HEADER}   0: {address} 00000000:0000 0A 0:0\n")
    assert is_exposed(11434, (tmp_path / "none", table)) is exposed


def test_a_connection_is_no_listener(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    table.write_text(f"{HEADER}   0: 0A0200C0:2CAA 00000000:0000 01 0:0\n")
    assert not is_exposed(11434, (table,))


def test_chunks_are_equal_whatever_they_came_from() -> None:
    chat, lines = OpenAIAnswer(Operation.CHAT), OllamaAnswer()
    event = b'data: {"choices": [{"delta": {"content": "a"}}]}'
    assert chat.take(event) is None
    assert chat.take(b"") == Chunk(text="a") == lines.take(b'{"response": "a", "done": false}')


def chunks_of(operation: Operation, *events: Value) -> list[Chunk]:
    answer = OpenAIAnswer(operation)
    lines = [line for event in events for line in (b"data: " + json.dumps(event).encode(), b"")]
    return [chunk for chunk in map(answer.take, lines) if chunk is not None]


def test_thoughts_tool_calls_and_logprobs() -> None:
    def delta(**said: Value) -> Value:
        return {"choices": [{"index": 0, "delta": said, "finish_reason": None}]}

    call: Value = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": ""}}
    more: Value = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    assert chunks_of(
        Operation.CHAT,
        delta(role="assistant", content=None),
        delta(reasoning_content="hm"),  # llama-server, vLLM
        delta(reasoning="hm", content=""),  # Ollama
        delta(tool_calls=[call]),
        delta(tool_calls=[more]),
    ) == [
        Chunk(reasoning="hm"),
        Chunk(reasoning="hm"),
        Chunk(tool_calls=(ToolCallDelta(0, "c1", "add"),)),
        Chunk(tool_calls=(ToolCallDelta(0, arguments='{"a": 1}'),)),
    ]
    told: Value = {
        "content": [
            {
                "id": 7,
                "token": "a",
                "bytes": [97],
                "logprob": -0.5,
                "top_logprobs": [{"token": "b", "logprob": -1, "bytes": None}],
            },
            {"token": "x", "logprob": "no"},
        ]
    }
    event: Value = {"choices": [{"index": 0, "text": "a", "logprobs": told}]}
    assert chunks_of(Operation.COMPLETE, event) == [
        Chunk(
            text="a",
            logprobs=(TokenLogprob(7, -0.5, b"a", (TokenLogprob(0, -1.0, b"b"),)),),
        )
    ]


def test_logprobs_of_completions_come_in_columns_too() -> None:
    told: Value = {
        "text_offset": [0, 1],
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, None],
        "top_logprobs": [{"a": -0.5, "c": -2.0}, None],
    }
    assert chunks_of(Operation.COMPLETE, {"choices": [{"text": "ab", "logprobs": told}]}) == [
        Chunk(
            text="ab",
            logprobs=(
                TokenLogprob(
                    0, -0.5, b"a", (TokenLogprob(0, -0.5, b"a"), TokenLogprob(0, -2.0, b"c"))
                ),
            ),
        )
    ]


def test_a_tool_call_beyond_the_bound_breaks_the_answer() -> None:
    with pytest.raises(Broken):
        chunks_of(Operation.CHAT, {"choices": [{"delta": {"tool_calls": [{"index": 10**6}]}}]})
