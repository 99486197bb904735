"""What a server's model is, and how it is announced. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from meshd_plugins.api import Descriptor, ModelFacts, Operation, Rates, Value
from meshd_plugins.builtin.adopt.config import Kind, ServerConfig
from meshd_plugins.builtin.adopt.tools import Tools

CHAT_NAME: Final = "knowledge.gpt/general"
EMBED_NAME: Final = "computation.gpt/embed"
FAMILY_CHARS_MAX: Final = 64

_EMBEDS: Final = re.compile(
    r"embed|\bbge\b|\be5\b|\bgte\b|minilm|\bsimcse\b|\bst5\b", re.IGNORECASE
)
"""How models that embed are called, where their server does not say."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as its server describes it: cleaned and bounded, and not verified by anybody."""

    id: str  # what its server calls it
    chats: bool = True
    completes: bool = True
    embeds: bool = False
    digest: str = ""  # as the server says it, "" when it does not
    architecture: str = ""
    parameters: int = 0
    quantisation: str = ""
    size_bytes: int = 0
    trained_tokens: int = 0  # of the context it was trained with
    context_tokens: int = 0  # of one request as it is served; 0: not known
    chat_template_digest: str = ""
    modalities: tuple[str, ...] = ("text",)
    tools: Tools = Tools.UNKNOWN
    is_warm: bool | None = None  # in memory now; None: the server does not say


def looks_like_embedding(model_id: str) -> bool:
    """Whether a model is called like those that embed."""
    return bool(_EMBEDS.search(model_id))


def family_of(model_id: str) -> str:
    """What people call it: an id, or the name of the file where the id is a path to one."""
    name = model_id
    if model_id.lower().endswith(".gguf"):
        name = re.split(r"[/\\]", model_id)[-1][: -len(".gguf")]
    return name[:FAMILY_CHARS_MAX]


def facts_of(model: ServedModel, kind: Kind) -> ModelFacts:
    """Return what is announced of the model.

    The digest is one of what the server says, not of a file, and says so to whoever computes it: it is never the
    digest of a GGUF, so that nobody takes a name for a checked file. It is the same on all nodes whose servers
    say the same.
    """
    said = (str(kind), model.id, model.digest, str(model.parameters), model.quantisation)
    return ModelFacts(
        digest=hashlib.sha256("\n".join(("adopted", *said)).encode()).hexdigest(),
        family=family_of(model.id),
        architecture=model.architecture,
        parameters=model.parameters,
        quantisation=model.quantisation,
        context_tokens=model.trained_tokens or model.context_tokens,
        size_bytes=model.size_bytes,
        modalities=model.modalities,
        chat_template_digest=model.chat_template_digest,
    )


def describe(
    model: ServedModel, kind: Kind, config: ServerConfig, slots: int, rates: Rates | None
) -> tuple[Descriptor, ...]:
    """Return what is announced: a descriptor a name."""
    model = replace(model, modalities=config.modalities_of(model.id, model.modalities))
    facts = facts_of(model, kind)
    generating = tuple(
        operation
        for operation, can in (
            (Operation.CHAT, model.chats),
            (Operation.COMPLETE, model.completes),
        )
        if can
    )
    names: dict[str, tuple[Operation, ...]] = {}
    if generating:
        names.update(dict.fromkeys(config.names_of(model.id, CHAT_NAME), generating))
        if model.embeds:
            names.setdefault(EMBED_NAME, (Operation.EMBED,))
    elif model.embeds:
        names.update(dict.fromkeys(config.names_of(model.id, EMBED_NAME), (Operation.EMBED,)))
    return tuple(
        Descriptor(
            name=name,
            operations=operations,
            summary=_summary(facts, kind),
            slots=slots,
            privacy=config.privacy_class,
            model=facts,
            rates=rates,
            fields=_fields(model, facts, kind, config, rates),
        )
        for name, operations in names.items()
    )


def _summary(facts: ModelFacts, kind: Kind) -> str:
    details: list[str] = []
    if facts.parameters >= 1e9:
        details.append(f"{facts.parameters / 1e9:.1f}B parameters")
    elif facts.parameters:
        details.append(f"{facts.parameters / 1e6:.0f}M parameters")
    if facts.quantisation:
        details.append(facts.quantisation)
    inside = f" ({', '.join(details)})" if details else ""
    server = "an OpenAI-compatible server" if kind is Kind.OPENAI else str(kind)
    return f"{facts.family}{inside} on {server}"


def _fields(
    model: ServedModel,
    facts: ModelFacts,
    kind: Kind,
    config: ServerConfig,
    rates: Rates | None,
) -> Mapping[str, Value]:
    fields: dict[str, Value] = {
        "x_engine": str(kind),
        "context": config.context or model.context_tokens or facts.context_tokens,
        "model": facts.family,
    }
    if facts.quantisation:
        fields["quant"] = facts.quantisation.lower()
    if rates is not None and rates.decode_tokens_per_s:
        fields["tokens_per_s"] = rates.decode_tokens_per_s
    if model.tools is Tools.APPLIED and model.chats:
        fields["tools"] = "native"
    if model.is_warm is not None:
        fields["resident"] = model.is_warm
    return fields
