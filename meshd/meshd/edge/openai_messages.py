"""The messages of a chat, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshd.edge.errors import RequestError
from meshd.edge.fields import listed, mapped, missing, unsupported, utf8
from meshd_plugins.api import Value
from meshd_plugins.checking import check_media
from meshd_plugins.media import DETAILS, MEDIA_MAX, BadMedium, is_medium, medium_of

_MESSAGES_MAX: Final = 4096
_CALLS_MAX: Final = 128
_ROLES: Final = ("system", "user", "assistant", "tool")
_TEXT_PARTS: Final = ("text", "refusal")
_OTHER_PARTS: Final = ("input_image", "audio_url", "video_url", "file")


def messages_of(value: Value) -> list[dict[str, Value]]:
    """The messages of a chat: role and content, and what belongs to tools.

    Content is a string, or, where a user's message holds images or sound, the list of its parts. Of those only the
    beginnings and the ends were looked at: `check_to_the_end` does the rest, and goes before anything is done.

    Raises:
        RequestError: 400, with `param` naming the message and the field.
    """
    if not isinstance(value, list) or not value:
        raise RequestError(
            "`messages` must be a list of at least one message",
            param="messages",
            code=missing(value),
        )
    media = _Media()
    return [
        _message(m, f"messages[{n}]", media)
        for n, m in enumerate(listed(value, "messages", _MESSAGES_MAX))
    ]


async def check_to_the_end(body: Mapping[str, Value]) -> None:
    """Check what `messages_of` leaves of the images and sounds in a body; others have their turn meanwhile.

    Raises:
        RequestError: 400, with `param` naming the part.
    """
    try:
        await check_media(body.get("messages"))
    except BadMedium as error:
        raise _refusal(error) from error


def _refusal(error: BadMedium) -> RequestError:
    code = "invalid_value" if error.code == BadMedium.code else error.code
    return RequestError(f"`{error.where}` {error.reason}", param=error.where, code=code)


class _Media:
    """Checks the images and sounds of one request, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def part(self, given: Mapping[str, Value], role: str, where: str) -> dict[str, Value]:
        """A part as it is passed on: as it came, without what nobody knows.

        Raises:
            RequestError: 400, with `param` naming the part.
        """
        kind = str(given["type"])
        if role != "user":
            raise unsupported(where, "only messages of the user hold images and sound")
        self._count += 1
        if self._count > MEDIA_MAX:
            raise RequestError(f"`{where}`: more than {MEDIA_MAX} images and sounds", param=where)
        try:
            medium_of(given, where)
        except BadMedium as error:
            raise _refusal(error) from error
        inner = mapped(given[kind], f"{where}.{kind}")
        detail = inner.get("detail")
        if detail is not None and detail not in DETAILS:
            name = f"{where}.{kind}.detail"
            raise RequestError(f"`{name}` must be one of {', '.join(DETAILS)}", param=name)
        kept = {key: each for key in _MEDIA_KEPT if (each := inner.get(key)) is not None}
        return {"type": kind, kind: kept}


_MEDIA_KEPT: Final = ("url", "detail", "data", "format")


def _message(value: Value, param: str, media: _Media) -> dict[str, Value]:
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
    found["content"] = (
        "" if content is None and calls else _content(content, str(role), f"{param}.content", media)
    )
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


def _content(value: Value, role: str, param: str, media: _Media) -> Value:
    if isinstance(value, str):
        return utf8(value, param)
    if not isinstance(value, list):
        raise RequestError(
            f"`{param}` must be a string, or a list of parts",
            param=param,
            code=missing(value),
        )
    parts: list[Value] = []
    texts: list[str] = []
    for i, part in enumerate(value):
        where = f"{param}[{i}]"
        given = mapped(part, where)
        if is_medium(given):
            parts.append(media.part(given, role, where))
            continue
        text = _text(given, where)
        texts.append(text)
        parts.append({"type": "text", "text": text})
    return "".join(texts) if len(texts) == len(parts) else parts


def _text(given: Mapping[str, Value], where: str) -> str:
    kind = given.get("type")
    if kind in _OTHER_PARTS:
        raise RequestError(
            f"`{where}`: parts of type {kind!r} are not taken; "
            "pictures come as 'image_url', sound as 'input_audio'",
            param=where,
            code="unsupported_modality",
        )
    if kind not in _TEXT_PARTS:
        raise unsupported(
            where, "only parts of type 'text', 'image_url' and 'input_audio' are supported"
        )
    text = given.get(str(kind))
    if not isinstance(text, str):
        name = f"{where}.{kind}"
        raise RequestError(f"`{name}` must be a string", param=name, code=missing(text))
    return utf8(text, f"{where}.{kind}")
