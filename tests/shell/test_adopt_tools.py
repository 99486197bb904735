"""Tools at an adopted server: promised where they are applied, refused where they are not, and never passed over.

What llama-server says here is what one said: with `--no-jinja`, with a template that knows no tools, and with one that does.
"""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest
import trio
from tests.shell.support_adopt import MESSAGES, adopting, ask, capability_at, done_of, text_of
from tests.shell.support_adopt_servers import (
    FakeServer,
    answering,
    delta,
    llama_server,
    not_found,
    running,
    streaming,
    usage,
)

from meshd_plugins.api import BadRequest, Chunk, Failed, Operation, Refused, Request, Value
from meshd_plugins.builtin.adopt.tools import PROBE
from meshd_plugins.testing import make_request

NO_JINJA: Value = {
    "error": {"code": 500, "message": "tools param requires --jinja flag", "type": "server_error"}
}
NO_PLACE: Value = {"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"}
TOLD: Value = {
    "prompt": "<|im_start|>system\n<tools>\n"
    '{"type": "function", "function": {"name": "meshd_probe_of_tools", "description": "a"}}\n'
    "</tools><|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
}
WEATHER: Value = {"type": "function", "function": {"name": "weather", "parameters": {}}}
TIME: Value = {"type": "function", "function": {"name": "time", "parameters": {}}}
NAMED: Value = {"type": "function", "function": {"name": "weather"}}
CHATS = "POST /v1/chat/completions"


def wanting(choice: Value, **more: Value) -> Request:
    body: dict[str, Value] = {"messages": MESSAGES, "tools": [TIME, WEATHER], **more}
    return make_request(Operation.CHAT, {**body, "tool_choice": choice})


def calling(name: str) -> Value:
    call: Value = {"index": 0, "id": "c", "type": "function", "function": {"name": name}}
    return delta(None, tool_calls=[call])


def arguments(text: str) -> Value:
    return delta(None, tool_calls=[{"index": 0, "function": {"arguments": text}}])


def saying(*events: Value) -> FakeServer:
    """A server of whose tools nothing is known."""
    server = FakeServer()
    server.routes[CHATS] = streaming(*events, usage(9, 2), "[DONE]")
    return server


@pytest.mark.parametrize(
    ("status", "value", "field", "says"),
    [
        (500, NO_JINJA, None, "without --jinja"),
        (200, NO_PLACE, None, "--chat-template-file"),
        (200, TOLD, "native", ""),
        (404, None, None, ""),
        (200, {"prompt": 5}, None, ""),
        (200, ["meshd_probe_of_tools"], None, ""),
    ],
    ids=["no jinja", "no place", "told", "no such path", "no prompt", "no object"],
)
def test_what_is_told_at_adoption(
    tmp_path: Path, status: int, value: Value, field: str | None, says: str
) -> None:
    server = llama_server()
    server.routes["POST /apply-template"] = not_found if status == 404 else answering(value, status)

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            capability = adopted.only()
            assert capability.descriptor.fields.get("tools") == field
            assert server.last("POST /apply-template").body["tools"] == PROBE["tools"]
            if says:
                for choice in ("auto", "required", NAMED):
                    with pytest.raises(Refused, match=says) as refused:
                        await ask(capability, wanting(choice))
                    assert refused.value.code == "unsupported"
                    assert "--jinja" in refused.value.message
                assert CHATS not in server.lines()
                assert text_of(await ask(capability, wanting("none"))) == "Hello"
            else:
                assert text_of(await ask(capability, wanting("auto"))) == "Hello"
            await adopted.looks(2)
            assert server.lines().count("POST /apply-template") == 1, "asked once"

    trio.run(main)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_an_answer_without_the_call_that_was_asked_for_is_refused(choice: Value) -> None:
    server = saying(delta("It is "), delta("fine.", "stop"))

    async def main() -> None:
        async with running(server):
            async with aclosing(capability_at(server.url).invoke(wanting(choice))) as events:
                with pytest.raises(Refused, match="--jinja") as refused:
                    await anext(events)  # nothing went out: another node can be asked
            assert refused.value.code == "unsupported"

    trio.run(main)


def test_a_call_of_another_function_is_not_the_one() -> None:
    server = saying(calling("time"), arguments("{}"), delta(None, "tool_calls"))

    async def main() -> None:
        async with running(server):
            with pytest.raises(Refused, match="a call of weather"):
                await ask(capability_at(server.url), wanting(NAMED))

    trio.run(main)


def test_after_thoughts_it_is_a_failure() -> None:
    server = saying(delta(None, reasoning_content="Hm."), delta("Fine."), delta(None, "stop"))

    async def main() -> None:
        async with running(server):
            async with aclosing(capability_at(server.url).invoke(wanting("required"))) as events:
                assert await anext(events) == Chunk(reasoning="Hm.")
                with pytest.raises(Failed, match="--jinja") as failed:
                    await anext(events)
            assert failed.value.code == "unsupported"

    trio.run(main)


def test_an_answer_that_is_cut_goes_out_and_says_what_it_lacks() -> None:
    server = saying(delta("It is "), delta("fi"), delta(None, "length"))

    async def main() -> None:
        async with running(server):
            events = await ask(capability_at(server.url), wanting("required"))
            assert text_of(events) == "It is fi"
            assert done_of(events).finish_reason == "length"
            assert done_of(events).detail["unenforced"] == ["tool_choice"]

    trio.run(main)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_goes_out_with_what_was_said_before_it(choice: Value) -> None:
    server = saying(
        delta("Let me see. "), calling("weather"), arguments("{}"), delta(None, "tool_calls")
    )

    async def main() -> None:
        async with running(server):
            events = await ask(capability_at(server.url), wanting(choice))
            assert text_of(events) == "Let me see. "
            chunks = [event for event in events if isinstance(event, Chunk)]
            assert [call.name for each in chunks for call in each.tool_calls] == ["weather", ""]
            assert "unenforced" not in done_of(events).detail

    trio.run(main)


def test_auto_may_answer_without_a_call() -> None:
    server = saying(delta("Fine."), delta(None, "stop"))

    async def main() -> None:
        async with running(server):
            assert text_of(await ask(capability_at(server.url), wanting("auto"))) == "Fine."

    trio.run(main)


def test_a_named_function_is_the_only_one_that_llama_server_gets(tmp_path: Path) -> None:
    server = llama_server()
    server.routes["POST /apply-template"] = answering(TOLD)

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            await ask(adopted.only(), wanting(NAMED))
            asked = server.last(CHATS).body
            assert (asked["tools"], asked["tool_choice"]) == ([WEATHER], "required")
            with pytest.raises(BadRequest, match="not among the tools"):
                await ask(adopted.only(), wanting({"function": {"name": "tide"}}))

    trio.run(main)
