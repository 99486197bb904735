"""How far away an address is, as far as a privacy class cares. Pure."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address

from meshd_plugins.api import Privacy


@lru_cache(maxsize=1024)
def reach_of_host(host: str) -> Privacy:
    """LAN for an address that no router of the Internet forwards (RFC 1918, 4193, 3927), else MESH.

    What is not known, or is no address, counts as far.
    """
    try:
        found = ip_address(host.partition("%")[0])
    except ValueError:
        return Privacy.MESH
    mapped = getattr(found, "ipv4_mapped", None)
    private = (mapped or found).is_private
    return Privacy.LAN if private and not found.is_unspecified else Privacy.MESH
