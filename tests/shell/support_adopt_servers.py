"""Servers of language models on loopback, as the adopting plugin meets them.

`FakeServer` speaks real HTTP over real sockets; what it answers is in the shapes that the servers' own
documentation and sources show (Ollama docs/api.md and openai/openai.go, llama.cpp tools/server, vLLM
entrypoints/openai), with other values.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import h11
import trio

from meshd_plugins.api import Value


@dataclass(frozen=True)
class Asked:
    """A request as the server got it."""

    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


Handler: TypeAlias = "Callable[[Asked, trio.SocketStream], Awaitable[None]]"


@dataclass
class FakeServer:
    """Answers by method and path; what it does not know is a 404."""

    routes: dict[str, Handler] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    hung_up: trio.Event = field(default_factory=trio.Event)  # a client left before its answer's end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[str]:
        return [asked.line for asked in self.asked]

    def last(self, line: str) -> Asked:
        return [asked for asked in self.asked if asked.line == line][-1]

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                asked = await read_request(stream)
                self.asked.append(asked)
                await self.routes.get(asked.line, not_found)(asked, stream)
            except (trio.BrokenResourceError, h11.RemoteProtocolError):
                self.hung_up.set()

    async def until_hung_up(self, _asked: Asked, stream: trio.SocketStream) -> None:
        """Say nothing until the client goes."""
        try:
            while await stream.receive_some(1024):
                pass
        except trio.BrokenResourceError:
            pass
        self.hung_up.set()


async def read_request(stream: trio.SocketStream) -> Asked:
    wire = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    body = b""
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            headers = {name.decode(): value.decode() for name, value in request.headers}
            return Asked(request.method.decode(), request.target.decode(), headers, body)
        else:
            raise trio.BrokenResourceError("the client went")


@asynccontextmanager
async def running(
    server: FakeServer,
    port: int = 0,
    *,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> AsyncGenerator[FakeServer]:
    """Serve while the block runs; afterwards nothing listens there."""
    async with trio.open_nursery() as nursery:
        serve: Any = partial(trio.serve_tcp, server.serve, port, host=host)
        if tls is not None:
            serve = partial(trio.serve_ssl_over_tcp, server.serve, port, tls, host=host)
        [listener] = await nursery.start(serve)
        tcp = listener.transport_listener if tls is not None else listener
        server.port = tcp.socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()


# -- answers -----------------------------------------------------------------------------------------------


def head(status: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", *headers, "", ""]).encode()


def answering(value: Value, status: int = 200, *headers: str) -> Handler:
    return sending(json.dumps(value).encode(), status, "Content-Type: application/json", *headers)


def sending(body: bytes, status: int = 200, *headers: str) -> Handler:
    async def handle(_asked: Asked, stream: trio.SocketStream) -> None:
        await stream.send_all(head(status, f"Content-Length: {len(body)}", *headers) + body)

    return handle


def raw(*pieces: bytes) -> Handler:
    """Exactly these bytes, then the end of the connection."""

    async def handle(_asked: Asked, stream: trio.SocketStream) -> None:
        for piece in pieces:
            await stream.send_all(piece)

    return handle


STREAM_HEAD = head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def streaming(*events: Value | str, ending: bytes = b"0\r\n\r\n") -> Handler:
    """Server-sent events in chunks, one each."""
    return raw(STREAM_HEAD, *(chunked(sse(event)) for event in events), ending)


def sse(event: Value | str) -> bytes:
    text = event if isinstance(event, str) else json.dumps(event)
    return f"data: {text}\n\n".encode()


async def not_found(asked: Asked, stream: trio.SocketStream) -> None:
    await answering({"error": {"message": "File Not Found", "type": "not_found_error"}}, 404)(
        asked, stream
    )


def delta(content: str | None = None, finish: str | None = None, **more: Value) -> dict[str, Value]:
    """A chunk of a chat, as all of these servers write it."""
    said: dict[str, Value] = {} if content is None else {"content": content}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_760_000_000,
        "model": "m",
        "choices": [{"index": 0, "delta": {**said, **more}, "finish_reason": finish}],
    }


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Value]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }


# -- servers -----------------------------------------------------------------------------------------------


def openai_models(*ids: str, owner: str = "somebody", **more: Value) -> Handler:
    data: list[Value] = [
        {"id": name, "object": "model", "created": 1, "owned_by": owner, **more} for name in ids
    ]
    return answering({"object": "list", "data": data})


def vllm(*ids: str) -> FakeServer:
    server = FakeServer()
    server.routes["GET /v1/models"] = openai_models(
        *ids, owner="vllm", root="/models/x", parent=None, max_model_len=8192, permission=[]
    )
    server.routes["GET /version"] = answering({"version": "0.11.0"})
    server.routes["POST /v1/chat/completions"] = streaming(
        delta("", role="assistant"), delta("Hel"), delta("lo", "stop"), usage(9, 2), "[DONE]"
    )
    return server


LLAMA_SERVER_MODELS: dict[str, Value] = {
    "models": [{"name": "small.gguf", "model": "small.gguf", "capabilities": ["completion"]}],
    "object": "list",
    "data": [
        {
            "id": "/models/Small-135M-Q4_K_M.gguf",
            "aliases": [],
            "tags": [],
            "object": "model",
            "created": 1_760_000_000,
            "owned_by": "llamacpp",
            "meta": {
                "vocab_type": 2,
                "n_vocab": 49152,
                "n_ctx": 2048,
                "n_ctx_train": 8192,
                "n_embd": 576,
                "n_params": 134_515_008,
                "size": 105_000_000,
                "ftype": "Q4_K - Medium",
            },
        }
    ],
}
LLAMA_SERVER_PROPS: dict[str, Value] = {
    "default_generation_settings": {"params": {}, "n_ctx": 2048},
    "total_slots": 4,
    "model_alias": "small",
    "model_path": "/models/Small-135M-Q4_K_M.gguf",
    "modalities": {"vision": False, "video": False, "audio": False},
    "endpoint_slots": True,
    "chat_template": "{{ messages }}",
    "build_info": "b1-0",
    "is_sleeping": False,
}
TIMINGS: dict[str, Value] = {
    "cache_n": 3,
    "prompt_n": 64,
    "prompt_ms": 160.0,
    "predicted_n": 20,
    "predicted_ms": 400.0,
    "predicted_per_second": 50.0,
}


def llama_server() -> FakeServer:
    server = FakeServer()
    server.routes["GET /v1/models"] = answering(LLAMA_SERVER_MODELS, 200, "Server: llama.cpp")
    server.routes["GET /props"] = answering(LLAMA_SERVER_PROPS, 200, "Server: llama.cpp")
    server.routes["POST /v1/embeddings"] = answering(
        {
            "error": {
                "code": 501,
                "message": "This server does not support embeddings. Start it with `--embeddings`",
                "type": "not_supported_error",
            }
        },
        501,
    )
    server.routes["POST /v1/chat/completions"] = streaming(
        delta(None, role="assistant"),
        delta("Hel"),
        delta("lo"),
        delta(None, "length"),
        {**usage(67, 20, 3), "timings": TIMINGS},
        "[DONE]",
    )
    server.routes["POST /v1/completions"] = streaming(
        {"choices": [{"text": "1 2", "index": 0, "finish_reason": None}]},
        {"choices": [{"text": "", "index": 0, "finish_reason": "length"}], "timings": TIMINGS},
        "[DONE]",
    )
    return server


LOADING: Value = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@dataclass
class OllamaModel:
    """One that was pulled."""

    name: str
    digest: str = "a" * 64
    family: str = "llama"
    capabilities: tuple[str, ...] = ("completion", "tools")
    warm: bool = False


class Ollama(FakeServer):
    """An Ollama whose models can be pulled, removed and loaded while it runs."""

    def __init__(self, *models: OllamaModel) -> None:
        super().__init__()
        self.models = list(models)
        self.routes.update(
            {
                "GET /v1/models": self._openai,
                "GET /api/version": answering({"version": "0.12.3"}),
                "GET /api/tags": self._tags,
                "GET /api/ps": self._ps,
                "POST /api/show": self._show,
                "POST /api/generate": generating("1 2", " 3"),
                "POST /v1/chat/completions": streaming(
                    delta("Hel", role="assistant"),
                    delta("lo", role="assistant"),
                    delta("", "stop", role="assistant"),
                    usage(26, 2),
                    "[DONE]",
                ),
            }
        )

    async def _openai(self, asked: Asked, stream: trio.SocketStream) -> None:
        data = [
            {"id": m.name, "object": "model", "created": 1, "owned_by": "library"}
            for m in self.models
        ]
        await answering({"object": "list", "data": data or None})(asked, stream)

    def _details(self, model: OllamaModel) -> dict[str, Value]:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": model.family,
            "families": [model.family],
            "parameter_size": "3.2B",
            "quantization_level": "Q4_K_M",
        }

    async def _tags(self, asked: Asked, stream: trio.SocketStream) -> None:
        listed: list[Value] = [
            {
                "name": m.name,
                "model": m.name,
                "modified_at": "2026-01-01T00:00:00Z",
                "size": 2_019_393_189,
                "digest": m.digest,
                "details": self._details(m),
            }
            for m in self.models
        ]
        await answering({"models": listed})(asked, stream)

    async def _ps(self, asked: Asked, stream: trio.SocketStream) -> None:
        listed: list[Value] = [
            {
                "name": m.name,
                "model": m.name,
                "size": 3_000_000_000,
                "digest": m.digest,
                "expires_at": "2026-01-01T00:05:00Z",
                "size_vram": 0,
                "context_length": 16384,
            }
            for m in self.models
            if m.warm
        ]
        await answering({"models": listed})(asked, stream)

    async def _show(self, asked: Asked, stream: trio.SocketStream) -> None:
        found = [m for m in self.models if m.name == asked.body["model"]]
        if not found:
            await answering({"error": "model not found"}, 404)(asked, stream)
            return
        [model] = found
        shown: dict[str, Value] = {
            "license": "x" * 1000,
            "template": "{{ .Prompt }}",
            "details": self._details(model),
            "model_info": {
                "general.architecture": model.family,
                "general.parameter_count": 3_212_749_888,
                f"{model.family}.context_length": 131_072,
            },
            "capabilities": list(model.capabilities),
        }
        await answering(shown)(asked, stream)


def generating(*texts: str, done: bool = True) -> Handler:
    """`/api/generate` in lines of JSON."""
    lines: list[dict[str, Value]] = [
        {"model": "m", "created_at": "2026-01-01T00:00:00Z", "response": text, "done": False}
        for text in texts
    ]
    if done:
        lines.append(
            {
                "model": "m",
                "created_at": "2026-01-01T00:00:01Z",
                "response": "",
                "done": True,
                "done_reason": "stop",
                "total_duration": 2_000_000_000,
                "load_duration": 20_000_000,
                "prompt_eval_count": 100,
                "prompt_eval_duration": 500_000_000,
                "eval_count": 24,
                "eval_duration": 1_200_000_000,
            }
        )
    body = [chunked(json.dumps(line).encode() + b"\n") for line in lines]
    return raw(head(200, "Transfer-Encoding: chunked"), *body, b"0\r\n\r\n")
