"""What is announced of a model: written from what its worker said, now or when it was last loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from meshd_plugins.api import Capabilities, Descriptor, ModelFacts, Operation, Privacy, Rates, Value
from meshd_plugins.builtin.llama.config import ModelConfig
from meshd_plugins.builtin.llama.models.facts import (
    compatibility_key,
    facts_from_wire,
    modalities_from_wire,
)
from meshd_plugins.builtin.llama.running.fit import Plan, explain
from meshd_plugins.builtin.llama.running.hardware import Chosen
from meshd_plugins.builtin.llama.serving.capability import Served
from meshd_plugins.builtin.llama.serving.embedding import (
    EmbeddingHello,
    capability_for,
    describe_embedding,
)
from meshd_plugins.builtin.llama.serving.warmth import kv_bytes_per_token

RATE_MAX: Final = 1e7
_READS: Final = {"image": "images", "audio": "sound"}
_RATES: Final = ("prefill_tokens_per_s", "decode_tokens_per_s", "load_s")


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """What changes about a model while its file does not."""

    resident: bool
    prefill_tokens_per_s: float = 0.0  # lately, where that is known better than what was measured
    decode_tokens_per_s: float = 0.0
    adapters: tuple[tuple[str, float], ...] = ()  # their digests and scales
    spread: tuple[str, ...] = ()  # other nodes that hold parts of it, and how many layers each


def describe(
    model: ModelConfig, digest: str, hello: Mapping[str, Value], standing: Standing
) -> tuple[Descriptor, ...]:
    """Return what is announced: one descriptor a name. Raises ValueError: the worker said nonsense."""
    facts = facts_from_wire(hello.get("model"), digest)
    if (embedding := EmbeddingHello.read(hello)) is not None:
        privacy = Privacy[model.privacy.upper()]
        lately = embedding.lately(standing.prefill_tokens_per_s)
        told = describe_embedding(model.names, model.slots, privacy, facts, lately)
        resident = {"resident": standing.resident}
        return tuple(dataclasses.replace(each, fields={**each.fields, **resident}) for each in told)
    adapters = (f"{digest}*{scale:g}" for digest, scale in standing.adapters)
    identity = "+".join((facts.digest, *adapters))
    key = compatibility_key(identity, str(hello.get("build", "")))
    facts = dataclasses.replace(
        facts,
        kv_key=key,
        kv_bytes_per_token=kv_bytes_per_token(hello),
        modalities=_modalities(facts, hello),
    )
    rates = _rates(hello, standing)
    slots, context = _count(hello, "slots"), _count(hello, "context_tokens")
    operations = (
        (Operation.CHAT, Operation.COMPLETE) if hello.get("chat") else (Operation.COMPLETE,)
    )
    fields: dict[str, Value] = {
        "context": context,
        "tokens_per_s": rates.decode_tokens_per_s,
        "quant": facts.quantisation.lower(),
        "model": facts.family,
        "resident": standing.resident,
    }
    if hello.get("tools") in ("native", "generic"):
        fields["tools"] = hello["tools"]
    if standing.spread:
        fields["split"] = list(standing.spread)
    if standing.adapters:
        fields["lora"] = [digest[:16] for digest, _ in standing.adapters]
    return tuple(
        Descriptor(
            name=name,
            operations=operations,
            summary=_summary(facts, standing),
            slots=slots,
            privacy=Privacy[model.privacy.upper()],
            model=facts,
            rates=rates,
            fields=fields,
        )
        for name in model.names
    )


def _modalities(facts: ModelFacts, hello: Mapping[str, Value]) -> tuple[str, ...]:
    """What the projector's header promises, as far as the worker found it true. Raises ValueError."""
    if "modalities" not in hello:
        return facts.modalities
    found = modalities_from_wire(hello["modalities"])
    return tuple(each for each in facts.modalities if each in found)


def _summary(facts: ModelFacts, standing: Standing) -> str:
    size = (
        f"{facts.parameters / 1e6:.0f}M"
        if facts.parameters < 1e9
        else f"{facts.parameters / 1e9:.1f}B"
    )
    adapted = f", {len(standing.adapters)} LoRA" if standing.adapters else ""
    quantisation = facts.quantisation or "unknown quantisation"
    reads = " and ".join(_READS[each] for each in facts.modalities if each in _READS)
    reads = f", reads {reads} too" if reads else ""
    return f"{facts.family} ({size} parameters, {quantisation}{adapted}{reads})"


def _rates(hello: Mapping[str, Value], standing: Standing) -> Rates:
    measured = {name: _rate(hello.get(name)) for name in _RATES}
    by_batch = hello.get("decode_tokens_per_s_by_batch")
    sizes = {
        int(size): _rate(rate)
        for size, rate in (by_batch.items() if isinstance(by_batch, Mapping) else ())
        if size.isdecimal() and len(size) < 5
    }
    alone = measured["decode_tokens_per_s"]
    lately = standing.decode_tokens_per_s or alone
    slower = lately / alone if alone > 0 else 1.0
    return Rates(
        prefill_tokens_per_s=round(
            standing.prefill_tokens_per_s or measured["prefill_tokens_per_s"], 1
        ),
        decode_tokens_per_s=round(lately, 1),
        decode_tokens_per_s_by_batch={
            size: round(rate * slower, 1) for size, rate in sizes.items()
        },
        load_s=round(measured["load_s"], 1),
    )


def _rate(value: Value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= RATE_MAX:
        raise ValueError(f"the worker gives {str(value)[:80]!r} for a rate")
    return float(value)


def _count(hello: Mapping[str, Value], name: str) -> int:
    value = hello.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31:
        raise ValueError(f"the worker gives {str(value)[:80]!r} for {name}")
    return value


class Announced:
    """The capabilities of one model that the daemon announces now."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities
        self._ids: set[str] = set()

    def say(self, descriptors: Sequence[Descriptor], model: Served) -> None:
        """Announce these and no others. Raises ValueError: a name is malformed or taken."""
        for capability_id in sorted(self._ids - {each.id for each in descriptors}):
            self._capabilities.remove(capability_id)
            self._ids.discard(capability_id)
        for descriptor in descriptors:
            capability = capability_for(descriptor, model)
            if descriptor.id in self._ids:
                self._capabilities.replace(capability)
            else:
                self._capabilities.add(capability)
                self._ids.add(descriptor.id)

    def withdraw(self) -> None:
        """Announce none."""
        for capability_id in sorted(self._ids):
            self._capabilities.remove(capability_id)
        self._ids.clear()


def explain_plan(plan: Plan, threads: Chosen) -> dict[str, Value]:
    """How a model is loaded, and why so, for people."""
    return {
        "threads": threads.value,
        "threads_reason": f"{threads.value} thread{'s' * (threads.value > 1)}: {threads.reason}",
        "slots": plan.slots,
        "context_tokens": plan.context_tokens,
        "batch_tokens": plan.batch_tokens,
        "gpu_layers": plan.gpu_layers,
        "memory": explain(plan),
    }
