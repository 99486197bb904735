"""From a checked request to what the engine needs: the prompt, what the answer is held to, and its reader."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from meshd_plugins.builtin.llama.prompt.answers import AnswerReader
from meshd_plugins.builtin.llama.prompt.constraint import Constraint, Gate, Reasoning
from meshd_plugins.builtin.llama.prompt.gbnf import GrammarError, parse
from meshd_plugins.builtin.llama.prompt.gbnf_check import check
from meshd_plugins.builtin.llama.prompt.history import (
    History,
    broken_arguments,
    find_history,
)
from meshd_plugins.builtin.llama.prompt.markup import ParameterKind
from meshd_plugins.builtin.llama.prompt.schema_merge import Schema, SchemaError, as_map
from meshd_plugins.builtin.llama.prompt.schemas import ANY_OBJECT, SchemaCompiler
from meshd_plugins.builtin.llama.prompt.special import (
    Medium,
    MessageCutter,
    medium_mark,
    parts,
)
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
PLACES_MAX: Final = 16  # of keywords that an answer is not held to, told with it
RESERVED: Final = frozenset({"messages", "tools", "add_generation_prompt"})


class RequestUnusable(Exception):
    """The caller's fault. The message is for people; the code is stable."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request, ready to be computed."""

    parts: list[str | Medium]  # of the prompt: no token reaches from one into the next
    special: bool  # whether control tokens in it are what they look like
    constraint: Constraint | None
    reader: AnswerReader | None  # None: all of the answer is text
    unenforced: tuple[str, ...] = ()  # places of keywords that the answer is not held to


@dataclass(frozen=True, slots=True)
class _Compiled:
    """What a request's schemas and grammars came to."""

    grammar: str
    unenforced: tuple[str, ...] = ()
    kinds: Mapping[str, Mapping[str, ParameterKind]] = field(
        default_factory=dict[str, Mapping[str, ParameterKind]]
    )


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
        self._history = find_history(template) if template and self._native else History()
        self._grammars: OrderedDict[str, _Compiled] = OrderedDict()

    def prepare(self, message: Mapping[str, Any]) -> Prepared:
        """Raises RequestUnusable."""
        if message["operation"] == "complete":
            compiled = self._compiled(message, ())
            constraint = self._constraint(message, (), None, compiled)
            prompt = self._cutter.cut(str(message["prompt"]))
            return Prepared(
                parts(prompt),
                special=False,
                constraint=constraint,
                reader=None,
                unenforced=_told(compiled),
            )
        tools = _tools(message)
        prompt, reasoning = self._prompt(message, tools)
        compiled = self._compiled(message, tools)
        names = frozenset(tool.name for tool in tools)
        syntax: ToolSyntax | None = None
        if tools and compiled is not None:
            syntax = ToolSyntax(self._format, names, compiled.kinds)
        constraint = self._constraint(message, tools, reasoning, compiled)
        reader = AnswerReader(reasoning, syntax, self._new_id)
        found = parts(prompt)
        shown = sorted(part.number for part in found if isinstance(part, Medium))
        if shown != list(range(len(message.get("media") or ()))):
            raise RequestUnusable(
                "this model's chat template does not show each picture and sound once",
                "chat_template",
            )
        return Prepared(
            found,
            special=True,
            constraint=constraint,
            reader=reader,
            unenforced=_told(compiled),
        )

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
        messages = [self._cut_message(each) for each in message["messages"]]
        begun = ""  # of the answer: a last message of the assistant is gone on with
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            begun = str(messages.pop().get("content") or "")
        rendered: Sequence[Mapping[str, Any]] = self._history.messages(messages)
        told: Any = [self._cut(described(tool)) for tool in tools] or None
        if not self._native:
            cut_tools = [_cut_tool(tool, self._cut) for tool in tools]
            rendered, told = generic_messages(messages, cut_tools), None
        try:
            prompt = self._template.render(self._typed(rendered), told, self._cut(options))
        except TemplateError as error:
            broken = broken_arguments(messages)
            why = f"; {broken} is no object of JSON" if broken else ""
            raise RequestUnusable(f"{error}{why}", "chat_template") from None
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

    def _typed(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """As a template wants them that knows contents only as lists of parts."""
        assert self._template is not None
        if not self._template.wants_parts:
            return messages
        return [
            {**each, "content": [{"type": "text", "text": each["content"]}]}
            if isinstance(each.get("content"), str)
            else each
            for each in messages
        ]

    def _cut_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message of which nothing steers the model; a mark stands for each medium in it."""
        content = message.get("content")
        if not isinstance(content, list | tuple):
            cut: dict[str, Any] = self._cut(message)
            return cut
        rest = {key: value for key, value in message.items() if key != "content"}
        shown: list[str] = []
        for part in cast("Sequence[Mapping[str, Any]]", content):
            if "media" in part:
                shown.append(medium_mark(int(part["media"])))
            else:
                shown.append(self._cutter.cut(str(part.get("text") or "")))
        return {**self._cut(rest), "content": "".join(shown)}

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
        self,
        message: Mapping[str, Any],
        tools: Sequence[Tool],
        reasoning: Reasoning | None,
        compiled: _Compiled | None,
    ) -> Constraint | None:
        if compiled is None:
            return None
        choice = str(message.get("tool_choice") or "auto")
        if reasoning is not None and reasoning.forbidden:
            reasoning = None
        lazily = bool(tools) and choice == "auto" and not message.get("format")
        gate = Gate(reasoning=reasoning)
        if lazily:
            gate = call_gate(ToolSyntax(self._format, frozenset(t.name for t in tools)), reasoning)
        return Constraint(compiled.grammar, gate)

    def _compiled(self, message: Mapping[str, Any], tools: Sequence[Tool]) -> _Compiled | None:
        """The grammar of what is asked for; None: nothing is."""
        wanted: Mapping[str, Any] = message.get("format") or {}
        choice = str(message.get("tool_choice") or "auto")
        if not wanted and not tools:
            return None
        if wanted and tools and "grammar" in wanted:
            raise RequestUnusable("grammar and tools exclude each other", "unsupported_parameter")
        parallel = bool(message.get("parallel", True))
        key = json.dumps([wanted, [dataclasses.astuple(t) for t in tools], choice, parallel])
        if (known := self._grammars.get(key)) is not None:
            self._grammars.move_to_end(key)
            return known
        try:
            if "grammar" in wanted:
                found = _Compiled(str(wanted["grammar"]))
                check(parse(found.grammar))
            else:
                found = self._compile(wanted, tools, choice, parallel=parallel)
        except SchemaError as error:
            raise RequestUnusable(str(error), "unsupported_schema") from None
        except GrammarError as error:
            where = "grammar" if "grammar" in wanted else "the schema cannot be used"
            raise RequestUnusable(f"{where}: {error}", "unsupported_grammar") from None
        self._grammars[key] = found
        if len(self._grammars) > GRAMMARS_KEPT:
            self._grammars.popitem(last=False)
        return found

    def _compile(
        self, wanted: Mapping[str, Any], tools: Sequence[Tool], choice: str, *, parallel: bool
    ) -> _Compiled:
        compiler = SchemaCompiler()
        roots: list[str] = []
        kinds: Mapping[str, Mapping[str, ParameterKind]] = {}
        if tools:
            chosen = [(n, t) for n, t in enumerate(tools) if choice in ("auto", "required", t.name)]
            paths = [f"tools[{number}].function.parameters" for number, _ in chosen]
            call, kinds = call_rules(compiler, self._format, [tool for _, tool in chosen], paths)
            marked = bool(wanted) or choice != "auto"
            several = parallel and choice in ("auto", "required")
            roots.append(
                calls_expression(compiler, self._format, call, parallel=several, marked=marked)
            )
        if wanted and choice in ("auto", "none"):
            schema: Schema = wanted.get("schema", ANY_OBJECT)
            where = "response_format.json_schema.schema"
            roots.append(compiler.add(schema, where, strict=bool(wanted.get("strict"))))
        grammar = compiler.grammar(" | ".join(roots))
        return _Compiled(grammar, tuple(compiler.unenforced), kinds)


def _told(compiled: _Compiled | None) -> tuple[str, ...]:
    """Places that are named in an answer: a few of them."""
    found = compiled.unenforced if compiled is not None else ()
    if len(found) <= PLACES_MAX:
        return found
    return (*found[:PLACES_MAX], f"and {len(found) - PLACES_MAX} more")


def _tools(message: Mapping[str, Any]) -> list[Tool]:
    if message.get("tool_choice") == "none":
        return []
    return [
        Tool(str(each["name"]), str(each.get("description") or ""), each.get("parameters"))
        for each in message.get("tools") or ()
    ]


def _cut_tool(tool: Tool, cut: Callable[[Any], Any]) -> Tool:
    return Tool(cut(tool.name), cut(tool.description), cut(tool.parameters))
