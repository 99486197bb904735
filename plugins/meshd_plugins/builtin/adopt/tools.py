"""Tools at an adopted server: whether it tells its model of them, and whether an answer does what was asked. Pure.

llama-server takes `tools` only with `--jinja`, and even so passes them over in silence where the model's chat
template has no place for them, `tool_choice: "required"` with them. `/apply-template` tells both, and generates nothing: the
name of a tool stands in the prompt, or it does not. It also takes a function that is named by `tool_choice` for "auto".

Invariant: where a call was asked for, no text goes out before one, so that another node may still be asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Final

from meshd_plugins.api import BadRequest, Chunk, Done, Failed, Refused, Value
from meshd_plugins.builtin.adopt.config import Kind
from meshd_plugins.builtin.adopt.untrusted import error_message, table

_PROBE_NAME: Final = "meshd_probe_of_tools"
PROBE: Final[Mapping[str, Value]] = {
    "messages": [{"role": "user", "content": "a"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": _PROBE_NAME,
                "description": "a",
                "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
            },
        }
    ],
}
"""For `POST /apply-template`."""


class Tools(Enum):
    """Whether a model is told of tools; the value says why not."""

    UNKNOWN = ""
    APPLIED = "applied"
    NO_JINJA = "its llama-server was started without --jinja, which tools need"
    NO_PLACE = (
        "its chat template has no place for tools: start its llama-server with --jinja and a "
        "--chat-template-file that has one"
    )


def tools_of(status: int, value: Value) -> Tools:
    """What the answer to the probe says."""
    if status != 200:
        return Tools.NO_JINJA if "--jinja" in error_message(value) else Tools.UNKNOWN
    prompt = table(value).get("prompt")
    if not isinstance(prompt, str):
        return Tools.UNKNOWN
    return Tools.APPLIED if _PROBE_NAME in prompt else Tools.NO_PLACE


class ToolDuty:
    """What a request asks of tools, and what of it the answer does.

    Args:
        body: of a chat, as it came.
        tools: of its model.

    Raises:
        Refused: it wants tools, and the model is not told of them.
    """

    def __init__(self, body: Mapping[str, Value], tools: Tools) -> None:
        choice = body.get("tool_choice")
        given = bool(body.get("tools")) and choice != "none"
        if given and tools in (Tools.NO_JINJA, Tools.NO_PLACE):
            raise Refused(f"this model is not told of tools: {tools.value}", code="unsupported")
        named = table(table(choice).get("function")).get("name")
        self._body = body
        self._named = named if isinstance(named, str) else ""
        self._is_open = given and (choice == "required" or isinstance(choice, Mapping))
        self._held: list[Chunk] = []
        self._has_begun = False

    def body_for(self, kind: Kind) -> Mapping[str, Value]:
        """The body in words that the server minds: to llama-server a named function is the only one, and required.

        Raises:
            BadRequest: it is none of the tools.
        """
        if kind is not Kind.LLAMA_SERVER or not self._named:
            return self._body
        tools = self._body.get("tools")
        only: list[Value] = [
            tool
            for tool in (tools if isinstance(tools, list | tuple) else ())
            if table(table(tool).get("function")).get("name") == self._named
        ]
        if not only:
            raise BadRequest(
                f"tool_choice names {self._named[:64]!r}, which is not among the tools"
            )
        return {**self._body, "tools": only, "tool_choice": "required"}

    def take(self, chunk: Chunk) -> tuple[Chunk, ...]:
        """A part of the answer; what may go out now."""
        if not self._is_open:
            return (chunk,)
        if any(call.name and self._named in ("", call.name) for call in chunk.tool_calls):
            self._is_open = False
            ready, self._held = (*self._held, chunk), []
            return ready
        if chunk.reasoning:  # may take minutes, and is no answer
            self._has_begun = True
            if chunk.text:
                self._held.append(Chunk(chunk.text))
            return (replace(chunk, text="", tool_calls=()),)
        self._held.append(chunk)
        return ()

    def end(self, done: Done) -> tuple[tuple[Chunk, ...], Done]:
        """What is left to go out, and the end.

        Raises:
            Refused, Failed: `unsupported`: the answer is whole, and there is no call in it; nothing of it has gone
                out, or only thoughts.
        """
        if not self._is_open:
            return (), done
        if done.finish_reason in ("stop", "tool_calls"):
            told = (
                f"tool_choice asks for a call of {self._named or 'a tool'}, and the server answered without one: "
                "it does not hold its model to it (llama-server: --jinja and a chat template with tools)"
            )
            raise (Failed if self._has_begun else Refused)(told, code="unsupported")
        return tuple(self._held), replace(
            done, detail={**done.detail, "unenforced": ["tool_choice"]}
        )
