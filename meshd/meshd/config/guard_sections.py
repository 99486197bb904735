"""The sections about who may do what: [access], [trust] and [audit]."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from meshd.config.fields import Tables, about


class PrivacyClass(StrEnum):
    """How far a request may travel."""

    LOCAL = "local"
    LAN = "lan"
    MESH = "mesh"
    CLOUD = "cloud"


@dataclass(frozen=True, slots=True)
class AccessSection:
    """Who may use what. Without rules every member and every client may use everything."""

    default_privacy: PrivacyClass = field(
        default=PrivacyClass.MESH,
        metadata=about(
            "How far a request may travel that does not say: local (it never leaves this node), lan,"
            " mesh (members only), cloud."
        ),
    )
    rules: Tables = field(
        default=Tables(),
        metadata=about(
            "Tables [[access.rules]], looked at in order: the first that is about the capability, the"
            " caller and the request's class decides. Where a rule is about a capability and none"
            " decides, it is denied. name: a name or a pattern. callers: anyone, local (this machine),"
            " mesh (any other member), a node's name or whole id, role:observer, key:NAME (an API key of"
            " this node) or key:NAME@NODE. privacy: classes of requests. effect: allow or deny."
        ),
    )


@dataclass(frozen=True, slots=True)
class TrustSection:
    """Certificates that this node issues, where it is an issuer."""

    certificate_days: float = field(
        default=28.0,
        metadata=about(
            "Days that a node's certificate lasts; it is renewed by itself after a third of them. Raising"
            " it lets a mesh go on for longer while no issuer is there; revoking works at once in any"
            " case.",
            minimum=0.00001,
            maximum=397.0,
        ),
    )


@dataclass(frozen=True, slots=True)
class AuditSection:
    """The record of what left this node and of what it did for others. Never what was in it."""

    keep: bool = field(
        default=True,
        metadata=about("Keep it, in the folder audit of state_dir; `meshd audit` reads it."),
    )
    size_bytes_max: int = field(
        default=16_777_216,
        metadata=about(
            "Bytes of all its files; the oldest go first. A request takes about 300.",
            minimum=65_536,
            maximum=1_073_741_824,
        ),
    )
