"""How a model is told of tools, and how it writes that it wants one called.

There are four ways of writing a call, chosen by what the model's chat template mentions. A template that
does not know tools, or writes calls in a way that is not read here, gets its tools by a system message, and
is asked to write calls as most small models were trained to (`<tool_call>`): "generic", not "native".

The arguments of a call always fit the tool's schema: from where a call begins on, a grammar holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.constraint import Gate, Reasoning
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


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that a model may have called."""

    name: str
    description: str
    parameters: Schema | None  # None: it takes no arguments


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """What the reader of an answer has to know."""

    format: ToolFormat
    names: frozenset[str]

    @property
    def markers(self) -> tuple[str, ...]:
        """What a call begins with, anywhere in an answer."""
        return MARKERS[self.format]

    @property
    def bare(self) -> bool:
        """Whether an answer may also begin with a call, without any marker."""
        return self.format is ToolFormat.LLAMA3


MARKERS: Final[Mapping[ToolFormat, tuple[str, ...]]] = {
    ToolFormat.HERMES: ("<tool_call>",),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]",),
    ToolFormat.MISTRAL_ARGS: ("[TOOL_CALLS]",),
    ToolFormat.LLAMA3: ("<|python_tag|>",),
}
CALL_ENDS: Final = "</tool_call>"
ARGUMENTS_MARKER: Final = "[ARGS]"


def find_format(template: str) -> tuple[ToolFormat, bool]:
    """How the model of this template writes calls, and whether the template tells it of tools itself."""
    if re.search(r"\btools\b", template):
        # Others write the arguments as XML between the same tags.
        xml = "<function=" in template or "<arg_key>" in template
        if "<tool_call>" in template and not xml:
            return ToolFormat.HERMES, True
        if "[TOOL_CALLS]" in template:
            args = ARGUMENTS_MARKER in template
            return (ToolFormat.MISTRAL_ARGS if args else ToolFormat.MISTRAL), True
        if "<|python_tag|>" in template or '"parameters":' in template:
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
) -> str:
    """The expression of one call of any of the tools. Raises SchemaError."""
    calls: list[str] = []
    for tool, path in zip(tools, paths, strict=True):
        arguments = compiler.add(_parameters(tool, path), path)
        if syntax is ToolFormat.MISTRAL_ARGS:
            calls.append(f"{literal(tool.name + ARGUMENTS_MARKER)} {arguments}")
            continue
        key = '"\\"parameters\\""' if syntax is ToolFormat.LLAMA3 else '"\\"arguments\\""'
        name = f'"\\"name\\"" ws ":" ws {literal(json_text(tool.name))}'
        calls.append(f'"{{" ws {name} ws "," ws {key} ws ":" ws {arguments} ws "}}"')
    return compiler.rule(choice([compiler.rule(call) for call in calls]))


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
    if syntax is ToolFormat.LLAMA3:
        another = f'ws ";" ws {call}'
        return f'("<|python_tag|>" ws)? {call}{then(another)}'
    if syntax is ToolFormat.MISTRAL:
        another = f'ws "," ws {call}'
        body = f'ws "[" ws {call}{then(another)} ws "]"'
    else:
        one = f"ws {call} ws {literal(CALL_ENDS)}" if syntax is ToolFormat.HERMES else call
        body = f"{one}{then(f'ws {marker} {one}')}"
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
