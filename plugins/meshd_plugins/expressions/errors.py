"""What reading an expression may raise."""

from __future__ import annotations


class ExpressionError(Exception):
    """The text is not an expression that is understood here. Nothing was computed.

    `code` is one of: not_arithmetic (words remain), bad_expression (syntax), too_large, undefined
    (division by zero and the like), ambiguous, bad_units. `column` is 1-based; 0 when no one place is
    at fault.
    """

    def __init__(self, message: str, *, column: int = 0, code: str = "bad_expression") -> None:
        super().__init__(message)
        self.message = message
        self.column = column
        self.code = code
