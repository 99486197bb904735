"""The section [handoff], and the choice it makes for the core."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshd.config.fields import about
from meshd.core.handoff import HandoffConfig


@dataclass(frozen=True, slots=True)
class HandoffSection:
    """KV state from node to node, instead of computing a long prompt's beginning once more."""

    enable: bool = field(
        default=True,
        metadata=about("Whether this node fetches such state from peers, and hands its own out."),
    )
    tokens_min: int = field(
        default=256,
        metadata=about(
            "Tokens that must be saved for a fetch. Raising it fetches less often, of more use each.",
            minimum=16,
            maximum=1_048_576,
        ),
    )
    advantage: float = field(
        default=1.5,
        metadata=about(
            "How many times faster than computing a fetch must be expected to be; it is given up when it"
            " has taken as long as that leaves. Raising it fetches less often, and wastes less.",
            minimum=0.1,
            maximum=100.0,
        ),
    )


def handoff_config(section: HandoffSection) -> HandoffConfig:
    """What the core is built with."""
    return HandoffConfig(
        enable=section.enable, tokens_min=section.tokens_min, advantage=section.advantage
    )
