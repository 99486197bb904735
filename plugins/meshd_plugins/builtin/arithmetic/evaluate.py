"""A tree to its value, exactly; each operation bounded before it is carried out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, assert_never

from meshd_plugins.builtin.arithmetic import units
from meshd_plugins.builtin.arithmetic.numbers import (
    BITS_MAX,
    DIGITS_MAX,
    Interval,
    power,
    root,
    too_large,
    undefined,
)
from meshd_plugins.expressions import (
    Binary,
    Call,
    Compound,
    Convert,
    ExpressionError,
    Negate,
    Node,
    Number,
    Percent,
    Quantity,
    Unit,
    render,
)


@dataclass(frozen=True, slots=True)
class Measure:
    """A number, with a unit or without."""

    number: Interval
    unit: Unit | None = None

    @property
    def shown_unit(self) -> str:
        """For messages."""
        return self.unit.shown if self.unit else "a plain number"


def evaluate(node: Node) -> Measure:
    """Compute a tree.

    Raises:
        ExpressionError: undefined, too_large, ambiguous or bad_units.
    """
    match node:
        case Number():
            return Measure(Interval.of(node.value))
        case Quantity(value, unit):
            return _quantity(value, unit)
        case Compound(parts):
            return _compound(parts)
        case Negate(operand):
            inner = evaluate(operand)
            return Measure(-inner.number, inner.unit)
        case Percent(operand):
            inner = evaluate(operand)
            return Measure(_plain(inner, "%") * Interval.of(Fraction(1, 100)))
        case Binary():
            return _binary(node)
        case Call(function, arguments):
            return _FUNCTIONS[function]([evaluate(argument) for argument in arguments])
        case Convert(operand, unit):
            return convert(evaluate(operand), unit)
        case _:
            assert_never(node)


def convert(measure: Measure, unit: Unit) -> Measure:
    """Express a quantity in another unit. Raises ExpressionError(bad_units)."""
    if measure.unit is None:
        raise ExpressionError(
            f"a plain number cannot be converted to {unit.shown}: it has no unit", code="bad_units"
        )
    if units.is_temperature(measure.unit) or units.is_temperature(unit):
        factor, offset = units.temperature_scale(measure.unit)
        target_factor, target_offset = units.temperature_scale(unit)
        kelvin = measure.number * Interval.of(factor) + Interval.of(offset)
        if kelvin.high < 0:
            raise undefined("a temperature below absolute zero")
        shifted = kelvin - Interval.of(target_offset)
        return Measure(shifted / Interval.of(target_factor), unit)
    _require_same_dimension(measure.unit, unit, "converted to")
    ratio = units.factor_of(measure.unit) / units.factor_of(unit)
    return Measure(measure.number * Interval.of(ratio), unit)


def _require_same_dimension(one: Unit, other: Unit, what: str) -> None:
    if units.dimension_of(one) != units.dimension_of(other):
        raise ExpressionError(f"{one.shown} cannot be {what} {other.shown}", code="bad_units")


def _plain(measure: Measure, what: str) -> Interval:
    if measure.unit is not None:
        raise ExpressionError(
            f"{what} wants a plain number, not one in {measure.unit.shown}", code="bad_units"
        )
    return measure.number


def _quantity(value: Node, unit: Unit) -> Measure:
    for atom in unit.atoms:
        units.definition(atom.name)
    return Measure(_plain(evaluate(value), unit.shown), unit)


def _compound(parts: tuple[Quantity, ...]) -> Measure:
    total = evaluate(parts[0])
    for part in parts[1:]:
        total = _add(total, evaluate(part), sign=1)
    return total


def _add(left: Measure, right: Measure, *, sign: int) -> Measure:
    if left.unit is None or right.unit is None:
        if left.unit is not right.unit:
            raise ExpressionError(
                f"{left.shown_unit} and {right.shown_unit} cannot be added or subtracted",
                code="bad_units",
            )
        number = right.number
    else:
        units.refuse_temperature(left.unit)
        units.refuse_temperature(right.unit)
        _require_same_dimension(right.unit, left.unit, "added to or subtracted from")
        number = convert(right, left.unit).number
    return Measure(left.number + number if sign > 0 else left.number - number, left.unit)


def _binary(node: Binary) -> Measure:
    if (
        node.operator in ("+", "-")
        and isinstance(node.right, Percent)
        and not isinstance(node.left, Percent)
    ):
        share, whole = render(node.right), render(node.left)
        raise ExpressionError(
            f"{render(node)} can be read in two ways: write {whole} {node.operator} "
            f"{share} of {whole}, or {whole} {node.operator} ({share} of 1)",
            code="ambiguous",
        )
    left, right = evaluate(node.left), evaluate(node.right)
    match node.operator:
        case "+":
            return _add(left, right, sign=1)
        case "-":
            return _add(left, right, sign=-1)
        case "*" | "of":
            return _multiply(left, right, sign=1)
        case "/":
            return _multiply(left, right, sign=-1)
        case "mod":
            return _modulo(left, right)
        case "^":
            return _power(left, right)
        case _:
            assert_never(node.operator)


def _multiply(left: Measure, right: Measure, *, sign: int) -> Measure:
    number = left.number * right.number if sign > 0 else left.number / right.number
    if left.unit is None and right.unit is None:
        return Measure(number)
    if (left.unit is not None and right.unit is not None) or (right.unit is not None and sign < 0):
        for unit in (left.unit, right.unit):
            units.refuse_temperature(unit)
    unit, factor = units.multiply(left.unit, right.unit, sign)
    return Measure(number * Interval.of(factor), unit)


def _modulo(left: Measure, right: Measure) -> Measure:
    one, other = _plain(left, "mod"), _plain(right, "mod")
    if not (one.exact and other.exact):
        raise undefined("a remainder of a rounded value")
    if other.low == 0:
        raise undefined("a division by zero")
    return Measure(Interval.of(one.low % other.low))


def _power(left: Measure, right: Measure) -> Measure:
    exponent = _plain(right, "an exponent")
    if left.unit is None:
        return Measure(power(left.number, exponent))
    whole = exponent.integer("a unit to the power")
    units.refuse_temperature(left.unit)
    if not 1 <= whole <= units.POWER_MAX:
        raise ExpressionError(
            f"a quantity can be raised to 1 to {units.POWER_MAX}, not to {whole}", code="bad_units"
        )
    result = left
    for _ in range(whole - 1):
        result = _multiply(result, left, sign=1)
    return result


def _factorial(number: Interval) -> Interval:
    n = number.integer("the factorial")
    if n < 0:
        raise undefined("the factorial of a negative number")
    if n > DIGITS_MAX:  # n! has more than n digits from 25 on
        raise too_large(int(math.lgamma(n + 1) / math.log(10)) + 1 if n < 1 << 60 else None)
    return Interval.of(math.factorial(n))


def _on_number(
    name: str, function: Callable[[Interval], Interval]
) -> Callable[[list[Measure]], Measure]:
    def call(arguments: list[Measure]) -> Measure:
        return Measure(function(_plain(arguments[0], name)))

    return call


def _on_integers(name: str, function: Callable[..., int]) -> Callable[[list[Measure]], Measure]:
    def call(arguments: list[Measure]) -> Measure:
        integers = [_plain(item, name).integer(name) for item in arguments]
        result = integers[0]
        for integer in integers[1:]:
            result = function(result, integer)
            if result.bit_length() > BITS_MAX:
                raise too_large()
        return Measure(Interval.of(abs(result)))

    return call


def _sum(arguments: list[Measure]) -> Measure:
    total = arguments[0]
    for item in arguments[1:]:
        total = _add(total, item, sign=1)
    return total


def _product(arguments: list[Measure]) -> Measure:
    total = arguments[0]
    for item in arguments[1:]:
        total = _multiply(total, item, sign=1)
    return total


def _mean(arguments: list[Measure]) -> Measure:
    total = _sum(arguments)
    return Measure(total.number * Interval.of(Fraction(1, len(arguments))), total.unit)


def _extreme(arguments: list[Measure], *, largest: bool) -> Measure:
    best = arguments[0]
    for item in arguments[1:]:
        apart = _add(item, best, sign=-1).number
        if apart.low <= 0 <= apart.high and not apart.exact:
            raise undefined("a comparison of values that cannot be told apart")
        if (apart.low > 0) == largest and apart.low != 0:
            best = item
    return best


def _absolute(arguments: list[Measure]) -> Measure:
    number = arguments[0].number
    ends = sorted((abs(number.low), abs(number.high)))
    if number.low < 0 < number.high:
        ends[0] = Fraction(0)
    return Measure(Interval(ends[0], ends[1]), arguments[0].unit)


def _floor(number: Interval) -> Interval:
    low, high = math.floor(number.low), math.floor(number.high)
    if low != high:
        raise undefined("the floor of a value this close to a whole number")
    return Interval.of(low)


def _round(arguments: list[Measure]) -> Measure:
    """Half away from zero, as people learn it at school; an optional number of places."""
    number = _plain(arguments[0], "round")
    places = _plain(arguments[1], "round").integer("places") if len(arguments) > 1 else 0
    if not 0 <= places <= 100:
        raise ExpressionError("round takes 0 to 100 places", code="too_large")
    scale = 10**places
    ends = [
        Fraction(math.floor(abs(end) * scale + Fraction(1, 2)) * (1 if end >= 0 else -1), scale)
        for end in (number.low, number.high)
    ]
    if ends[0] != ends[1]:
        raise undefined("rounding a value this close to a half")
    return Measure(Interval.of(ends[0]))


def _square_root(arguments: list[Measure]) -> Measure:
    return Measure(root(_plain(arguments[0], "sqrt"), 2))


_FUNCTIONS: Final[dict[str, Callable[[list[Measure]], Measure]]] = {
    "sqrt": _square_root,
    "cbrt": _on_number("cbrt", lambda number: root(number, 3)),
    "abs": _absolute,
    "factorial": _on_number("!", _factorial),
    "floor": _on_number("floor", _floor),
    "ceil": _on_number("ceil", lambda number: -_floor(-number)),
    "round": _round,
    "gcd": _on_integers("gcd", math.gcd),
    "lcm": _on_integers("lcm", math.lcm),
    "sum": _sum,
    "product": _product,
    "difference": lambda arguments: _add(arguments[0], arguments[1], sign=-1),
    "quotient": lambda arguments: _multiply(arguments[0], arguments[1], sign=-1),
    "mean": _mean,
    "min": lambda arguments: _extreme(arguments, largest=False),
    "max": lambda arguments: _extreme(arguments, largest=True),
}
