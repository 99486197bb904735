"""Checks of this node's standing in its mesh: its certificate, the datagram key, and the mesh's clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from meshd.health.facts import Facts
from meshd.health.findings import Code, Finding, Severity
from meshd.health.wording import lasting, listed

MESH_CLOCK_OFF_S: Final = 60.0


def certificate(facts: Facts) -> Iterator[Finding]:
    """Not valid, or soon not, and nobody to renew it."""
    trust = None if facts.daemon is None else facts.daemon.trust
    if trust is None:
        return
    issuers = (
        f"Look whether one of those known here is reachable: {listed(trust.issuers)}."
        if trust.issuers
        else "No issuer is known here: start one, such as the node that founded the mesh."
    )
    because = f" The last try: {trust.last_error}." if trust.last_error else ""
    if trust.standing_code:
        yield Finding(
            Code.CERTIFICATE_BAD,
            Severity.ERROR,
            f"Peers serve this node nothing but a renewal: {trust.standing}.{because}",
            f"It renews by itself once it reaches an issuer. {issuers}",
        )
    elif trust.renewal_overdue_s > 0.0 and (trust.last_error or not trust.issuers):
        yield Finding(
            Code.CERTIFICATE_ENDING,
            Severity.WARNING,
            f"This node's certificate ends in {lasting(trust.left_s)} and could not be renewed.{because}",
            issuers,
        )


def keys(facts: Facts) -> Iterator[Finding]:
    """A datagram key was decreed that is not here."""
    trust = None if facts.daemon is None else facts.daemon.trust
    if trust is None or trust.wanted_generation is None:
        return
    yield Finding(
        Code.KEY_BEHIND,
        Severity.ERROR,
        f"Datagram key generation {trust.wanted_generation} is in force, and this node has "
        f"{trust.key_generation}: it hears nobody's datagrams and nobody hears its own.",
        "It asks peers for the key over TCP by itself; if this lasts, look whether TCP passes to any of them.",
    )


def mesh_clock(facts: Facts) -> Iterator[Finding]:
    """Our own clock against the mesh's, as far as it is known without asking; asked peers tell it finer."""
    daemon = facts.daemon
    if daemon is None or daemon.trust is None:
        return
    if any(peer.answer is not None for peer in daemon.peers):
        return
    ahead_s = daemon.trust.clock_ahead_s
    if abs(ahead_s) > MESH_CLOCK_OFF_S:
        yield Finding(
            Code.CLOCK_OFF,
            Severity.WARNING,
            f"This node's clock is {lasting(ahead_s)} {'ahead of' if ahead_s > 0 else 'behind'} the mesh's.",
            "Synchronise it: `timedatectl` shows whether it is, `timedatectl set-ntp true` does it.",
        )
