"""How a model is told of tools, and how it writes that it wants one called.

How a call is written is chosen by what the model's chat template mentions. A template that does not know
tools, or writes calls in a way that is not read here, gets its tools by a system message, and is asked to
write calls as most small models were trained to (`<tool_call>`): "generic", not "native".

The arguments of a call fit the tool's schema: from where a call begins on, a grammar holds. What of a schema
no grammar can say is noted; schemas of tools come from generators, and hold such keywords by the dozen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, assert_never

from meshd_plugins.builtin.llama.prompt.constraint import Gate, Reasoning
from meshd_plugins.builtin.llama.prompt.markup import Markup, ParameterKind, call_expression
from meshd_plugins.builtin.llama.prompt.schema_merge import Schema, SchemaError, types_of
from meshd_plugins.builtin.llama.prompt.schemas import SchemaCompiler
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate
from meshd_plugins.builtin.llama.prompt.terminals import choice, json_text, literal

CALLS_MAX: Final = 16  # of one answer, beside each other
NO_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object", "additionalProperties": False}

_GENERIC: Final = """\
You may call tools. These are there, as JSON with the schema of their arguments:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON within tags, and nothing else:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>
The results come within <tool_response> tags."""


class ToolFormat(Enum):
    """How a model writes a call."""

    HERMES = (
        "hermes"  # <tool_call>{"name", "arguments"}</tool_call>; Qwen, Hermes, SmolLM2 and others
    )
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name", "arguments"}, ...]
    MISTRAL_ARGS = "mistral_args"  # [TOOL_CALLS]NAME[ARGS]{...}
    LLAMA3 = "llama3"  # {"name", "parameters"}, and nothing else in the answer
    # <tool_call><function=NAME><parameter=KEY>...</parameter></function></tool_call>; Qwen3-Coder, Nemotron 3
    FUNCTION_TAGS = "function_tags"
    # <tool_call>NAME<arg_key>KEY</arg_key><arg_value>...</arg_value></tool_call>; GLM-4.5 and later
    ARGUMENT_TAGS = "argument_tags"
    # <minimax:tool_call><invoke name="NAME"><parameter name="KEY">...</parameter></invoke>...; MiniMax-M2
    INVOKE_TAGS = "invoke_tags"
    DEEPSEEK = "deepseek"  # <\uff5ctool▁call▁begin\uff5c>NAME<\uff5ctool▁sep\uff5c>{...}; V3.1
    DEEPSEEK_FENCED = (
        "deepseek_fenced"  # with "function" as its name, and NAME and a block of JSON; V3, R1
    )


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that a model may have called."""

    name: str
    description: str
    parameters: Schema | None  # None: it takes no arguments


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """What the reader of an answer has to know.

    Attributes:
        format: how calls are written.
        names: the functions that there are.
        kinds: how their parameters are written, where that is not always JSON.
    """

    format: ToolFormat
    names: frozenset[str]
    kinds: Mapping[str, Mapping[str, ParameterKind]] = field(
        default_factory=dict[str, Mapping[str, ParameterKind]]
    )

    @property
    def markers(self) -> tuple[str, ...]:
        """What a call begins with, anywhere in an answer."""
        return MARKERS[self.format]

    @property
    def bare(self) -> bool:
        """Whether an answer may also begin with a call, without any marker."""
        return self.format is ToolFormat.LLAMA3


CALL_ENDS: Final = "</tool_call>"
ARGUMENTS_MARKER: Final = "[ARGS]"
# DeepSeek's tokens have wide bars, and a block at the bottom of a line between words.
DEEPSEEK_CALLS: Final = "<\uff5ctool▁calls▁begin\uff5c>"
DEEPSEEK_CALL: Final = "<\uff5ctool▁call▁begin\uff5c>"
DEEPSEEK_SEPARATOR: Final = "<\uff5ctool▁sep\uff5c>"
DEEPSEEK_CALL_ENDS: Final = "<\uff5ctool▁call▁end\uff5c>"
DEEPSEEK_CALLS_END: Final = "<\uff5ctool▁calls▁end\uff5c>"
INVOKES_END: Final = "</minimax:tool_call>"

MARKERS: Final[Mapping[ToolFormat, tuple[str, ...]]] = {
    ToolFormat.HERMES: ("<tool_call>",),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]",),
    ToolFormat.MISTRAL_ARGS: ("[TOOL_CALLS]",),
    ToolFormat.LLAMA3: ("<|python_tag|>",),
    ToolFormat.FUNCTION_TAGS: ("<tool_call>", "<function="),  # they forget the first now and then
    ToolFormat.ARGUMENT_TAGS: ("<tool_call>",),
    ToolFormat.INVOKE_TAGS: ("<minimax:tool_call>",),
    ToolFormat.DEEPSEEK: (DEEPSEEK_CALLS, DEEPSEEK_CALL),
    ToolFormat.DEEPSEEK_FENCED: (DEEPSEEK_CALLS, DEEPSEEK_CALL),
}
MARKUPS: Final[Mapping[ToolFormat, Markup]] = {
    ToolFormat.FUNCTION_TAGS: Markup(
        call=("<function=", ">"),
        closes="</function>",
        key=("<parameter=", ">"),
        value=("", "</parameter>"),
        lines=True,
    ),
    ToolFormat.ARGUMENT_TAGS: Markup(
        call=("", ""),
        closes=CALL_ENDS,
        key=("<arg_key>", "</arg_key>"),
        value=("<arg_value>", "</arg_value>"),
    ),
    ToolFormat.INVOKE_TAGS: Markup(
        call=('<invoke name="', '">'),
        closes="</invoke>",
        key=('<parameter name="', '">'),
        value=("", "</parameter>"),
    ),
}
_OTHER_TAGS: Final = ("<function=", "<arg_key>", "<invoke ", "<tool_sep>", "<|tool_sep|>")
"""With these between them, `<tool_call>` tags hold something else than an object of JSON."""


def find_format(template: str) -> tuple[ToolFormat, bool]:
    """How the model of this template writes calls, and whether the template tells it of tools itself."""

    def has(*words: str) -> bool:
        return all(word in template for word in words)

    if not re.search(r"\btools\b", template):
        return ToolFormat.HERMES, False
    if has("<minimax:tool_call>", "<invoke name=", "<parameter name="):
        return ToolFormat.INVOKE_TAGS, True
    if has("<tool_call>", "<function=", "<parameter=", "</function>"):
        return ToolFormat.FUNCTION_TAGS, True
    if has("<tool_call>", "<arg_key>", "</arg_key>", "<arg_value>") and not has("<tool_sep>"):
        return ToolFormat.ARGUMENT_TAGS, True
    if has("<tool_call>") and not any(word in template for word in _OTHER_TAGS):
        return ToolFormat.HERMES, True
    if has("[TOOL_CALLS]"):
        return ToolFormat.MISTRAL_ARGS if has(ARGUMENTS_MARKER) else ToolFormat.MISTRAL, True
    if has(DEEPSEEK_CALL, DEEPSEEK_SEPARATOR):
        return ToolFormat.DEEPSEEK_FENCED if has("```json") else ToolFormat.DEEPSEEK, True
    bare = has("<|python_tag|>") or has('"name":', '"parameters":')
    if bare and not any(word in template for word in _OTHER_TAGS):
        return ToolFormat.LLAMA3, True
    return ToolFormat.HERMES, False


def tools_of(template: ChatTemplate | None) -> str:
    """How a model is told of tools: `native`, `generic`, or "" when it cannot chat."""
    if template is None:
        return ""
    return "native" if find_format(template.source)[1] else "generic"


def find_reasoning(template: str) -> Reasoning | None:
    """The markers of a model that thinks before it answers; None for one that does not."""
    for opens, closes in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        if opens in template or closes in template:
            return Reasoning(opens, closes)
    return None


def call_rules(
    compiler: SchemaCompiler, syntax: ToolFormat, tools: Sequence[Tool], paths: Sequence[str]
) -> tuple[str, dict[str, Mapping[str, ParameterKind]]]:
    """The expression of one call of any of the tools, and how their parameters are written. Raises SchemaError."""
    calls: list[str] = []
    kinds: dict[str, Mapping[str, ParameterKind]] = {}
    for tool, path in zip(tools, paths, strict=True):
        schema = _parameters(tool, path)
        if syntax in MARKUPS:
            call, kinds[tool.name] = call_expression(
                compiler, MARKUPS[syntax], tool.name, schema, path
            )
            calls.append(call)
            continue
        arguments = compiler.add(schema, path, strict=False)
        calls.append(_json_call(syntax, tool.name, arguments))
    return compiler.rule(choice([compiler.rule(call) for call in calls])), kinds


def _json_call(syntax: ToolFormat, name: str, arguments: str) -> str:
    """One call whose arguments are an object of JSON."""
    match syntax:
        case ToolFormat.MISTRAL_ARGS:
            return f"{literal(name + ARGUMENTS_MARKER)} {arguments}"
        case ToolFormat.DEEPSEEK:
            opens = literal(f"{name}{DEEPSEEK_SEPARATOR}")
            return f"{opens} {arguments} {literal(DEEPSEEK_CALL_ENDS)}"
        case ToolFormat.DEEPSEEK_FENCED:
            opens = literal(f"function{DEEPSEEK_SEPARATOR}{name}\n```json\n")
            return f"{opens} {arguments} {literal(f'{chr(10)}```{DEEPSEEK_CALL_ENDS}')}"
        case _:
            key = '"\\"parameters\\""' if syntax is ToolFormat.LLAMA3 else '"\\"arguments\\""'
            told = f'"\\"name\\"" ws ":" ws {literal(json_text(name))}'
            return f'"{{" ws {told} ws "," ws {key} ws ":" ws {arguments} ws "}}"'


def _parameters(tool: Tool, path: str) -> Schema:
    """The schema of the arguments, which are an object. Raises SchemaError."""
    if not isinstance(tool.parameters, Mapping) or not tool.parameters:
        return NO_ARGUMENTS
    schema = {"type": "object", **tool.parameters}
    if types_of(schema, path) != ("object",):
        raise SchemaError(f"{path}.type", "must be object")
    return schema


def calls_expression(
    compiler: SchemaCompiler, syntax: ToolFormat, call: str, *, parallel: bool, marked: bool
) -> str:
    """One call, or several, as they stand in an answer; `marked`: with the marker before the first."""
    more = f"{{0,{CALLS_MAX - 1}}}" if parallel else ""

    def then(expression: str) -> str:
        return f" {compiler.rule(expression)}{more}" if parallel else ""

    marker = literal(MARKERS[syntax][0])
    match syntax:
        case ToolFormat.LLAMA3:
            another = f'ws ";" ws {call}'
            return f'("<|python_tag|>" ws)? {call}{then(another)}'
        case ToolFormat.MISTRAL:
            another = f'ws "," ws {call}'
            body = f'ws "[" ws {call}{then(another)} ws "]"'
        case ToolFormat.HERMES:
            one = f"ws {call} ws {literal(CALL_ENDS)}"
            body = f"{one}{then(f'ws {marker} {one}')}"
        case ToolFormat.MISTRAL_ARGS | ToolFormat.ARGUMENT_TAGS:
            one = call if syntax is ToolFormat.MISTRAL_ARGS else f"ws {call}"
            body = f"{one}{then(f'ws {marker} {one}')}"
        case ToolFormat.FUNCTION_TAGS:
            opens = literal(MARKUPS[syntax].call[0])
            one = f"{call} ws {literal(CALL_ENDS)}"
            begun = f"ws {opens}" if marked else f"(ws {opens})?"  # the marker may be that
            body = f"{begun} {one}{then(f'ws {marker} ws {opens} {one}')}"
        case ToolFormat.INVOKE_TAGS:
            one = f"ws {literal(MARKUPS[syntax].call[0])} {call}"
            body = f"{one}{then(one)} ws {literal(INVOKES_END)}"
        case ToolFormat.DEEPSEEK | ToolFormat.DEEPSEEK_FENCED:
            opens = literal(DEEPSEEK_CALL)
            begun = f"ws {opens}" if marked else f"(ws {opens})?"
            body = f"{begun} {call}{then(f'ws {opens} {call}')} ws {literal(DEEPSEEK_CALLS_END)}"
        case _:
            assert_never(syntax)
    return f"{marker} {body}" if marked else body


def call_gate(syntax: ToolSyntax, reasoning: Reasoning | None) -> Gate:
    """Where a call begins in an answer that may also be text."""
    if syntax.bare:
        names = "|".join(re.escape(name) for name in sorted(syntax.names))
        bare = rf'(?:<\|python_tag\|>\s*)?\{{\s*"name"\s*:\s*"(?:{names})"'
        return Gate(bare=bare, reasoning=reasoning)
    return Gate(markers=syntax.markers, reasoning=reasoning)


def generic_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: all of it as plain text."""
    rendered: list[dict[str, Any]] = []
    for message in messages:
        content = str(message.get("content") or "")
        if message["role"] == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            if rendered and rendered[-1].get("results"):
                rendered[-1]["content"] += f"\n{text}"
            else:
                rendered.append({"role": "user", "content": text, "results": True})
            continue
        calls = [
            f"<tool_call>\n{json.dumps(_written(call), ensure_ascii=False)}\n</tool_call>"
            for call in message.get("tool_calls", ())
        ]
        text = "\n".join(part for part in (content, *calls) if part)
        rendered.append({"role": message["role"], "content": text})
    for message in rendered:
        message.pop("results", None)
    if tools:
        told = "\n".join(json.dumps(described(tool), ensure_ascii=False) for tool in tools)
        system = _GENERIC.format(tools=told)
        if rendered and rendered[0]["role"] == "system":
            rendered[0]["content"] = f"{rendered[0]['content']}\n\n{system}"
        else:
            rendered.insert(0, {"role": "system", "content": system})
    return rendered


def described(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI has it, which is what templates expect."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = tool.parameters if tool.parameters is not None else {"type": "object"}
    return {"type": "function", "function": function}


def _written(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": function["arguments"]}
