"""The tree of an expression, and how it is written back as text.

`parse_expression(render(node)) == node` for every tree that the parser can make.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, TypeAlias, assert_never

Operator: TypeAlias = Literal["+", "-", "*", "/", "^", "mod", "of"]


@dataclass(frozen=True, slots=True)
class Number:
    """A literal."""

    value: Fraction
    text: str  # as it is written back: "0.1", "1234"


@dataclass(frozen=True, slots=True)
class UnitAtom:
    """One factor of a unit."""

    name: str  # as the units library knows it: "kilometer"
    shown: str  # as it was written: "km"
    power: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """A product of powers of units; never empty."""

    atoms: tuple[UnitAtom, ...]

    @property
    def shown(self) -> str:
        """As it is written back: "km/h", "m^2", "1/s"."""
        above = [_atom(atom.shown, atom.power) for atom in self.atoms if atom.power > 0]
        below = [_atom(atom.shown, -atom.power) for atom in self.atoms if atom.power < 0]
        return "/".join(["*".join(above) or "1", *below])


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with a unit."""

    value: Node
    unit: Unit


@dataclass(frozen=True, slots=True)
class Compound:
    """Quantities said one after the other that make one: "3 hours 20 minutes"."""

    parts: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True)
class Negate:
    """Minus one times."""

    operand: Node


@dataclass(frozen=True, slots=True)
class Percent:
    """A hundredth of."""

    operand: Node


@dataclass(frozen=True, slots=True)
class Binary:
    """Two operands; "of" multiplies, "^" is a power."""

    operator: Operator
    left: Node
    right: Node
    implied: bool = field(default=False, compare=False)  # a product without a sign: 2(3 + 4)


@dataclass(frozen=True, slots=True)
class Call:
    """A named function; its arity was checked by the parser."""

    function: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Convert:
    """The same quantity in another unit; only at the root of a tree."""

    operand: Node
    unit: Unit


Node: TypeAlias = Number | Quantity | Compound | Negate | Percent | Binary | Call | Convert

# How tightly each form binds when it is written: a weaker one inside a stronger one needs parentheses.
CONVERT, SUM, PRODUCT, SIGN, POWER, POSTFIX, ATOM = range(7)
_BINDING: dict[Operator, int] = {
    "+": SUM,
    "-": SUM,
    "*": PRODUCT,
    "/": PRODUCT,
    "mod": PRODUCT,
    "of": PRODUCT,
    "^": POWER,
}


def _atom(shown: str, power: int) -> str:
    return shown if power == 1 else f"{shown}^{power}"


def binding(node: Node) -> int:
    """How tightly the outermost form of a tree binds."""
    match node:
        case Number():
            return ATOM
        case Quantity() | Compound():
            return POSTFIX
        case Negate():
            return SIGN
        case Percent():
            return POSTFIX
        case Binary():
            return _BINDING[node.operator]
        case Call(function="factorial"):
            return POSTFIX
        case Call():
            return ATOM
        case Convert():
            return CONVERT
        case _:
            assert_never(node)


def _wrapped(node: Node, weakest: int) -> str:
    text = render(node)
    return text if binding(node) >= weakest else f"({text})"


def render(node: Node) -> str:
    """Write a tree with the fewest parentheses that keep its meaning."""
    match node:
        case Number():
            return node.text
        case Quantity():
            return f"{_wrapped(node.value, ATOM)} {node.unit.shown}"
        case Compound():
            return " ".join(render(part) for part in node.parts)
        case Negate():
            return f"-{_wrapped(node.operand, SIGN)}"
        case Percent():
            return f"{_wrapped(node.operand, ATOM)}%"
        case Binary("^", left, right):
            # Right-associative, and a sign may stand in the exponent: 2^-3.
            exponent = render(right) if isinstance(right, Negate) else _wrapped(right, POWER)
            return f"{_wrapped(left, ATOM)}^{exponent}"
        case Binary():
            own = _BINDING[node.operator]
            right_text = _wrapped(node.right, own + 1)
            return f"{_wrapped(node.left, own)} {node.operator} {right_text}"
        case Call("factorial", (operand,)):
            return f"{_wrapped(operand, ATOM)}!"
        case Call():
            return f"{node.function}({', '.join(render(item) for item in node.arguments)})"
        case Convert():
            return f"{render(node.operand)} in {node.unit.shown}"
        case _:
            assert_never(node)


def children(node: Node) -> tuple[Node, ...]:
    """The subtrees directly below."""
    match node:
        case Number():
            return ()
        case Quantity():
            return (node.value,)
        case Compound():
            return node.parts
        case Negate() | Percent() | Convert():
            return (node.operand,)
        case Binary():
            return (node.left, node.right)
        case Call():
            return node.arguments
        case _:
            assert_never(node)


def size(node: Node) -> int:
    """Count the nodes of a tree."""
    return 1 + sum(size(child) for child in children(node))


def has_units(node: Node) -> bool:
    """Whether a unit stands anywhere in the tree."""
    if isinstance(node, Quantity | Compound | Convert):
        return True
    return any(has_units(child) for child in children(node))
