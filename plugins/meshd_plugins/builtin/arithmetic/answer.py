"""A question to its answer as text and plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.arithmetic.evaluate import Measure, evaluate
from meshd_plugins.builtin.arithmetic.numbers import Interval
from meshd_plugins.expressions import Node, render

DECIMAL_PLACES_MAX: Final = 60
"""A terminating decimal longer than this is shown as a fraction and rounded."""

SHOWN_DIGITS: Final = 20
"""Significant digits of a rounded figure."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was computed."""

    expression: str  # normalised
    result: str  # exact where `exact`: "42", "1/3", "7.67 miles"; else the digits that are certain
    exact: bool
    decimal: str  # "" unless the result is a fraction; then rounded to SHOWN_DIGITS

    @property
    def text(self) -> str:
        """One line for people: "17 + 25 = 42", "1 / 3 = 1/3 ≈ 0.333…"."""
        sign = "=" if self.exact else "≈"
        rounded = f" ≈ {self.decimal}" if self.decimal else ""
        return f"{self.expression} {sign} {self.result}{rounded}"

    @property
    def detail(self) -> dict[str, Value]:
        """Plain data for programs."""
        detail: dict[str, Value] = {
            "expression": self.expression,
            "result": self.result,
            "exact": self.exact,
        }
        if self.decimal:
            detail["decimal"] = self.decimal
        return detail


def answer(node: Node) -> Answer:
    """Compute and write down. Raises ExpressionError as `evaluate` does."""
    measure = evaluate(node)
    unit = f" {measure.unit.shown}" if measure.unit else ""
    result, decimal = _written(measure)
    return Answer(
        expression=render(node),
        result=result + unit,
        exact=measure.number.exact,
        decimal=decimal + unit if decimal else "",
    )


def _written(measure: Measure) -> tuple[str, str]:
    number = measure.number
    if not number.exact:
        return certain_digits(number), ""
    exact = decimal_of(number.low)
    if exact is not None:
        return exact, ""
    return str(number.low), rounded(number.low, SHOWN_DIGITS)


def decimal_of(value: Fraction) -> str | None:
    """The decimal that a fraction is, or None when it does not end (or not soon enough)."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1 or places > DECIMAL_PLACES_MAX:
        return None
    return _placed(abs(value.numerator) * 10**places // value.denominator, places, value < 0)


def _placed(digits: int, places: int, negative: bool) -> str:
    text = str(digits).rjust(places + 1, "0")
    whole, part = (text[:-places], text[-places:].rstrip("0")) if places else (text, "")
    return ("-" if negative else "") + whole + (f".{part}" if part else "")


def rounded(value: Fraction, significant: int) -> str:
    """Round half up to significant digits; very large and very small values with an exponent."""
    if value == 0:
        return "0"
    exponent = _exponent(abs(value))
    scaled = abs(value) * Fraction(10) ** (significant - 1 - exponent)
    digits = math.floor(scaled + Fraction(1, 2))
    if digits >= 10**significant:
        digits, exponent = digits // 10, exponent + 1
    places = significant - 1 - exponent
    if 0 <= places <= significant + 5:
        return _placed(digits, places, value < 0)
    mantissa = _placed(digits, significant - 1, value < 0)
    return f"{mantissa}e{exponent}"


def _exponent(value: Fraction) -> int:
    """Floor of log10 of a positive number, exactly."""
    guess = math.floor(
        (value.numerator.bit_length() - value.denominator.bit_length()) * math.log10(2)
    )
    while Fraction(10) ** guess > value:
        guess -= 1
    while Fraction(10) ** (guess + 1) <= value:
        guess += 1
    return guess


def certain_digits(number: Interval) -> str:
    """As many digits, at most SHOWN_DIGITS, as both ends of the interval agree on."""
    for significant in range(SHOWN_DIGITS, 0, -1):
        low = rounded(number.low, significant)
        if low == rounded(number.high, significant):
            return low
    return "0"
