"""What decides and records at one node, put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshd.config import Config, access_rules
from meshd.core.decrees import Decree, DecreeKind
from meshd.orchestrate.access import AccessPolicy
from meshd.orchestrate.access_guard import Guard
from meshd.orchestrate.audit import FOLDER, TO_CLOUD, Audit
from meshd.orchestrate.callers import Passports, id_text
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.host import Departure
from meshd.trust.identity import Identity, Role
from meshd_cms import NodeId, Store
from meshd_plugins.api import Logger, Value


@dataclass(frozen=True, slots=True)
class AccessParts:
    """Rules, the guard that applies them, passports, and the audit trail."""

    policy: AccessPolicy
    guard: Guard
    passports: Passports
    audit: Audit

    def departed(self, departure: Departure) -> None:
        """A capability of this node took a request out of the mesh."""
        request = departure.request
        self.audit.record(
            "left",
            to=TO_CLOUD,
            to_name=TO_CLOUD,
            capability=departure.capability_id,
            privacy=request.privacy.name.lower(),
            caller=str(departure.source.caller),
            request=request.request_id,
            bytes=content_bytes(request.body),
            pieces=1,
            outcome=departure.outcome,
        )

    def decreed(self, decree: Decree) -> None:
        """An authority decreed something that was not known here."""
        fields: dict[str, Value] = {
            "decree": decree.kind.name.lower(),
            "by": id_text(decree.authority),
            "made_at": round(decree.made_at_s, 3),
        }
        match decree.kind:
            case DecreeKind.REVOCATION:
                fields["to"] = "" if decree.node is None else id_text(decree.node)
                fields["reason"] = decree.reason
            case DecreeKind.KEY_GENERATION:
                fields["generation"] = decree.generation
        self.audit.record("decreed", **fields)

    def joined(self, node: NodeId, name: str, role: str) -> None:
        """This node let another one in."""
        self.audit.record("join_granted", to=id_text(node), to_name=name, role=role)


def content_bytes(value: Value) -> int:
    """Bytes of the texts and data in a value: what leaves with a request, whatever it is wrapped in."""
    match value:
        case str():
            return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        case bytes():
            return len(value)
        case Mapping():
            return sum(content_bytes(each) for each in value.values())
        case list() | tuple():
            return sum(content_bytes(each) for each in value)
        case _:
            return 0


def build_access(
    config: Config,
    identity: Identity,
    store: Store,
    catalogue: Catalogue,
    is_revoked: Callable[[NodeId], bool],
    *,
    mesh_s: Callable[[], float],
    log: Logger,
) -> AccessParts:
    """The parts of one daemon; `load` has checked the rules.

    `mesh_s` is the mesh's clock: passports are judged by what all nodes take for the time, lines of the trail
    have this machine's own.
    """
    me = identity.node_id
    policy = AccessPolicy(access_rules(config.access.rules), me, catalogue.standing_of)

    def key_of(node: NodeId) -> bytes | None:
        """Of a member in good standing: one that is live here, and was not shut out."""
        if node == me:
            return identity.signer.public_key
        if is_revoked(node) or not catalogue.is_live(node):
            return None
        return store.public_key(node)

    catalogue.note_role(me, identity.role)
    return AccessParts(
        policy=policy,
        guard=Guard(me, policy, catalogue.reach_of, is_observer=identity.role is Role.OBSERVER),
        passports=Passports(identity.mesh_id, me, identity.signer, identity.verify, key_of, mesh_s),
        audit=Audit(
            config.node.state_dir / FOLDER,
            size_bytes_max=config.audit.size_bytes_max,
            keep=config.audit.keep,
            unix_s=time.time,
            log=log,
        ),
    )
