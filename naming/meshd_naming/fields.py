"""The fields that constraints compare, their types and their orders.

A constraint is `FIELD OPERATOR VALUE`. The set of fields is closed, so that a misspelt one is an error
and not a filter that nothing passes; a plugin's own fields start with `x_` and are free. A record that
does not say a field satisfies no constraint on it but `!=`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum

from meshd_plugins.api import Privacy, Value

NUMBER_MAX = 10**15  # exclusive; below it a float is exact to an integer
VALUE_CHARS_MAX = 64
FREE_PREFIX = "x_"


class FieldType(Enum):
    """How a field's values compare."""

    NUMBER = "a number, such as 8192, 8k or 1.5"
    QUANTISATION = "a quantisation, such as q4, q4_0 or f16"
    PRIVACY = "local, lan, mesh or cloud"
    TEXT = "text of letters, digits and - _ . : / +"
    TEXTS = "one of a list of texts"
    MODEL = "a model's family or the first 8 or more characters of its digest"
    FREE = "a number or a text"


class Operator(Enum):
    """Comparison; the value is the canonical spelling."""

    GE = ">="
    LE = "<="
    GT = ">"
    LT = "<"
    EQ = "="
    NE = "!="


SHELL_WORDS: Mapping[str, Operator] = {
    "ge": Operator.GE,
    "le": Operator.LE,
    "gt": Operator.GT,
    "lt": Operator.LT,
    "eq": Operator.EQ,
    "ne": Operator.NE,
}
ORDERED = frozenset({FieldType.NUMBER, FieldType.QUANTISATION, FieldType.PRIVACY, FieldType.FREE})

FIELDS: Mapping[str, FieldType] = {
    "architecture": FieldType.TEXT,
    "context": FieldType.NUMBER,  # tokens
    "decode_tokens_per_s": FieldType.NUMBER,  # one sequence, measured
    "dimensions": FieldType.NUMBER,  # of a vector
    "family": FieldType.TEXT,
    "label": FieldType.TEXTS,  # of the node
    "licence": FieldType.TEXT,
    "modality": FieldType.TEXTS,
    "model": FieldType.MODEL,
    "parameters": FieldType.NUMBER,  # count
    "pooling": FieldType.TEXT,
    "prefill_tokens_per_s": FieldType.NUMBER,
    "price": FieldType.NUMBER,  # per million tokens
    "privacy": FieldType.PRIVACY,
    "quant": FieldType.QUANTISATION,
    "resident": FieldType.TEXT,  # true or false: in memory, or to be loaded first
    "size_bytes": FieldType.NUMBER,
    "slots": FieldType.NUMBER,
    "texts_per_s": FieldType.NUMBER,  # vectors or scores, measured
    "zone": FieldType.TEXT,  # of the node
}
ALIASES: Mapping[str, str] = {
    "context_tokens": "context",
    "ctx": "context",
    "labels": "label",
    "license": "licence",
    "modalities": "modality",
    "params": "parameters",
    "quantisation": "quant",
    "quantization": "quant",
    "tokens_per_s": "decode_tokens_per_s",
}

# Worst first. Names of one family (same bits a weight) stand together.
_QUANTISATIONS: tuple[tuple[int, str], ...] = (
    *((1, name) for name in ("tq1_0", "iq1_s", "iq1_m")),
    *((2, name) for name in ("tq2_0", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "q2_k_s", "q2_k")),
    *((3, name) for name in ("iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "q3_k_s", "q3_k_m", "q3_k_l")),
    *((4, name) for name in ("iq4_xs", "iq4_nl", "mxfp4", "q4_0", "q4_1", "q4_k_s", "q4_k_m")),
    *((5, name) for name in ("q5_0", "q5_1", "q5_k_s", "q5_k_m")),
    (6, "q6_k"),
    (8, "q8_0"),
    *((16, name) for name in ("f16", "bf16")),
    (32, "f32"),
)
_QUANTISATION_RANK: Mapping[str, tuple[int, int]] = {
    name: (bits, rank) for rank, (bits, name) in enumerate(_QUANTISATIONS)
}
_QUANTISATION_FAMILY: Mapping[str, int] = {f"q{bits}": bits for bits in (1, 2, 3, 4, 5, 6, 8)}
_QUANTISATION_ALIAS: Mapping[str, str] = {
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "fp16": "f16",
    "fp32": "f32",
}
QUANTISATIONS: tuple[str, ...] = (*_QUANTISATION_FAMILY, *_QUANTISATION_RANK)
PRIVACIES: Mapping[str, Privacy] = {level.name.lower(): level for level in Privacy}

_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)(k|m|g|b|t|ki|mi|gi)?", re.IGNORECASE)
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_SCALE: Mapping[str, int] = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "b": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
}


@dataclass(frozen=True, slots=True, order=False)
class Constraint:
    """One comparison, in canonical form: field not an alias, numbers without suffix, text in lower case."""

    field: str
    operator: Operator
    value: int | float | str

    def __str__(self) -> str:
        return f"{self.field}{self.operator.value}{value_text(self.value)}"


def value_text(value: float | str) -> str:
    """Canonical spelling of a constraint's value: never an exponent."""
    match value:
        case float():
            return format(Decimal(repr(value)), "f")
        case _:
            return str(value)


def parse_number(text: str) -> int | float | None:
    """Non-negative decimal with an optional suffix k M G B T (powers of 1000) or Ki Mi Gi (of 1024).

    None when it is no such number or not below `NUMBER_MAX`. Whole numbers come back as int.
    """
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    exact = Decimal(found[1]) * _SCALE[(found[2] or "").lower()]
    if exact >= NUMBER_MAX:
        return None
    if exact == exact.to_integral_value():
        return int(exact)
    rounded = float(exact)
    return int(rounded) if rounded.is_integer() else rounded


def normal_quantisation(text: str) -> str:
    """As in the table of quantisations, from the many ways tools write it ("Q4_K - Medium")."""
    lowered = text.lower().replace(" - ", "_").replace("-", "_").replace(" ", "")
    for word, letter in (("_small", "_s"), ("_medium", "_m"), ("_large", "_l")):
        lowered = lowered.replace(word, letter)
    return _QUANTISATION_ALIAS.get(lowered, lowered)


def is_quantisation(text: str) -> bool:
    """Whether `text` (normalised) is a known quantisation or a family of them."""
    return text in _QUANTISATION_RANK or text in _QUANTISATION_FAMILY


def field_type(name: str) -> FieldType | None:
    """Type of a canonical field name; None when there is no such field."""
    if name.startswith(FREE_PREFIX) and len(name) > len(FREE_PREFIX):
        return FieldType.FREE
    return FIELDS.get(name)


def satisfies(constraint: Constraint, have: Value) -> bool:
    """Whether a record's value passes; `have` is None when the record does not say.

    Never raises: `have` comes from a peer, and a value of another type satisfies nothing but `!=`.
    """
    want, operator = constraint.value, constraint.operator
    absent = operator is Operator.NE
    kind = field_type(constraint.field)
    if have is None or kind is None:
        return absent
    match kind:
        case FieldType.NUMBER:
            return _compare_numbers(operator, have, want, otherwise=absent)
        case FieldType.QUANTISATION:
            return _compare_quantisations(operator, have, str(want), otherwise=absent)
        case FieldType.PRIVACY:
            level = PRIVACIES.get(have.lower()) if isinstance(have, str) else have
            return _compare_numbers(operator, level, PRIVACIES[str(want)], otherwise=absent)
        case FieldType.TEXT:
            text = str(have) if isinstance(have, bool) else have
            same = isinstance(text, str) and text.lower() == want
            return same is (operator is Operator.EQ)
        case FieldType.TEXTS | FieldType.MODEL:
            same = _any_same(have, str(want), prefixes=kind is FieldType.MODEL)
            return same is (operator is Operator.EQ)
        case FieldType.FREE:
            number = parse_number(str(want))
            if not isinstance(have, str) and number is not None:
                return _compare_numbers(operator, have, number, otherwise=absent)
            same = isinstance(have, str) and have.lower() == want
            return same if operator is Operator.EQ else (operator is Operator.NE and not same)


def _ordered(operator: Operator, left: float, right: float) -> bool:
    match operator:
        case Operator.GE:
            return left >= right
        case Operator.LE:
            return left <= right
        case Operator.GT:
            return left > right
        case Operator.LT:
            return left < right
        case Operator.EQ:
            return left == right
        case Operator.NE:
            return left != right


def _compare_numbers(
    operator: Operator, have: Value, want: float | str, *, otherwise: bool
) -> bool:
    if isinstance(have, bool) or not isinstance(have, int | float) or isinstance(want, str):
        return otherwise
    return _ordered(operator, have, want)


def _compare_quantisations(operator: Operator, have: Value, want: str, *, otherwise: bool) -> bool:
    rank = _QUANTISATION_RANK.get(normal_quantisation(have)) if isinstance(have, str) else None
    if rank is None:
        return otherwise
    bits = _QUANTISATION_FAMILY.get(want)
    if bits is not None:  # a family: any of its members is equal to it
        return _ordered(operator, rank[0], bits)
    return _ordered(operator, rank[1], _QUANTISATION_RANK[want][1])


def _any_same(have: Value, want: str, *, prefixes: bool) -> bool:
    prefixes = prefixes and _DIGEST_PREFIX.fullmatch(want) is not None
    texts = [have] if isinstance(have, str) else have
    if not isinstance(texts, list | tuple):
        return False
    for text in texts:
        if isinstance(text, str):
            lowered = text.lower()
            if lowered == want or (prefixes and lowered.startswith(want)):
                return True
    return False
