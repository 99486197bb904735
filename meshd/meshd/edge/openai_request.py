"""OpenAI request bodies, checked and turned into what the mesh is asked. No I/O.

What is done with a parameter:

- understood: checked, and passed on under OpenAI's own name;
- known, not supported yet (tools, response_format, logprobs, ...): refused with a 400 that names it,
  unless its value asks for nothing (`tools: []`, `n: 1`), because an answer that silently lacks what
  was asked for is worse than none;
- unknown, or without effect on the answer (user, store, metadata, ...): ignored, as OpenAI-compatible
  servers do, so that clients which send more than we know keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from meshd.edge.errors import RequestError
from meshd_plugins.api import Privacy, Value

_STOP_MAX: Final = 16
_MESSAGES_MAX: Final = 4096
_DEADLINE_MAX_S: Final = 86_400.0  # what is above the node's own bound is cut to it
_EXTENSION: Final = ("deadline_s", "privacy", "split")


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request that may be asked."""

    model: str  # as the client wrote it
    body: Mapping[str, Value]  # messages or prompt, and sampling parameters
    stream: bool
    include_usage: bool
    deadline_s: float | None
    privacy: Privacy | None  # None: the node's default
    split: bool


def parse_chat(payload: Mapping[str, Value]) -> Parsed:
    """A body of `/v1/chat/completions`.

    Raises:
        RequestError: 400, with `param` naming what is wrong.
    """
    _refuse_unsupported(payload, _CHAT_UNSUPPORTED)
    messages = messages_of(payload.get("messages"))
    return _parsed(payload, {"messages": messages, **sampling(payload)})


def parse_completion(payload: Mapping[str, Value]) -> Parsed:
    """A body of `/v1/completions`.

    Raises:
        RequestError: 400, with `param` naming what is wrong.
    """
    _refuse_unsupported(payload, _COMPLETION_UNSUPPORTED)
    prompt = payload.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RequestError("`prompt` must be one string", param="prompt", code=_missing(prompt))
    return _parsed(payload, {"prompt": _utf8(prompt, "prompt"), **sampling(payload)})


def _parsed(payload: Mapping[str, Value], body: dict[str, Value]) -> Parsed:
    model = payload.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError(
            "`model` must be a name such as 'auto' or 'knowledge.gpt/general', or a model's name",
            param="model",
            code=_missing(model),
        )
    stream = _boolean(payload, "stream", default=False)
    options = payload.get("stream_options")
    include_usage = False
    if options is not None:
        if not isinstance(options, Mapping):
            raise RequestError("`stream_options` must be an object", param="stream_options")
        if not stream:
            raise RequestError(
                "`stream_options` is allowed only with `stream: true`", param="stream_options"
            )
        include_usage = _boolean(options, "include_usage", default=False, within="stream_options.")
    extension = payload.get("meshd")
    if extension is None:
        extension = dict[str, Value]()
    if not isinstance(extension, Mapping):
        raise RequestError("`meshd` must be an object", param="meshd")
    for key in extension:  # ours alone: a misspelt `privacy` must not pass for none
        if key not in _EXTENSION:
            raise RequestError(
                f"`meshd.{key[:64]}` is unknown; there are {', '.join(_EXTENSION)}",
                param=f"meshd.{key[:64]}",
                code="unsupported_parameter",
            )
    return Parsed(
        model=_utf8(model, "model"),
        body=body,
        stream=stream,
        include_usage=include_usage,
        deadline_s=deadline(extension, within="meshd."),
        privacy=privacy(extension, within="meshd."),
        split=_boolean(extension, "split", default=True, within="meshd."),
    )


def deadline(payload: Mapping[str, Value], within: str = "") -> float | None:
    """`deadline_s` of a request, None when it names none."""
    return _number(payload, "deadline_s", 0.001, _DEADLINE_MAX_S, within)


def privacy(payload: Mapping[str, Value], within: str = "") -> Privacy | None:
    """`privacy` of a request, None when it names none: the node's default then."""
    value = payload.get("privacy")
    if value is None:
        return None
    known = {level.name.lower(): level for level in Privacy}
    if not isinstance(value, str) or value not in known:
        raise RequestError(f"`privacy` must be one of {', '.join(known)}", param=f"{within}privacy")
    return known[value]


def sampling(payload: Mapping[str, Value]) -> dict[str, Value]:
    """The sampling parameters of a request, under OpenAI's names; only those that were given.

    Raises:
        RequestError: 400, naming the one out of range.
    """
    found: dict[str, Value] = {}
    for name, low, high in _NUMBERS:
        number = _number(payload, name, low, high)
        if number is not None:
            found[name] = number
    for name, lowest in _INTEGERS:
        value = payload.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value < 1 << 63:
            raise RequestError(f"`{name}` must be an integer of at least {lowest}", param=name)
        found["max_tokens" if name == "max_completion_tokens" else name] = value
    stop = payload.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or len(stops) > _STOP_MAX:
            raise RequestError(
                f"`stop` must be a string or a list of at most {_STOP_MAX}", param="stop"
            )
        if not all(isinstance(text, str) and text for text in stops):
            raise RequestError("`stop` must hold strings that are not empty", param="stop")
        found["stop"] = [_utf8(str(text), "stop") for text in stops]
    return found


_NUMBERS: Final = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repeat_penalty", 0.0, 10.0),
)
_INTEGERS: Final = (
    ("max_tokens", 1),
    ("max_completion_tokens", 1),
    ("top_k", 0),
    ("seed", -(1 << 63)),
)


def _missing(value: Value) -> str:
    return "missing_required_parameter" if value is None else "invalid_type"


def _utf8(text: str, param: str) -> str:
    """The text, if UTF-8 can carry it: JSON can smuggle in half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"`{param}` holds half a surrogate pair at character {error.start}", param=param
        ) from error
    return text


def _number(
    payload: Mapping[str, Value], name: str, low: float, high: float, within: str = ""
) -> float | None:
    value = payload.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(
            f"`{within}{name}` must be a number from {low:g} to {high:g}", param=f"{within}{name}"
        )
    return float(value)


def _boolean(payload: Mapping[str, Value], name: str, *, default: bool, within: str = "") -> bool:
    value = payload.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"`{within}{name}` must be true or false", param=f"{within}{name}")
    return value


def messages_of(value: Value) -> list[dict[str, str]]:
    """The messages of a chat, as roles and texts.

    Raises:
        RequestError: 400, with `param` naming the message and the field.
    """
    if not isinstance(value, list) or not value:
        raise RequestError(
            "`messages` must be a list of at least one message",
            param="messages",
            code=_missing(value),
        )
    if len(value) > _MESSAGES_MAX:
        raise RequestError(f"`messages` holds more than {_MESSAGES_MAX}", param="messages")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(value: Value, param: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise RequestError(f"`{param}` must be an object", param=param, code="invalid_type")
    role = value.get("role")
    if role == "developer":  # OpenAI's newer word for it; chat templates know only the older
        role = "system"
    if role not in ("system", "user", "assistant"):
        if role in ("tool", "function"):
            raise _unsupported(f"{param}.role", "tool results are not supported yet")
        raise RequestError(
            f"`{param}.role` must be system, developer, user or assistant",
            param=f"{param}.role",
            code=_missing(role),
        )
    if value.get("tool_calls") or value.get("function_call"):
        raise _unsupported(f"{param}.tool_calls", "tool calls are not supported yet")
    return {"role": str(role), "content": _content(value.get("content"), f"{param}.content")}


def _content(value: Value, param: str) -> str:
    if isinstance(value, str):
        return _utf8(value, param)
    if not isinstance(value, list):
        raise RequestError(
            f"`{param}` must be a string, or a list of text parts",
            param=param,
            code=_missing(value),
        )
    texts: list[str] = []
    for i, part in enumerate(value):
        where = f"{param}[{i}]"
        if not isinstance(part, Mapping):
            raise RequestError(f"`{where}` must be an object", param=where, code="invalid_type")
        if part.get("type") != "text":
            raise _unsupported(where, "only parts of type 'text' are supported yet")
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError(
                f"`{where}.text` must be a string", param=f"{where}.text", code=_missing(text)
            )
        texts.append(_utf8(text, f"{where}.text"))
    return "".join(texts)


def _unsupported(param: str, why: str) -> RequestError:
    return RequestError(f"`{param}`: {why}", param=param, code="unsupported_parameter")


def _empty(value: Value) -> bool:
    return value in ([], {}, False, 0, "")


def _never(_value: Value) -> bool:
    return False


def _one(value: Value) -> bool:
    return value == 1 and value is not True


_Neutral = Callable[["Value"], bool]
_CHAT_UNSUPPORTED: Final[Mapping[str, _Neutral]] = {
    "audio": _empty,
    "function_call": lambda value: value in ("none", "auto"),
    "functions": _empty,
    "logit_bias": _empty,
    "logprobs": _empty,
    "modalities": lambda value: value == ["text"],
    "n": _one,
    "prediction": _empty,
    "response_format": lambda value: isinstance(value, Mapping) and value.get("type") == "text",
    "tool_choice": lambda value: value in ("none", "auto"),
    "tools": _empty,
    "top_logprobs": _empty,
    "web_search_options": _never,
}
_COMPLETION_UNSUPPORTED: Final[Mapping[str, _Neutral]] = {
    "best_of": _one,
    "echo": _empty,
    "logit_bias": _empty,
    "logprobs": _never,
    "n": _one,
    "suffix": _empty,
}


def _refuse_unsupported(payload: Mapping[str, Value], table: Mapping[str, _Neutral]) -> None:
    for name, is_neutral in table.items():
        value = payload.get(name)
        if value is not None and not is_neutral(value):
            raise _unsupported(name, "this parameter is not supported yet")
