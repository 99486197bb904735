"""A server that lies, floods, drips, hangs or breaks costs its own requests, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgpack
import pytest
import trio
from tests.shell.support_adopt import adopting, ask, capability_at, done_of, keeping, text_of
from tests.shell.support_adopt_servers import (
    LLAMA_SERVER_MODELS,
    STREAM_HEAD,
    Asked,
    FakeServer,
    Handler,
    answering,
    chunked,
    delta,
    head,
    llama_server,
    openai_models,
    raw,
    running,
    sending,
    sse,
    streaming,
    usage,
    vllm,
)

from meshd_plugins.api import Failed, Operation, Refused, Value
from meshd_plugins.builtin.adopt.keeper import State
from meshd_plugins.builtin.adopt.served import REQUESTS_MAX
from meshd_plugins.testing import check_descriptor, make_request

QUICK: dict[str, Value] = {"first_token_s": 0.3, "between_tokens_s": 0.3}


def chatting(handler: Handler) -> FakeServer:
    server = vllm("m")
    server.routes["POST /v1/chat/completions"] = handler
    return server


def repeating(piece: bytes, *before: bytes) -> Handler:
    """Send it again and again until the client has had enough."""

    async def handle(_asked: Asked, stream: trio.SocketStream) -> None:
        for first in before:
            await stream.send_all(first)
        while True:
            await stream.send_all(piece)

    return handle


def dripping(piece: bytes, *before: bytes) -> Handler:
    """As `repeating`, a piece every few milliseconds: the deadline is for progress, not for bytes."""

    async def handle(_asked: Asked, stream: trio.SocketStream) -> None:
        for first in before:
            await stream.send_all(first)
        while True:
            await stream.send_all(piece)
            with trio.move_on_after(0.005):
                await stream.receive_some(1)

    return handle


def silent(*before: bytes) -> Callable[[FakeServer], Handler]:
    def handler(server: FakeServer) -> Handler:
        async def handle(asked: Asked, stream: trio.SocketStream) -> None:
            for piece in before:
                await stream.send_all(piece)
            await server.until_hung_up(asked, stream)

        return handle

    return handler


# -- answers that never come to an end -----------------------------------------------------------------------

BEGUN = (STREAM_HEAD, chunked(sse(delta("Hel"))))


@pytest.mark.parametrize(
    "handler",
    [
        dripping(b"X-A: b\r\n", b"HTTP/1.1 200 OK\r\n"),
        dripping(chunked(b"d"), STREAM_HEAD),  # a line that never ends
        dripping(chunked(b": ping\n\n"), STREAM_HEAD),
        dripping(chunked(b"\n"), *BEGUN),
        dripping(chunked(sse(delta(None, role="assistant"))), *BEGUN),  # says nothing, often
        repeating(chunked(b": ping\n\n" * 100), *BEGUN),
    ],
)
def test_what_makes_no_progress_is_given_up(tmp_path: Path, handler: Handler) -> None:
    server = chatting(handler)

    async def main() -> None:
        async with adopting(server, tmp_path, **QUICK) as adopted:
            with pytest.raises(Failed) as failed:
                await ask(adopted.only())
            assert failed.value.code in ("worker_hung", "stream_lost", "peer_fault")
            with trio.fail_after(5):
                await server.hung_up.wait()  # its connection is closed

    trio.run(main)


@pytest.mark.parametrize("before", [(), (STREAM_HEAD,), BEGUN])
def test_a_hung_server_frees_the_request(tmp_path: Path, before: tuple[bytes, ...]) -> None:
    server = vllm("m")
    server.routes["POST /v1/chat/completions"] = silent(*before)(server)

    async def main() -> None:
        async with adopting(server, tmp_path, **QUICK) as adopted:
            with pytest.raises(Failed) as failed:
                await ask(adopted.only())
            assert failed.value.code == "worker_hung"
            with trio.fail_after(5):
                await server.hung_up.wait()

    trio.run(main)


def test_a_server_that_does_not_read_frees_the_request() -> None:
    """Its kernel takes the connection and some of the request, as after SIGSTOP."""
    body: dict[str, Value] = {"prompt": "x" * 30_000_000}

    async def main() -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            port = listener.socket.getsockname()[1]
            capability = capability_at(f"http://127.0.0.1:{port}", **QUICK)
            with pytest.raises(Failed) as failed:
                await ask(capability, make_request(Operation.COMPLETE, body))
            assert failed.value.code == "worker_hung"

    trio.run(main)


@pytest.mark.parametrize(
    ("handler", "code"),
    [
        (repeating(b"X-A: b\r\n" * 100, b"HTTP/1.1 200 OK\r\n"), "stream_lost"),
        (repeating(b"HTTP/1.1 100 Continue\r\n\r\n"), "stream_lost"),
        (repeating(chunked(b"x" * 65536), STREAM_HEAD), "peer_fault"),  # a line without an end
        (
            repeating(chunked(b"data: x\n" * 1000), STREAM_HEAD),
            "peer_fault",
        ),  # an event without one
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "stream_lost"),
        (raw(b""), "stream_lost"),
        (raw(STREAM_HEAD, b"zz\r\nhello\r\n"), "stream_lost"),
        (raw(head(200, "Content-Length: 100"), b"data: "), "stream_lost"),
        (raw(head(200, "Content-Length: 1", "Content-Length: 2"), b"data: "), "stream_lost"),
        (raw(head(200, "Transfer-Encoding: gzip"), b"\x1f\x8b"), "stream_lost"),
        (sending(b"\x00\xff\xfe garbage \x80\n\n" * 100), "stream_lost"),
        (sending(b"data: \xff\xfe\n\n"), "stream_lost"),
        (sending(b"data: " + b"[" * 100_000 + b"\n\n"), "stream_lost"),
        (sending(b'data: {"choices": [{"delta": {"content": NaN}}]}\n\n'), "stream_lost"),
        (streaming({"choices": "x"}, {"choices": [1]}, {"choices": [{"delta": 5}]}), "stream_lost"),
        (sending(b"moved", 302, "Location: http://192.0.2.1/"), "failed"),
    ],
)
def test_what_is_no_answer(tmp_path: Path, handler: Handler, code: str) -> None:
    async def main() -> None:
        async with adopting(chatting(handler), tmp_path, first_token_s=5.0) as adopted:
            with pytest.raises(Failed) as failed:
                await ask(adopted.only())
            assert failed.value.code == code
            assert len(failed.value.message) < 500

    trio.run(main)


def test_odd_texts_and_figures_are_made_fit(tmp_path: Path) -> None:
    odd: Value = {
        **usage(1, 1),
        "usage": {"prompt_tokens": -5, "completion_tokens": 10**30, "prompt_tokens_details": 7},
        "timings": {"predicted_ms": -1, "predicted_n": 1e300, "prompt_n": "x", "prompt_ms": True},
    }
    lone = b'data: {"choices": [{"index": 0, "delta": {"content": "a\\ud800b"}}]}\n\n'
    server = chatting(
        raw(
            STREAM_HEAD,
            chunked(lone),
            chunked(sse(delta(None, "stop"))),
            chunked(sse(odd)),
            chunked(sse("[DONE]")),
            b"0\r\n\r\n",
        )
    )

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            events = await ask(adopted.only())
            assert text_of(events) == "a?b"
            done = done_of(events)
            assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (0, 0)
            msgpack.packb([text_of(events), dict(done.detail)])
            await adopted.looks(2)
            assert adopted.only().descriptor.rates is None

    trio.run(main)


def test_an_answer_in_single_bytes_is_an_answer(tmp_path: Path) -> None:
    whole = STREAM_HEAD + b"".join(
        chunked(sse(event)) for event in (delta("Hel"), delta("lo", "stop"), usage(1, 2), "[DONE]")
    )

    async def main() -> None:
        pieces = [bytes([byte]) for byte in whole + b"0\r\n\r\n"]
        async with adopting(chatting(raw(*pieces)), tmp_path) as adopted:
            assert text_of(await ask(adopted.only())) == "Hello"

    trio.run(main)


def test_many_refusals_do_not_make_many_looks(tmp_path: Path) -> None:
    """A request that finds trouble brings the next look forward, not one look each."""
    server = chatting(answering({"error": "no"}, 500))

    async def main() -> None:
        async with adopting(server, tmp_path, poll_s=600.0) as adopted:
            looks = adopted.keeper.looks
            for _ in range(50):
                with pytest.raises(Failed):
                    await ask(adopted.only())
            assert adopted.keeper.looks - looks <= 2

    trio.run(main)


# -- surveys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "handler",
    [
        repeating(b"X-A: b\r\n" * 100, b"HTTP/1.1 200 OK\r\n"),
        repeating(chunked(b" " * 65536), STREAM_HEAD),
        raw(b"\x16\x03\x01\x00\x00"),
        sending(b"[" * 100_000),
        sending(b'{"data": 1e999, "object": "list"}'),
        sending(b"<html>", 200, "Content-Type: text/html"),
        sending(b"", 302, "Location: /login"),
        answering({"object": "list"}),
        answering([1, 2, 3]),
        answering({}, 500),
    ],
)
def test_what_is_no_list_of_models_is_not_adopted(tmp_path: Path, handler: Handler) -> None:
    server = FakeServer({"GET /v1/models": handler})

    async def main() -> None:
        async with running(server), keeping(server.url, tmp_path) as adopted:
            await adopted.until(lambda: adopted.keeper.state in (State.DOWN, State.REFUSED))
            assert not adopted.capabilities.added
            [complaint] = adopted.keeper.complaints()
            assert complaint.message.isprintable()
            assert len(complaint.message) < 600

    trio.run(main)


def test_models_with_odd_names_are_left_out(tmp_path: Path) -> None:
    listed: Value = [
        {"id": "ok", "max_model_len": -1},
        {"id": "evil\nname"},
        {"id": "\u202eevil"},
        {"id": "\ud800"},
        {"id": "x" * 100_000},
        {"id": ""},
        {"id": 5},
        {"id": None},
        {"id": {"a": 1}},
        {},
        "text",
        None,
        {"id": "ok", "object": "the same again"},
    ]
    server = vllm()
    server.routes["GET /v1/models"] = answering({"object": "list", "data": listed})

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            assert adopted.capabilities.families == ["knowledge.gpt/general ok"]

    trio.run(main)


def test_facts_that_make_no_sense_are_unknown(tmp_path: Path) -> None:
    models = json.loads(json.dumps(LLAMA_SERVER_MODELS))
    models["data"][0]["id"] = "m" * 200
    models["data"][0]["meta"] = {
        "n_params": -1,
        "size": 10**30,
        "n_ctx_train": "many",
        "n_ctx": [1],
        "ftype": "Q4\nK" * 100,
    }
    server = llama_server()
    server.routes["GET /v1/models"] = answering(models, 200, "Server: llama.cpp")
    server.routes["GET /props"] = answering(
        {"total_slots": 10**9, "chat_template": "\ud800", "modalities": [], "model_ftype": 5}
    )

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            descriptor = adopted.only().descriptor
            check_descriptor(descriptor)
            assert descriptor.slots == 256
            assert descriptor.model is not None
            assert descriptor.model.parameters == 0
            assert descriptor.model.size_bytes == 0
            assert descriptor.model.context_tokens == 0
            assert descriptor.model.quantisation.isprintable()
            assert len(descriptor.summary) < 200

    trio.run(main)


def test_a_flood_of_models_is_bounded(tmp_path: Path) -> None:
    server = vllm()
    server.routes["GET /v1/models"] = openai_models(*(f"model-{n}" for n in range(5000)))

    async def main() -> None:
        async with adopting(server, tmp_path, count=32) as adopted:
            await adopted.looks(2)
            assert len(adopted.capabilities.added) == 32

    trio.run(main)


def test_a_long_error_in_a_stream_is_cut(tmp_path: Path) -> None:
    server = chatting(streaming(delta("Hel"), {"error": {"message": "x" * 5000}}))

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            with pytest.raises(Failed) as failed:
                await ask(adopted.only())
            assert failed.value.code == "failed"
            assert len(failed.value.message) < 400

    trio.run(main)


def test_too_many_requests_at_once_are_refused() -> None:
    async def main() -> None:
        capability = capability_at("http://127.0.0.1:1")
        with ExitStack() as stack:
            for _ in range(REQUESTS_MAX):
                stack.enter_context(capability.served.traffic.one())
            with pytest.raises(Refused) as refused:
                await ask(capability)
            assert refused.value.code == "busy"
        with pytest.raises(Refused) as refused:
            await ask(capability)
        assert refused.value.code == "starting"

    trio.run(main)
