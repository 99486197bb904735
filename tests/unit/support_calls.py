"""Reading answers in tests: all that comes out of one, however it is cut into pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshd_plugins.builtin.llama.prompt.answers import AnswerReader, Parts
from meshd_plugins.builtin.llama.prompt.constraint import Reasoning
from meshd_plugins.builtin.llama.prompt.markup import ParameterKind
from meshd_plugins.builtin.llama.prompt.tools import ToolFormat, ToolSyntax

NAMES = frozenset({"f", "g", "get_weather"})


@dataclass
class Read:
    """All that came out."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)  # id, name, arguments
    called: bool = False
    reasoning_tokens: int = 0

    def add(self, parts: Parts) -> None:
        self.text += parts.text
        self.reasoning += parts.reasoning
        for delta in parts.tool_calls:
            call = self.calls.setdefault(delta.index, ["", "", ""])
            assert not (delta.name and call[1]), "a name is told once"
            call[0] += delta.id
            call[1] += delta.name
            call[2] += delta.arguments


def read(
    pieces: Sequence[str],
    form: ToolFormat | None = None,
    reasoning: Reasoning | None = None,
    kinds: Mapping[str, Mapping[str, ParameterKind]] | None = None,
) -> Read:
    """Feed an answer piece by piece."""
    ids = iter(range(1000))
    syntax = ToolSyntax(form, NAMES, kinds or {}) if form else None
    reader = AnswerReader(reasoning, syntax, lambda: f"id{next(ids)}")
    found = Read()
    for piece in pieces:
        found.add(reader.feed(piece, 1))
    found.add(reader.finish())
    found.called, found.reasoning_tokens = reader.called, reader.reasoning_tokens
    return found
