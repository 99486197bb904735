"""What a template is told of calls that were made earlier: in the form that it prints well.

Most templates want the arguments of a call as an object, some as the text of one; some want ids of nine
letters and digits. Which one it is shows when a template is given such a call: it fails, or leaves the
arguments out, or prints them as Python does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.schema_merge import as_map
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate, TemplateError

SHORT_ID: Final = re.compile(r"[A-Za-z0-9]{9}")
_LONG: Final = "call_0123456789abcdef01234567"
_SHORT: Final = "abcdef123"
_NEEDLE: Final = "needle"


@dataclass(frozen=True, slots=True)
class History:
    """How a template wants earlier calls."""

    as_text: bool = False  # the arguments
    short_ids: bool = False

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation with its calls in that form."""
        if not self.as_text and not self.short_ids:
            return list(messages)
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        found = dict(message)
        if message.get("tool_calls"):
            found["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if self.short_ids and message["role"] == "tool":
            found["tool_call_id"] = _short(str(message.get("tool_call_id") or ""))
        return found

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if self.as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        identity = str(call.get("id") or "")
        if self.short_ids:
            identity = _short(identity)
        return {**call, "id": identity, "function": {**function, "arguments": arguments}}


def find_history(template: ChatTemplate) -> History:
    """Try which form of a call this template prints."""
    for identity in (_LONG, _SHORT):
        for as_text in (False, True):
            if _prints(template, identity, as_text=as_text):
                return History(as_text, short_ids=identity == _SHORT)
    return History()


def broken_arguments(messages: Sequence[Mapping[str, Any]]) -> str:
    """Where arguments of an earlier call are no object of JSON; "" where all are."""
    for number, message in enumerate(messages):
        for index, call in enumerate(message.get("tool_calls") or ()):
            if as_map(call["function"]["arguments"]) is None:
                return f"messages[{number}].tool_calls[{index}].function.arguments"
    return ""


def _prints(template: ChatTemplate, identity: str, *, as_text: bool) -> bool:
    arguments: Any = {_NEEDLE: "a"}
    function = {"name": "f", "arguments": json.dumps(arguments) if as_text else arguments}
    call = {"id": identity, "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": identity, "name": "f", "content": "b"},
    ]
    try:
        shown = template.render(messages)
    except TemplateError:
        return False
    return _NEEDLE in shown and f"'{_NEEDLE}'" not in shown


def _short(identity: str) -> str:
    """The id itself where it is short enough, or one that is always the same for it."""
    if SHORT_ID.fullmatch(identity):
        return identity
    return hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:9]
