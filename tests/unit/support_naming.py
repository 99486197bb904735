"""Offers and states for tests of names and of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping

from meshd_cms.types import NodeId
from meshd_naming import Index, Offer, parse_capability_name
from meshd_plugins.api import Privacy, Rates, Value


def node(number: int) -> NodeId:
    """A node id; numbers order ids."""
    return NodeId(number.to_bytes(16, "big"))


def offer(
    number: int,
    name: str,
    *,
    fields: Mapping[str, Value] | None = None,
    privacy: Privacy = Privacy.MESH,
    decode: float = 0.0,
    slots: int = 1,
    operations: tuple[str, ...] = ("chat",),
    updated_at_s: float = 0.0,
) -> Offer:
    return Offer(
        owner=node(number),
        node_name=f"pi-{number}",
        capability_id=name,
        name=parse_capability_name(name),
        operations=operations,
        fields=fields or {},
        updated_at_s=updated_at_s,
        slots=slots,
        privacy=privacy,
        rates=Rates(10.0 * decode, decode) if decode else None,
    )


def index_of(*offers: Offer) -> Index:
    index = Index()
    for one in offers:
        assert index.put(one)
    return index
