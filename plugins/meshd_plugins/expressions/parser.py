"""A Pratt parser over the tokens: precedence, postfix forms, units and spoken argument lists.

Binding, from loose to tight: conversion ("in miles", at the root only); + -; * / mod of and products
without a sign; a leading minus; ^ (right-associative); ! % ² ³; a number with its unit. So -2^2 is -4.
Depth of nesting is bounded by `DEPTH_MAX`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final, cast

from meshd_plugins.expressions.errors import ExpressionError
from meshd_plugins.expressions.nodes import (
    Binary,
    Call,
    Compound,
    Convert,
    Negate,
    Node,
    Number,
    Operator,
    Percent,
    Quantity,
    Unit,
    UnitAtom,
)
from meshd_plugins.expressions.tokens import Kind, Token, tokenize
from meshd_plugins.expressions.unit_words import unit_named

DEPTH_MAX: Final = 60
"""Deepest nesting; raising it costs Python stack (about five frames a level)."""

DEPTH_LENIENT_MAX: Final = 12
"""The same in prose, where each place of an unclosed nest is read anew: it multiplies the worst time."""

_SUM, _PRODUCT, _SIGN, _POWER = 10, 20, 25, 30
_INFIX: Final[dict[str, tuple[int, int]]] = {  # text: (left binding, right binding)
    "+": (_SUM, _SUM + 1),
    "-": (_SUM, _SUM + 1),
    "*": (_PRODUCT, _PRODUCT + 1),
    "x": (_PRODUCT, _PRODUCT + 1),
    "/": (_PRODUCT, _PRODUCT + 1),
    "mod": (_PRODUCT, _PRODUCT + 1),
    "of": (_PRODUCT, _PRODUCT + 1),
    "^": (_POWER, _SIGN),  # the right side may begin with a sign: 2^-3
}
_CONVERSION_WORDS: Final = frozenset({"in", "to", "into", "as"})
_FRACTION_WORDS: Final = {"half": 2, "third": 3, "quarter": 4}
_MULTIPLE_WORDS: Final = {"double": 2, "twice": 2, "triple": 3}
_POWER_WORDS: Final = {"square": 2, "sq": 2, "cubic": 3}
_DEGREE_WORDS: Final = frozenset({"degree", "degrees", "deg"})
_VERBS: Final[dict[str, tuple[tuple[str, ...], Operator, bool]]] = {
    # verb: (what joins its operands, operator, operands swapped)
    "add": (("and", "to"), "+", False),
    "subtract": (("from",), "-", True),
    "multiply": (("by", "and", "with"), "*", False),
    "divide": (("by",), "/", False),
}
_ARITY: Final[dict[str, tuple[int, int]]] = {
    "sqrt": (1, 1),
    "cbrt": (1, 1),
    "abs": (1, 1),
    "factorial": (1, 1),
    "floor": (1, 1),
    "ceil": (1, 1),
    "round": (1, 2),
    "difference": (2, 2),
    "quotient": (2, 2),
}
_ARITY_OTHERS: Final = (1, 100)


def parse_expression(text: str) -> Node:
    """Parse a text that is an expression and nothing else.

    Raises:
        ExpressionError: with the 1-based column of what was not understood.
    """
    tokens = tuple(token for token in tokenize(text) if token.kind is not Kind.NEWLINE)
    return parse_all(tokens)


def parse_all(tokens: Sequence[Token]) -> Node:
    """Parse tokens up to END; every one must belong to the expression."""
    node, after = parse_prefix_of(tokens, 0, lenient=False)
    if tokens[after].kind is not Kind.END:
        raise unexpected(tokens[after])
    return node


def parse_prefix_of(tokens: Sequence[Token], start: int, *, lenient: bool) -> tuple[Node, int]:
    """Parse the longest expression that begins at `start`; return it and the index after it.

    A lenient parse gives back an operator whose right side is no expression; a strict one raises.
    """
    parser = _Parser(tokens, start, lenient=lenient)
    node = parser.root()
    return node, parser.index


def unexpected(token: Token) -> ExpressionError:
    """Say that a token is out of place."""
    if token.kind is Kind.END:
        return ExpressionError("the expression ends too early", column=token.start + 1)
    return ExpressionError(f"did not expect {token.text!r} here", column=token.start + 1)


def unit_at(tokens: Sequence[Token], index: int, *, inch: bool = False) -> tuple[Unit | None, int]:
    """Read a unit ("km/h", "square metres", "m^2"); (None, index) when there is none."""
    first, index = _unit_atom(tokens, index, sign=1, inch=inch)
    if first is None:
        return None, index
    atoms = [first]
    while True:
        token = tokens[index]
        if (token.kind is Kind.WORD and token.text.lower() in ("per", "an")) or token.text == "/":
            sign = -1
        elif token.text == "*" and not token.spoken:
            sign = 1
        else:
            break
        atom, after = _unit_atom(tokens, index + 1, sign=sign, inch=False)
        if atom is None:
            break
        atoms.append(atom)
        index = after
    return Unit(tuple(atoms)), index


def _unit_atom(
    tokens: Sequence[Token], index: int, *, sign: int, inch: bool
) -> tuple[UnitAtom | None, int]:
    token, start, power = tokens[index], index, 1
    if token.kind is Kind.WORD and token.text.lower() in _POWER_WORDS:
        power, index = _POWER_WORDS[token.text.lower()], index + 1
    elif token.kind is Kind.WORD and token.text.lower() in _DEGREE_WORDS:
        index += 1
    token = tokens[index]
    if token.kind is not Kind.WORD:
        return None, start
    name = "inch" if inch and token.text == "in" else unit_named(token.text)
    if name is None:
        return None, start
    index += 1
    if tokens[index].text in ("²", "³"):
        power, index = power * (2 if tokens[index].text == "²" else 3), index + 1
    elif tokens[index].text == "^" and not tokens[index].spoken:
        negative = tokens[index + 1].text == "-"
        exponent = tokens[index + 1 + negative]
        if exponent.kind is Kind.NUMBER and exponent.text in ("1", "2", "3", "4"):
            power *= -int(exponent.text) if negative else int(exponent.text)
            index += 2 + negative
    return UnitAtom(name, token.text, sign * power), index


class _Parser:
    """One reading; `index` is the next token. Tokens end with END, which is never passed."""

    def __init__(self, tokens: Sequence[Token], start: int, *, lenient: bool) -> None:
        self._tokens = tokens
        self._lenient = lenient
        self._depth_max = DEPTH_LENIENT_MAX if lenient else DEPTH_MAX
        self.index = start

    def _peek(self, ahead: int = 0) -> Token:
        return self._tokens[min(self.index + ahead, len(self._tokens) - 1)]

    def _take(self) -> Token:
        token = self._peek()
        if token.kind is not Kind.END:
            self.index += 1
        return token

    def _word(self, *words: str) -> bool:
        token = self._peek()
        return token.kind is Kind.WORD and token.text.lower() in words

    def root(self) -> Node:
        """Read an expression and the conversion after it."""
        node = self._expression(0, 0)
        if self._word(*_CONVERSION_WORDS):
            unit, after = unit_at(self._tokens, self.index + 1, inch=True)
            if unit is not None:
                self.index = after
                return Convert(node, unit)
        return node

    def _expression(self, binding: int, depth: int) -> Node:
        if depth > self._depth_max:
            raise ExpressionError(
                f"nested more than {self._depth_max} deep",
                column=self._peek().start + 1,
                code="too_large",
            )
        left = self._postfix(self._primary(depth), depth)
        while True:
            token, start = self._peek(), self.index
            implied = token.kind is Kind.OPEN and not isinstance(left, Quantity | Compound)
            text = "*" if implied else token.text
            if not implied and (token.kind is not Kind.OPERATOR or text not in _INFIX):
                return left
            left_binding, right_binding = _INFIX[text]
            if left_binding < binding:
                return left
            if not implied:
                self._take()
            try:
                if text == "of":
                    _check_of(left, token)
                right = self._expression(right_binding, depth + 1)
            except ExpressionError:
                if not self._lenient:
                    raise
                self.index = start
                return left
            operator = cast("Operator", "*" if text == "x" else text)
            left = Binary(operator, left, right, implied)

    def _postfix(self, node: Node, depth: int) -> Node:
        while (token := self._peek()).kind is Kind.OPERATOR:
            if token.text == "!":
                if isinstance(node, Call) and node.function == "factorial" and self._adjacent():
                    raise ExpressionError(
                        "a double factorial is not known here; write (5!)! for one of the other",
                        column=token.start + 1,
                        code="ambiguous",
                    )
                node = Call("factorial", (node,))
            elif token.text in ("²", "³"):
                exponent = "2" if token.text == "²" else "3"
                node = Binary("^", node, Number(Fraction(exponent), exponent))
            elif token.text == "%" and not self._begins_operand(1):
                node = Percent(node)
            elif token.text == "%":
                self._take()
                right = self._postfix(self._primary(depth + 1), depth + 1)
                return Binary("mod", node, right)
            else:
                break
            self._take()
        return node

    def _adjacent(self) -> bool:
        return self._tokens[self.index - 1].text == "!"

    def _begins_operand(self, ahead: int) -> bool:
        return self._peek(ahead).kind in (Kind.NUMBER, Kind.OPEN, Kind.FUNCTION)

    def _primary(self, depth: int) -> Node:
        token = self._take()
        match token.kind:
            case Kind.NUMBER:
                return self._with_unit(Number(token.value, token.text))
            case Kind.OPEN:
                inner = self._expression(0, depth + 1)
                self._close()
                return self._with_unit(inner)
            case Kind.FUNCTION:
                return self._call(token, depth)
            case Kind.VERB:
                return self._verb(token, depth)
            case Kind.OPERATOR if token.text == "-":
                return Negate(self._expression(_SIGN, depth + 1))
            case Kind.OPERATOR if token.text == "+":
                return self._expression(_SIGN, depth + 1)
            case Kind.OPERATOR if token.text == "√":
                operand = self._postfix(self._primary_within(depth), depth)
                return Call("sqrt", (operand,))
            case Kind.WORD:
                return self._word_primary(token, depth)
            case _:
                raise unexpected(token)

    def _primary_within(self, depth: int) -> Node:
        if depth >= self._depth_max:
            raise ExpressionError(
                f"nested more than {self._depth_max} deep",
                column=self._peek().start + 1,
                code="too_large",
            )
        return self._primary(depth + 1)

    def _word_primary(self, token: Token, depth: int) -> Node:
        word = token.text.lower()
        if word in _FRACTION_WORDS and self._peek().text == "of":
            below = _FRACTION_WORDS[word]
            return Binary("/", Number(Fraction(1), "1"), Number(Fraction(below), str(below)))
        if word in _MULTIPLE_WORDS:
            factor = _MULTIPLE_WORDS[word]
            operand = self._postfix(self._primary_within(depth), depth)
            return Binary("*", Number(Fraction(factor), str(factor)), operand)
        if word == "min" and self._peek().kind is Kind.OPEN:
            return self._call(Token(Kind.FUNCTION, "min", token.start, token.end), depth)
        if word in ("a", "an"):
            unit, after = unit_at(self._tokens, self.index)
            if unit is not None:
                self.index = after
                return Quantity(Number(Fraction(1), "1"), unit)
        self.index -= 1
        raise unexpected(token)

    def _close(self) -> None:
        if self._peek().kind is not Kind.CLOSE:
            token = self._peek()
            raise ExpressionError("a closing parenthesis is missing", column=token.start + 1)
        self._take()

    def _with_unit(self, value: Node) -> Node:
        """Attach the unit that follows, and the quantities said after it."""
        unit, after = unit_at(self._tokens, self.index, inch=self._means_inch())
        if unit is None:
            return value
        self.index = after
        parts = [Quantity(value, unit)]
        while True:
            joined = 1 if self._word("and") else 0
            number = self._peek(joined)
            if number.kind is not Kind.NUMBER or not isinstance(value, Number):
                break
            unit, after = unit_at(self._tokens, self.index + joined + 1)
            if unit is None:
                break
            parts.append(Quantity(Number(number.value, number.text), unit))
            self.index = after
        return parts[0] if len(parts) == 1 else Compound(tuple(parts))

    def _means_inch(self) -> bool:
        """Whether "in" here is the inch: "5 in to cm", not "5 in cm" and not "5 in total"."""
        after = self._peek(1)
        if after.kind is Kind.WORD:
            return after.text.lower() in _CONVERSION_WORDS
        return after.kind in (Kind.END, Kind.CLOSE, Kind.OPERATOR, Kind.PUNCTUATION)

    def _call(self, token: Token, depth: int) -> Node:
        arguments: list[Node] = []
        least, most = _ARITY.get(token.text, _ARITY_OTHERS)
        if self._peek().kind is Kind.OPEN and (most > 1 or token.text not in ("sqrt", "cbrt")):
            self._take()
            arguments.append(self._expression(0, depth + 1))
            while self._peek().kind is Kind.COMMA or self._word("and"):
                self._take()
                arguments.append(self._expression(0, depth + 1))
            self._close()
        elif most == 1:
            arguments.append(self._postfix_power(depth))
        else:
            arguments.append(self._expression(_SUM + 1, depth + 1))
            while self._peek().kind is Kind.COMMA or self._word("and"):
                while self._peek().kind is Kind.COMMA or self._word("and"):  # "1, 2, and 3"
                    self._take()
                arguments.append(self._expression(_SUM + 1, depth + 1))
        if not least <= len(arguments) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ExpressionError(
                f"{token.text} takes {wanted} values, not {len(arguments)}", column=token.start + 1
            )
        return Call(token.text, tuple(arguments))

    def _postfix_power(self, depth: int) -> Node:
        """Read the operand of a spoken function: "square root of 144 + 1" is 12 + 1."""
        if self._peek().text == "-":
            self._take()
            return Negate(self._postfix_power_of(depth))
        return self._postfix_power_of(depth)

    def _postfix_power_of(self, depth: int) -> Node:
        if self._peek().kind is Kind.OPEN:
            self._take()
            inner = self._expression(0, depth + 1)
            self._close()
            return inner
        return self._postfix(self._primary_within(depth), depth)

    def _verb(self, token: Token, depth: int) -> Node:
        joins, operator, swapped = _VERBS[token.text]
        first = self._expression(_SUM + 1, depth + 1)
        if not self._word(*joins):
            raise ExpressionError(
                f"{token.text} wants {' or '.join(joins)!r} here", column=self._peek().start + 1
            )
        self._take()
        second = self._expression(_SUM + 1, depth + 1)
        return Binary(operator, second, first) if swapped else Binary(operator, first, second)


def _check_of(left: Node, token: Token) -> None:
    """A half of ten, 15% of 80, 3/4 of 20; "5 of 3" means nothing here."""
    match left:
        case Percent() | Binary("/"):
            return
        case Number() if left.value.denominator != 1:
            return
        case _:
            raise ExpressionError(
                "'of' wants a percentage or a fraction before it", column=token.start + 1
            )
