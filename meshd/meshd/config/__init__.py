"""The configuration of a daemon: `load` it, `describe` it.

One frozen dataclass a section says everything about each setting; loader, display and the example
file are made from those.
"""

from meshd.config.access import AccessRule, access_rules
from meshd.config.errors import BadValue, ConfigError, ConfigSyntax, ConfigUnreadable, UnknownKey
from meshd.config.gossip import gossip_config
from meshd.config.guard_sections import AccessSection, AuditSection
from meshd.config.handoff import HandoffSection, handoff_config
from meshd.config.load import load, socket_candidates
from meshd.config.machine import Machine
from meshd.config.sections import (
    Config,
    DiscoverySection,
    GossipSection,
    HttpSection,
    LimitsSection,
    ListenSection,
    LogFormat,
    LogLevel,
    LogSection,
    NodeSection,
    PluginsSection,
    Preset,
    StorageSection,
)
from meshd.config.show import describe

__all__ = [
    "AccessRule",
    "AccessSection",
    "AuditSection",
    "BadValue",
    "Config",
    "ConfigError",
    "ConfigSyntax",
    "ConfigUnreadable",
    "DiscoverySection",
    "GossipSection",
    "HandoffSection",
    "HttpSection",
    "LimitsSection",
    "ListenSection",
    "LogFormat",
    "LogLevel",
    "LogSection",
    "Machine",
    "NodeSection",
    "PluginsSection",
    "Preset",
    "StorageSection",
    "UnknownKey",
    "access_rules",
    "describe",
    "gossip_config",
    "handoff_config",
    "load",
    "socket_candidates",
]
