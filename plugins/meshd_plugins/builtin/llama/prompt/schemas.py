"""JSON Schema to grammar: whatever the model writes under it is JSON and fits the schema.

The grammar describes *some* of what fits, in one way of writing: properties in the schema's order, bounded
white space, numbers of at most 15 digits. Nothing that does not fit is described, and a keyword that cannot
be honoured so is an error which names its place; none is dropped. Annotations (`title`, `default`, ...) say
nothing about what fits. Which values a schema leaves open is taken as closed: an object with `properties`
gets others only where `additionalProperties` asks for them.

Work is bounded: bytes, schemas visited, size of the grammar (decision 0026).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.gbnf import REPETITIONS_MAX, parse
from meshd_plugins.builtin.llama.prompt.gbnf_check import check
from meshd_plugins.builtin.llama.prompt.patterns import PatternError, read_pattern
from meshd_plugins.builtin.llama.prompt.schema_merge import (
    Merger,
    References,
    Schema,
    SchemaError,
    as_list,
    checked,
    constraining,
    is_type,
    properties_of,
    required_of,
    types_of,
    values_of,
)
from meshd_plugins.builtin.llama.prompt.terminals import (
    BASIC_RULES,
    BOUND_MAX,
    FORMATS,
    choice,
    choice_of_texts,
    integers,
    json_text,
    literal,
    numbers,
    other_key,
    repeated,
)

SCHEMA_BYTES_MAX: Final = 64 * 1024
STEPS_MAX: Final = 4_000  # schemas visited
DEPTH_MAX: Final = 48
ENUM_MAX: Final = 1_000
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}

_BY_TYPE: Final[Mapping[str, tuple[str, ...]]] = {
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "minProperties",
        "maxProperties",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_KNOWN: Final = frozenset(
    (
        "type",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "nullable",
        *(k for v in _BY_TYPE.values() for k in v),
    )
)


class _Impossible(Exception):
    """Nothing fits the schema at this place."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class SchemaCompiler:
    """Makes one grammar of one or several schemas of the same request."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of expressions, so that none is written twice
        self._steps = 0

    def add(self, document: Schema, path: str) -> str:
        """Compile a whole schema and return the name of its rule. Raises SchemaError."""
        checked(document, path)
        try:
            size = len(json.dumps(document).encode())
        except (ValueError, RecursionError):
            raise SchemaError(path, "is no JSON, or too deep") from None
        if size > SCHEMA_BYTES_MAX:
            raise SchemaError(path, f"has {size} bytes; at most {SCHEMA_BYTES_MAX} are taken")
        root: Mapping[str, Any] = {} if isinstance(document, bool) else document
        try:
            return _Document(self, References(root)).rule(document, path)
        except _Impossible as nothing:
            raise SchemaError(nothing.path, "nothing fits it") from None
        except RecursionError:
            raise SchemaError(path, "is too deep") from None

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


class _Document:
    """One schema with its definitions."""

    def __init__(self, compiler: SchemaCompiler, references: References) -> None:
        self._compiler = compiler
        self._references = references
        self._merger = Merger(references, compiler.step)
        self._referred: dict[str, str] = {}
        self._impossible: set[str] = set()
        self._depth = 0

    def rule(self, schema: Schema, path: str) -> str:
        """A rule, or a basic one. Raises SchemaError, _Impossible."""
        self._compiler.step(path)
        if schema is True:
            return "value"
        if schema is False:
            raise _Impossible(path)
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
        schema = self._merger.flat(schema, path)
        if isinstance(schema, bool):
            return self.rule(schema, path)
        for keyword in schema:
            if keyword not in _KNOWN and keyword in constraining(schema):
                raise SchemaError(f"{path}.{keyword}", "this keyword is not supported")
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._alternatives(schema, keyword, path)
        values = values_of(schema, path)
        if values is not None:
            return self._values(schema, values, path)
        return self._typed(schema, path)

    def _alternatives(self, schema: Mapping[str, Any], keyword: str, path: str) -> str:
        parts = as_list(schema[keyword])
        if not parts:
            raise SchemaError(f"{path}.{keyword}", "must be a list that is not empty")
        rest = {k: v for k, v in constraining(schema).items() if k != keyword}
        choices = [checked(part, f"{path}.{keyword}[{n}]") for n, part in enumerate(parts)]
        if keyword == "oneOf":
            self._check_apart(choices, f"{path}.oneOf")
        found: list[str] = []
        for number, part in enumerate(choices):
            here = f"{path}.{keyword}[{number}]"
            try:
                found.append(
                    self.rule(self._merger.merge(rest, part, here) if rest else part, here)
                )
            except _Impossible:
                continue
        if not found:
            raise _Impossible(f"{path}.{keyword}")
        return choice(found)

    def _check_apart(self, choices: Sequence[Schema], path: str) -> None:
        for second, other in enumerate(choices):
            for first in range(second):
                self._compiler.step(path)
                if not self._merger.disjoint(choices[first], other, path):
                    raise SchemaError(
                        path,
                        f"[{first}] and [{second}] may both fit; use anyOf, or tell them apart",
                    )

    def _values(self, schema: Mapping[str, Any], values: Sequence[Any], path: str) -> str:
        types = types_of(schema, path)
        for keyword in constraining(schema):
            if keyword not in ("type", "enum", "const", "nullable"):
                raise SchemaError(f"{path}.{keyword}", "is not supported beside enum or const")
        fitting = [value for value in values if types is None or is_type(value, types)]
        if len(fitting) > ENUM_MAX:
            raise SchemaError(f"{path}.enum", f"holds more than {ENUM_MAX} values")
        if not fitting:
            raise _Impossible(f"{path}.enum" if "enum" in schema else f"{path}.const")
        return choice_of_texts([json_text(value) for value in fitting], self._compiler.rule)

    def _typed(self, schema: Mapping[str, Any], path: str) -> str:
        types = types_of(schema, path)
        if types is None:  # what a keyword is about is what is written
            types = tuple(t for t, words in _BY_TYPE.items() if any(w in schema for w in words))
            if not types:
                return "value"
        if "number" in types:
            types = tuple(each for each in types if each != "integer")
        makers: dict[str, Callable[[Mapping[str, Any], str], str]] = {
            "object": self._object,
            "array": self._array,
            "string": _string,
            "number": _number,
            "integer": _integer,
        }
        return choice([makers[t](schema, path) if t in makers else t for t in types])

    # -- objects -----------------------------------------------------------------------------------------

    def _object(self, schema: Mapping[str, Any], path: str) -> str:
        properties = properties_of(schema, path)
        required = required_of(schema, path)
        more = checked(
            schema.get("additionalProperties", not properties), f"{path}.additionalProperties"
        )
        for name in required:
            properties.setdefault(name, more)
        rules: list[tuple[str, bool]] = []  # of each property, and whether it must be there
        for name, part in properties.items():
            here = f"{path}.properties.{name}"
            try:
                value = self.rule(part, here)
            except _Impossible:
                if name in required:
                    raise
                continue
            key = literal(json_text(name))
            rules.append((self._compiler.rule(f'{key} ws ":" ws {value}'), name in required))
        extra = self._extra(schema, properties, more, path)
        self._check_count(schema, len(required), len(rules), extra is not None, path)
        if not rules and extra is None:
            return '"{" ws "}"'
        return (
            f'"{{" ws {self._members(rules, extra, _bounds(schema, "Properties", path)[1])}ws "}}"'
        )

    def _extra(
        self, schema: Mapping[str, Any], properties: Mapping[str, Schema], more: Schema, path: str
    ) -> str | None:
        if more is False or _bounds(schema, "Properties", path)[1] == 0:
            return None
        try:
            value = self.rule(more, f"{path}.additionalProperties")
        except _Impossible:
            return None
        key = other_key(list(properties), self._compiler.rule) if properties else "string"
        return self._compiler.rule(f'{key} ws ":" ws {value}')

    def _check_count(
        self, schema: Mapping[str, Any], required: int, named: int, more: bool, path: str
    ) -> None:
        least, most = _bounds(schema, "Properties", path)
        # One that is asked for without a name may repeat a key: only the first is sure to count.
        if least > required and not (least == 1 and more and not named):
            raise SchemaError(
                f"{path}.minProperties", "is supported where as many properties are required"
            )
        if most is not None and named + more > most and (named or most < required):
            raise SchemaError(f"{path}.maxProperties", "is smaller than the number of properties")

    def _members(
        self, rules: Sequence[tuple[str, bool]], extra: str | None, most: int | None
    ) -> str:
        """What stands between the braces: two rules a property, for the first member and for a later one."""
        make = self._compiler.rule
        later, first = "", ""
        if extra is not None:
            another = make(f'ws "," ws {extra}')
            later = make(f"{another}*")
            room = None if most is None else most - 1
            first = make(f"({extra} {repeated(another, 0, room)})?")
        for member, is_required in reversed(rules):
            following = f"{make(f'ws {chr(34)},{chr(34)} ws {member}')} {later}".rstrip()
            leading = f"{member} {later}".rstrip()
            if not is_required:
                following = choice([following, later or '""'])
                leading = choice([leading, first or '""'])
            later, first = make(following), make(leading)
        return f"{first} "

    # -- arrays --------------------------------------------------------------------------------------------

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = _bounds(schema, "Items", path)
        if schema.get("uniqueItems") is True and (most is None or most > 1):
            raise SchemaError(f"{path}.uniqueItems", "is not supported")
        prefix = as_list(schema.get("prefixItems", []))
        if prefix is None:
            raise SchemaError(f"{path}.prefixItems", "must be a list of schemas")
        first: list[str] = []
        cut = False
        for number, part in enumerate(prefix[: most if most is not None else len(prefix)]):
            here = f"{path}.prefixItems[{number}]"
            try:
                first.append(self.rule(checked(part, here), here))
            except _Impossible:
                if number < least:
                    raise
                cut = True
                break
        try:
            rest = self.rule(checked(schema.get("items", True), f"{path}.items"), f"{path}.items")
        except _Impossible:
            if least > len(first):
                raise
            rest = None
        return self._items(first, None if cut else rest, least, most)

    def _items(self, first: Sequence[str], rest: str | None, least: int, most: int | None) -> str:
        """All of `first` that must be there, then as many more as may be."""
        make = self._compiler.rule
        after = ""
        if rest is not None and (most is None or most > len(first)):
            another = make(f'ws "," ws {rest}')
            needed = max(0, least - len(first))
            room = None if most is None else most - len(first)
            if first:
                after = make(repeated(another, needed, room))
            else:
                many = repeated(another, max(0, needed - 1), None if room is None else room - 1)
                after = make(f"{rest} {many}") if needed else make(f"({rest} {many})?")
        for number in range(len(first) - 1, -1, -1):
            item = f'ws "," ws {first[number]}' if number else first[number]
            expression = f"{item} {after}".rstrip()
            after = make(expression if number < least else f"({expression})?")
        return f'"[" ws {after} ws "]"' if after else '"[" ws "]"'


def _bounds(schema: Mapping[str, Any], what: str, path: str) -> tuple[int, int | None]:
    """`minWHAT` and `maxWHAT`. Raises SchemaError, _Impossible."""
    found: list[int | None] = []
    for name in (f"min{what}", f"max{what}"):
        bound = schema.get(name)
        if isinstance(bound, float) and bound.is_integer():
            bound = int(bound)
        if bound is not None and (
            isinstance(bound, bool) or not isinstance(bound, int) or bound < 0
        ):
            raise SchemaError(f"{path}.{name}", "must be an integer from 0 on")
        found.append(bound)
    least, most = found[0] or 0, found[1]
    if least > REPETITIONS_MAX:
        raise SchemaError(f"{path}.min{what}", f"may be {REPETITIONS_MAX} at most")
    if most is not None and most < least:
        raise _Impossible(f"{path}.max{what}")
    return least, most


def _string(schema: Mapping[str, Any], path: str) -> str:
    least, most = _bounds(schema, "Length", path)
    named, written = schema.get("format"), schema.get("pattern")
    if named is not None and written is not None:
        raise SchemaError(f"{path}.format", "is not supported beside pattern")
    if named is not None:
        if named not in FORMATS:
            raise SchemaError(
                f"{path}.format", f"{str(named)[:40]!r} is none of {', '.join(FORMATS)}"
            )
        expression, shortest, longest = FORMATS[str(named)]
        _check_length(path, "format", (shortest, longest), (least, most))
        return f'"\\"" {expression} "\\""'
    if written is not None:
        if not isinstance(written, str):
            raise SchemaError(f"{path}.pattern", "must be a string")
        try:
            pattern = read_pattern(written)
        except PatternError as error:
            raise SchemaError(f"{path}.pattern", str(error)) from None
        _check_length(path, "pattern", (pattern.least, pattern.most), (least, most))
        return f'"\\"" {pattern.expression} "\\""'
    if not least and most is None:
        return "string"
    return f'"\\"" {repeated("char", least, most)} "\\""'


def _check_length(
    path: str, keyword: str, own: tuple[int, int | None], bounds: tuple[int, int | None]
) -> None:
    if own[0] < bounds[0]:
        raise SchemaError(f"{path}.minLength", f"the {keyword} also fits shorter texts")
    if bounds[1] is not None and (own[1] is None or own[1] > bounds[1]):
        raise SchemaError(f"{path}.maxLength", f"the {keyword} also fits longer texts")


def _limits(schema: Mapping[str, Any], path: str) -> tuple[float, float, bool, bool]:
    """Lower and upper bound, and whether each is left out. Raises SchemaError."""
    found: dict[str, float] = {}
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bound = schema.get(name)
        if bound is None:
            continue
        number = isinstance(bound, int | float) and not isinstance(bound, bool)
        if not number or not math.isfinite(bound) or abs(bound) > BOUND_MAX:
            raise SchemaError(f"{path}.{name}", f"must be a number of at most {BOUND_MAX:.0e}")
        found[name] = bound
    low, above = found.get("minimum", -math.inf), found.get("exclusiveMinimum", -math.inf)
    high, below = found.get("maximum", math.inf), found.get("exclusiveMaximum", math.inf)
    return max(low, above), min(high, below), above >= low, below <= high


def _integer(schema: Mapping[str, Any], path: str) -> str:
    low, high, above, below = _limits(schema, path)
    if schema.get("multipleOf") not in (None, 1):
        raise SchemaError(f"{path}.multipleOf", "is not supported")
    first = None if math.isinf(low) else math.ceil(low) + (above and low == math.ceil(low))
    last = None if math.isinf(high) else math.floor(high) - (below and high == math.floor(high))
    found = integers(first, last)
    if found is None:
        raise _Impossible(path)
    return found


def _number(schema: Mapping[str, Any], path: str) -> str:
    if schema.get("multipleOf") is not None:
        if schema["multipleOf"] == 1:
            return _integer(schema, path)
        raise SchemaError(f"{path}.multipleOf", "is not supported")
    low, high, above, below = _limits(schema, path)
    if math.isinf(low) and math.isinf(high):
        return "number"
    found = numbers(low, high, above=above, below=below)
    if found is None:
        raise SchemaError(path, "no whole number lies within its bounds: widen them")
    return found
