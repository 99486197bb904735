"""Every code is found where it should be, and only there; and docs/operate.md explains every one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_health import (
    DOCKER0,
    ETH0,
    HEARD,
    LO,
    NOW_UNIX_S,
    answer,
    daemon,
    facts,
    load,
    machine,
    peer,
    trust,
)

from meshd.core.membership import MemberState
from meshd.core.offences import Offence
from meshd.core.sealing import DropReason
from meshd.health import (
    ClockFacts,
    Code,
    DaemonFacts,
    DiskFacts,
    Facts,
    InterfaceFact,
    MdnsFacts,
    MulticastFact,
    PeerFact,
    PluginFact,
    Report,
    SeedFact,
    Severity,
    StoreDifference,
    StrangerFact,
    Trouble,
    TroubleKind,
    WorkerFact,
    examine,
)

OPERATE = Path(__file__).parents[2] / "docs" / "operate.md"
BLOCKED = MulticastFact("eth0", "192.0.2.10", error="Operation not permitted")


def down(kind: TroubleKind, message: str = "it is so") -> Facts:
    return facts(daemon=None, troubles=(Trouble(kind, message),))


def with_daemon(**changes: object) -> Facts:
    return facts(daemon=daemon(**changes))


def stranger(reason: DropReason, address: str = "192.0.2.99:7946") -> tuple[StrangerFact, ...]:
    return (StrangerFact(reason, address, 3, 1.0),)


def peers(**changes: object) -> Facts:
    """One peer that is not well and one that is."""
    return with_daemon(peers=(peer(1, **changes), peer(2)))


def answers(**changes: object) -> Facts:
    return peers(answer=answer(**changes))


# What triggers a code, and a word that its sentence must hold; below, what is near to it and does not.
TRIGGERS: list[tuple[Code, Facts, str]] = [
    (Code.DAEMON_DOWN, facts(daemon=None), "/run/meshd/meshd.sock"),
    (Code.SOCKET_DENIED, down(TroubleKind.SOCKET_DENIED, "not for you"), "not for you"),
    (Code.CONFIG_WRONG, down(TroubleKind.CONFIG, "line 3"), "line 3"),
    (Code.NO_IDENTITY, down(TroubleKind.IDENTITY, "no keys"), "no keys"),
    (Code.PORT_TAKEN, down(TroubleKind.PORT, "port 7946"), "7946"),
    (Code.DISK_REFUSES, down(TroubleKind.DISK, "full"), "full"),
    (Code.DISK_REFUSES, with_daemon(disk=DiskFacts("/state", "No space left")), "No space left"),
    (Code.STATE_SET_ASIDE, with_daemon(disk=DiskFacts("/state", set_aside=1)), "/state"),
    (Code.OVERLOADED, with_daemon(load=load(stalls=9)), "9 times"),
    (Code.OVERLOADED, with_daemon(load=load(lost=4)), "4 pieces"),
    (Code.HEALTH_LOW, with_daemon(load=load(local_health=5)), "5 of 8"),
    (
        Code.WORKER_EXPOSED,
        with_daemon(workers=(WorkerFact("m", ("no_network: refused",)), WorkerFact("n"))),
        "m be locked in wholly: no_network: refused",
    ),
    (
        Code.PLUGIN_COMPLAINS,
        with_daemon(plugins=(PluginFact("adopt", "The server x is down.", "Start it."),)),
        "The server x is down.",
    ),
    (Code.SEND_FAILS, with_daemon(load=load(sent=10, send_errors=90)), "90 of 100"),
    (Code.CLOCK_UNSET, facts(clock=ClockFacts(3600.0)), "never set"),
    (
        Code.CLOCK_OFF,
        with_daemon(peers=tuple(peer(n, answer=answer(clock_ahead_s=60.0 + n)) for n in (1, 2, 3))),
        "61 s behind the clocks of 3 peers",
    ),
    (
        Code.CLOCK_OFF,
        with_daemon(peers=(peer(1, answer=answer(clock_ahead_s=-30.0)),)),
        "30 s ahead of the clock of pi1: one of the two",
    ),
    (
        Code.PEER_CLOCK_OFF,
        with_daemon(peers=(peer(1, answer=answer(clock_ahead_s=500.0)), peer(2), peer(3))),
        "pi1 (8 min ahead)",
    ),
    (
        Code.CLOCK_OFF,
        with_daemon(peers=(peer(1, answer=None),), trust=trust(clock_ahead_s=-90.0)),
        "90 s behind the mesh's",
    ),
    (
        Code.CERTIFICATE_BAD,
        with_daemon(
            trust=trust(left_s=-60.0, standing_code="certificate_expired", standing="it ended")
        ),
        "nothing but a renewal: it ended",
    ),
    (
        Code.CERTIFICATE_ENDING,
        with_daemon(trust=trust(renewal_overdue_s=60.0, last_error="no route")),
        "could not be renewed. The last try: no route.",
    ),
    (
        Code.CERTIFICATE_ENDING,
        with_daemon(trust=trust(renewal_overdue_s=60.0, issuers=())),
        "ends in 2 days",
    ),
    (Code.KEY_BEHIND, with_daemon(trust=trust(wanted_generation=4)), "generation 4 is in force"),
    (
        Code.EPOCH_AHEAD,
        facts(clock=ClockFacts(NOW_UNIX_S, int(NOW_UNIX_S * 1e3) + 7_200_000)),
        "2 h",
    ),
    (Code.NO_NETWORK, facts(machine=machine(interfaces=(LO,), multicast=())), "loopback"),
    (
        Code.BRIDGE_ADDRESS,
        facts(
            daemon=daemon(address="172.17.0.1:7946"),
            machine=machine(interfaces=(DOCKER0, ETH0, LO)),
        ),
        "docker0",
    ),
    (
        Code.MULTICAST_OFF,
        facts(
            machine=machine(
                interfaces=(replace(ETH0, has_multicast=False), LO), multicast=(BLOCKED,)
            )
        ),
        "eth0",
    ),
    (  # the kernel gives the own question back whatever the flag says
        Code.MULTICAST_OFF,
        facts(
            machine=machine(
                interfaces=(replace(ETH0, has_multicast=False), LO),
                multicast=(replace(HEARD, others=()),),
            )
        ),
        "eth0",
    ),
    (Code.MULTICAST_BLOCKED, facts(machine=machine(multicast=(BLOCKED,))), "not permitted"),
    (
        Code.MULTICAST_BLOCKED,
        facts(machine=machine(multicast=(MulticastFact("eth0", "192.0.2.10"),))),
        "did not come back",
    ),
    (Code.MULTICAST_SILENT, facts(machine=machine(multicast=(replace(HEARD, others=()),))), "pi1"),
    (
        Code.MDNS_FAILED,
        with_daemon(mdns=MdnsFacts(True, registered=False, last_error="no such device")),
        "no such device",
    ),
    (Code.UDP_BLOCKED, peers(heard_ago_s=None), "from pi1 arrived here"),
    (Code.UDP_BLOCKED, peers(heard_ago_s=40.0), "from pi1 arrived here"),
    (Code.UDP_BLOCKED, answers(heard_us_ago_s=None), "to pi1 arrived there"),
    (Code.TCP_BLOCKED, answers(error="does not answer"), "pi1 (does not answer)"),
    (Code.NO_PEERS, with_daemon(peers=()), "multicast DNS"),
    (Code.NO_PEERS, with_daemon(peers=(), mdns=MdnsFacts(False)), "no seed and mDNS is off"),
    (Code.PEERS_LOST, peers(state=MemberState.DEAD), "1 of 2 other members"),
    (Code.PEERS_LOST, peers(state=MemberState.SUSPECT, since_s=2.0), "pi1 (suspected for 2 s)"),
    (Code.SEED_SILENT, with_daemon(seeds=(SeedFact("pi:7946", "192.0.2.9:7946", True),)), "never"),
    (Code.SEED_SILENT, with_daemon(seeds=(SeedFact("pi:7946", None, False),)), "does not resolve"),
    (Code.OTHER_MESH, with_daemon(strangers=stranger(DropReason.OTHER_MESH)), "192.0.2.99:7946"),
    (
        Code.OTHER_MESH,
        with_daemon(mdns=MdnsFacts(True, other_mesh=("192.0.2.98:1",))),
        "192.0.2.98:1",
    ),
    (
        Code.BAD_SEAL,
        with_daemon(strangers=stranger(DropReason.BAD_SEAL)),
        "192.0.2.99:7946 (3 times)",
    ),
    (Code.OTHER_PROTOCOL, with_daemon(strangers=stranger(DropReason.WRONG_FORMAT)), "192.0.2.99"),
    (Code.OTHER_PROTOCOL, answers(protocol=9), "pi1 (9)"),
    (Code.OTHER_PROTOCOL, with_daemon(mdns=MdnsFacts(True, other_protocol=1)), "multicast DNS"),
    (Code.SOFTWARE_MIXED, answers(software="meshd 0.2.0"), "pi1 (meshd 0.2.0)"),
    (Code.IDENTITY_DUPLICATE, with_daemon(strangers=stranger(DropReason.OWN)), "192.0.2.99:7946"),
    (Code.IDENTITY_DUPLICATE, with_daemon(load=load(epochs_raised=5)), "5 times"),
    (
        Code.IDENTITY_DUPLICATE,
        with_daemon(doubles={"pi1": ("192.0.2.1:7946", "192.0.2.2:7946")}),
        "pi1 is used in turn at 192.0.2.1:7946 and 192.0.2.2:7946",
    ),
    (Code.NAME_DUPLICATE, peers(name="hub"), "called hub: 192.0.2.10:7946 (this node) and"),
    (Code.NAME_DUPLICATE, with_daemon(peers=(peer(1, name="x"), peer(2, name="x"))), "called x"),
    (
        Code.ADDRESS_CONTESTED,
        with_daemon(contested=(("10.0.0.1:7946", "pi1", "pi2"),)),
        "pi1 and pi2 both",
    ),
    (
        Code.PEER_MISBEHAVES,
        with_daemon(offences={"pi1": {"accusations_refuted": 31}}),
        "pi1 accused others 31 times, all refuted",
    ),
    (
        Code.STORE_BEHIND,
        with_daemon(differences=(StoreDifference("pi1", "pi2", True, 3.0),)),
        "this node lacks news of pi1 (newer at pi2)",
    ),
    (
        Code.STORE_BEHIND,
        with_daemon(differences=(StoreDifference("pi1", "pi2", False, 3.0),)),
        "lacking at pi2 (of pi1)",
    ),
]

NEAR: list[tuple[Code, Facts]] = [
    (Code.DAEMON_DOWN, down(TroubleKind.SOCKET_DENIED)),
    (Code.SOCKET_DENIED, facts(daemon=None)),
    (Code.CONFIG_WRONG, down(TroubleKind.PORT)),
    (Code.NO_IDENTITY, down(TroubleKind.PORT)),
    (Code.PORT_TAKEN, down(TroubleKind.IDENTITY)),
    (Code.DISK_REFUSES, with_daemon(disk=DiskFacts("/state", set_aside=2))),
    (Code.STATE_SET_ASIDE, with_daemon(disk=DiskFacts("/state", "No space left"))),
    (Code.OVERLOADED, with_daemon(load=load(stalls=2))),
    (Code.HEALTH_LOW, with_daemon(load=load(local_health=2))),
    (Code.WORKER_EXPOSED, with_daemon(workers=(WorkerFact("m"),))),
    (Code.PLUGIN_COMPLAINS, with_daemon(plugins=())),
    (Code.SEND_FAILS, with_daemon(load=load(sent=996, send_errors=4))),
    (Code.SEND_FAILS, with_daemon(load=load(sent=990, send_errors=10))),
    (Code.CLOCK_UNSET, facts()),
    (Code.CLOCK_OFF, answers(clock_ahead_s=9.0)),
    (Code.CLOCK_OFF, answers(clock_ahead_s=500.0)),
    (
        Code.CLOCK_OFF,
        with_daemon(peers=(peer(1, answer=answer(clock_ahead_s=12.0, clock_error_s=3.0)),)),
    ),
    (Code.PEER_CLOCK_OFF, with_daemon(peers=(peer(1, answer=answer(clock_ahead_s=500.0)),))),
    (Code.CLOCK_OFF, with_daemon(peers=(peer(1, answer=None),), trust=trust(clock_ahead_s=59.0))),
    (Code.CLOCK_OFF, with_daemon(trust=trust(clock_ahead_s=90.0))),  # peers tell it finer
    (Code.CERTIFICATE_BAD, with_daemon(trust=trust())),
    (Code.CERTIFICATE_ENDING, with_daemon(trust=trust(renewal_overdue_s=60.0))),
    (Code.CERTIFICATE_ENDING, with_daemon(trust=trust(renewal_overdue_s=-1.0, last_error="x"))),
    (Code.KEY_BEHIND, with_daemon(trust=trust())),
    (Code.EPOCH_AHEAD, facts(clock=ClockFacts(NOW_UNIX_S, int(NOW_UNIX_S * 1e3) + 50_000))),
    (
        Code.NO_NETWORK,
        facts(machine=machine(interfaces=(LO,), multicast=(), listens_everywhere=False)),
    ),
    (
        Code.BRIDGE_ADDRESS,
        facts(daemon=daemon(address="172.17.0.1:7946"), machine=machine(interfaces=(DOCKER0, LO))),
    ),
    (Code.MULTICAST_OFF, facts(machine=machine(multicast=(BLOCKED,)))),
    (
        Code.MULTICAST_OFF,  # others are heard on it
        facts(machine=machine(interfaces=(replace(ETH0, has_multicast=False), LO))),
    ),
    (
        Code.MULTICAST_BLOCKED,
        facts(
            machine=machine(
                interfaces=(replace(ETH0, has_multicast=False), LO), multicast=(BLOCKED,)
            )
        ),
    ),
    (Code.MULTICAST_BLOCKED, facts(machine=machine(multicast=None))),
    (
        Code.MULTICAST_SILENT,  # the members are on another network
        facts(
            daemon=daemon(peers=(peer(1, address="198.51.100.7:7946"),)),
            machine=machine(multicast=(replace(HEARD, others=()),)),
        ),
    ),
    (
        Code.MULTICAST_SILENT,  # the member is another daemon of this machine
        facts(
            daemon=daemon(peers=(peer(1, address="192.0.2.10:7947"),)),
            machine=machine(multicast=(replace(HEARD, others=()),)),
        ),
    ),
    (Code.MDNS_FAILED, with_daemon(mdns=MdnsFacts(True, registered=True, last_error="long ago"))),
    (Code.MDNS_FAILED, with_daemon(mdns=MdnsFacts(False, registered=False, last_error="x"))),
    (Code.UDP_BLOCKED, peers(heard_ago_s=19.0)),
    (Code.UDP_BLOCKED, peers(heard_ago_s=None, since_s=5.0)),
    (Code.UDP_BLOCKED, peers(heard_ago_s=None, answer=None)),
    (Code.UDP_BLOCKED, peers(heard_ago_s=None, state=MemberState.DEAD)),
    (Code.UDP_BLOCKED, answers(heard_us_ago_s=None, up_s=5.0)),
    (Code.TCP_BLOCKED, peers(heard_ago_s=None, answer=answer(error="does not answer"))),
    (Code.TCP_BLOCKED, peers(state=MemberState.SUSPECT, answer=answer(error="does not answer"))),
    (Code.NO_PEERS, with_daemon(peers=(), up_s=5.0)),
    (Code.NO_PEERS, with_daemon(peers=(peer(1, state=MemberState.SUSPECT),))),
    (Code.PEERS_LOST, peers(state=MemberState.LEFT)),
    (Code.SEED_SILENT, with_daemon(seeds=(SeedFact("pi:7946", "192.0.2.9:7946", False),))),
    (Code.OTHER_MESH, with_daemon(strangers=stranger(DropReason.BAD_SEAL))),
    (Code.BAD_SEAL, with_daemon(strangers=stranger(DropReason.OTHER_MESH))),
    (Code.OTHER_PROTOCOL, answers(software="meshd 0.2.0")),
    (Code.SOFTWARE_MIXED, answers(software="meshd 0.2.0", protocol=2)),
    (Code.IDENTITY_DUPLICATE, with_daemon(load=load(epochs_raised=1))),
    (Code.NAME_DUPLICATE, peers(name="hub", state=MemberState.LEFT)),
    (Code.ADDRESS_CONTESTED, facts()),
    (Code.PEER_MISBEHAVES, with_daemon(offences={"pi1": {"accusations_refuted": 0}})),
    (Code.STORE_BEHIND, with_daemon(differences=None)),
]


def found(report: Report, code: Code) -> list[str]:
    return [finding.says for finding in report.findings if finding.code is code]


@pytest.mark.parametrize(
    ("code", "snapshot", "says"), TRIGGERS, ids=[f"{c.value}-{w[:24]}" for c, _, w in TRIGGERS]
)
def test_it_is_found_once_with_what_matters_in_its_sentence(
    code: Code, snapshot: Facts, says: str
) -> None:
    [sentence] = found(examine(snapshot), code)
    assert says in sentence


@pytest.mark.parametrize(
    ("code", "snapshot"), NEAR, ids=[f"{code.value}-{i}" for i, (code, _) in enumerate(NEAR)]
)
def test_what_is_near_is_not_taken_for_it(code: Code, snapshot: Facts) -> None:
    assert not found(examine(snapshot), code)


def test_where_all_is_well_nothing_is_found() -> None:
    assert examine(facts()).findings == ()
    assert examine(facts()).worst is Severity.NOTE


def test_every_code_has_a_case_each_way() -> None:
    assert {code for code, _, _ in TRIGGERS} == set(Code)
    assert {code for code, _ in NEAR} == set(Code)


def test_docs_explain_every_code_and_no_other() -> None:
    rows = re.findall(
        r"^\| `([a-z_]+)` \| (error|warning|note) \|", OPERATE.read_text(), re.MULTILINE
    )
    assert sorted(code for code, _ in rows) == sorted(code.value for code in Code)
    told = {
        (finding.code.value, finding.severity.word)
        for _, snapshot, _ in TRIGGERS
        for finding in examine(snapshot).findings
    }
    assert set(rows) <= told


def test_every_sentence_and_every_cure_is_one_for_a_person() -> None:
    for _, snapshot, _ in TRIGGERS:
        for finding in examine(snapshot).findings:
            for text in (finding.says, finding.do):
                assert text == text.strip()
                assert "{" not in text
            assert finding.do.endswith((".", ";")) or finding.do.endswith("`")


def test_every_kind_of_offence_reads_as_a_sentence() -> None:
    kinds = {kind.value: 2 for kind in Offence}
    for kind in kinds:
        [sentence] = found(examine(with_daemon(offences={"pi1": {kind: 2}})), Code.PEER_MISBEHAVES)
        assert kind not in sentence


def test_a_daemon_that_is_down_is_not_asked_about_its_mesh() -> None:
    report = examine(facts(daemon=None))
    assert [finding.code for finding in report.findings] == [Code.DAEMON_DOWN]


def test_the_worst_comes_first() -> None:
    snapshot = facts(
        daemon=daemon(
            strangers=stranger(DropReason.OTHER_MESH),
            disk=DiskFacts("/state", "No space left"),
            offences={"pi1": {"claims_forged": 1}},
        )
    )
    report = examine(snapshot)
    assert [finding.code for finding in report.findings] == [
        Code.DISK_REFUSES,
        Code.PEER_MISBEHAVES,
        Code.OTHER_MESH,
    ]
    assert report.worst is Severity.ERROR
    assert (report.tally.errors, report.tally.warnings, report.tally.notes) == (1, 1, 1)


def test_an_interface_of_loopback_without_the_flag_is_not_at_fault() -> None:
    lonely: InterfaceFact = replace(LO, for_mdns=True)
    heard = MulticastFact("lo", "127.0.0.1", own_heard=True)
    snapshot = facts(
        machine=machine(interfaces=(lonely,), multicast=(heard,), listens_everywhere=False)
    )
    assert examine(snapshot).findings == ()


def test_a_hundred_boards_are_summed_up_in_a_sentence() -> None:
    many = tuple(peer(n, state=MemberState.DEAD) for n in range(1, 100))
    [sentence] = found(examine(with_daemon(peers=many)), Code.PEERS_LOST)
    assert "99 of 99" in sentence
    assert sentence.endswith("and 95 more.")


seconds = st.floats(0, 1e9) | st.none()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(
            PeerFact,
            node=st.text(max_size=5),
            name=st.text(max_size=5),
            address=st.text(max_size=9),
            state=st.sampled_from(MemberState),
            since_s=st.floats(0, 1e9),
            heard_ago_s=seconds,
            answer=st.none()
            | st.builds(answer, error=st.text(max_size=3), clock_ahead_s=seconds, up_s=seconds),
        ),
        max_size=5,
    ),
    st.floats(0, 1e6),
)
def test_no_check_breaks_on_what_peers_say(found_peers: list[PeerFact], up_s: float) -> None:
    whole: DaemonFacts = daemon(peers=tuple(found_peers), up_s=up_s)
    examine(facts(daemon=whole, machine=machine(multicast=(replace(HEARD, others=()),))))


def test_the_port_to_open_is_the_one_of_the_side_that_hears_nothing() -> None:
    """Ours where we hear nothing, the peer's where it does not hear us."""
    deaf = facts(
        daemon=daemon(
            address="192.0.2.10:7001",
            peers=(
                peer(1, address="192.0.2.11:7002", heard_ago_s=None),
                peer(2, address="192.0.2.12:7003", answer=answer(heard_us_ago_s=None)),
            ),
        )
    )
    here, there = (finding.do for finding in examine(deaf).findings)
    assert "UDP port 7001 " in here
    assert "UDP port 7003 " in there


def test_a_tunnel_without_multicast_beside_a_network_that_has_it_is_a_note() -> None:
    tunnel = InterfaceFact("wg0", "10.9.0.1", "10.9.0.0/24", False, False, False)
    beside = facts(
        machine=machine(
            interfaces=(ETH0, LO, tunnel),
            multicast=(HEARD, MulticastFact("wg0", "10.9.0.1", own_heard=True)),
        )
    )
    assert [finding.severity for finding in examine(beside).findings] == [Severity.NOTE]
