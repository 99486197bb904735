"""A validator of JSON Schemas for tests: written from the specification, with nothing of the code under test.

It knows the keywords that a grammar is made of, and says of every other one that it does not.
"""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any

IGNORED = {"$defs", "definitions", "title", "description", "default", "$schema"}


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
    return all(_fits(each, wanted, root) for each in value[len(schema.get("prefixItems", [])) :])


def _format(value: Any, wanted: str, _schema: Any, _root: Any) -> bool:
    if not isinstance(value, str):
        return True
    readers: dict[str, Callable[[str], object]] = {
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
        "date-time": datetime.datetime.fromisoformat,
        "uuid": uuid.UUID,
        "ipv4": IPv4Address,
    }
    try:
        readers[wanted](value)
    except ValueError:
        return False
    return True


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
    "multipleOf": _when(float, lambda value, wanted: value % wanted == 0),
}
