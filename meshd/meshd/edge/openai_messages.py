"""The messages of a chat, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshd.edge.errors import RequestError
from meshd.edge.fields import listed, mapped, missing, unsupported, utf8
from meshd_plugins.api import Value

_MESSAGES_MAX: Final = 4096
_CALLS_MAX: Final = 128
_ROLES: Final = ("system", "user", "assistant", "tool")
_TEXT_PARTS: Final = ("text", "refusal")
_OTHER_PARTS: Final = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file")


def messages_of(value: Value) -> list[dict[str, Value]]:
    """The messages of a chat: role and text, and what belongs to tools.

    Raises:
        RequestError: 400, with `param` naming the message and the field.
    """
    if not isinstance(value, list) or not value:
        raise RequestError(
            "`messages` must be a list of at least one message",
            param="messages",
            code=missing(value),
        )
    return [
        _message(m, f"messages[{n}]")
        for n, m in enumerate(listed(value, "messages", _MESSAGES_MAX))
    ]


def _message(value: Value, param: str) -> dict[str, Value]:
    message = mapped(value, param)
    role = message.get("role")
    if role == "developer":  # OpenAI's newer word for it; chat templates know only the older
        role = "system"
    if role not in _ROLES:
        raise RequestError(
            f"`{param}.role` must be developer, {', '.join(_ROLES)}",
            param=f"{param}.role",
            code=missing(role),
        )
    if message.get("function_call"):
        raise unsupported(f"{param}.function_call", "use `tool_calls`")
    found: dict[str, Value] = {"role": role}
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise RequestError(
            f"`{param}.tool_calls`: only the assistant calls tools", param=f"{param}.tool_calls"
        )
    content = message.get("content")
    found["content"] = "" if content is None and calls else _content(content, f"{param}.content")
    if calls:
        found["tool_calls"] = _calls(calls, f"{param}.tool_calls")
    for key in _KEPT.get(str(role), ()):
        text = message.get(key)
        if text is None:
            continue
        if not isinstance(text, str):
            raise RequestError(f"`{param}.{key}` must be a string", param=f"{param}.{key}")
        found[key] = utf8(text, f"{param}.{key}")
    return found


_KEPT: Final[Mapping[str, tuple[str, ...]]] = {
    "assistant": ("reasoning_content",),
    "tool": ("tool_call_id", "name"),
}


def _calls(value: Value, param: str) -> list[Value]:
    calls: list[Value] = []
    for number, call in enumerate(listed(value, param, _CALLS_MAX)):
        where = f"{param}[{number}]"
        given = mapped(call, where)
        if given.get("type", "function") != "function":
            raise unsupported(f"{where}.type", "only functions are supported")
        function = mapped(given.get("function"), f"{where}.function")
        texts: dict[str, Value] = {}
        for key in ("name", "arguments"):
            text = function.get(key)
            if not isinstance(text, str):
                name = f"{where}.function.{key}"
                raise RequestError(f"`{name}` must be a string", param=name, code=missing(text))
            texts[key] = utf8(text, f"{where}.function.{key}")
        identity = given.get("id")
        calls.append(
            {
                "id": utf8(identity, f"{where}.id") if isinstance(identity, str) else "",
                "type": "function",
                "function": texts,
            }
        )
    return calls


def _content(value: Value, param: str) -> str:
    if isinstance(value, str):
        return utf8(value, param)
    if not isinstance(value, list):
        raise RequestError(
            f"`{param}` must be a string, or a list of text parts",
            param=param,
            code=missing(value),
        )
    texts: list[str] = []
    for i, part in enumerate(value):
        where = f"{param}[{i}]"
        given = mapped(part, where)
        kind = given.get("type")
        if kind in _OTHER_PARTS:
            raise RequestError(
                f"`{where}`: no model of this mesh takes parts of type {kind!r}, only text",
                param=where,
                code="unsupported_modality",
            )
        if kind not in _TEXT_PARTS:
            raise unsupported(where, "only parts of type 'text' are supported")
        text = given.get(str(kind))
        if not isinstance(text, str):
            name = f"{where}.{kind}"
            raise RequestError(f"`{name}` must be a string", param=name, code=missing(text))
        texts.append(utf8(text, f"{where}.{kind}"))
    return "".join(texts)
