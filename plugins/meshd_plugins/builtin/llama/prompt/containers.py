"""Objects and arrays of a schema, as expressions of a grammar.

Properties come in the schema's order. Items that may not repeat are written where the values they can have
are few: one rule for each set of those that were written already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.scalars import Maker, bounds
from meshd_plugins.builtin.llama.prompt.schema_merge import (
    Impossible,
    Schema,
    canonical,
    checked,
    constraining,
    prefix_of,
    properties_of,
    required_of,
)
from meshd_plugins.builtin.llama.prompt.terminals import (
    choice,
    json_text,
    literal,
    other_key,
    repeated,
)

SETS_MAX: Final = 130  # of values that were written, where none may repeat

# -- objects -----------------------------------------------------------------------------------------------


def an_object(maker: Maker, schema: Mapping[str, Any], path: str) -> str:
    """The objects of a schema. Raises SchemaError, Impossible."""
    properties = properties_of(schema, path)
    required = required_of(schema, path)
    more = others(schema, properties, path)
    for name in required:
        properties.setdefault(name, more)
    rules: list[tuple[str, bool]] = []  # of each property, and whether it must be there
    for name, part in properties.items():
        here = f"{path}.properties.{name}"
        try:
            value = maker.rule(part, here)
        except Impossible:
            if name in required:
                raise
            continue
        key = literal(json_text(name))
        rules.append((maker.make(f'{key} ws ":" ws {value}'), name in required))
    extra = _extra(maker, schema, properties, more, path)
    check_count(maker, schema, (len(required), len(rules)), path, more=extra is not None)
    if not rules and extra is None:
        return '"{" ws "}"'
    count = bounds(schema, "Properties", path)
    return f'"{{" ws {_members(maker.make, rules, extra, count)}ws "}}"'


def others(schema: Mapping[str, Any], properties: Mapping[str, Schema], path: str) -> Schema:
    """What properties that have no name in the schema are to be: none, where it names some and asks for no others."""
    more = schema.get("additionalProperties", not properties)
    return checked(more, f"{path}.additionalProperties")


def _extra(
    maker: Maker,
    schema: Mapping[str, Any],
    properties: Mapping[str, Schema],
    more: Schema,
    path: str,
) -> str | None:
    if more is False or bounds(schema, "Properties", path)[1] == 0:
        return None
    try:
        value = maker.rule(more, f"{path}.additionalProperties")
    except Impossible:
        return None
    key = other_key(list(properties), maker.make) if properties else "string"
    names = checked(schema.get("propertyNames", True), f"{path}.propertyNames")
    if isinstance(names, Mapping) and constraining(names).keys() - {"type"}:
        if properties:
            maker.unsupported(f"{path}.propertyNames", "is not supported beside properties")
        else:
            key = maker.rule({"type": "string", **names}, f"{path}.propertyNames")
    return maker.make(f'{key} ws ":" ws {value}')


def check_count(
    maker: Maker, schema: Mapping[str, Any], named: tuple[int, int], path: str, *, more: bool
) -> None:
    """Note what `minProperties` and `maxProperties` ask for beyond what is certain.

    `named`: how many properties must be there, and how many may.
    """
    required, possible = named
    least, most = bounds(schema, "Properties", path)
    # One that is asked for without a name may repeat a key: only the first is sure to count.
    if least > required and not (least == 1 and more and not possible):
        maker.unsupported(
            f"{path}.minProperties", "is supported where as many properties are required"
        )
    if most is not None and possible + more > most and (possible or most < required):
        maker.unsupported(f"{path}.maxProperties", "is smaller than the number of properties")


def _members(
    make: Callable[[str], str],
    rules: Sequence[tuple[str, bool]],
    extra: str | None,
    count: tuple[int, int | None],
) -> str:
    """What stands between the braces: a rule for each property says which members may be left from it on."""
    left: str | None = None
    if extra is not None:
        another = make(f'ws "," ws {extra}')
        room = None if count[1] is None else max(0, count[1] - len(rules) - 1)
        left = make(f"{extra} {repeated(another, 0, room)}")
    needed = not rules and count[0] > 0
    for member, is_required in reversed(rules):
        more = f'ws "," ws {left}' if needed else f'(ws "," ws {left})?'
        one = member if left is None else f"{member} {make(more)}"
        left = make(one if is_required or left is None else choice([one, left]))
        needed = needed or is_required
    return f"{left} " if needed else f"({left})? "


# -- arrays ------------------------------------------------------------------------------------------------


def an_array(maker: Maker, schema: Mapping[str, Any], path: str) -> str:
    """The arrays of a schema. Raises SchemaError, Impossible."""
    least, most = bounds(schema, "Items", path)
    prefix = prefix_of(schema, path)
    rest = checked(schema.get("items", True), f"{path}.items")
    if schema.get("uniqueItems") is True and (most is None or most > 1):
        found = _without_repetition(maker, prefix, rest, (least, most), path)
        if found is not None:
            return found
        maker.unsupported(
            f"{path}.uniqueItems", "is supported where items can have a few values only"
        )
    first: list[str] = []
    cut = False
    for number, part in enumerate(prefix[: most if most is not None else len(prefix)]):
        here = f"{path}.prefixItems[{number}]"
        try:
            first.append(maker.rule(part, here))
        except Impossible:
            if number < least:
                raise
            cut = True
            break
    try:
        item: str | None = maker.rule(rest, f"{path}.items")
    except Impossible:
        if least > len(first):
            raise
        item = None
    return _listed(maker.make, first, None if cut else item, (least, most))


def _listed(
    make: Callable[[str], str],
    first: Sequence[str],
    rest: str | None,
    count: tuple[int, int | None],
) -> str:
    """All of `first` that must be there, then as many more as may be."""
    least, most = count
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


def _without_repetition(
    maker: Maker, prefix: Sequence[Any], rest: Schema, count: tuple[int, int | None], path: str
) -> str | None:
    """All orders of all selections; None: there are too many."""
    values = maker.fitting(rest, f"{path}.items")
    if prefix or values is None:
        return None
    distinct = list({canonical(value): value for value in values}.values())
    least = count[0]
    most = len(distinct) if count[1] is None else min(count[1], len(distinct))
    if least > most:
        raise Impossible(f"{path}.items")
    numbers = range(len(distinct))
    count_of_sets = 0
    for size in range(most):
        count_of_sets += comb(len(distinct), size)
        if count_of_sets > SETS_MAX:
            return None
    sets = [chosen for size in range(most) for chosen in combinations(numbers, size)]
    texts = [literal(json_text(value)) for value in distinct]
    rules: dict[tuple[int, ...], str] = {}  # what may follow, by what was written
    for chosen in reversed(sets):
        following: list[str] = []
        for number in numbers:
            if number not in chosen:
                after = rules.get(tuple(sorted((*chosen, number))), "")
                following.append(f"{texts[number]} {after}".rstrip())
        expression = choice(following)
        if chosen:
            expression = f'ws "," ws {maker.make(expression)}'
        optional = len(chosen) >= least
        rules[chosen] = maker.make(f"({expression})?" if optional else expression)
    return f'"[" ws {rules[()]} ws "]"' if rules else '"[" ws "]"'
