"""What an answer has to look like, and what it has to tell: tools, formats, probabilities. Checked, no I/O.

Schemas and grammars are passed on as they are: the worker that answers compiles them, and what it cannot
honour comes back as a 400 that names the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshd.edge.errors import RequestError
from meshd.edge.fields import boolean, integer, listed, mapped, missing, plain, unsupported, utf8
from meshd_plugins.api import Value

LOGPROBS_MAX: Final = 20
_TOOLS_MAX: Final = 128
_BIASES_MAX: Final = 1024
_FORMATS: Final = ("text", "json_object", "json_schema")
_CHOICES: Final = ("auto", "none", "required")


def structure_of_chat(payload: Mapping[str, Value]) -> dict[str, Value]:
    """The fields of a chat beside messages and sampling parameters; only those that were given.

    Raises:
        RequestError: 400, with `param` naming what is wrong.
    """
    found = structure(payload)
    tools = _tools(payload.get("tools"))
    if tools:
        found["tools"] = tools
    choice = _tool_choice(payload.get("tool_choice"), bool(tools))
    if tools and choice is not None:
        found["tool_choice"] = choice
    if tools and payload.get("parallel_tool_calls") is not None:
        found["parallel_tool_calls"] = boolean(payload, "parallel_tool_calls", default=True)
    options = payload.get("chat_template_kwargs")
    if options:
        param = "chat_template_kwargs"
        found[param] = plain(mapped(options, param), param)
    likeliest = integer(payload, "top_logprobs", 0, LOGPROBS_MAX)
    if boolean(payload, "logprobs", default=False):
        found["logprobs"] = True
        if likeliest is not None:
            found["top_logprobs"] = likeliest
    elif likeliest:
        raise RequestError("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    return found


def structure_of_completion(payload: Mapping[str, Value]) -> dict[str, Value]:
    """The same of a completion."""
    found = structure(payload)
    count = integer(payload, "logprobs", 0, LOGPROBS_MAX)
    if count is not None:
        found["logprobs"] = count
    return found


def structure(payload: Mapping[str, Value]) -> dict[str, Value]:
    """What chats and completions have in common: `response_format`, `grammar`, `logit_bias`."""
    found: dict[str, Value] = {}
    form = _response_format(payload.get("response_format"))
    if form is not None:
        found["response_format"] = form
    grammar, param = payload.get("grammar"), "grammar"
    extension = payload.get("meshd")
    if isinstance(extension, Mapping) and extension.get("grammar") is not None:
        grammar, param = extension["grammar"], "meshd.grammar"
    if grammar is not None and grammar != "":
        if not isinstance(grammar, str):
            raise RequestError(f"`{param}` must be a string", param=param, code="invalid_type")
        if form is not None:
            raise RequestError(f"`{param}` and `response_format` exclude each other", param=param)
        found["grammar"] = utf8(grammar, param)
    biases = _logit_bias(payload.get("logit_bias"))
    if biases:
        found["logit_bias"] = biases
    return found


def _response_format(value: Value) -> Value:
    """As it came; None for text."""
    if value is None:
        return None
    form = mapped(value, "response_format")
    kind = form.get("type")
    if kind not in _FORMATS:
        raise RequestError(
            f"`response_format.type` must be one of {', '.join(_FORMATS)}",
            param="response_format.type",
            code=missing(kind) if kind is None else "invalid_value",
        )
    if kind == "text":
        return None
    if kind == "json_schema":
        inner = mapped(form.get("json_schema"), "response_format.json_schema")
        param = "response_format.json_schema.schema"
        if not isinstance(inner.get("schema"), Mapping | bool):
            raise RequestError(
                f"`{param}` must be a schema", param=param, code=missing(inner.get("schema"))
            )
        if not isinstance(inner.get("strict"), bool | None):
            param = "response_format.json_schema.strict"
            raise RequestError(f"`{param}` must be true or false", param=param, code="invalid_type")
    return plain(form, "response_format")


def _tools(value: Value) -> list[Value]:
    if value is None:
        return []
    tools = listed(value, "tools", _TOOLS_MAX)
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        given = mapped(tool, where)
        if given.get("type") != "function":
            raise unsupported(f"{where}.type", "only functions are supported")
        function = mapped(given.get("function"), f"{where}.function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            param = f"{where}.function.name"
            raise RequestError(
                f"`{param}` must be a name", param=param, code=missing(function.get("name"))
            )
        if function.get("parameters") is not None:
            mapped(function["parameters"], f"{where}.function.parameters")
        plain(given, where)
    return tools


def _tool_choice(value: Value, there_are_tools: bool) -> Value:
    """As it came; None for none given."""
    if value is None or (isinstance(value, str) and value in _CHOICES):
        if value == "required" and not there_are_tools:
            raise RequestError(
                "`tool_choice` asks for a call and there are no `tools`", param="tool_choice"
            )
        return value
    function = mapped(value, "tool_choice").get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            f"`tool_choice` must be one of {', '.join(_CHOICES)}, or name a function",
            param="tool_choice",
        )
    if not there_are_tools:
        raise RequestError(
            "`tool_choice` names a tool and there are no `tools`", param="tool_choice"
        )
    return plain(value, "tool_choice")


def _logit_bias(value: Value) -> dict[str, Value]:
    if value is None:
        return {}
    biases = mapped(value, "logit_bias")
    if len(biases) > _BIASES_MAX:
        raise RequestError(f"`logit_bias` holds more than {_BIASES_MAX}", param="logit_bias")
    for token, bias in biases.items():
        number = (
            isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        )
        if not (token.isascii() and token.isdecimal() and len(token) <= 10) or not number:
            raise RequestError(
                "`logit_bias` maps token ids to numbers from -100 to 100", param="logit_bias"
            )
    return dict(biases)
