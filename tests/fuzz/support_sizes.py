"""How much state an object holds: the length of every container in it, by where it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

_CONTAINERS = (list, dict, set, deque, tuple, frozenset)


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(value, name):
                yield name, getattr(value, name)


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith(("meshd.", "meshd_cms."))


def sizes(root: object) -> dict[str, int]:
    """The largest length of each container attribute, as `Class.attribute`, reachable from `root`.

    Only objects of this project are entered: what they hold is what they can let grow.
    """
    found: dict[str, int] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        where, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            container = cast("Collection[Any]", value)
            found[where] = max(found.get(where, 0), len(container))
            is_mapping = isinstance(value, Mapping)
            inside = cast("Mapping[Any, Any]", value).values() if is_mapping else container
            todo += [(where + "[]", one) for one in inside if _is_worth_a_look(one)]
        elif _is_ours(value):
            kind = type(value).__name__
            todo += [
                (f"{kind}.{name}", one) for name, one in _attributes(value) if _is_worth_a_look(one)
            ]
    return found


def _is_worth_a_look(value: object) -> bool:
    return isinstance(value, _CONTAINERS) or _is_ours(value)
