"""The grammar of semantic names, and the only way from text to a `Name`.

    name       = kind ".gpt/" label *( "/" label ) [ "@" node ] [ ( "?" | "," ) constraints ]
    constraints = constraint *( ( "&" | "," ) constraint )
    constraint = field ( ">=" | "<=" | ">" | "<" | "=" | "!=" ) value
               | field "." ( "ge" | "le" | "gt" | "lt" | "eq" | "ne" ) "=" value
    kind       = "knowledge" | "data" | "computation"
    label      = [a-z0-9] *[a-z0-9-_.]        at most 63 characters, at most 8 labels
    node       = [A-Za-z0-9] *[A-Za-z0-9-_.]  a node's name, or the first 6 or more characters of its id
    value      = 1*64 [A-Za-z0-9-_.:/+]

In a query a label may be `*` (any one label) and the last may be `**` (any rest, also none). No value
holds a comma, so a comma that starts or separates constraints is never ambiguous (decision 0007).

Invariant: `str()` of what was parsed is canonical (lower case but for nothing, constraints sorted and
without duplicates, `?` and `&`, symbols for operators, numbers without suffix), it parses again, and to
an equal `Name`. Any text whatever either parses or raises `NamingError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from meshd_naming.errors import (
    BadConstraint,
    BadLabel,
    BadNode,
    BadOperator,
    BadValue,
    EmptyName,
    MissingSuffix,
    NamingError,
    NotBare,
    TooLong,
    UnknownField,
    UnknownKind,
    WildcardNotAllowed,
    printable,
)
from meshd_naming.fields import (
    ALIASES,
    FIELDS,
    FREE_PREFIX,
    ORDERED,
    PRIVACIES,
    QUANTISATIONS,
    SHELL_WORDS,
    VALUE_CHARS_MAX,
    Constraint,
    FieldType,
    Operator,
    field_type,
    is_quantisation,
    normal_quantisation,
    parse_number,
)
from meshd_naming.nearest import closest

TEXT_CHARS_MAX = 2048  # of any text given to a parser; canonical text is always shorter
PATH_CHARS_MAX = 253  # kind and labels: what fits a DNS name
LABEL_CHARS_MAX = 63
LABELS_MAX = 8
NODE_CHARS_MAX = 63
CONSTRAINTS_MAX = 8
FIELD_CHARS_MAX = 32
ANY_LABEL = "*"
ANY_REST = "**"
_PARSED_MAX = 1024  # names kept parsed; each is bounded in length


class Kind(StrEnum):
    """What the last step of a request is: a model's answer, a stored object, or an exact computation."""

    KNOWLEDGE = "knowledge"
    DATA = "data"
    COMPUTATION = "computation"


_KINDS: Mapping[str, Kind] = {kind.value: kind for kind in Kind}
_LABEL = re.compile(r"[a-z0-9][a-z0-9\-_.]*")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-_.]*")
_VALUE = re.compile(r"[A-Za-z0-9\-_.:/+]+")
_FREE_FIELD = re.compile(r"x_[a-z0-9_]+")
_PATH_END = re.compile(r"[@?,]")
_NODE_END = re.compile(r"[?,]")
_CONSTRAINT = re.compile(r"([A-Za-z0-9_\-]*)(\.[A-Za-z]*)?([<>=!]*)(.*)", re.DOTALL)
_OPERATORS: Mapping[str, Operator] = {operator.value: operator for operator in Operator}
_OPERATOR_SLIPS: Mapping[str, str] = {
    "==": "=",
    ">==": ">=",
    "<==": "<=",
    "=>": ">=",
    "=<": "<=",
    "<>": "!=",
    "=!": "!=",
    "!": "!=",
    "!==": "!=",
    "===": "=",
}


@dataclass(frozen=True, slots=True)
class Name:
    """A parsed name or query. Made by the parsers of this module; made by hand it is not checked."""

    kind: Kind
    labels: tuple[str, ...]  # 1..LABELS_MAX
    node: str | None = None  # lower case
    constraints: tuple[Constraint, ...] = ()  # sorted by text, no duplicates

    @property
    def path(self) -> str:
        """Kind and labels: what an index is keyed by."""
        return f"{self.kind.value}.gpt/{'/'.join(self.labels)}"

    @property
    def is_pattern(self) -> bool:
        """Whether a label is a wildcard."""
        return ANY_LABEL in self.labels or self.labels[-1] == ANY_REST

    @property
    def is_bare(self) -> bool:
        """Whether it is nothing but kind and labels."""
        return self.node is None and not self.constraints

    def covers(self, name: Name) -> bool:
        """Whether another's kind and labels match these, wildcards and all; the rest is not read."""
        if self.kind is not name.kind:
            return False
        wanted, found = self.labels, name.labels
        if wanted[-1] == ANY_REST:
            wanted = wanted[:-1]
            found = found[: len(wanted)]
        return len(wanted) == len(found) and all(
            want in (ANY_LABEL, have) for want, have in zip(wanted, found, strict=True)
        )

    def __str__(self) -> str:
        node = f"@{self.node}" if self.node else ""
        query = f"?{'&'.join(map(str, self.constraints))}" if self.constraints else ""
        return f"{self.path}{node}{query}"


def parse_name(text: str) -> Name:
    """One name, without wildcards; `@node` and constraints are allowed. Raises NamingError."""
    return _parse(text, patterns=False)


def parse_query(text: str) -> Name:
    """A name or a pattern. Raises NamingError."""
    return _parse(text, patterns=True)


def parse_capability_name(text: str) -> Name:
    """The name a capability is announced under: kind and labels only. Raises NamingError."""
    name = _parse(text, patterns=False)
    if not name.is_bare:
        found = _PATH_END.search(text)
        raise NotBare(
            'a capability is announced by kind and labels only, without "@node" and constraints',
            text=text,
            column=found.start() + 1 if found else 1,
            suggestion=name.path,
        )
    return name


@lru_cache(
    maxsize=_PARSED_MAX
)  # a request parses its name more than once, and few names are asked for
def _parse(text: str, *, patterns: bool) -> Name:
    _check_text(text)
    found = _PATH_END.search(text)
    end = found.start() if found else len(text)
    kind, labels_at = _parse_kind(text, end)
    labels = _parse_labels(text, labels_at, end, patterns=patterns)
    node: str | None = None
    if text[end : end + 1] == "@":
        found = _NODE_END.search(text, end)
        at, end = end + 1, (found.start() if found else len(text))
        node = _parse_node(text, at, end)
    constraints = _parse_constraints(text, end + 1) if end < len(text) else ()
    return Name(kind, labels, node, constraints)


def _check_text(text: str) -> None:
    if not text.strip():
        raise EmptyName("nothing was given", text=text, suggestion="knowledge.gpt/general")
    if len(text) > TEXT_CHARS_MAX:
        raise TooLong(
            f"{len(text)} characters; at most {TEXT_CHARS_MAX} are read",
            text=text,
            column=TEXT_CHARS_MAX + 1,
        )


def _parse_kind(text: str, end: int) -> tuple[Kind, int]:
    """Kind, and the index where the labels begin."""
    slash = text.find("/", 0, end)
    head = text[: slash if slash >= 0 else end]
    if slash >= 0 and head.endswith(".gpt"):
        word = head[:-4]
        if (kind := _KINDS.get(word)) is not None:
            return kind, slash + 1
        near = closest(word.strip(), _KINDS)
        raise UnknownKind(
            f'"{printable(word)}" is no kind; a name starts with knowledge, data or computation',
            text=text,
            suggestion=near[0] if near else None,
        )
    dot = head.find(".")
    word = (head[:dot] if dot >= 0 else head).strip()
    near = closest(word, _KINDS)
    if slash < 0 and not near:  # "arithmetic": a label alone
        label = _lenient_label(head)
        suggestion, column = f"knowledge.gpt/{label or 'general'}", 1
    else:
        rest = _lenient_label(text[slash + 1 : end].split("/")[0]) if slash >= 0 else ""
        suggestion = f"{near[0] if near else 'knowledge'}.gpt/{rest or 'general'}"
        cut = len(head) if dot < 0 or head.endswith(".gpt") else dot
        column = cut + 1 if near else 1
    raise MissingSuffix(
        'a name starts with a kind and ".gpt/"', text=text, column=column, suggestion=suggestion
    )


def _lenient_label(text: str) -> str:
    """The nearest valid label to `text`, "" when nothing of it is left."""
    kept = re.sub(r"[^a-z0-9\-_.]+", "-", text.strip().lower())
    return kept.strip("-_.")[:LABEL_CHARS_MAX]


def _parse_labels(text: str, start: int, end: int, *, patterns: bool) -> tuple[str, ...]:
    labels = text[start:end].split("/")
    at = start
    for index, label in enumerate(labels):
        if index == LABELS_MAX:
            raise TooLong(f"more than {LABELS_MAX} labels", text=text, column=at + 1)
        last = index == len(labels) - 1
        if "*" in label:
            _check_wildcard(text, at, label, patterns=patterns, last=last)
        elif len(label) > LABEL_CHARS_MAX or _LABEL.fullmatch(label) is None:
            raise _label_error(text, at, label, end)
        at += len(label) + 1
    if end > PATH_CHARS_MAX:
        raise TooLong(
            f"kind and labels take {end} characters; at most {PATH_CHARS_MAX}",
            text=text,
            column=PATH_CHARS_MAX + 1,
        )
    return tuple(labels)


def _check_wildcard(text: str, at: int, label: str, *, patterns: bool, last: bool) -> None:
    column = at + label.index("*") + 1
    if not patterns:
        raise WildcardNotAllowed(
            "a wildcard stands in queries only; this wants one name", text=text, column=column
        )
    if label == ANY_LABEL or (label == ANY_REST and last):
        return
    if label == ANY_REST:
        raise WildcardNotAllowed(
            '"**" stands only at the end', text=text, column=column, suggestion=ANY_LABEL
        )
    raise WildcardNotAllowed(
        "a wildcard is a whole label", text=text, column=column, suggestion=ANY_LABEL
    )


def _label_error(text: str, at: int, label: str, end: int) -> NamingError:
    suggestion = _lenient_label(label) or None
    if not label:
        slash = text.index("/")
        kept = [part for part in text[slash + 1 : end].split("/") if part]
        whole = f"{text[:slash]}/{'/'.join(kept) or 'general'}"
        return BadLabel("empty label", text=text, column=at + 1, suggestion=whole)
    if len(label) > LABEL_CHARS_MAX:
        return TooLong(
            f"a label has at most {LABEL_CHARS_MAX} characters; this one has {len(label)}",
            text=text,
            column=at + LABEL_CHARS_MAX + 1,
        )
    found = _LABEL.match(label)
    bad = found.end() if found else 0
    char = label[bad]
    if char.isupper():
        problem = f'upper case "{printable(char)}"; labels are in lower case'
    elif bad == 0 and char in "-_.":
        problem = f'a label starts with a letter or a digit, not "{char}"'
    else:
        problem = f'"{printable(char)}" in a label; labels hold a-z 0-9 - _ .'
    return BadLabel(problem, text=text, column=at + bad + 1, suggestion=suggestion)


def _parse_node(text: str, start: int, end: int) -> str:
    word = text[start:end]
    if not word:
        raise BadNode('no node after "@"', text=text, column=start + 1)
    found = _NODE.match(word)
    bad = found.end() if found else 0
    if bad < len(word):
        raise BadNode(
            f'"{printable(word[bad])}" in a node; a node is a name of letters, digits and - _ . or an id',
            text=text,
            column=start + bad + 1,
            suggestion=_lenient_label(word) or None,
        )
    if len(word) > NODE_CHARS_MAX:
        raise BadNode(
            f"a node has at most {NODE_CHARS_MAX} characters",
            text=text,
            column=start + NODE_CHARS_MAX + 1,
        )
    return word.lower()


def _parse_constraints(text: str, start: int) -> tuple[Constraint, ...]:
    found: dict[str, Constraint] = {}
    at = start
    for item in text[start:].replace(",", "&").split("&"):
        constraint = _parse_constraint(text, at, item)
        found[str(constraint)] = constraint
        if len(found) > CONSTRAINTS_MAX:
            raise BadConstraint(
                f"more than {CONSTRAINTS_MAX} constraints", text=text, column=at + 1
            )
        at += len(item) + 1
    return tuple(found[key] for key in sorted(found))


def _parse_constraint(text: str, at: int, item: str) -> Constraint:
    if not item:
        raise BadConstraint(
            "empty constraint; one is FIELD OPERATOR VALUE",
            text=text,
            column=at + 1,
            suggestion="context>=8192",
        )
    parts = _CONSTRAINT.fullmatch(item)
    assert parts is not None  # every part may be empty and the last takes any rest
    field, kind = _parse_field(text, at, parts[1])
    operator = _parse_operator(text, at, parts, field)
    if operator not in (Operator.EQ, Operator.NE) and kind not in ORDERED:
        raise BadOperator(
            f'"{field}" has no order; it is compared with = or != only',
            text=text,
            column=at + parts.end(1) + 1,
            suggestion="=",
        )
    value = _parse_value(text, at + parts.start(4), parts[4], kind)
    ordered = operator not in (Operator.EQ, Operator.NE)
    if kind is FieldType.FREE and ordered and parse_number(str(value)) is None:
        raise BadValue(
            "an order wants a number; text is compared with = or != only",
            text=text,
            column=at + parts.start(4) + 1,
        )
    return Constraint(field, operator, value)


def _parse_field(text: str, at: int, word: str) -> tuple[str, FieldType]:
    field = ALIASES.get(word, word)
    kind = field_type(field)
    if kind is FieldType.FREE and (
        len(field) > FIELD_CHARS_MAX or _FREE_FIELD.fullmatch(field) is None
    ):
        raise UnknownField(
            f"a plugin's field is {FREE_PREFIX} and at most {FIELD_CHARS_MAX - 2} of a-z 0-9 _",
            text=text,
            column=at + 1,
        )
    if kind is not None:
        return field, kind
    near = closest(word.replace("-", "_"), (*FIELDS, *ALIASES))
    problem = f'unknown field "{printable(word)}"' if word else "no field before the operator"
    raise UnknownField(
        f"{problem}; the fields are {', '.join(FIELDS)} and a plugin's {FREE_PREFIX}…",
        text=text,
        column=at + 1,
        suggestion=near[0] if near else None,
    )


def _parse_operator(text: str, at: int, parts: re.Match[str], field: str) -> Operator:
    word, symbol = parts[2], parts[3]
    if word is not None:
        near = closest(word[1:], SHELL_WORDS)
        operator = SHELL_WORDS.get(word[1:])
        if operator is not None and symbol == "=":
            return operator
        if operator is not None:
            column, suggestion = at + parts.start(3) + 1, f"{field}.{word[1:]}="
        else:
            column, suggestion = at + parts.start(2) + 2, near[0] if near else "ge"
        raise BadOperator(
            "an operator in letters is .ge= .le= .gt= .lt= .eq= or .ne=",
            text=text,
            column=column,
            suggestion=suggestion,
        )
    if (operator := _OPERATORS.get(symbol)) is not None:
        return operator
    problem = f'"{symbol}" is no operator' if symbol else f'no operator after "{field}"'
    raise BadOperator(
        f"{problem}; there are >= <= > < = !=",
        text=text,
        column=at + parts.start(3) + 1,
        suggestion=_OPERATOR_SLIPS.get(symbol, "=" if symbol else ">="),
    )


def _parse_value(text: str, at: int, word: str, kind: FieldType) -> int | float | str:
    found = _VALUE.match(word)
    good = found.end() if found else 0
    if good < len(word) or not word:
        problem = (
            f'"{printable(word[good])}" in a value; values hold letters, digits and - _ . : / +'
            if word
            else f"no value; it is {kind.value}"
        )
        raise BadValue(problem, text=text, column=at + good + 1)
    if len(word) > VALUE_CHARS_MAX:
        raise BadValue(
            f"a value has at most {VALUE_CHARS_MAX} characters",
            text=text,
            column=at + VALUE_CHARS_MAX + 1,
        )
    lowered = word.lower()
    near: tuple[str, ...] = ()
    match kind:
        case FieldType.NUMBER:
            number = parse_number(word)
            if number is not None:
                return number
            near = tuple(re.findall(r"^[0-9]{1,9}", word))
        case FieldType.QUANTISATION:
            quantisation = normal_quantisation(word)
            if is_quantisation(quantisation):
                return quantisation
            near = closest(quantisation, QUANTISATIONS)
        case FieldType.PRIVACY:
            if lowered in PRIVACIES:
                return lowered
            near = closest(lowered, PRIVACIES)
        case FieldType.TEXT | FieldType.TEXTS | FieldType.MODEL | FieldType.FREE:
            return lowered
    raise BadValue(
        f'"{printable(word)}" is not {kind.value}',
        text=text,
        column=at + 1,
        suggestion=near[0] if near else None,
    )
