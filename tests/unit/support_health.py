"""Facts of a mesh in which all is well, and small changes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshd.core.membership import MemberState
from meshd.health import (
    ClockFacts,
    DaemonFacts,
    DiskFacts,
    Facts,
    InterfaceFact,
    LoadFacts,
    MachineFacts,
    MdnsFacts,
    MulticastFact,
    PeerAnswer,
    PeerFact,
    TrustFacts,
)

NOW_UNIX_S = 1_790_000_000.0
ETH0 = InterfaceFact("eth0", "192.0.2.10", "192.0.2.0/24", False, False, True)
LO = InterfaceFact("lo", "127.0.0.1", "127.0.0.0/8", True, False, False)
DOCKER0 = InterfaceFact("docker0", "172.17.0.1", "172.17.0.0/16", False, True, True)
HEARD = MulticastFact("eth0", "192.0.2.10", own_heard=True, others=("192.0.2.11",))
ANSWER = PeerAnswer(
    clock_ahead_s=0.01,
    clock_error_s=0.001,
    software="meshd 0.1.0",
    protocol=1,
    heard_us_ago_s=0.5,
    up_s=3600.0,
)


def peer(number: int = 1, **changes: Any) -> PeerFact:
    """A peer that is well."""
    fact = PeerFact(
        node=f"node{number}",
        name=f"pi{number}",
        address=f"192.0.2.{10 + number}:7946",
        state=MemberState.ALIVE,
        since_s=3600.0,
        heard_ago_s=0.5,
        answer=ANSWER,
    )
    return replace(fact, **changes)


def answer(**changes: Any) -> PeerAnswer:
    """What a peer says that is well."""
    return replace(ANSWER, **changes)


def daemon(**changes: Any) -> DaemonFacts:
    """A daemon that is well, with two peers."""
    facts = DaemonFacts(
        node="node0",
        name="hub",
        mesh="home",
        address="192.0.2.10:7946",
        software="meshd 0.1.0",
        protocol=1,
        up_s=3600.0,
        silence_max_s=20.0,
        mdns=MdnsFacts(enabled=True),
        disk=DiskFacts("/var/lib/meshd"),
        load=LoadFacts(300.0, sent=1000),
        peers=(peer(1), peer(2)),
        differences=(),
    )
    return replace(facts, **changes)


def load(**changes: Any) -> LoadFacts:
    """A process that keeps up."""
    return replace(LoadFacts(300.0, sent=1000), **changes)


def trust(**changes: Any) -> TrustFacts:
    """A node in good standing whose certificate is not due yet."""
    well = TrustFacts(
        left_s=2 * 86_400.0, renewal_overdue_s=-3600.0, key_generation=3, issuers=("hub",)
    )
    return replace(well, **changes)


def machine(**changes: Any) -> MachineFacts:
    """A machine with one network on which multicast passes."""
    return replace(MachineFacts((ETH0, LO), (HEARD,)), **changes)


def facts(**changes: Any) -> Facts:
    """All of it."""
    clock = ClockFacts(NOW_UNIX_S, int(NOW_UNIX_S * 1e3) - 5000)
    whole = Facts(clock=clock, daemon=daemon(), machine=machine(), socket="/run/meshd/meshd.sock")
    return replace(whole, **changes)
