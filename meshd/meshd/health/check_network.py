"""Checks of the network between this node and others: interfaces, multicast, firewalls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_address, ip_network
from typing import Final

from meshd.core.membership import MemberState
from meshd.health.facts import DaemonFacts, Facts, InterfaceFact, PeerFact
from meshd.health.findings import Code, Finding, Severity
from meshd.health.wording import lasting, listed

SETTLED_S: Final = 10.0  # a member that young may not have had its turn
HEARD_RECENTLY_S: Final = 30.0


def interfaces(facts: Facts) -> Iterator[Finding]:
    """Is there a network, and is the address that peers are told one of it?"""
    if facts.machine is None:
        return
    found = facts.machine.interfaces
    if facts.machine.listens_everywhere and all(each.is_loopback for each in found):
        yield Finding(
            Code.NO_NETWORK,
            Severity.ERROR,
            "No network interface has an IPv4 address, but loopback.",
            "Look at `ip -br addr`: plug the cable in, join the Wi-Fi, or wait for DHCP; the daemon follows "
            "by itself.",
        )
    if facts.daemon is None:
        return
    host = facts.daemon.address.rpartition(":")[0]
    on = [each for each in found if each.address == host]
    if on and on[0].is_bridge and any(not (e.is_bridge or e.is_loopback) for e in found):
        yield Finding(
            Code.BRIDGE_ADDRESS,
            Severity.WARNING,
            f"Peers are told {host}, which belongs to the bridge {on[0].name} of this machine.",
            "A container runtime's bridge has the same address everywhere: set listen.advertise to the "
            "address of the real network.",
        )


def multicast(facts: Facts) -> Iterator[Finding]:
    """Does mDNS leave this machine, and does anything come back?"""
    machine = facts.machine
    if machine is None or machine.multicast is None:
        return
    known = {(each.name, each.address): each for each in machine.interfaces}
    works = any(tested.own_heard for tested in machine.multicast)
    for tested in machine.multicast:
        interface = known.get((tested.interface, tested.address))
        where = f"{tested.interface} ({tested.address})"
        is_off = interface is not None and not (interface.has_multicast or interface.is_loopback)
        if is_off and not tested.others:  # the own question comes back all the same: by the kernel
            others_work = works and len(machine.multicast) > 1
            yield Finding(
                Code.MULTICAST_OFF,
                Severity.NOTE if others_work else Severity.WARNING,
                f"The interface {where} has multicast switched off.",
                f"`ip link set {tested.interface} multicast on`, or leave it out of discovery.interfaces; a "
                "tunnel may not carry multicast at all: name a peer in discovery.seeds.",
            )
        elif tested.own_heard:
            if interface is not None and not tested.others:
                yield from _silent(facts, interface)
        else:
            reason = tested.error or "what was sent did not come back"
            yield Finding(
                Code.MULTICAST_BLOCKED,
                Severity.WARNING,
                f"Multicast DNS does not work on {where}: {reason}.",
                "Let UDP port 5353 to 224.0.0.251 pass, in and out, in this machine's firewall "
                "(`nft list ruleset`, `ufw allow 5353/udp`); or name a peer in discovery.seeds.",
            )


def _silent(facts: Facts, interface: InterfaceFact) -> Iterator[Finding]:
    """Multicast works here, and yet the members on this network are not heard by it."""
    if facts.daemon is None or interface.is_loopback:
        return
    there = [
        peer.name
        for peer in facts.daemon.peers
        if peer.state is MemberState.ALIVE
        and _is_on(peer, interface)
        and _is_elsewhere(facts, peer)
    ]
    if there:
        yield Finding(
            Code.MULTICAST_SILENT,
            Severity.WARNING,
            f"Multicast DNS leaves {interface.name} and nobody answers, though {listed(there)} "
            f"{'is' if len(there) == 1 else 'are'} on that network.",
            "The access point or the switch keeps multicast to itself (client isolation, IGMP snooping "
            "without a querier), or mDNS is off there: members stay, new ones need discovery.seeds.",
        )


def _is_on(peer: PeerFact, interface: InterfaceFact) -> bool:
    try:
        host = ip_address(peer.address.rpartition(":")[0])
    except ValueError:
        return False
    return host in ip_network(interface.network, strict=False)


def _is_elsewhere(facts: Facts, peer: PeerFact) -> bool:
    """Whether it is on another machine."""
    assert facts.machine is not None
    host = peer.address.rpartition(":")[0]
    return all(each.address != host for each in facts.machine.interfaces)


def mdns(facts: Facts) -> Iterator[Finding]:
    """Discovery gave up for now."""
    if facts.daemon is None:
        return
    seen = facts.daemon.mdns
    if seen.enabled and not seen.registered and seen.last_error:
        yield Finding(
            Code.MDNS_FAILED,
            Severity.WARNING,
            f"This node is not announced by multicast DNS: {seen.last_error}.",
            "It is tried again by itself; if it stays so, look at discovery.interfaces and at what else "
            "holds UDP port 5353 without sharing it (`ss -lnpu sport = 5353`).",
        )


def lanes(facts: Facts) -> Iterator[Finding]:
    """UDP and TCP, each way, compared: what one lane lets through and the other does not."""
    if facts.daemon is None:
        return
    yield from _datagrams(facts.daemon)
    cut = [
        peer
        for peer in facts.daemon.peers
        if peer.state is MemberState.ALIVE
        and peer.answer is not None
        and peer.answer.error
        and peer.heard_ago_s is not None
        and peer.heard_ago_s < HEARD_RECENTLY_S
        and peer.since_s > SETTLED_S
    ]
    if cut:
        told = [f"{peer.name} ({peer.answer.error})" for peer in cut if peer.answer is not None]
        yield Finding(
            Code.TCP_BLOCKED,
            Severity.ERROR,
            f"Datagrams of {listed(told)} arrive, and no stream to it comes about.",
            f"Let TCP port {_ports(cut)} pass in the firewalls of both: work is handed over by "
            "streams, so nothing can be asked of it.",
        )


def _datagrams(daemon: DaemonFacts) -> Iterator[Finding]:
    not_here: list[PeerFact] = []
    not_there: list[PeerFact] = []
    for peer in daemon.peers:
        answer = peer.answer
        old = min(peer.since_s, daemon.up_s) > max(SETTLED_S, daemon.silence_max_s)
        if not old or answer is None or answer.error or peer.state is not MemberState.ALIVE:
            continue
        if answer.up_s is not None and answer.up_s <= daemon.silence_max_s:
            continue
        if _silence_s(peer.heard_ago_s) > daemon.silence_max_s:
            not_here.append(peer)
        if _silence_s(answer.heard_us_ago_s) > daemon.silence_max_s:
            not_there.append(peer)
    ways = (
        ("from", "here", not_here, daemon.address.rpartition(":")[2]),
        ("to", "there", not_there, _ports(not_there)),
    )
    for word, where, peers, port in ways:
        if peers:
            yield Finding(
                Code.UDP_BLOCKED,
                Severity.ERROR,
                f"Streams work, but no datagram {word} {listed([peer.name for peer in peers])} arrived "
                f"{where} in the last {lasting(daemon.silence_max_s)}.",
                f"Let UDP port {port} pass in the firewalls, {where} first (`nft list ruleset`, "
                f"`ufw allow {port}/udp`); until then those nodes hold on by streams alone and notice "
                "failures late.",
            )


def _silence_s(ago_s: float | None) -> float:
    return float("inf") if ago_s is None else ago_s


def _ports(peers: Sequence[PeerFact]) -> str:
    """The ports of peers, mostly one and the same."""
    return listed(sorted({peer.address.rpartition(":")[2] for peer in peers}))
