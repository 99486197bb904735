"""From a checked request to what the engine needs: the prompt, what the answer is held to, and its reader."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from meshd_plugins.builtin.llama.prompt.answers import AnswerReader
from meshd_plugins.builtin.llama.prompt.constraint import Constraint, Gate, Reasoning
from meshd_plugins.builtin.llama.prompt.gbnf import GrammarError, parse
from meshd_plugins.builtin.llama.prompt.gbnf_check import check
from meshd_plugins.builtin.llama.prompt.schema_merge import Schema, SchemaError, as_map
from meshd_plugins.builtin.llama.prompt.schemas import ANY_OBJECT, SchemaCompiler
from meshd_plugins.builtin.llama.prompt.special import MessageCutter, pieces
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate, TemplateError
from meshd_plugins.builtin.llama.prompt.tools import (
    Tool,
    ToolSyntax,
    call_gate,
    call_rules,
    calls_expression,
    described,
    find_format,
    find_reasoning,
    generic_messages,
)

GRAMMARS_KEPT: Final = 16  # an agent sends the same tools with each turn
RESERVED: Final = frozenset({"messages", "tools", "add_generation_prompt"})


class RequestUnusable(Exception):
    """The caller's fault. The message is for people; the code is stable."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request, ready to be computed."""

    pieces: list[str]  # of the prompt: no token reaches from one into the next
    special: bool  # whether control tokens in it are what they look like
    constraint: Constraint | None
    reader: AnswerReader | None  # None: all of the answer is text


class Conversations:
    """Of one model.

    Args:
        template: None: it cannot chat.
        cutter: keeps what a user wrote from steering the model.
        new_id: makes ids of tool calls.
    """

    def __init__(
        self,
        template: ChatTemplate | None,
        cutter: MessageCutter,
        new_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}",
    ) -> None:
        source = template.source if template is not None else ""
        self._template = template
        self._cutter = cutter
        self._new_id = new_id
        self._format, self._native = find_format(source)
        self._reasoning = find_reasoning(source)
        self._grammars: OrderedDict[str, str] = OrderedDict()

    def prepare(self, message: Mapping[str, Any]) -> Prepared:
        """Raises RequestUnusable."""
        if message["operation"] == "complete":
            constraint = self._constraint(message, (), None)
            prompt = self._cutter.cut(str(message["prompt"]))
            return Prepared(pieces(prompt), special=False, constraint=constraint, reader=None)
        tools = _tools(message)
        prompt, reasoning = self._prompt(message, tools)
        names = frozenset(tool.name for tool in tools)
        syntax = ToolSyntax(self._format, names) if tools else None
        constraint = self._constraint(message, tools, reasoning)
        reader = AnswerReader(reasoning, syntax, self._new_id)
        return Prepared(pieces(prompt), special=True, constraint=constraint, reader=reader)

    # -- the prompt -------------------------------------------------------------------------------------

    def _prompt(
        self, message: Mapping[str, Any], tools: Sequence[Tool]
    ) -> tuple[str, Reasoning | None]:
        if self._template is None:
            raise RequestUnusable(
                "this model has no chat template that can be used", "no_chat_template"
            )
        options: Mapping[str, Any] = message.get("template_options") or {}
        if taken := sorted(RESERVED & set(options)):
            raise RequestUnusable(
                f"chat_template_kwargs may not set {taken[0]}", "unsupported_parameter"
            )
        messages: list[dict[str, Any]] = [self._cut(each) for each in message["messages"]]
        begun = ""  # of the answer: a last message of the assistant is gone on with
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            begun = str(messages.pop().get("content") or "")
        rendered: Sequence[Mapping[str, Any]] = messages
        told: Any = [self._cut(described(tool)) for tool in tools] or None
        if not self._native:
            cut_tools = [_cut_tool(tool, self._cut) for tool in tools]
            rendered, told = generic_messages(messages, cut_tools), None
        try:
            prompt = self._template.render(rendered, told, self._cut(options))
        except TemplateError as error:
            raise RequestUnusable(str(error), "chat_template") from None
        return prompt + begun, self._thinks(prompt, begun)

    def _thinks(self, prompt: str, begun: str) -> Reasoning | None:
        """The markers, and on which side of them the answer begins."""
        reasoning = self._reasoning
        if reasoning is None:
            return None
        text = begun if begun.strip() else prompt.rstrip()[-len(reasoning.closes) :]
        if reasoning.closes in text:
            return dataclasses.replace(reasoning, forbidden=True)
        if reasoning.opens in text:
            return dataclasses.replace(reasoning, opened=True)
        return dataclasses.replace(reasoning, forbidden=True) if begun.strip() else reasoning

    def _cut(self, value: Any) -> Any:
        """All texts in a value, so that nothing in them steers the model."""
        if isinstance(value, str):
            return self._cutter.cut(value)
        if (entries := as_map(value)) is not None:
            return {self._cut(key): self._cut(each) for key, each in entries.items()}
        if isinstance(value, list | tuple):
            return list(map(self._cut, cast("Any", value)))
        return value

    # -- what the answer is held to ---------------------------------------------------------------------

    def _constraint(
        self, message: Mapping[str, Any], tools: Sequence[Tool], reasoning: Reasoning | None
    ) -> Constraint | None:
        wanted: Mapping[str, Any] = message.get("format") or {}
        choice = str(message.get("tool_choice") or "auto")
        if not wanted and not tools:
            return None
        if wanted and tools and "grammar" in wanted:
            raise RequestUnusable("grammar and tools exclude each other", "unsupported_parameter")
        if reasoning is not None and reasoning.forbidden:
            reasoning = None
        lazily = bool(tools) and choice == "auto" and not wanted
        gate = Gate(reasoning=reasoning)
        if lazily:
            gate = call_gate(ToolSyntax(self._format, frozenset(t.name for t in tools)), reasoning)
        return Constraint(self._grammar(message, wanted, tools, choice), gate)

    def _grammar(
        self,
        message: Mapping[str, Any],
        wanted: Mapping[str, Any],
        tools: Sequence[Tool],
        choice: str,
    ) -> str:
        parallel = bool(message.get("parallel", True))
        key = json.dumps([wanted, [dataclasses.astuple(t) for t in tools], choice, parallel])
        if (known := self._grammars.get(key)) is not None:
            self._grammars.move_to_end(key)
            return known
        try:
            if "grammar" in wanted:
                text = str(wanted["grammar"])
                check(parse(text))
            else:
                text = self._compile(wanted, tools, choice, parallel=parallel)
        except SchemaError as error:
            raise RequestUnusable(str(error), "unsupported_schema") from None
        except GrammarError as error:
            where = "grammar" if "grammar" in wanted else "the schema cannot be used"
            raise RequestUnusable(f"{where}: {error}", "unsupported_grammar") from None
        self._grammars[key] = text
        if len(self._grammars) > GRAMMARS_KEPT:
            self._grammars.popitem(last=False)
        return text

    def _compile(
        self, wanted: Mapping[str, Any], tools: Sequence[Tool], choice: str, *, parallel: bool
    ) -> str:
        compiler = SchemaCompiler()
        roots: list[str] = []
        if tools:
            chosen = [(n, t) for n, t in enumerate(tools) if choice in ("auto", "required", t.name)]
            paths = [f"tools[{number}].function.parameters" for number, _ in chosen]
            call = call_rules(compiler, self._format, [tool for _, tool in chosen], paths)
            marked = bool(wanted) or choice != "auto"
            several = parallel and choice in ("auto", "required")
            roots.append(
                calls_expression(compiler, self._format, call, parallel=several, marked=marked)
            )
        if wanted and choice in ("auto", "none"):
            schema: Schema = wanted.get("schema", ANY_OBJECT)
            roots.append(compiler.add(schema, "response_format.json_schema.schema"))
        return compiler.grammar(" | ".join(roots))


def _tools(message: Mapping[str, Any]) -> list[Tool]:
    if message.get("tool_choice") == "none":
        return []
    return [
        Tool(str(each["name"]), str(each.get("description") or ""), each.get("parameters"))
        for each in message.get("tools") or ()
    ]


def _cut_tool(tool: Tool, cut: Callable[[Any], Any]) -> Tool:
    return Tool(cut(tool.name), cut(tool.description), cut(tool.parameters))
