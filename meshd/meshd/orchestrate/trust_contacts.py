"""Who may be asked about certificates and keys: members, then those whom the records and the last life tell of."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from meshd.core.effects import Address
from meshd.core.membership import MemberState, MemberView
from meshd.orchestrate.records import NODE_KEY
from meshd.shell.warden_tools import Contact
from meshd.trust.certificates import Role
from meshd_cms import NodeId, Store


def contacts(
    me: NodeId,
    members: Iterable[MemberView],
    store: Store,
    connected: Sequence[NodeId],
    elsewhere: Iterable[Address],
) -> tuple[Contact, ...]:
    """All that are known, the likeliest to answer first.

    A node that comes back after a month knows nobody as a member, and has records that say where issuers were.

    Args:
        me: is not asked.
        members: as gossip has them.
        store: the records; what they say of a role is a hint.
        connected: with whom there is a connection.
        elsewhere: addresses where somebody of the mesh was.
    """
    found: dict[NodeId, Contact] = {}
    for view in members:
        if not view.is_self and view.state in (MemberState.ALIVE, MemberState.SUSPECT):
            found[view.node] = Contact(
                view.node, view.address, is_issuer(store, view.node), view.node in connected
            )
    for owner in store.owners():
        address = _address(store, owner)
        if owner != me and owner not in found and address is not None:
            found[owner] = Contact(owner, address, is_issuer(store, owner), owner in connected)
    taken = {each.address for each in found.values()}
    others = [Contact(None, address) for address in elsewhere if address not in taken]
    return (*found.values(), *others)


def is_issuer(store: Store, node: NodeId) -> bool:
    """Whether a node says of itself that it is an issuer; what it then issues proves it."""
    return _about(store, node).get("role") == Role.ISSUER.value


def _address(store: Store, node: NodeId) -> Address | None:
    addresses = _about(store, node).get("addresses")
    if not isinstance(addresses, list) or not addresses or not isinstance(addresses[0], str):
        return None
    host, _, port = addresses[0].rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    return (host, int(port)) if port.isdecimal() and 0 < int(port) < 65_536 else None


def _about(store: Store, node: NodeId) -> Mapping[str, object]:
    value = store.get(node, NODE_KEY)
    return value if isinstance(value, Mapping) else {}
