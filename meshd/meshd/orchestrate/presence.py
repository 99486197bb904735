"""How this node makes itself known: the `node` key of its record, and its mDNS announcement."""

from __future__ import annotations

from collections.abc import Iterable

from meshd.config import Config
from meshd.core.effects import Address
from meshd.core.frames import PROTOCOL_VERSION
from meshd.core.sealing import mesh_tag
from meshd.orchestrate.parts import at
from meshd.shell.addresses import Whereabouts
from meshd.shell.discovery import JOINABLE, JOINABLE_KEY, Announcement
from meshd.trust.identity import Identity, Role
from meshd_cms import Epoch, node_id_text
from meshd_plugins.api import Value


def node_value(
    config: Config, address: Address, epoch: Epoch, software: str, role: Role
) -> dict[str, Value]:
    """What the record says of the node as a whole."""
    node = config.node
    return {
        "name": node.name,
        "software": software,
        "protocol": PROTOCOL_VERSION,
        "role": role.value,
        "addresses": [at(address)],
        "zone": node.zone,
        "labels": list(node.labels),
        "epoch": int(epoch),
    }


def announcement(
    config: Config,
    identity: Identity,
    whereabouts: Whereabouts,
    names: Iterable[str],
    joinable: bool = False,
) -> Announcement:
    """What mDNS shows of us: an opaque tag, and the names we serve if the configuration allows it.

    `joinable` says that a device may join by the PIN that is shown here; not who, and not which mesh.
    """
    text: dict[str, str] = {}
    if config.discovery.announce_models:
        text = {"node": config.node.name, "names": ",".join(sorted(set(names)))}
    if joinable:
        text[JOINABLE_KEY] = JOINABLE
    return Announcement(
        instance=node_id_text(identity.node_id),
        port=whereabouts.address[1],
        addresses=whereabouts.announced(),
        mesh_tag=mesh_tag(identity.mesh_id).hex(),
        text=text,
    )
