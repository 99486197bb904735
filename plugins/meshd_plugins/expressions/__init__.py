"""Arithmetic as people write it: tokens, a Pratt parser, and a finder of expressions in prose.

Pure and light: no I/O, no units library, no evaluation. The arithmetic plugin evaluates what is parsed
here; whoever routes questions uses `find_expressions` and `is_expression` to see whether a text holds
arithmetic at all.

Invariants: `parse_question` accepts a text only when *every* word of it is understood, so a word that
would change the meaning is never skipped. `find_expressions` never returns a part of a longer
expression that it could not read, and its spans are disjoint and in order. Neither raises anything but
`ExpressionError`; `find_expressions` and `is_expression` raise nothing. Work is linear in the text
(one place is read at most as often as expressions may nest).
"""

from meshd_plugins.expressions.errors import ExpressionError
from meshd_plugins.expressions.finder import Span, find_expressions, is_expression
from meshd_plugins.expressions.nodes import (
    Binary,
    Call,
    Compound,
    Convert,
    Negate,
    Node,
    Number,
    Percent,
    Quantity,
    Unit,
    UnitAtom,
    has_units,
    render,
    size,
)
from meshd_plugins.expressions.parser import DEPTH_MAX, parse_expression
from meshd_plugins.expressions.question import LENGTH_MAX, parse_question

__all__ = [
    "DEPTH_MAX",
    "LENGTH_MAX",
    "Binary",
    "Call",
    "Compound",
    "Convert",
    "ExpressionError",
    "Negate",
    "Node",
    "Number",
    "Percent",
    "Quantity",
    "Span",
    "Unit",
    "UnitAtom",
    "find_expressions",
    "has_units",
    "is_expression",
    "parse_expression",
    "parse_question",
    "render",
    "size",
]
