"""From the section [gossip] to the timers of the gossip core: the preset with single overrides on top."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import cast

from meshd.config.sections import GossipSection
from meshd.config.values import Unsuitable
from meshd.core.config import PRESETS, GossipConfig

_FIXED = frozenset({"datagram_payload_bytes_max"})  # the wire format decides; all nodes must agree
_FRACTIONS = frozenset({"rumour_loss"})

NAMES = tuple(field.name for field in dataclasses.fields(GossipConfig) if field.name not in _FIXED)
"""What [gossip.overrides] may hold."""


class UnknownTimer(ValueError):
    """No such name in [gossip.overrides]; the text is the name."""


def gossip_config(section: GossipSection) -> GossipConfig:
    """What the core is built with.

    Raises UnknownTimer or Unsuitable; not for a section that `load` returned, which has tried it.
    """
    preset = PRESETS[section.preset.value]()
    changes: dict[str, int | float] = {}
    for name, raw in section.overrides.items():
        if name not in NAMES:
            raise UnknownTimer(name)
        whole = isinstance(getattr(preset, name), int)
        expected = "a whole number above 0" if whole else "a number above 0"
        if name in _FRACTIONS:
            expected += " and below 1"
        if isinstance(raw, bool) or not isinstance(raw, int if whole else (int, float)):
            raise Unsuitable(f"{name} = {raw!r}: expected {expected}")
        if not math.isfinite(raw) or raw <= 0 or (name in _FRACTIONS and raw >= 1):
            raise Unsuitable(f"{name} = {raw!r}: expected {expected}")
        changes[name] = raw if whole else float(raw)
    # Each value was checked against the type of the field it goes to.
    return cast("Callable[..., GossipConfig]", dataclasses.replace)(preset, **changes)
