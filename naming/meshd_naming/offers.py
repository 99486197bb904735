"""What one node says it can do, in the form that the index and the resolver read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshd_cms.types import NodeId
from meshd_naming.grammar import Name, parse_capability_name
from meshd_plugins.api import Descriptor, Privacy, Rates, Value

WEIGHT_MAX = 65_535  # as in a DNS SRV record
TEXT_ONLY = ("text",)


@dataclass(frozen=True, slots=True)
class Offer:
    """One capability of one node. Identity is (owner, capability_id)."""

    owner: NodeId
    node_name: str
    capability_id: str  # unique on its owner
    name: Name  # bare: kind and labels
    operations: tuple[str, ...]  # values of `Operation`; from a peer, so unknown ones may be there
    fields: Mapping[str, Value] = field(default_factory=dict[str, Value])  # canonical field names
    updated_at_s: float = (
        0.0  # monotonic, when what it says was last confirmed by its owner's record
    )
    slots: int = 1  # requests served at once
    privacy: Privacy = Privacy.MESH  # the widest distance from which it may be called
    rates: Rates | None = None  # None: has no notion of tokens
    kv_key: str = ""  # what KV state must be made for to be of use there; "": none is
    kv_bytes_per_token: int = 0  # of that state

    @property
    def weight(self) -> int:
        """Relative capacity, 1..65535: slots times measured decode tokens/s (1 where not measured)."""
        rate = self.rates.decode_tokens_per_s if self.rates else 0.0
        capacity = self.slots * (rate if 0.0 < rate < WEIGHT_MAX else 1.0)
        return max(1, min(WEIGHT_MAX, round(capacity)))

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it can take in: text, where it does not say."""
        return modalities_from(self.fields.get("modality"))

    def value(self, name: str) -> Value:
        """What a constraint on field `name` compares; None when the record does not say."""
        return self.slots if name == "slots" else self.fields.get(name)


def modalities_from(told: Value) -> tuple[str, ...]:
    """What a record says under `modality`, as texts; text alone, where it says nothing that makes sense."""
    if isinstance(told, list | tuple):
        return tuple(each for each in told if isinstance(each, str)) or TEXT_ONLY
    return (told,) if isinstance(told, str) else TEXT_ONLY


def offer_from_descriptor(
    owner: NodeId,
    node_name: str,
    descriptor: Descriptor,
    *,
    updated_at_s: float,
    zone: str = "",
    labels: tuple[str, ...] = (),
) -> Offer:
    """Flatten a descriptor, and the node's zone and labels, into the fields that constraints compare.

    The descriptor's own `fields` win over what is derived, except for zone and labels, which are the
    node's. Raises NamingError when the descriptor's name is malformed.
    """
    fields: dict[str, Value] = {}
    if (model := descriptor.model) is not None:
        fields |= {
            "architecture": model.architecture,
            "context": model.context_tokens,
            "family": model.family,
            "licence": model.licence,
            "modality": model.modalities,
            "model": (model.family, model.digest),
            "parameters": model.parameters,
            "quant": model.quantisation,
            "size_bytes": model.size_bytes,
        }
    if (rates := descriptor.rates) is not None:
        for name, rate in (
            ("decode_tokens_per_s", rates.decode_tokens_per_s),
            ("prefill_tokens_per_s", rates.prefill_tokens_per_s),
        ):
            if rate > 0.0:  # 0.0 is "not measured", not "slow"
                fields[name] = rate
    fields |= descriptor.fields
    fields |= {"zone": zone or None, "label": labels}
    return Offer(
        owner=owner,
        node_name=node_name,
        capability_id=descriptor.id,
        name=parse_capability_name(descriptor.name),
        operations=tuple(str(operation) for operation in descriptor.operations),
        fields=fields,
        updated_at_s=updated_at_s,
        slots=max(1, descriptor.slots),
        privacy=descriptor.privacy,
        rates=rates,
        kv_key=model.kv_key if model is not None and model.kv_bytes_per_token else "",
        kv_bytes_per_token=model.kv_bytes_per_token if model is not None else 0,
    )
