"""From what a client names (`model`, or a target of the mesh API) to what the mesh is asked.

A client may name three things:

- `auto`: the classifier picks a name;
- a semantic name with constraints: passed on as it is, the resolver judges it;
- a concrete model by its family (`SmolLM2-135M-Instruct`), as `/v1/models` lists it: whoever serves
  that model, under any name.

What the kind of a name makes of the request (data is fetched, a computation is run) the planner decides.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final, Protocol, cast

from meshd.edge.errors import RequestError
from meshd_plugins.api import Operation, Value

AUTO: Final = "auto"
_CATALOGUE_AGE_MAX_S: Final = 1.0
_COMPARED_CHARS_MAX: Final = 100  # of an unknown model, with what there is
_KINDS: Final = frozenset({"knowledge", "data", "computation"})
_EXPRESSIBLE: Final = re.compile(r"[A-Za-z0-9\-_.:/+]{1,64}")  # as the value of a constraint


class _Catalogue(Protocol):
    def capabilities(self) -> list[Mapping[str, Value]]: ...


def is_name(model: str) -> bool:
    """Whether it is meant as a semantic name (or `auto`) rather than as a concrete model's."""
    head = model.partition("/")[0]
    return model == AUTO or ".gpt" in head or head in _KINDS


class Models:
    """The models of the mesh as OpenAI's clients see them, from the node's own catalogue.

    Reading the catalogue costs time in proportion to the mesh, so it is kept for a second.
    """

    def __init__(self, catalogue: _Catalogue, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._listed: dict[str, dict[str, Value]] = {}
        self._kinds: dict[tuple[str, str], str] = {}  # of the names that serve a model's operation
        self._listed_at_s = -_CATALOGUE_AGE_MAX_S

    def listed(self) -> dict[str, dict[str, Value]]:
        """Id to `{"nodes", "operations", "modalities"}`, the last of models: `auto`, then names, then families, sorted."""
        now_s = self._clock()
        if now_s - self._listed_at_s >= _CATALOGUE_AGE_MAX_S:
            capabilities = self._catalogue.capabilities()
            self._listed, self._kinds = _listing(capabilities), _kinds_of(capabilities)
            self._listed_at_s = now_s
        return self._listed

    def target_for(self, model: str, operation: Operation = Operation.CHAT) -> str:
        """What to ask the mesh for when a client names `model`.

        Raises:
            RequestError: 404 `model_not_found` when it is no name and nobody has such a model.
        """
        if is_name(model):
            return model
        if model in self.listed():
            kind = self._kinds.get((model, operation), "knowledge")
            return f"{kind}.gpt/**?model={model}"
        raise self.not_found(model)

    def not_found(self, model: str) -> RequestError:
        """404 `model_not_found`, with the nearest that exists."""
        by_folded = {known.casefold(): known for known in self.listed()}
        near = get_close_matches(model[:_COMPARED_CHARS_MAX].casefold(), by_folded, n=1)
        hint = f"did you mean {by_folded[near[0]]!r}? " if near else ""
        return RequestError(
            f"The model {model!r} does not exist in this mesh; "
            f"{hint}`meshd caps` and GET /v1/models list what there is",
            code="model_not_found",
            param="model",
            status=404,
        )


def _listing(capabilities: list[Mapping[str, Value]]) -> dict[str, dict[str, Value]]:
    names: dict[str, dict[str, Value]] = {}
    families: dict[str, dict[str, Value]] = {}
    for capability in capabilities:
        node = str(capability.get("node_name") or capability.get("node") or "")
        operations = capability.get("operations")
        modalities = capability.get("modalities")
        _add(names, str(capability.get("name", "")), node, operations, modalities)
        family = family_of(capability)
        if _EXPRESSIBLE.fullmatch(family):
            _add(families, family, node, operations, modalities)
    names.pop("", None)
    return {
        AUTO: {"nodes": [], "operations": [Operation.CHAT, Operation.COMPLETE]},
        **dict(sorted(names.items())),
        **dict(sorted(families.items())),
    }


def _kinds_of(capabilities: list[Mapping[str, Value]]) -> dict[tuple[str, str], str]:
    """Models that are no `knowledge` by family and operation: who makes vectors has any kind of name."""
    kinds: dict[tuple[str, str], str] = {}
    for capability in capabilities:
        kind = str(capability.get("name", "")).partition(".gpt/")[0]
        operations = capability.get("operations")
        for operation in operations if isinstance(operations, list | tuple) else ():
            key = (family_of(capability), str(operation))
            if kinds.get(key) != "knowledge":
                kinds[key] = kind
    return kinds


def family_of(capability: Mapping[str, Value]) -> str:
    """The family of a capability's model, "" when it has none."""
    model = capability.get("model")
    if isinstance(model, Mapping):
        return str(model.get("family") or "")
    return model if isinstance(model, str) else ""


def _add(
    table: dict[str, dict[str, Value]], key: str, node: str, operations: Value, modalities: Value
) -> None:
    row = table.setdefault(key, {"nodes": [], "operations": []})
    nodes = cast("list[Value]", row["nodes"])
    if node and node not in nodes:
        nodes.append(node)
    for field, found in (("operations", operations), ("modalities", modalities)):
        if isinstance(found, list | tuple) and found:
            known = cast("list[Value]", row.setdefault(field, []))
            known.extend(each for each in found if each not in known)
