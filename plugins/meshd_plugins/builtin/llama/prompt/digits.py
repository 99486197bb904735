"""Numbers within bounds, and multiples of a number, as expressions over their digits (GBNF).

What is described are the numbers that JSON would write without an exponent, of at most `DIGITS_MAX` digits
on either side of the point. A bound is kept to the digit: 0.25 to 0.7 is no rounder than it was asked for.
Multiples are told by an automaton that reads digits and keeps the remainder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Final

from meshd_plugins.builtin.llama.prompt.terminals import (
    DIGITS_MAX,
    choice,
    choice_of_texts,
    literal,
)

LISTED_MAX: Final = 256  # multiples within bounds that are written one by one
REMAINDERS_MAX: Final = 32  # a rule for each, and for each number of digits
MULTIPLE_DIGITS_MAX: Final = 9  # of a multiple without bounds

_Rule = Callable[[str], str]


def integers(low: int | None, high: int | None) -> str | None:
    """The whole numbers within bounds, both included; None when there are none."""
    if low is None and high is None:
        return "integer"
    low, high = _closed(low, high, DIGITS_MAX)
    if low > high:
        return None
    alternatives: list[str] = []
    if low < 0:
        below = _natural(max(1, -high), -low)
        alternatives.append(f'"-" {choice(below)}')
    if high >= 0:
        alternatives += _natural(max(0, low), high)
    return choice(alternatives)


def _closed(low: int | None, high: int | None, digits: int) -> tuple[int, int]:
    """The bounds, with one for each that is missing."""
    far = 10**digits - 1
    if low is None:
        return (-far, far) if high is None else (min(-far, high * 10), high)
    return low, max(far, low * 10) if high is None else high


def _natural(low: int, high: int) -> list[str]:
    """Numbers from 0 on: those of each length."""
    found: list[str] = []
    whole: list[int] = []  # lengths of which all numbers are within
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = 10 ** (length - 1) if length > 1 else 0, 10**length - 1
        if length > 1 and low <= first and last <= high:
            whole.append(length)
        else:
            found += _digits(str(max(low, first)), str(min(high, last)))
    if whole:
        found.append(f"[1-9] [0-9]{{{whole[0] - 1},{whole[-1] - 1}}}")
    return found


def _digits(low: str, high: str) -> list[str]:
    """Digits between two texts of the same length."""
    if low == high:
        return [literal(low)]
    if len(low) == 1:
        return [f"[{low}-{high}]"]
    if low[0] == high[0]:
        return [f"{literal(low[0])} {choice(_digits(low[1:], high[1:]))}"]
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    found: list[str] = []
    if low[1:] != "0" * rest:
        found.append(f"{literal(low[0])} {choice(_digits(low[1:], '9' * rest))}")
        first += 1
    ending: list[str] = []
    if high[1:] != "9" * rest:
        ending.append(f"{literal(high[0])} {choice(_digits('0' * rest, high[1:]))}")
        last -= 1
    if first <= last:
        found.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return found + ending


# -- multiples ---------------------------------------------------------------------------------------------


class Multiples:
    """The whole numbers that a number divides."""

    def __init__(self, divisor: int, rule: _Rule) -> None:
        """Take a divisor from 1 on; `rule` makes a rule of an expression and returns its name."""
        zeros = len(str(divisor)) - len(str(divisor).rstrip("0"))
        self._zeros = "0" * zeros  # what is divided by ten ends with it
        self._rest = divisor // 10**zeros
        self._rule = rule
        self._free: dict[tuple[int, int, int], str | None] = {}

    def within(self, low: int | None, high: int | None) -> str | None:
        """Those within bounds; None when there are none. Raises ValueError: there is no way to tell them."""
        scale = 10 ** len(self._zeros)
        low = None if low is None else -(-low // scale)
        high = None if high is None else high // scale
        if self._rest == 1:
            digits = DIGITS_MAX - len(self._zeros)
            low, high = _closed(low, high, max(1, digits))
            parts = [integers(low, min(high, -1)), integers(max(low, 1), high)]
        elif low is not None and high is not None and (high - low) // self._rest <= LISTED_MAX:
            first = -(-low // self._rest) * self._rest
            texts = [str(n) for n in range(first, high + 1, self._rest) if n]
            parts = [choice_of_texts(texts, self._rule)] if texts else []
        elif self._rest <= REMAINDERS_MAX:
            low, high = _closed(low, high, MULTIPLE_DIGITS_MAX)
            below = self._natural(max(1, -high), -low) if low < 0 else None
            parts = [f'"-" {below}' if below else None, self._natural(max(1, low), high)]
        else:
            raise ValueError("such multiples cannot be told by their digits")
        found = [
            f"({part}) {literal(self._zeros)}" if self._zeros else part for part in parts if part
        ]
        if low <= 0 <= high:
            found.append('"0"')
        return choice(found) if found else None

    def _natural(self, low: int, high: int) -> str | None:
        """Those from 1 on: of each length."""
        found: list[str] = []
        whole: list[int] = []  # lengths of which all numbers are within
        for length in range(len(str(low)), len(str(high)) + 1):
            first, last = 10 ** (length - 1), 10**length - 1
            if low <= first and last <= high:
                whole.append(length)
            elif low <= last and first <= high:
                texts = str(max(low, first)), str(min(high, last))
                found.append(self._between(*texts, 0) or "")
        if whole:
            for digit in range(1, 10):
                after = self._any(whole[0] - 1, whole[-1] - 1, digit % self._rest)
                found.append(_then(f'"{digit}"', after) if after else "")
        found = [each for each in found if each]
        return choice(found) if found else None

    def _between(self, low: str, high: str, remainder: int) -> str | None:
        """Digits between two texts of the same length that end without a remainder."""
        if not low:
            return '""' if remainder == 0 else None
        rest = len(low) - 1
        if low == "0" * len(low) and high == "9" * len(low):
            return self._any(len(low), len(low), remainder)
        found: list[str] = []
        for digit in range(int(low[0]), int(high[0]) + 1):
            after = self._between(
                low[1:] if digit == int(low[0]) else "0" * rest,
                high[1:] if digit == int(high[0]) else "9" * rest,
                (remainder * 10 + digit) % self._rest,
            )
            if after:
                found.append(_then(f'"{digit}"', after))
        return self._rule(choice(found)) if found else None

    def _any(self, least: int, most: int, remainder: int) -> str | None:
        """So many digits that end without a remainder."""
        key = (max(least, 0), most, remainder)
        if key not in self._free:
            found = ['""'] if least <= 0 and remainder == 0 else []
            for digit in range(10 if most else 0):
                after = self._any(least - 1, most - 1, (remainder * 10 + digit) % self._rest)
                if after:
                    found.append(_then(f'"{digit}"', after))
            self._free[key] = None if not found else self._rule(choice(found)) if most else '""'
        return self._free[key]


def _then(first: str, after: str) -> str:
    return first if after == '""' else f"{first} {after}"


# -- numbers with a point ----------------------------------------------------------------------------------


def numbers(
    low: float, high: float, *, above: bool, below: bool, decimals: int = DIGITS_MAX
) -> str | None:
    """Numbers within bounds, one of them finite; `above` and `below` leave the bound itself out.

    None: there are none with so many decimals.
    """
    whole = integers(_up(low, strictly=above), _down(high, strictly=below))
    found = [whole] if whole is not None else []
    if decimals > 0:
        found += _fractions(low, high, (above, below), decimals)
        found += [f'"-" {each}' for each in _fractions(-high, -low, (below, above), decimals)]
    return choice(found) if found else None


def _fractions(low: float, high: float, strictly: tuple[bool, bool], decimals: int) -> list[str]:
    """Those with a point, from 0 on, within bounds of which one may be infinite or below 0."""
    if high <= 0:
        return []
    if low < 0:
        low, strictly = 0.0, (True, strictly[1])  # with 0 itself left to the whole ones
    first, lower = _split(low)
    last, upper = (10**DIGITS_MAX - 1, None) if math.isinf(high) else _split(high)
    least = _Bound(lower, strictly[0]) if lower or strictly[0] or first == 0 else None
    if first == 0 and not lower:
        least = _Bound("", strictly=True)  # -0.0 is no number that anybody asked for
    most = None if upper is None else _Bound(upper, strictly[1] or not upper)
    if first == last:
        text = _fraction(least, most, _room(first, decimals))
        return [f'"{first}" {text}'] if text else []
    found: list[str] = []
    if least is not None:
        text = _fraction(least, None, _room(first, decimals))
        found += [f'"{first}" {text}'] if text else []
        first += 1
    if most is not None:
        text = _fraction(None, most, _room(last, decimals))
        found += [f'"{last}" {text}'] if text else []
        last -= 1
    if first <= last and (between := integers(first, last)):
        found.append(f'{between} "." [0-9]{{1,{decimals}}}')
    return found


def _room(whole: int, decimals: int) -> int:
    """How many decimals a number next to a bound may have for a double to tell the two apart."""
    return min(decimals, DIGITS_MAX - (len(str(whole)) if whole else 0))


class _Bound:
    """What stands behind the point of a bound, without zeros at its end."""

    def __init__(self, digits: str, strictly: bool) -> None:
        self.digits = digits
        self.strictly = strictly

    def behind(self) -> _Bound:
        """What is left of it behind its first digit."""
        return _Bound(self.digits[1:], self.strictly)


def _fraction(low: _Bound | None, high: _Bound | None, room: int) -> str | None:
    """A point and digits within bounds."""
    found = _behind_point(low, high, room, begun=False) if room > 0 else []
    return f'"." {choice(found)}' if found else None


def _behind_point(low: _Bound | None, high: _Bound | None, room: int, *, begun: bool) -> list[str]:
    """Digits from here on, at most `room`; `begun`: there are some already."""
    if low is not None and not low.digits and not low.strictly:
        low = None  # all that follows is above it
    if high is not None and not high.digits:
        return ['""'] if begun and low is None and not high.strictly else []
    if low is None and high is None:
        if room == 0:
            return ['""'] if begun else []
        return [f"[0-9]{{{0 if begun else 1},{room}}}"]
    if low is not None and high is None and not low.digits:
        return [f"[0-9]{{0,{room - 1}}} [1-9]"] if room else []  # anything but 0
    found = ['""'] if low is None and begun else []
    if room == 0:
        return found
    least = int(low.digits[:1] or 0) if low is not None else 0
    most = int(high.digits[0]) if high is not None else 9
    if least > most:
        return found
    edges: dict[int, tuple[_Bound | None, _Bound | None]] = {}
    if low is not None:
        edges[least] = (low.behind(), None)
    if high is not None:
        edges[most] = (edges.get(most, (None, None))[0], high.behind())
    free = [digit for digit in range(least, most + 1) if digit not in edges]
    if free:
        more = f" [0-9]{{0,{room - 1}}}" if room > 1 else ""
        found.append(f"[{free[0]}-{free[-1]}]{more}")
    for digit, (lower, upper) in edges.items():
        if after := _behind_point(lower, upper, room - 1, begun=True):
            found.append(_then(f'"{digit}"', choice(after)))
    return found


def _split(bound: float) -> tuple[int, str]:
    """Whole part of a number from 0 on, and its decimals without zeros at the end."""
    whole, _, rest = f"{Decimal(str(bound)):f}".partition(".")
    return int(whole), rest.rstrip("0")


def _up(bound: float, *, strictly: bool) -> int | None:
    if math.isinf(bound):
        return None
    whole = math.ceil(bound)
    return whole + (strictly and whole == bound)


def _down(bound: float, *, strictly: bool) -> int | None:
    if math.isinf(bound):
        return None
    whole = math.floor(bound)
    return whole - (strictly and whole == bound)
