"""What can be wrong with a name.

    NamingError                    name_invalid         root; a ValueError
      MalformedName                name_malformed       the text is outside the grammar
        EmptyName                  name_empty
        TooLong                    name_too_long        a label, the path, the depth or the whole text
        UnknownKind                name_kind            not knowledge | data | computation
        MissingSuffix              name_suffix          no ".gpt/" after the kind
        BadLabel                   name_label           empty, upper case or a character outside the set
        WildcardNotAllowed         name_wildcard        "*" or "**" where one name is wanted, or misplaced
        BadNode                    name_node            what follows "@"
      BadConstraint                constraint_invalid
        UnknownField               constraint_field
        BadOperator                constraint_operator  none, misspelt, or meaningless for that field
        BadValue                   constraint_value
      NotBare                      name_not_bare        "@node" or "?..." on the name of a capability
      NotServed                    name_not_served      well-formed, and no one serves it now

The parsers raise the first three groups and nothing else, whatever text they are given. Nothing is left
behind: parsing has no state.
"""

from __future__ import annotations

QUOTED_CHARS_MAX = 80  # of the caller's text in one message


def printable(text: str, chars_max: int = QUOTED_CHARS_MAX) -> str:
    """`text` fit for a terminal: one character for one, unprintable ones replaced, cut with an ellipsis."""
    cut = text if len(text) <= chars_max else text[: chars_max - 1] + "…"
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in cut)


class NamingError(ValueError):
    """Root of the tree. `code` is stable; the message is for people and may change."""

    code = "name_invalid"

    def __init__(
        self, problem: str, *, text: str, column: int = 1, suggestion: str | None = None
    ) -> None:
        hint = f'; nearest: "{suggestion}"' if suggestion else ""
        super().__init__(f"column {column}: {problem}{hint}")
        self.problem = problem
        self.text = text
        self.column = column
        """1-based; at most `len(text) + 1`."""
        self.suggestion = suggestion
        """The nearest valid thing to put where the fault is, or None."""

    @property
    def message(self) -> str:
        """The whole message, column and suggestion included."""
        return str(self)

    def pointer(self) -> str:
        """Two lines for a fixed-width terminal: the text, and a caret under the fault."""
        first = max(0, self.column - 1 - QUOTED_CHARS_MAX // 2)
        shown = printable(self.text[first : first + QUOTED_CHARS_MAX])
        return f"{shown}\n{' ' * (self.column - 1 - first)}^"


class MalformedName(NamingError):
    """The text is outside the grammar."""

    code = "name_malformed"


class EmptyName(MalformedName):
    """Nothing was given."""

    code = "name_empty"


class TooLong(MalformedName):
    """A label, the path, the number of labels or the whole text is over its bound."""

    code = "name_too_long"


class UnknownKind(MalformedName):
    """What stands before `.gpt/` is none of the three kinds."""

    code = "name_kind"


class MissingSuffix(MalformedName):
    """The kind is not followed by `.gpt/`."""

    code = "name_suffix"


class BadLabel(MalformedName):
    """A label is empty, in upper case, or holds a character outside `a-z 0-9 - _ .`."""

    code = "name_label"


class WildcardNotAllowed(MalformedName):
    """A wildcard where one name is wanted, as a part of a label, or `**` that is not last."""

    code = "name_wildcard"


class BadNode(MalformedName):
    """What follows `@` is no node name and no node id."""

    code = "name_node"


class BadConstraint(NamingError):
    """What follows `?` is not a list of `FIELD OPERATOR VALUE`."""

    code = "constraint_invalid"


class UnknownField(BadConstraint):
    """No record has that field."""

    code = "constraint_field"


class BadOperator(BadConstraint):
    """The operator is missing, misspelt, or means nothing for that field."""

    code = "constraint_operator"


class BadValue(BadConstraint):
    """The value is not of the field's type."""

    code = "constraint_value"


class NotBare(NamingError):
    """A capability's own name carries `@node` or constraints; those belong to queries."""

    code = "name_not_bare"


class NotServed(NamingError):
    """Well-formed, and no peer serves it now. Made by `Resolution.not_served()`."""

    code = "name_not_served"
