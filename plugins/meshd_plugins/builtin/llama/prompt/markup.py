"""Calls whose parameters stand between tags, each by its name: how they are written, and their grammar.

A parameter that can only be a string is written bare, up to its closing tag; all others are JSON. One that
may also be null is bare too, and the word `null` stands for that. Whoever reads such a call has to know which
is which (`ParameterKind`), so both come from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.containers import check_count, others
from meshd_plugins.builtin.llama.prompt.scalars import bounds, string
from meshd_plugins.builtin.llama.prompt.schema_merge import (
    Impossible,
    Schema,
    SchemaError,
    constraining,
    properties_of,
    required_of,
    type_of,
    types_of,
)
from meshd_plugins.builtin.llama.prompt.schemas import Document, SchemaCompiler
from meshd_plugins.builtin.llama.prompt.terminals import (
    but_for,
    choice,
    choice_of_texts,
    literal,
    one_of,
    other_name,
)

DEPTH_MAX: Final = 8  # of alternatives within each other
NULLS: Final = ("null", "None")
OTHERS: Final = ""  # the name under which those are that have none in the schema
_WRITABLE: Final = re.compile(r'[^<>"\x00-\x1f\x7f]{1,128}')


class ParameterKind(Enum):
    """How a parameter is written."""

    TEXT = "text"
    TEXT_OR_NULL = "text or null"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Markup:
    """The tags of one way of writing calls."""

    call: tuple[str, str]  # around the name
    closes: str  # behind the last parameter
    key: tuple[str, str]  # around a parameter's name
    value: tuple[str, str]  # around its value
    lines: bool = False  # a value stands on lines of its own


def parameter_kinds(document: Document, schema: Schema, path: str) -> dict[str, ParameterKind]:
    """How each parameter of a tool is written. Raises SchemaError, Impossible."""
    kinds: dict[str, ParameterKind] = {}
    for variant, here in _variants(document, schema, path):
        named = properties_of(variant, here)
        for name in required_of(variant, here):
            named.setdefault(name, others(variant, named, here))
        for name, part in {**named, OTHERS: others(variant, named, here)}.items():
            kind = _kind(document, part, f"{here}.properties.{name}", 0) or ParameterKind.JSON
            kinds[name] = kind if kinds.get(name, kind) is kind else ParameterKind.JSON
    return kinds


def call_expression(
    compiler: SchemaCompiler,
    markup: Markup,
    name: str,
    schema: Schema,
    path: str,
) -> tuple[str, dict[str, ParameterKind]]:
    """From a tool's name to the end of its parameters, and how these are written. Raises SchemaError."""
    document = compiler.open(schema, path, strict=False)
    kinds: dict[str, ParameterKind] = {}

    def build() -> str:
        kinds.update(parameter_kinds(document, schema, path))
        writer = _Writer(compiler, document, markup, kinds)
        found: list[str] = []
        for variant, here in _variants(document, schema, path):
            try:
                found.append(writer.parameters(variant, here))
            except Impossible:
                continue
        if not found:
            raise Impossible(path)
        return f"{literal(name + markup.call[1])} ws {choice(found)} {literal(markup.closes)}"

    return compiler.rule(compiler.guarded(build, path)), kinds


def _variants(
    document: Document, schema: Schema, path: str, depth: int = 0
) -> list[tuple[Mapping[str, Any], str]]:
    """The objects that arguments may be, without alternatives. Raises SchemaError, Impossible."""
    flat = document.plain(schema, path)
    if isinstance(flat, bool):
        if not flat:
            raise Impossible(path)
        return [({}, path)]
    for keyword in ("anyOf", "oneOf"):
        if keyword not in flat:
            continue
        if depth == DEPTH_MAX:
            raise SchemaError(path, "more alternatives within each other than a call can have")
        parts = document.alternatives(flat, keyword, path)
        found: list[tuple[Mapping[str, Any], str]] = []
        for part, here in parts:
            try:
                found += _variants(document, part, here, depth + 1)
            except Impossible:
                continue
        return found
    for keyword in ("enum", "const"):
        if keyword in flat:
            document.unsupported(f"{path}.{keyword}", "is not supported for all of the arguments")
    return [(flat, path)]


def _kind(document: Document, schema: Schema, path: str, depth: int) -> ParameterKind | None:
    """How what a schema describes is written; None: it is null."""
    if depth == DEPTH_MAX or schema is True:
        return ParameterKind.JSON
    flat = document.plain(schema, path)
    if isinstance(flat, bool):
        return ParameterKind.JSON if flat else ParameterKind.TEXT
    for keyword in ("anyOf", "oneOf"):
        if keyword in flat:
            parts = document.alternatives(flat, keyword, path)
            return _joined([_kind(document, part, here, depth + 1) for part, here in parts])
    try:
        values = document.values(flat, path)
    except Impossible:
        return ParameterKind.TEXT
    types = {type_of(value) for value in values} if values is not None else types_of(flat, path)
    if types is None and set(constraining(flat)) & {"minLength", "maxLength", "pattern", "format"}:
        types = ("string",) if set(constraining(flat)) <= _OF_STRINGS else None
    if types is None:
        return ParameterKind.JSON
    kinds = {"string": ParameterKind.TEXT, "null": None}
    return _joined([kinds.get(name, ParameterKind.JSON) for name in types])


_OF_STRINGS: Final = {"minLength", "maxLength", "pattern", "format"}


def _joined(kinds: Sequence[ParameterKind | None]) -> ParameterKind | None:
    found = set(kinds)
    if ParameterKind.JSON in found:
        return ParameterKind.JSON
    if found == {None}:
        return None
    return ParameterKind.TEXT_OR_NULL if len(found) > 1 else found.pop()


class _Writer:
    """Of the calls of one tool."""

    def __init__(
        self,
        compiler: SchemaCompiler,
        document: Document,
        markup: Markup,
        kinds: Mapping[str, ParameterKind],
    ) -> None:
        self._compiler = compiler
        self._document = document
        self._markup = markup
        self._kinds = kinds

    def parameters(self, schema: Mapping[str, Any], path: str) -> str:
        """All parameters, in the schema's order. Raises SchemaError, Impossible."""
        named = properties_of(schema, path)
        required = required_of(schema, path)
        more = others(schema, named, path)
        for name in required:
            named.setdefault(name, more)
        written: list[str] = []
        for name, part in named.items():
            here = f"{path}.properties.{name}"
            try:
                if _WRITABLE.fullmatch(name) is None:
                    raise Impossible(here)
                one = self._one(literal(name), self._kinds[name], part, here)
            except Impossible:
                if name in required:
                    raise
                continue
            written.append(one if name in required else f"{one}?")
        extra = self._extra(named, more, path)
        if extra and not written and bounds(schema, "Properties", path)[0]:
            extra = f"{extra[:-1]}+"
        count = (len(required), len(written))
        check_count(self._document, schema, count, path, more=extra is not None)
        return " ".join([*written, extra or ""]).strip() or '""'

    def _extra(self, named: Mapping[str, Schema], more: Schema, path: str) -> str | None:
        if more is False:
            return None
        key = other_name([name for name in named if _WRITABLE.fullmatch(name)], self._compiler.rule)
        try:
            one = self._one(key, self._kinds[OTHERS], more, f"{path}.additionalProperties")
        except Impossible:
            return None
        return f"{one}*"

    def _one(self, key: str, kind: ParameterKind, schema: Schema, path: str) -> str:
        markup = self._markup
        opens = f"{literal(markup.key[0])} {key} {literal(markup.key[1])}"
        if markup.value[0]:
            opens += f" ws {literal(markup.value[0])}"
        if kind is ParameterKind.JSON:
            value = self._document.rule(schema, path)
        else:
            value = self._bare(schema, path)
        if markup.lines:
            value = f'"\\n" {value} "\\n"'
        return self._compiler.rule(f"{opens} {value} {literal(markup.value[1])} ws")

    def _bare(self, schema: Schema, path: str) -> str:
        """A string that is written without quotes, or null. Raises SchemaError, Impossible."""
        document = self._document
        flat = document.plain(schema, path)
        if isinstance(flat, bool):
            raise Impossible(path)
        for keyword in ("anyOf", "oneOf"):
            if keyword in flat:
                return self._compiler.rule(choice(self._possible(flat, keyword, path)))
        values = document.values(flat, path)
        if values is not None:
            texts = [NULLS[0] if value is None else str(value) for value in values]
            writable = [text for text in texts if self._markup.value[1] not in text]
            if not writable:
                raise Impossible(path)
            return choice_of_texts(writable, self._compiler.rule)
        found: list[str] = []
        types = types_of(flat, path) or ("string",)
        if "string" in types:
            plain = not set(constraining(flat)) - {"type", "nullable"}
            found.append(
                self._until(self._markup.value[1])
                if plain
                else string(document, flat, path, bare=True)
            )
        if "null" in types:
            found.append(literal(NULLS[0]))
        return self._compiler.rule(choice(found))

    def _possible(self, schema: Mapping[str, Any], keyword: str, path: str) -> list[str]:
        found: list[str] = []
        for part, here in self._document.alternatives(schema, keyword, path):
            try:
                found.append(self._bare(part, here))
            except Impossible:
                continue
        if not found:
            raise Impossible(path)
        return found

    def _until(self, end: str) -> str:
        """Any text that does not hold the end: a rule for each part of it that stands there already."""

        def build(names: Sequence[str]) -> list[str]:
            rules: list[str] = []
            for number, character in enumerate(end):
                nexts = [f"{but_for(end)} {names[0]}", '""']
                begun = {end[0]: names[1]}
                if number + 1 < len(end):
                    begun[character] = names[number + 1]
                # One in the middle of the end that is not the next one begins anew.
                strange = sorted(set(end) - set(begun) - {character})
                if strange:
                    nexts.append(f"{one_of(strange)} {names[0]}")
                nexts += [f"{literal(each)} {name}" for each, name in begun.items()]
                rules.append(" | ".join(nexts))
            return rules

        return self._compiler.family(f"until {end}", len(end), build)
