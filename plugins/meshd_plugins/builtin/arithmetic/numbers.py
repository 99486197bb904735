"""Exact rationals, and intervals where a root has no exact value.

Invariant: the true value of an expression lies in [low, high] at every step; low == high means that it
is exact. So no digit is ever shown that was not computed, whatever cancels. Every number stays below
`BITS_MAX` bits, and an operation that would exceed it is refused before it is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from meshd_plugins.expressions import ExpressionError

DIGITS_MAX: Final = 4_000
"""Largest result in decimal digits (Python refuses to print ints beyond 4,300); raising it raises the
worst time of an evaluation with its square."""

BITS_MAX: Final = int(DIGITS_MAX * math.log2(10))
ROOT_DIGITS: Final = 60
"""Significant digits to which an irrational root is enclosed."""

COARSE_BITS: Final = 512
"""Significant bits to which the ends of an inexact interval are rounded, outwards: far more than are
shown, and it keeps a long chain of roots as quick as a short one."""

ROOT_MAX: Final = 64
"""Largest n of an nth root."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A real number, known to lie in [low, high]."""

    low: Fraction
    high: Fraction

    @classmethod
    def of(cls, value: Fraction | int) -> Interval:
        """Make an exact one. Raises ExpressionError(too_large)."""
        fraction = bounded(Fraction(value))
        return cls(fraction, fraction)

    @property
    def exact(self) -> bool:
        """Whether there is no doubt left."""
        return self.low == self.high

    def __add__(self, other: Interval) -> Interval:
        return enclosing(self.low + other.low, self.high + other.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        if self.exact and other.exact:
            return Interval.of(self.low * other.low)
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return enclosing(min(corners), max(corners))

    def __truediv__(self, other: Interval) -> Interval:
        if other.low == 0 == other.high:
            raise undefined("a division by zero")
        if other.low <= 0 <= other.high:
            raise undefined("a division by a value that cannot be told from zero")
        return self * Interval(1 / other.high, 1 / other.low)

    def integer(self, what: str) -> int:
        """The whole number that this is. Raises ExpressionError(undefined)."""
        if not self.exact or self.low.denominator != 1:
            raise undefined(f"{what} of something that is no whole number")
        return self.low.numerator


def undefined(what: str) -> ExpressionError:
    """Say that an operation has no value."""
    return ExpressionError(f"{what} has no value", code="undefined")


def too_large(digits: int | None = None) -> ExpressionError:
    """Say that a result is beyond the bound."""
    about = "" if digits is None else f" (about {digits:,} digits)"
    return ExpressionError(
        f"the result is too large{about}: at most {DIGITS_MAX:,} digits are computed",
        code="too_large",
    )


def bounded(value: Fraction) -> Fraction:
    """Pass a number that is within the bound. Raises ExpressionError(too_large)."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS_MAX:
        raise too_large()
    return value


def enclosing(low: Fraction, high: Fraction) -> Interval:
    """Make an interval; an inexact one may become a little wider. Raises ExpressionError(too_large)."""
    if low == high:
        return Interval.of(low)
    return Interval(bounded(_outwards(low, math.floor)), bounded(_outwards(high, math.ceil)))


def _outwards(value: Fraction, rounding: Callable[[Fraction], int]) -> Fraction:
    if value.denominator.bit_length() <= COARSE_BITS:
        return value
    places = COARSE_BITS - value.numerator.bit_length() + value.denominator.bit_length()
    scale = Fraction(2) ** places
    return rounding(value * scale) / scale


def power(base: Interval, exponent: Interval) -> Interval:
    """Raise to a rational power; a whole one exactly, another through a root."""
    if not exponent.exact:
        raise ExpressionError("an exponent must be exact", code="undefined")
    above, below = exponent.low.numerator, exponent.low.denominator
    if below > ROOT_MAX:
        raise ExpressionError(
            f"only roots up to the {ROOT_MAX}th are computed; the exponent is {exponent.low}",
            code="too_large",
        )
    raised = _whole_power(base, above)
    return raised if below == 1 else root(raised, below)


def _whole_power(base: Interval, exponent: int) -> Interval:
    if base.low <= 0 <= base.high and exponent <= 0:
        raise undefined("0^0" if exponent == 0 else "a division by zero")
    bits = max(
        math.log2(max(abs(part), 1))
        for end in (base.low, base.high)
        for part in (end.numerator, end.denominator)
    )
    if bits and abs(exponent) > BITS_MAX / bits:
        astronomic = abs(exponent) > 1 << 60
        raise too_large(None if astronomic else int(bits * abs(exponent) / math.log2(10)) + 1)
    if not bits:
        exponent = exponent % 2 or (2 if exponent > 0 else -2)  # ±1 and 0: only the sign matters
    if base.exact:
        return Interval.of(base.low**exponent)
    ends = sorted((base.low**exponent, base.high**exponent))
    if base.low < 0 < base.high and exponent % 2 == 0:
        ends[0] = Fraction(0)
    return enclosing(ends[0], ends[1])


def root(value: Interval, degree: int) -> Interval:
    """The real nth root: exact where it is rational, else enclosed to `ROOT_DIGITS` digits."""
    if value.high < 0 and degree % 2 == 1:
        return -root(-value, degree)
    if value.low < 0:
        raise undefined("an even root of a negative number" if degree % 2 == 0 else "this root")
    low, high = _root_ends(value.low, degree)
    if not value.exact:
        high = _root_ends(value.high, degree)[1]
    return Interval(low, high)


def _root_ends(value: Fraction, degree: int) -> tuple[Fraction, Fraction]:
    above, above_exact = _integer_root(value.numerator, degree)
    below, below_exact = _integer_root(value.denominator, degree)
    if above_exact and below_exact:
        return Fraction(above, below), Fraction(above, below)
    # Scale so that the integer root has ROOT_DIGITS digits, whatever the size of the value.
    size = (value.numerator.bit_length() - value.denominator.bit_length()) * math.log10(2) / degree
    places = max(0, ROOT_DIGITS - math.floor(size))
    scale = 10**places
    scaled, _ = _integer_root(value.numerator * scale**degree // value.denominator, degree)
    return Fraction(scaled, scale), Fraction(scaled + 1, scale)


def _integer_root(value: int, degree: int) -> tuple[int, bool]:
    """Floor of the root of a natural number, and whether it is the root itself."""
    if degree == 2:
        found = math.isqrt(value)
        return found, found * found == value
    if value < 2:
        return value, True
    found = 1 << -(-value.bit_length() // degree)  # Newton from above descends to the floor
    while True:
        lower = ((degree - 1) * found + value // found ** (degree - 1)) // degree
        if lower >= found:
            return found, found**degree == value
        found = lower
