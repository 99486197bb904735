"""Checks of who else is there: strangers, doubles, liars, seeds, and stores that differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Final

from meshd.core.membership import MemberState
from meshd.core.sealing import DropReason
from meshd.health.facts import DaemonFacts, Facts, StrangerFact
from meshd.health.findings import Code, Finding, Severity
from meshd.health.wording import counted, lasting, listed, times

LONELY_S: Final = 10.0  # before that, a node may simply not have found anybody yet
EPOCHS_RAISED_MAX: Final = 1  # a restart with an old state folder needs one

_OFFENCES: Final[Mapping[str, str]] = {
    "accusations_refuted": "accused others {times}, all refuted",
    "claims_forged": "spoke {times} in the name of others",
    "epoch_absurd": "claimed an impossible epoch {times}",
    "record_rejected": "sent records that prove nothing {times}",
    "joins_excess": "asked to join far too often, {times}",
    "version_unfounded": "promised versions that do not exist {times}",
    "decree_rejected": "sent decrees that no authority signed {times}",
    "malformed": "sent what cannot be read {times}",
}


def peers(facts: Facts) -> Iterator[Finding]:
    """Nobody there, or somebody gone."""
    daemon = facts.daemon
    if daemon is None:
        return
    live = [peer for peer in daemon.peers if peer.state.is_live]
    if not live and daemon.up_s > LONELY_S:
        tried = [
            "multicast DNS" if daemon.mdns.enabled else "",
            counted(len(daemon.seeds), "seed") if daemon.seeds else "",
            counted(daemon.remembered, "remembered peer") if daemon.remembered else "",
        ]
        ways = listed([way for way in tried if way]) or "nothing: there is no seed and mDNS is off"
        yield Finding(
            Code.NO_PEERS,
            Severity.WARNING,
            f"This node is alone in the mesh {daemon.mesh}; it looked by {ways}.",
            "Is another node running, and in the same mesh (`meshd status` on both shows the same mesh_id)? "
            'Then name it here: discovery.seeds = ["ADDRESS:PORT"].',
        )
    lost = [
        f"{peer.name} ({'dead' if peer.state is MemberState.DEAD else 'suspected'} for "
        f"{lasting(peer.since_s)})"
        for peer in daemon.peers
        if peer.state in (MemberState.DEAD, MemberState.SUSPECT)
    ]
    if lost:
        yield Finding(
            Code.PEERS_LOST,
            Severity.WARNING,
            f"{len(lost)} of {len(daemon.peers)} other members do not answer: {listed(lost)}.",
            "Look at their power and network; one that is gone for good is forgotten after a day, and one "
            "that comes back needs nothing done.",
        )


def seeds(facts: Facts) -> Iterator[Finding]:
    """First contacts that lead nowhere."""
    if facts.daemon is None:
        return
    unknown = [each.seed for each in facts.daemon.seeds if each.address is None]
    silent = [each.seed for each in facts.daemon.seeds if each.address is not None and each.silent]
    if unknown:
        yield Finding(
            Code.SEED_SILENT,
            Severity.WARNING,
            f"The name of {_seeds(unknown)} does not resolve.",
            "Mend the name in discovery.seeds, or write an IP address.",
        )
    if silent:
        yield Finding(
            Code.SEED_SILENT,
            Severity.WARNING,
            f"{_seeds(silent).capitalize()} never answered.",
            "Is a node of this mesh running there, and does UDP pass? A seed that is gone for good is "
            "better removed from discovery.seeds.",
        )


def _seeds(names: list[str]) -> str:
    return f"the seed{'s' if len(names) > 1 else ''} {listed(names)}"


def strangers(facts: Facts) -> Iterator[Finding]:
    """Datagrams of others that are none of ours."""
    daemon = facts.daemon
    if daemon is None:
        return
    by_reason: defaultdict[DropReason, list[StrangerFact]] = defaultdict(list)
    for each in daemon.strangers:
        by_reason[each.reason].append(each)
    others = [each.address for each in by_reason[DropReason.OTHER_MESH]]
    others += [address for address in daemon.mdns.other_mesh if address not in others]
    if others:
        yield Finding(
            Code.OTHER_MESH,
            Severity.NOTE,
            f"Nodes of another mesh are near: {listed(others)}.",
            "Two meshes share a network without harm. If it was to be one, move the folder identity away there "
            "and join this one: `meshd invite` here, `meshd join TOKEN` there.",
        )
    if unsealed := by_reason[DropReason.BAD_SEAL]:
        yield Finding(
            Code.BAD_SEAL,
            Severity.WARNING,
            f"Datagrams that name this mesh and were not sealed with its key come from {_sources(unsealed)}.",
            "Somebody there has this mesh's id and not its key (a node of an earlier mesh of that name, an "
            "key rotation missed), or forges: let it join again, or keep it off the network.",
        )
    if foreign := by_reason[DropReason.WRONG_FORMAT]:
        yield Finding(
            Code.OTHER_PROTOCOL,
            Severity.WARNING,
            f"Datagrams in another format come from {_sources(foreign)}.",
            "Another release of meshd, or another program on this port: install the same release on all.",
        )


def _sources(found: list[StrangerFact]) -> str:
    return listed([f"{each.address} ({times(each.count)})" for each in found])


def releases(facts: Facts) -> Iterator[Finding]:
    """Who runs something else."""
    daemon = facts.daemon
    if daemon is None:
        return
    protocol = sorted(
        f"{peer.name} ({peer.answer.protocol})"
        for peer in daemon.peers
        if peer.answer is not None and peer.answer.protocol not in (None, daemon.protocol)
    )
    if protocol or daemon.mdns.other_protocol:
        seen = (
            f"{listed(protocol)}, where this node speaks {daemon.protocol}"
            if protocol
            else "a node that multicast DNS told of"
        )
        yield Finding(
            Code.OTHER_PROTOCOL,
            Severity.WARNING,
            f"Another version of the protocol is spoken by {seen}.",
            "Install the same release of meshd on all nodes.",
        )
    software = sorted(
        f"{peer.name} ({peer.answer.software})"
        for peer in daemon.peers
        if peer.answer is not None and peer.answer.software not in ("", daemon.software)
    )
    if software and not protocol:
        yield Finding(
            Code.SOFTWARE_MIXED,
            Severity.NOTE,
            f"Another release than {daemon.software} runs on {listed(software)}.",
            "They understand each other; update when it suits you.",
        )


def doubles(facts: Facts) -> Iterator[Finding]:
    """One identity, name or address that two processes carry."""
    daemon = facts.daemon
    if daemon is None:
        return
    yield from _identity(daemon)
    named: defaultdict[str, list[str]] = defaultdict(list)
    named[daemon.name].append(f"{daemon.address} (this node)")
    for peer in daemon.peers:
        if peer.state.is_live:
            named[peer.name].append(peer.address)
    for name, addresses in sorted(named.items()):
        if len(addresses) > 1:
            yield Finding(
                Code.NAME_DUPLICATE,
                Severity.WARNING,
                f"{len(addresses)} nodes are called {name}: {listed(addresses)}.",
                "Give each a name of its own (node.name) and restart it; names such as "
                f"computation.gpt/arithmetic@{name} mean either until then.",
            )
    for address, holder, other in daemon.contested:
        yield Finding(
            Code.ADDRESS_CONTESTED,
            Severity.WARNING,
            f"{holder} and {other} both say that they are reached at {address}.",
            "One of them tells a wrong address: look at listen.advertise on both, and at address translation "
            "between them and here.",
        )


def _identity(daemon: DaemonFacts) -> Iterator[Finding]:
    double = [each for each in daemon.strangers if each.reason is DropReason.OWN]
    raised = daemon.load.epochs_raised
    seen = [
        f"The identity of {name} is used in turn at {listed(addresses)}."
        for name, addresses in sorted(daemon.doubles.items())
    ]
    if double:
        seen.append(f"Datagrams of this node's own identity come from {_sources(double)}.")
    elif raised > EPOCHS_RAISED_MAX:
        seen.append(
            f"This node had to take a new epoch {times(raised)} in the last "
            f"{lasting(daemon.load.window_s)}: another process speaks under its identity."
        )
    for sentence in seen:
        yield Finding(
            Code.IDENTITY_DUPLICATE,
            Severity.ERROR,
            sentence,
            "A state folder or card image was copied with its keys: stop one of the two, empty its "
            "state folder, and let it join (`meshd invite` here, `meshd join TOKEN` there).",
        )


def offences(facts: Facts) -> Iterator[Finding]:
    """Members that lie, flood or babble."""
    if facts.daemon is None:
        return
    for name, kinds in sorted(facts.daemon.offences.items()):
        told = [
            _OFFENCES.get(kind, f"{kind} {{times}}").format(times=times(count))
            for kind, count in sorted(kinds.items())
            if count
        ]
        if told:
            yield Finding(
                Code.PEER_MISBEHAVES,
                Severity.WARNING,
                f"{name} {listed(told)}.",
                "It is bounded and does no harm here: it runs broken or hostile software, or its link to "
                "the rest is cut one way. Look at it, and shut it out (`meshd revoke NODE`) if it lies.",
            )


def stores(facts: Facts) -> Iterator[Finding]:
    """Records that do not come into step."""
    if facts.daemon is None or not facts.daemon.differences:
        return
    found = facts.daemon.differences
    here = sorted({f"{each.owner} (newer at {each.peer})" for each in found if each.here})
    there = sorted({f"{each.peer} (of {each.owner})" for each in found if not each.here})
    parts = [f"this node lacks news of {listed(here)}" if here else ""]
    parts += [f"news is lacking at {listed(there)}" if there else ""]
    lasted_s = min(each.lasted_s for each in found)
    yield Finding(
        Code.STORE_BEHIND,
        Severity.WARNING,
        f"The stores still differ after {lasting(lasted_s)}: {' and '.join(p for p in parts if p)}.",
        "`meshd store diff NODE` shows what; repair takes 2 s, so something keeps datagrams or streams "
        "between the two from arriving: see the other findings.",
    )
