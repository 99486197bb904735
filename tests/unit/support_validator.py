"""A validator of JSON Schemas for tests: written from the specification, with nothing of the code under test.

It knows the keywords that a grammar is made of, and says of every other one that it does not.
"""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Callable
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from urllib.parse import urlsplit

IGNORED = {
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "$schema",
    "contentEncoding",
    "then",
    "else",
    "minContains",
}


def problems(value: Any, schema: Any, root: Any = None) -> list[str]:
    """What is wrong with the value; [] when it fits."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return [] if schema else ["false"]
    found: list[str] = []
    for keyword, wanted in schema.items():
        if keyword in IGNORED:
            continue
        if not _KEYWORDS[keyword](value, wanted, schema, root):
            found.append(f"{keyword}: {json.dumps(value)[:200]}")
    return found


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return (type(one) is type(other) and one == other) or (
        _number(one) and _number(other) and one == other
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is(value: Any, name: str) -> bool:
    match name:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "number":
            return _number(value)
        case "integer":
            return _number(value) and value == int(value)
        case _:
            raise AssertionError(name)


def _fits(value: Any, schema: Any, root: Any) -> bool:
    return not problems(value, schema, root)


def _type(value: Any, wanted: Any, schema: Any, _root: Any) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    return any(_is(value, name) for name in names) or (
        value is None and schema.get("nullable") is True
    )


def _ref(value: Any, wanted: str, _schema: Any, root: Any) -> bool:
    node = root
    for part in wanted.split("/")[1:]:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return _fits(value, node, root)


def _additional(value: Any, wanted: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, dict):
        return True
    known = schema.get("properties", {})
    return all(_fits(each, wanted, root) for key, each in value.items() if key not in known)


def _items(value: Any, wanted: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, list):
        return True
    if isinstance(wanted, list):  # as older schemas have it
        more = schema.get("additionalItems", True)
        parts = [*wanted, *[more] * max(0, len(value) - len(wanted))]
        return all(_fits(each, part, root) for each, part in zip(value, parts, strict=False))
    return all(_fits(each, wanted, root) for each in value[len(schema.get("prefixItems", [])) :])


def _contains(value: Any, wanted: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, list):
        return True
    return sum(_fits(each, wanted, root) for each in value) >= int(schema.get("minContains", 1))


def _names(value: Any, wanted: Any, _schema: Any, root: Any) -> bool:
    return not isinstance(value, dict) or all(_fits(name, wanted, root) for name in value)


def _patterned(value: Any, wanted: Any, _schema: Any, root: Any) -> bool:
    return not isinstance(value, dict) or all(
        _fits(each, part, root)
        for name, each in value.items()
        for pattern, part in wanted.items()
        if re.search(pattern, name)
    )


def _if(value: Any, wanted: Any, schema: Any, root: Any) -> bool:
    branch = "then" if _fits(value, wanted, root) else "else"
    return _fits(value, schema.get(branch, True), root)


def _unique(values: list[Any]) -> bool:
    return not any(equal(one, other) for n, one in enumerate(values) for other in values[:n])


def _format(value: Any, wanted: str, _schema: Any, _root: Any) -> bool:
    if not isinstance(value, str):
        return True
    try:
        return bool(_READERS[wanted](value))
    except ValueError:
        return False


def _fullmatch(pattern: str) -> Callable[[str], object]:
    return lambda value: re.fullmatch(pattern, value)


def _uuid(version: int) -> Callable[[str], object]:
    return lambda value: uuid.UUID(value).version == version


def _uri(value: str) -> bool:
    """By the characters of RFC 3986, and as the standard library takes it apart."""
    if not re.fullmatch(
        r"[a-zA-Z][a-zA-Z0-9+.-]*:([\w.~:/?#@!$&'()*+,;=-]|%[0-9a-fA-F]{2})*", value
    ):
        return False
    found = urlsplit(value)
    return value.count("#") <= 1 and (found.port is None or found.port >= 0)


_HOST = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
_TIME = r"(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?"
_DURATION = rf"P(\d+W|(?=[\dT])(\d+Y)?(\d+M)?(\d+D)?{_TIME})"
_READERS: dict[str, Callable[[str], object]] = {
    "date": datetime.date.fromisoformat,
    # "Falsy" times are those without an offset.
    "time": lambda value: datetime.time.fromisoformat(value).tzinfo,
    "date-time": lambda value: datetime.datetime.fromisoformat(value).tzinfo,
    "duration": _fullmatch(_DURATION),
    "uuid": uuid.UUID,
    **{f"uuid{version}": _uuid(version) for version in range(1, 9)},
    "ipv4": IPv4Address,
    "ipv6": lambda value: [IPv6Address(value)],
    "hostname": _fullmatch(_HOST),
    "idn-hostname": _fullmatch(_HOST),
    "email": _fullmatch(rf"[a-z0-9._+-]+@{_HOST}"),
    "idn-email": _fullmatch(rf"[a-z0-9._+-]+@{_HOST}"),
    "uri": _uri,
    "url": _uri,
    "iri": _uri,
    "uri-reference": lambda value: _uri(value if ":" in value.split("/")[0] else f"a:{value}"),
    "iri-reference": lambda value: _uri(value if ":" in value.split("/")[0] else f"a:{value}"),
    "json-pointer": lambda value: value == "" or re.fullmatch(r"(/([^~/]|~[01])*)*", value),
    "password": lambda value: True,
}


def _when(kind: Any, test: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Any, Any], bool]:
    def check(value: Any, wanted: Any, _schema: Any, _root: Any) -> bool:
        of_kind = _number(value) if kind is float else isinstance(value, kind)
        return test(value, wanted) if of_kind else True

    return check


_KEYWORDS: dict[str, Callable[[Any, Any, Any, Any], bool]] = {
    "type": _type,
    "nullable": lambda *_: True,
    "enum": lambda value, wanted, _s, _r: any(equal(value, each) for each in wanted),
    "const": lambda value, wanted, _s, _r: equal(value, wanted),
    "anyOf": lambda value, wanted, _s, root: any(_fits(value, each, root) for each in wanted),
    "oneOf": lambda value, wanted, _s, root: sum(_fits(value, each, root) for each in wanted) == 1,
    "allOf": lambda value, wanted, _s, root: all(_fits(value, each, root) for each in wanted),
    "$ref": _ref,
    "properties": lambda value, wanted, _s, root: (
        not isinstance(value, dict)
        or all(_fits(value[key], each, root) for key, each in wanted.items() if key in value)
    ),
    "required": _when(dict, lambda value, wanted: all(key in value for key in wanted)),
    "additionalProperties": _additional,
    "minProperties": _when(dict, lambda value, wanted: len(value) >= wanted),
    "maxProperties": _when(dict, lambda value, wanted: len(value) <= wanted),
    "items": _items,
    "prefixItems": lambda value, wanted, _s, root: (
        not isinstance(value, list)
        or all(_fits(each, part, root) for each, part in zip(value, wanted, strict=False))
    ),
    "minItems": _when(list, lambda value, wanted: len(value) >= wanted),
    "maxItems": _when(list, lambda value, wanted: len(value) <= wanted),
    "minLength": _when(str, lambda value, wanted: len(value) >= wanted),
    "maxLength": _when(str, lambda value, wanted: len(value) <= wanted),
    "pattern": _when(str, lambda value, wanted: re.search(wanted, value) is not None),
    "format": _format,
    "minimum": _when(float, lambda value, wanted: value >= wanted),
    "maximum": _when(float, lambda value, wanted: value <= wanted),
    "exclusiveMinimum": _when(float, lambda value, wanted: value > wanted),
    "exclusiveMaximum": _when(float, lambda value, wanted: value < wanted),
    "multipleOf": _when(
        float, lambda value, wanted: Fraction(str(value)) % Fraction(str(wanted)) == 0
    ),
    "not": lambda value, wanted, _s, root: not _fits(value, wanted, root),
    "uniqueItems": _when(list, lambda value, wanted: not wanted or _unique(value)),
    "additionalItems": lambda *_: True,  # looked at with items
    "contains": _contains,
    "propertyNames": _names,
    "patternProperties": _patterned,
    "dependentRequired": _when(
        dict,
        lambda value, wanted: all(
            each in value for name, others in wanted.items() if name in value for each in others
        ),
    ),
    "if": _if,
}
