"""JSON Schema to grammar: whatever the model writes under it is JSON and fits the schema.

The grammar describes *some* of what fits, in one way of writing: properties in the schema's order, bounded
white space, numbers of at most 15 digits. Nothing that does not fit is described. A keyword that cannot be
honoured so is an error which names its place or, where the caller did not ask for strictness, a note that
does: none is dropped in silence. Annotations (`title`, `default`, ...) say nothing about what fits. Which values a schema leaves open is taken as closed: an object with `properties`
gets others only where `additionalProperties` asks for them.

Work is bounded: bytes, schemas visited, size of the grammar (decision 0026).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.containers import an_array, an_object
from meshd_plugins.builtin.llama.prompt.fitting import Fitting, Undecided
from meshd_plugins.builtin.llama.prompt.gbnf import parse
from meshd_plugins.builtin.llama.prompt.gbnf_check import check
from meshd_plugins.builtin.llama.prompt.negation import Negation, is_written_around
from meshd_plugins.builtin.llama.prompt.scalars import integer, number, string
from meshd_plugins.builtin.llama.prompt.schema_merge import (
    Impossible,
    Merger,
    References,
    Schema,
    SchemaError,
    as_list,
    checked,
    constraining,
    is_type,
    types_of,
    values_of,
)
from meshd_plugins.builtin.llama.prompt.terminals import (
    BASIC_RULES,
    choice,
    choice_of_texts,
    json_text,
)

SCHEMA_BYTES_MAX: Final = 64 * 1024
STEPS_MAX: Final = 4_000  # schemas visited
DEPTH_MAX: Final = 48
ENUM_MAX: Final = 1_000
UNENFORCED_MAX: Final = 64  # places that are kept
FEW_MAX: Final = 130  # values of a schema that names them all
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}

_BY_TYPE: Final[Mapping[str, tuple[str, ...]]] = {
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "minProperties",
        "maxProperties",
        "propertyNames",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
KNOWN: Final = frozenset(
    (
        "type",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "nullable",
        "not",
        "additionalItems",
        *(k for v in _BY_TYPE.values() for k in v),
    )
)

_SAID_FIRST: Final = frozenset(("anyOf", "oneOf", "enum", "const"))  # `not` is about each of these


class SchemaCompiler:
    """Makes one grammar of one or several schemas of the same request."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of expressions, so that none is written twice
        self._families: dict[str, str] = {}
        self._steps = 0
        self.unenforced: dict[str, None] = {}  # places of keywords that say more than the grammar

    def add(self, document: Schema, path: str, *, strict: bool = True) -> str:
        """Compile a whole schema and return the name of its rule. Raises SchemaError.

        Args:
            document: the schema.
            path: where it stands in the request.
            strict: refuse what cannot be honoured, instead of noting it in `unenforced`.
        """
        opened = self.open(document, path, strict=strict)
        return self.guarded(lambda: opened.rule(document, path), path)

    def open(self, document: Schema, path: str, *, strict: bool) -> Document:
        """Check a whole schema, of which parts will be compiled. Raises SchemaError."""
        checked(document, path)
        try:
            size = len(json.dumps(document).encode())
        except (ValueError, RecursionError):
            raise SchemaError(path, "is no JSON, or too deep") from None
        if size > SCHEMA_BYTES_MAX:
            raise SchemaError(path, f"has {size} bytes; at most {SCHEMA_BYTES_MAX} are taken")
        root: Mapping[str, Any] = {} if isinstance(document, bool) else document
        return Document(self, References(root), strict=strict)

    def guarded(self, compile_it: Callable[[], str], path: str) -> str:
        """Run what compiles, with all that may go wrong as SchemaError."""
        try:
            return compile_it()
        except Impossible as nothing:
            raise SchemaError(nothing.path, "nothing fits it") from None
        except RecursionError:
            raise SchemaError(path, "is too deep") from None

    def note(self, path: str) -> None:
        """Remember a keyword that is not honoured."""
        if len(self.unenforced) < UNENFORCED_MAX:
            self.unenforced[path] = None

    def step(self, path: str) -> None:
        """Count one more schema visited. Raises SchemaError."""
        self._steps += 1
        if self._steps > STEPS_MAX:
            raise SchemaError(path, f"more than {STEPS_MAX} schemas within each other: simplify it")

    def rule(self, expression: str) -> str:
        """The name of the rule with this expression."""
        if expression not in self._names:
            self._names[expression] = self.reserve()
            self._rules[self._names[expression]] = expression
        return self._names[expression]

    def reserve(self) -> str:
        """A name for a rule that is defined later."""
        name = f"r{len(self._rules)}"
        self._rules[name] = ""
        return name

    def family(self, key: str, count: int, build: Callable[[Sequence[str]], list[str]]) -> str:
        """The first of so many rules that name each other; `build` makes their expressions, once for a key."""
        if key not in self._families:
            names = [self.reserve() for _ in range(count)]
            for name, expression in zip(names, build(names), strict=True):
                self.define(name, expression)
            self._families[key] = names[0]
        return self._families[key]

    def define(self, name: str, expression: str) -> None:
        """Say what a reserved name stands for."""
        self._rules[name] = expression

    def grammar(self, root: str) -> str:
        """The whole grammar, checked, with the expression as its root. Raises SchemaError, GrammarError."""
        rules = {"root": root, **self._rules}
        # What was begun and then turned out to be impossible is not asked for by any other.
        wanted, todo = {"root": None}, ["root"]
        while todo:
            found = [w for w in rules[todo.pop()].translate(_SIGNS).split() if w in self._rules]
            todo += [name for name in found if name not in wanted]
            wanted.update(dict.fromkeys(found))
        lines = [f"{name} ::= {rules[name]}" for name in rules if name in wanted]
        text = "\n".join((*lines, *_basics(lines))) + "\n"
        check(parse(text), wholly=False)
        return text


def _basics(lines: Sequence[str]) -> list[str]:
    """Those of the basic rules that the others name."""
    wanted: dict[str, None] = {}
    todo = list(lines)
    while todo:
        words = todo.pop().translate(_SIGNS).split()
        found = [word for word in words if word in BASIC_RULES and word not in wanted]
        wanted.update(dict.fromkeys(found))
        todo += [BASIC_RULES[name] for name in found]
    return [f"{name} ::= {BASIC_RULES[name]}" for name in wanted]


_SIGNS: Final = str.maketrans("()|*+?{},", " " * 9)


def schema_grammar(document: Schema, path: str) -> str:
    """The grammar of one schema. Raises SchemaError, GrammarError."""
    compiler = SchemaCompiler()
    return compiler.grammar(compiler.add(document, path))


class Document:
    """One schema with its definitions; implements `Maker`."""

    def __init__(self, compiler: SchemaCompiler, references: References, *, strict: bool) -> None:
        self._compiler = compiler
        self._references = references
        self._strict = strict
        self._merger = Merger(references, compiler.step, self.unsupported)
        self._negation = Negation(self._merger, compiler.step, self.unsupported)
        self._fitting = Fitting(references, compiler.step)
        self._referred: dict[str, str] = {}
        self._depth = 0

    def unsupported(self, path: str, problem: str) -> None:
        """A keyword is not honoured: an error, or a note. Raises SchemaError."""
        if self._strict:
            raise SchemaError(path, problem)
        self._compiler.note(path)

    def make(self, expression: str) -> str:
        """The name of the rule with this expression."""
        return self._compiler.rule(expression)

    def rule(self, schema: Schema, path: str) -> str:
        """A rule, or a basic one. Raises SchemaError, Impossible."""
        self._compiler.step(path)
        if schema is True:
            return "value"
        if schema is False:
            raise Impossible(path)
        said = constraining(schema)
        if list(said) == ["$ref"]:
            return self._reference(str(said["$ref"]), path)
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise SchemaError(path, f"more than {DEPTH_MAX} schemas within each other")
        try:
            expression = self._expression(schema, path)
        finally:
            self._depth -= 1
        return expression if expression in BASIC_RULES else self._compiler.rule(expression)

    def _reference(self, reference: str, path: str) -> str:
        """A reference is a rule of its own, so that a schema may contain itself."""
        if reference in self._referred:
            return self._referred[reference]
        target = self._references.find(reference, path)
        name = self._referred[reference] = self._compiler.reserve()
        self._compiler.define(name, self.rule(target, f"{path}({reference})"[-200:]))
        return name

    def _expression(self, schema: Schema, path: str) -> str:
        schema = self.plain(schema, path)
        if isinstance(schema, bool):
            return self.rule(schema, path)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                found = self.alternatives(schema, keyword, path)
                return choice(self._possible(found, f"{path}.{keyword}"))
        values = self.values(schema, path)
        if values is not None:
            texts = [json_text(value) for value in values]
            return choice_of_texts(texts, self._compiler.rule)
        return self._typed(schema, path)

    def flat(self, schema: Schema, path: str) -> Schema:
        """The schema without `$ref` and `allOf` at its top, and of keywords that are known. Raises SchemaError."""
        schema = self._merger.flat(schema, path)
        if isinstance(schema, bool):
            return schema
        unknown = [
            k for k in constraining(schema) if k not in KNOWN and not _says_nothing(k, schema)
        ]
        for keyword in unknown:
            self.unsupported(f"{path}.{keyword}", "this keyword is not supported")
        return {k: v for k, v in schema.items() if k in KNOWN}

    def plain(self, schema: Schema, path: str) -> Schema:
        """The schema, flat, with `not` said in other words where that is not done later. Raises SchemaError, Impossible."""
        schema = self.flat(schema, path)
        if isinstance(schema, bool) or "not" not in schema or set(schema) & _SAID_FIRST:
            return schema
        if is_written_around(schema, path):
            return schema
        self._compiler.step(path)
        return self.plain(self._negation.without(schema, path), path)

    def alternatives(
        self, schema: Mapping[str, Any], keyword: str, path: str
    ) -> list[tuple[Schema, str]]:
        """The choices of `anyOf` or `oneOf` together with all else that is said. Raises SchemaError."""
        parts = as_list(schema[keyword])
        if not parts:
            raise SchemaError(f"{path}.{keyword}", "must be a list that is not empty")
        rest = {k: v for k, v in constraining(schema).items() if k != keyword}
        choices = [checked(part, f"{path}.{keyword}[{n}]") for n, part in enumerate(parts)]
        if keyword == "oneOf":
            self._check_apart(choices, f"{path}.oneOf")
        found: list[tuple[Schema, str]] = []
        for number_, part in enumerate(choices):
            here = f"{path}.{keyword}[{number_}]"
            found.append((self._merger.merge(rest, part, here) if rest else part, here))
        return found

    def _possible(self, parts: Sequence[tuple[Schema, str]], path: str) -> list[str]:
        found: list[str] = []
        for part, here in parts:
            try:
                found.append(self.rule(part, here))
            except Impossible:
                continue
        if not found:
            raise Impossible(path)
        return found

    def _check_apart(self, choices: Sequence[Schema], path: str) -> None:
        for second, other in enumerate(choices):
            for first in range(second):
                self._compiler.step(path)
                if not self._merger.disjoint(choices[first], other, path):
                    self.unsupported(
                        path,
                        f"[{first}] and [{second}] may both fit; use anyOf, or tell them apart",
                    )
                    return

    def values(self, schema: Mapping[str, Any], path: str) -> list[Any] | None:
        """Those that `enum` and `const` leave and that fit all else; None: anything. Raises SchemaError, Impossible."""
        found = values_of(schema, path)
        if found is None:
            return None
        if len(found) > ENUM_MAX:
            raise SchemaError(f"{path}.enum", f"holds more than {ENUM_MAX} values")
        types = types_of(schema, path)
        found = [value for value in found if types is None or is_type(value, types)]
        for keyword in constraining(schema):
            if keyword in ("type", "enum", "const", "nullable"):
                continue
            try:
                found = [v for v in found if self._fitting.holds(v, keyword, schema, path)]
            except Undecided:
                self.unsupported(f"{path}.{keyword}", "is not supported beside enum or const")
        if not found:
            raise Impossible(f"{path}.enum" if "enum" in schema else f"{path}.const")
        return found

    def fitting(self, schema: Schema, path: str) -> Sequence[Any] | None:
        """All values that fit, where they are few; None: they are not. Raises SchemaError."""
        self._compiler.step(path)
        schema = self.flat(schema, path)
        if isinstance(schema, bool):
            return None if schema else ()
        try:
            values = self.values(schema, path)
        except Impossible:
            return ()
        if values is not None:
            return values if len(values) <= FEW_MAX else None
        return _few(schema, path)

    def _typed(self, schema: Mapping[str, Any], path: str) -> str:
        types = types_of(schema, path)
        if types is None:  # what a keyword is about is what is written
            types = tuple(t for t, words in _BY_TYPE.items() if any(w in schema for w in words))
            if not types:
                return "value"
        if "number" in types:
            types = tuple(each for each in types if each != "integer")
        makers: dict[str, Callable[[Document, Mapping[str, Any], str], str]] = {
            "object": an_object,
            "array": an_array,
            "string": string,
            "number": number,
            "integer": integer,
        }
        return choice([makers[t](self, schema, path) if t in makers else t for t in types])


def _says_nothing(keyword: str, schema: Mapping[str, Any]) -> bool:
    """Whether a keyword that is not known lets everything pass that its neighbours do."""
    match keyword:
        case "additionalItems":
            return not isinstance(schema.get("items"), list)
        case "then" | "else":
            return "if" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
        case _:
            return False


def _few(schema: Mapping[str, Any], path: str) -> list[Any] | None:
    """All values of a schema that names none, where its type alone makes them few."""
    said = constraining(schema)
    types = types_of(schema, path)
    if (
        types is not None
        and set(types) <= {"boolean", "null"}
        and set(said) <= {"type", "nullable"}
    ):
        own: dict[str, list[Any]] = {"boolean": [True, False], "null": [None]}
        return [value for name in types for value in own[name]]
    low, high = schema.get("minimum"), schema.get("maximum")
    whole = types == ("integer",) and set(said) <= {"type", "minimum", "maximum"}
    if whole and type(low) is int and type(high) is int and 0 <= high - low < FEW_MAX:
        return list(range(low, high + 1))
    return None
