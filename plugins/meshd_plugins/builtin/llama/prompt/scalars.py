"""Strings and numbers of a schema, as expressions of a grammar.

A string is written as JSON has it, or bare: as the text of a parameter between tags, which holds no `<`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, Final, Protocol

from meshd_plugins.builtin.llama.prompt.digits import Multiples, integers, numbers
from meshd_plugins.builtin.llama.prompt.gbnf import REPETITIONS_MAX, GrammarError, parse
from meshd_plugins.builtin.llama.prompt.gbnf_check import check
from meshd_plugins.builtin.llama.prompt.patterns import Pattern, PatternError, read_pattern
from meshd_plugins.builtin.llama.prompt.schema_merge import (
    Impossible,
    Schema,
    SchemaError,
    as_list,
    as_map,
)
from meshd_plugins.builtin.llama.prompt.terminals import (
    BARE_CHARACTER,
    BOUND_MAX,
    DIGITS_MAX,
    FORMATS,
    HINTS,
    choice,
    other_key,
    repeated,
)

DECIMALS_MAX: Final = 6  # of a divisor such as 0.25


class Maker(Protocol):
    """What makes a grammar of a schema, as seen by the makers of its parts."""

    def rule(self, schema: Schema, path: str) -> str:
        """The expression of a schema. Raises SchemaError, Impossible."""
        ...

    def make(self, expression: str) -> str:
        """The name of the rule with this expression."""
        ...

    def unsupported(self, path: str, problem: str) -> None:
        """A keyword is not honoured: an error, or a note. Raises SchemaError."""
        ...

    def fitting(self, schema: Schema, path: str) -> Sequence[Any] | None:
        """All values that fit, where they are few; None: they are not. Raises SchemaError."""
        ...


def bounds(schema: Mapping[str, Any], what: str, path: str) -> tuple[int, int | None]:
    """`minWHAT` and `maxWHAT`. Raises SchemaError, Impossible."""
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
    if most is not None and most < least:
        raise Impossible(f"{path}.max{what}")
    if least > REPETITIONS_MAX:
        raise SchemaError(f"{path}.min{what}", f"may be {REPETITIONS_MAX} at most")
    return least, most


def excluded(schema: Mapping[str, Any]) -> list[Any]:
    """The values that `not` names, which is all that is left of it here."""
    inner = as_map(schema.get("not"))
    return [] if inner is None else as_list(inner.get("enum")) or []


# -- strings -----------------------------------------------------------------------------------------------


def string(maker: Maker, schema: Mapping[str, Any], path: str, *, bare: bool = False) -> str:
    """The strings of a schema. Raises SchemaError, Impossible."""
    least, most = bounds(schema, "Length", path)
    unwanted = [value for value in excluded(schema) if isinstance(value, str)]
    held = _shaped(maker, schema, path, bare=bare)
    if held is not None:
        keyword, pattern = held
        _check_length(maker, path, keyword, (pattern.least, pattern.most), (least, most))
        if unwanted and not (pattern.least > 0 and unwanted == [""]):
            maker.unsupported(f"{path}.not", f"is not supported beside {keyword}")
        return pattern.expression if bare else f'"\\"" {pattern.expression} "\\""'
    if unwanted == [""]:
        unwanted, least = [], max(1, least)
        if most == 0:
            raise Impossible(f"{path}.not")
    if unwanted and not bare and not least and most is None:
        return other_key(unwanted, maker.make)
    if unwanted:
        maker.unsupported(f"{path}.not", "is not supported beside a length")
    if bare:
        return repeated(BARE_CHARACTER, least, most)
    if not least and most is None:
        return "string"
    return f'"\\"" {repeated("char", least, most)} "\\""'


def _shaped(
    maker: Maker, schema: Mapping[str, Any], path: str, *, bare: bool
) -> tuple[str, Pattern] | None:
    """What `pattern` or `format` asks for, of which one is held."""
    named, written = schema.get("format"), schema.get("pattern")
    found: tuple[str, Pattern] | None = None
    if written is not None:
        if not isinstance(written, str):
            raise SchemaError(f"{path}.pattern", "must be a string")
        try:
            pattern = read_pattern(written, bare=bare)
            check(parse(f"root ::= {pattern.expression}"))
            found = ("pattern", pattern)
        except PatternError as error:
            maker.unsupported(f"{path}.pattern", str(error))
        except GrammarError as error:
            maker.unsupported(f"{path}.pattern", str(error).replace("the grammar", "it"))
    if named is not None:
        if not isinstance(named, str):
            raise SchemaError(f"{path}.format", "must be a string")
        if named in HINTS:
            return found
        if named not in FORMATS:
            known = ", ".join(FORMATS)
            maker.unsupported(f"{path}.format", f"{named[:40]!r} is none of {known}")
        elif found is not None:
            maker.unsupported(f"{path}.format", "is not supported beside pattern")
        else:
            expression, shortest, longest = FORMATS[named]
            found = ("format", Pattern(expression, shortest, longest))
    return found


def _check_length(
    maker: Maker,
    path: str,
    keyword: str,
    own: tuple[int, int | None],
    wanted: tuple[int, int | None],
) -> None:
    if own[0] < wanted[0]:
        maker.unsupported(f"{path}.minLength", f"the {keyword} also fits shorter texts")
    if wanted[1] is not None and (own[1] is None or own[1] > wanted[1]):
        maker.unsupported(f"{path}.maxLength", f"the {keyword} also fits longer texts")


# -- numbers -----------------------------------------------------------------------------------------------


def _limits(schema: Mapping[str, Any], path: str) -> tuple[float, float, bool, bool]:
    """Lower and upper bound, and whether each is left out. Raises SchemaError."""
    found: dict[str, float] = {}
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bound = schema.get(name)
        if bound is None:
            continue
        number = isinstance(bound, int | float) and not isinstance(bound, bool)
        if not number or not math.isfinite(bound):
            raise SchemaError(f"{path}.{name}", "must be a number")
        upper = name.endswith("aximum")
        if (bound if not upper else -bound) > BOUND_MAX:
            raise SchemaError(f"{path}.{name}", f"is further from 0 than {BOUND_MAX:.0e}")
        found[name] = max(-BOUND_MAX, min(BOUND_MAX, bound))  # what is further off is not written
    low, above = found.get("minimum", -math.inf), found.get("exclusiveMinimum", -math.inf)
    high, below = found.get("maximum", math.inf), found.get("exclusiveMaximum", math.inf)
    return max(low, above), min(high, below), above >= low, below <= high


def integer(maker: Maker, schema: Mapping[str, Any], path: str) -> str:
    """The whole numbers of a schema. Raises SchemaError, Impossible."""
    low, high, above, below = _limits(schema, path)
    first = None if math.isinf(low) else math.ceil(low) + (above and low == math.ceil(low))
    last = None if math.isinf(high) else math.floor(high) - (below and high == math.floor(high))
    divisor = _divisor(maker, schema, path)
    within: Callable[[int | None, int | None], str | None] = integers
    if divisor is not None and divisor.numerator > 1:
        within = Multiples(divisor.numerator, maker.make).within
    unwanted = sorted({int(v) for v in excluded(schema) if _is_whole(v)})
    edges = [first, *(edge for value in unwanted for edge in (value - 1, value + 1)), last]
    found: list[str] = []
    for lower, upper in zip(edges[::2], edges[1::2], strict=True):
        least = lower if first is None or lower is None else max(first, lower)
        most = upper if last is None or upper is None else min(last, upper)
        if least is not None and most is not None and least > most:
            continue
        try:
            part = within(least, most)
        except ValueError as error:
            maker.unsupported(f"{path}.multipleOf", str(error))
            within = integers
            part = within(least, most)
        found += [part] if part is not None else []
    if not found:
        raise Impossible(path)
    return choice(found)


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    )


def _divisor(maker: Maker, schema: Mapping[str, Any], path: str) -> Fraction | None:
    """`multipleOf`, as it is written. Raises SchemaError."""
    value = schema.get("multipleOf")
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0:
        raise SchemaError(f"{path}.multipleOf", "must be a number above 0")
    found = Fraction(str(value))
    if found.numerator > BOUND_MAX or 10**DECIMALS_MAX % found.denominator:
        maker.unsupported(f"{path}.multipleOf", "such multiples cannot be told by their digits")
        return None
    return found


def number(maker: Maker, schema: Mapping[str, Any], path: str) -> str:
    """The numbers of a schema. Raises SchemaError, Impossible."""
    low, high, above, below = _limits(schema, path)
    divisor = _divisor(maker, schema, path)
    decimals = DIGITS_MAX
    if divisor is not None:
        # Of the multiples of 0.01 all with two digits are held, of those of 0.25 the whole ones.
        decimals = next((n for n in range(1, DECIMALS_MAX + 1) if divisor == Fraction(1, 10**n)), 0)
        if not decimals:
            return integer(maker, {**schema, "multipleOf": divisor.numerator}, path)
    unwanted = sorted({v for v in excluded(schema) if _is_number(v)})
    if math.isinf(low) and math.isinf(high) and not unwanted and divisor is None:
        return "number"
    found: list[str] = []
    edges = [low, *unwanted, high]
    for place, (lower, upper) in enumerate(pairwise(edges)):
        from_low, to_high = place == 0, place == len(unwanted)
        strictly = (above if from_low else True, below if to_high else True)
        if lower < low or upper > high:  # a value that is left out and was out of bounds anyway
            strictly = (
                above if lower <= low else strictly[0],
                below if upper >= high else strictly[1],
            )
            lower, upper = max(lower, low), min(upper, high)
        part = _numbers((lower, upper), strictly, decimals) if lower <= upper else None
        found += [part] if part is not None else []
    if not found:
        raise Impossible(path)
    return choice(found)


def _numbers(limits: tuple[float, float], strictly: tuple[bool, bool], decimals: int) -> str | None:
    low, high = limits
    if math.isinf(low) and math.isinf(high):  # both signs, so that one bound is always there
        parts = (
            numbers(-math.inf, 0, above=False, below=False, decimals=decimals),
            numbers(0, math.inf, above=True, below=False, decimals=decimals),
        )
        return choice([part for part in parts if part is not None])
    return numbers(low, high, above=strictly[0], below=strictly[1], decimals=decimals)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
