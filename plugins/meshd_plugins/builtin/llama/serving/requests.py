"""A request as OpenAI has it, checked and put into the worker's words.

The body comes from a client or from a peer, through the edge or past it: nothing of it is believed. Schemas
and grammars are only bounded here; the worker compiles them, where a hostile one harms nobody.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

from meshd_plugins.api import BadRequest, Operation, Value
from meshd_plugins.builtin.llama.prompt.schema_merge import as_map
from meshd_plugins.builtin.llama.sampling import SEEDS, read_sampling
from meshd_plugins.media import MEDIA_MAX, MEDIA_TYPES, Modality, is_medium, medium_of
from meshd_plugins.workerkit import FRAME_BYTES_MAX

MESSAGES_MAX: Final = 1024
TOOLS_MAX: Final = 128
CALLS_MAX: Final = 128  # in one message
STRUCTURE_BYTES_MAX: Final = 256 * 1024  # of all tools, of a schema, of a grammar
OPTIONS_MAX: Final = 32
OPTIONS_BYTES_MAX: Final = 8 * 1024
NESTING_MAX: Final = 100
MESSAGE_BYTES_MAX: Final = FRAME_BYTES_MAX - 64 * 1024  # of what the worker is sent
TEXT_ONLY: Final = (Modality.TEXT,)
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
CHOICES: Final = ("auto", "none", "required")

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TEXT_PARTS: Final = ("text", "input_text", "output_text", "refusal")
_UNREAD: Final = ("webp",)  # formats that the worker's libraries have no decoder for


def worker_message(
    operation: Operation, body: Mapping[str, Value], modalities: Sequence[str] = TEXT_ONLY
) -> dict[str, Value]:
    """Check a request and put it into the worker's words.

    Images and sound go on as they came, for the worker to decode: there nobody waits meanwhile. Of them only the
    beginnings and the ends are looked at here; `check_media` does the rest.

    Args:
        operation: CHAT or COMPLETE.
        body: as the client or the peer sent it.
        modalities: what the model can take in.

    Raises:
        BadRequest: what is wrong, and where.
    """
    message = _message_of(operation, body, modalities)
    if (size := packed_bytes_max(message)) > MESSAGE_BYTES_MAX:
        raise BadRequest(
            f"the request takes {size} bytes on its way to the model; at most {MESSAGE_BYTES_MAX} are taken",
            code="too_large",
        )
    return message


def _message_of(
    operation: Operation, body: Mapping[str, Value], modalities: Sequence[str]
) -> dict[str, Value]:
    form = read_format(body)
    tools = read_tools(body.get("tools")) if operation is Operation.CHAT else []
    choice = read_choice(body.get("tool_choice"), tools)
    structured = bool(form) or bool(tools and choice != "none")
    sampling = read_sampling(body, secrets.randbelow(SEEDS), structured=structured)
    message: dict[str, Value] = {"operation": operation.value, "sampling": sampling.to_wire()}
    if form:
        message["format"] = form
    if operation is Operation.CHAT:
        message["messages"], media = read_messages(body.get("messages"), modalities)
        if media:
            message["media"] = media
        if tools:
            message |= {"tools": tools, "tool_choice": choice, "parallel": _parallel(body)}
        if options := _template_options(body.get("chat_template_kwargs")):
            message["template_options"] = options
        return message
    if body.get("tools"):
        raise BadRequest("tools are for chats", code="unsupported_parameter")
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadRequest("prompt must be a string that is not empty")
    message["prompt"] = prompt
    return message


def read_format(body: Mapping[str, Value]) -> dict[str, Value]:
    """What the answer is held to: {"grammar"}, {"schema"}, {"object": True}, or nothing. Raises BadRequest."""
    grammar, wanted = body.get("grammar"), body.get("response_format")
    if grammar is not None and grammar != "":
        if not isinstance(grammar, str) or len(grammar) > STRUCTURE_BYTES_MAX:
            raise BadRequest(f"grammar must be a text of at most {STRUCTURE_BYTES_MAX} characters")
        if isinstance(wanted, Mapping) and wanted.get("type") != "text":
            raise BadRequest("grammar and response_format exclude each other")
        return {"grammar": grammar}
    if wanted is None:
        return {}
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    match kind:
        case "text":
            return {}
        case "json_object":
            schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
            where = "response_format.schema"  # as llama-server has it
            return {"object": True} if schema is None else {"schema": _bounded(schema, where)}
        case "json_schema":
            assert isinstance(wanted, Mapping)
            inner = wanted.get("json_schema")
            if not isinstance(inner, Mapping) or inner.get("schema") is None:
                raise BadRequest("response_format.json_schema.schema is missing")
            schema = _bounded(inner["schema"], "response_format.json_schema.schema")
            return {"schema": schema, "strict": inner.get("strict") is True}
        case _:
            raise BadRequest("response_format.type must be text, json_object or json_schema")


def read_tools(value: Value) -> list[Value]:
    """The functions that may be called. Raises BadRequest."""
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) > TOOLS_MAX:
        raise BadRequest(f"tools must be a list of at most {TOOLS_MAX}")
    _bounded(value, "tools")
    tools: list[Value] = []
    names: set[str] = set()
    for number, tool in enumerate(value):
        where = f"tools[{number}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise BadRequest(f"{where}.type must be function", code="unsupported_parameter")
        if not isinstance(function, Mapping):
            raise BadRequest(f"{where}.function must be an object")
        name, told = function.get("name"), function.get("description")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in names:
            raise BadRequest(
                f"{where}.function.name must be unique, of 1 to 64 letters, digits, _ . and -"
            )
        if told is not None and not isinstance(told, str):
            raise BadRequest(f"{where}.function.description must be a string")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise BadRequest(f"{where}.function.parameters must be a schema")
        names.add(name)
        tools.append({"name": name, "description": told or "", "parameters": parameters})
    return tools


def read_choice(value: Value, tools: Sequence[Value]) -> str:
    """`auto`, `none`, `required`, or the name of a tool. Raises BadRequest."""
    if value is None:
        return "auto"
    if isinstance(value, str) and value in CHOICES:
        if value == "required" and not tools:
            raise BadRequest("tool_choice is required and there are no tools")
        return value
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise BadRequest(f"tool_choice must be {', '.join(CHOICES)}, or name a function")
    if not any(isinstance(tool, Mapping) and tool["name"] == name for tool in tools):
        raise BadRequest(f"tool_choice names {name[:64]!r}, which is not among the tools")
    if name in CHOICES:
        raise BadRequest(f"tool_choice: a tool that is called {name!r} cannot be chosen by name")
    return name


def read_messages(
    value: Value, modalities: Sequence[str] = TEXT_ONLY
) -> tuple[list[Value], list[Value]]:
    """The conversation, and the images and sounds in it: each a `data:` URL, or base64.

    Content is a text; or, where there are media in it, a list of {"text"} and {"media": n}, the n-th of all.

    Raises:
        BadRequest: it names the message; `unsupported_modality`: the model cannot take in what is there.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise BadRequest("messages must be a list that is not empty")
    if len(value) > MESSAGES_MAX:
        raise BadRequest(f"messages holds {len(value)}; the most is {MESSAGES_MAX}")
    media = _Media(modalities)
    messages: list[Value] = [
        _message(message, f"messages[{number}]", media) for number, message in enumerate(value)
    ]
    return messages, media.found


class _Media:
    """The images and sounds of one request, taken out of its messages."""

    def __init__(self, modalities: Sequence[str]) -> None:
        self._modalities = modalities
        self.found: list[Value] = []

    def take(self, part: Mapping[str, Value], role: str, where: str) -> dict[str, Value]:
        """The worker's word for a part that holds a medium. Raises BadRequest."""
        wanted = MEDIA_TYPES[str(part["type"])]
        if wanted not in self._modalities:
            known = " and ".join(self._modalities)
            raise BadRequest(f"{where}: this model reads {known} only", code="unsupported_modality")
        if role != "user":
            raise BadRequest(f"{where}: only messages of the user hold images and sound")
        if len(self.found) == MEDIA_MAX:
            raise BadRequest(f"{where}: more than {MEDIA_MAX} images and sounds")
        medium = medium_of(part, where)
        if medium.format in _UNREAD:
            raise BadRequest(
                f"{where}: this model reads no {medium.format}; send PNG or JPEG",
                code="unsupported_modality",
            )
        self.found.append(medium.text)
        return {"media": len(self.found) - 1}


def _message(value: Value, where: str, media: _Media) -> dict[str, Value]:
    if not isinstance(value, Mapping):
        raise BadRequest(f"{where} must be an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise BadRequest(f"{where}.role must be one of {', '.join(ROLES)}")
    message: dict[str, Value] = {"role": "system" if role == "developer" else role}
    calls = value.get("tool_calls")
    if calls and role != "assistant":
        raise BadRequest(f"{where}.tool_calls: only the assistant calls tools")
    content = value.get("content")
    message["content"] = (
        "" if content is None and calls else _content(content, str(role), f"{where}.content", media)
    )
    if calls:
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    thought = value.get("reasoning_content")
    if role == "assistant" and isinstance(thought, str):
        message["reasoning_content"] = thought
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if isinstance(value.get(key), str):
                message[key] = value[key]
    return message


def _calls(value: Value, where: str) -> list[Value]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) > CALLS_MAX:
        raise BadRequest(f"{where} must be a list of at most {CALLS_MAX}")
    calls: list[Value] = []
    for number, call in enumerate(value):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if (
            not isinstance(call, Mapping)
            or not isinstance(name, str)
            or not isinstance(arguments, str)
        ):
            raise BadRequest(f"{where}[{number}] must have a function with name and arguments")
        calls.append(
            {
                "id": str(call.get("id") or ""),
                "type": "function",
                "function": {"name": name, "arguments": _arguments(arguments)},
            }
        )
    return calls


def _arguments(text: str) -> Value:
    """As templates want them: an object, or the text where it is none."""
    try:
        found = as_map(json.loads(text or "{}"))
    except (ValueError, RecursionError):
        return text
    return found if found is not None and _depth_is_sane(found) else text


def _content(value: Value, role: str, where: str, media: _Media) -> Value:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise BadRequest(f"{where} must be a string or a list of parts")
    parts: list[Value] = []
    texts: list[str] = []
    for number, part in enumerate(value):
        at = f"{where}[{number}]"
        if not isinstance(part, Mapping):
            raise BadRequest(f"{at} must be an object with a type")
        if is_medium(part):
            parts.append(media.take(part, role, at))
            continue
        if part.get("type") not in _TEXT_PARTS:
            raise BadRequest(
                f"{at}: a part is text, image_url or input_audio", code="unsupported_modality"
            )
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise BadRequest(f"{at}.text must be a string")
        texts.append(text)
        parts.append({"text": text})
    return "".join(texts) if len(texts) == len(parts) else parts


def _parallel(body: Mapping[str, Value]) -> bool:
    value = body.get("parallel_tool_calls")
    if value is not None and not isinstance(value, bool):
        raise BadRequest("parallel_tool_calls must be true or false")
    return value is not False


def _template_options(value: Value) -> dict[str, Value]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > OPTIONS_MAX:
        raise BadRequest(f"chat_template_kwargs must be an object of at most {OPTIONS_MAX} entries")
    for name in value:
        if not name.isidentifier() or name.startswith("_"):
            raise BadRequest(f"chat_template_kwargs: {name[:40]!r} is no name of a variable")
    _bounded(value, "chat_template_kwargs", OPTIONS_BYTES_MAX)
    return dict(value)


def _bounded(value: Value, where: str, bytes_max: int = STRUCTURE_BYTES_MAX) -> Value:
    """The value, if JSON can carry it and it is neither large nor deep. Raises BadRequest."""
    if not _depth_is_sane(value):
        raise BadRequest(f"{where}: more than {NESTING_MAX} levels deep", code="too_deep")
    try:
        size = len(json.dumps(value, allow_nan=False).encode())
    except (ValueError, TypeError):
        raise BadRequest(f"{where} must be JSON") from None
    if size > bytes_max:
        raise BadRequest(f"{where} has {size} bytes; at most {bytes_max} are taken")
    return value


def _depth_is_sane(value: Value) -> bool:
    level: list[Value] = [value]
    for _ in range(NESTING_MAX):
        below: list[Value] = []
        for each in level:
            if isinstance(each, Mapping):
                below += each.values()
            elif isinstance(each, list | tuple):
                below += each
        if not below:
            return True
        level = below
    return False


def packed_bytes_max(value: Value) -> int:
    """No fewer bytes than msgpack needs for a value."""
    size = 0
    waiting: list[Value] = [value]
    while waiting:
        each = waiting.pop()
        size += 9  # the longest head of an item, or a number
        if isinstance(each, str):
            size += len(each) if each.isascii() else len(each.encode("utf-8", "surrogatepass"))
        elif isinstance(each, bytes):
            size += len(each)
        elif isinstance(each, Mapping):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, Sequence):
            waiting += each
    return size
