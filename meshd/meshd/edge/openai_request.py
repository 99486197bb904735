"""OpenAI request bodies, checked and turned into what the mesh is asked. No I/O.

What is done with a parameter:

- understood: checked, and passed on under OpenAI's own name;
- known and not supported (`n` above 1, `echo`, `suffix`, `audio`, ...): refused with a 400 that names it,
  unless its value asks for nothing (`n: 1`, `echo: false`), because an answer that silently lacks what was
  asked for is worse than none;
- unknown, or without effect on the answer (user, store, metadata, ...): ignored, as OpenAI-compatible
  servers do, so that clients which send more than we know keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from meshd.edge.errors import RequestError
from meshd.edge.fields import boolean, missing, number, unsupported, utf8
from meshd.edge.openai_messages import messages_of
from meshd.edge.openai_structure import structure_of_chat, structure_of_completion
from meshd_plugins.api import Privacy, Value

_STOP_MAX: Final = 16
_DEADLINE_MAX_S: Final = 86_400.0  # what is above the node's own bound is cut to it
_EXTENSION: Final = ("deadline_s", "privacy", "split", "grammar")


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
    return _parsed(
        payload, {"messages": messages, **sampling(payload), **structure_of_chat(payload)}
    )


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
        raise RequestError("`prompt` must be one string", param="prompt", code=missing(prompt))
    body = {"prompt": utf8(prompt, "prompt"), **sampling(payload)}
    return _parsed(payload, {**body, **structure_of_completion(payload)})


def _parsed(payload: Mapping[str, Value], body: dict[str, Value]) -> Parsed:
    model = payload.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError(
            "`model` must be a name such as 'auto' or 'knowledge.gpt/general', or a model's name",
            param="model",
            code=missing(model),
        )
    stream = boolean(payload, "stream", default=False)
    options = payload.get("stream_options")
    include_usage = False
    if options is not None:
        if not isinstance(options, Mapping):
            raise RequestError("`stream_options` must be an object", param="stream_options")
        if not stream:
            raise RequestError(
                "`stream_options` is allowed only with `stream: true`", param="stream_options"
            )
        include_usage = boolean(options, "include_usage", default=False, within="stream_options.")
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
        model=utf8(model, "model"),
        body=body,
        stream=stream,
        include_usage=include_usage,
        deadline_s=deadline(extension, within="meshd."),
        privacy=privacy(extension, within="meshd."),
        split=boolean(extension, "split", default=True, within="meshd."),
    )


def deadline(payload: Mapping[str, Value], within: str = "") -> float | None:
    """`deadline_s` of a request, None when it names none."""
    return number(payload, "deadline_s", 0.001, _DEADLINE_MAX_S, within)


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
        given = number(payload, name, low, high)
        if given is not None:
            found[name] = given
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
        found["stop"] = [utf8(str(text), "stop") for text in stops]
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
    "modalities": lambda value: value == ["text"],
    "n": _one,
    "prediction": _empty,
    "web_search_options": _never,
}
_COMPLETION_UNSUPPORTED: Final[Mapping[str, _Neutral]] = {
    "best_of": _one,
    "echo": _empty,
    "n": _one,
    "suffix": _empty,
}


def _refuse_unsupported(payload: Mapping[str, Value], table: Mapping[str, _Neutral]) -> None:
    for name, is_neutral in table.items():
        value = payload.get(name)
        if value is not None and not is_neutral(value):
            raise unsupported(name, "this parameter is not supported yet")
