"""Peer streams and who may speak on them: expired, revoked, of a revoked issuer, observers, and the clock."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from tests.shell.support_streams import (
    Peer,
    answer,
    bare_client,
    header,
    hello,
    peer,
    settled,
    trio_test,
)

from meshd.core.decrees import DecreeKind, Decrees
from meshd.core.frames import Call, CallHeader, Hello, Refuse
from meshd.shell.gate import RENEW, TRUST_ID, Gate
from meshd.shell.streams import (
    IncomingCall,
    PeerRejected,
    PeerUnreachable,
    RemoteRefused,
    StreamLost,
)
from meshd.trust.decree_proofs import decree_verifier, sign_decree
from meshd.trust.identity import Identity, Role, admit, init_mesh
from meshd.trust.mesh_clock import MeshClock
from meshd_cms.types import NodeId, Value

DAY_S = 86_400.0


async def serve(call: IncomingCall) -> Value:
    return {"served": call.header.operation}


async def ask(source: Peer, target: Peer, capability: str, operation: str) -> Value:
    wanted = CallHeader("request", "", capability, operation, remaining_s=10.0)
    async with source.streams.call(target.node, target.address, wanted, {}) as call:
        assert await call.receive() is None
        return call.trailer


def gate(ahead: Callable[[], float] = lambda: 0.0, decrees: Decrees | None = None) -> Gate:
    """That of a node whose clock is so far ahead."""
    return Gate(MeshClock(), decrees, wall_s=lambda: time.time() + ahead())


def decrees_of(identity: Identity) -> Decrees:
    return Decrees(decree_verifier(identity.root, identity.mesh_id))


def revoke(decrees: Decrees, issuer: Identity, node: NodeId) -> None:
    raw = sign_decree(
        issuer, DecreeKind.REVOCATION, made_at_s=time.time(), node=node, reason="lost"
    )
    assert decrees.load([raw]) == 0
    assert decrees.is_revoked(node)


@trio_test
async def test_who_has_expired_is_served_a_renewal_and_nothing_else(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    bob_is = admit(alice_is, tmp_path / "b", now_s=time.time() - 30 * DAY_S)
    async with peer(alice_is, serve) as alice, peer(bob_is, serve) as bob:
        with pytest.raises(RemoteRefused, match="has to be renewed") as refused:
            await ask(bob, alice, "echo", "run")
        assert refused.value.code == "certificate_expired"
        with pytest.raises(RemoteRefused):
            await ask(bob, alice, TRUST_ID, "sync")
        assert await ask(bob, alice, TRUST_ID, RENEW) == {"served": "renew"}
        await bob.streams.send_gossip(alice.node, alice.address, b"news")
        await settled(lambda: alice.streams.statistics.frames_ignored == 1)
        assert alice.gossip == []
        assert "peer.restricted" in alice.log.events()


@trio_test
async def test_nothing_is_sent_to_a_peer_that_has_expired(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    bob_is = admit(alice_is, tmp_path / "b", now_s=time.time() - 30 * DAY_S)
    async with peer(alice_is, serve) as alice, peer(bob_is, serve) as bob:
        with pytest.raises(PeerRejected) as rejected:
            await ask(alice, bob, "echo", "run")
        assert rejected.value.code == "certificate_expired"
        with pytest.raises(PeerRejected):
            await alice.streams.send_gossip(bob.node, bob.address, b"news")


@trio_test
async def test_a_certificate_of_the_future_is_not_valid_yet(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    bob_is = admit(alice_is, tmp_path / "b", now_s=time.time() + 30 * DAY_S)
    async with peer(alice_is, serve) as alice, peer(bob_is, serve) as bob:
        with pytest.raises(RemoteRefused, match="look at the clocks") as refused:
            await ask(bob, alice, "echo", "run")
        assert refused.value.code == "certificate_not_yet_valid"


@trio_test
async def test_a_board_without_a_clock_takes_the_time_of_the_first_peer(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    board_is = admit(alice_is, tmp_path / "b")
    board_gate = Gate(MeshClock(), wall_s=lambda: 100.0)
    async with peer(alice_is, serve) as alice, peer(board_is, serve, gate=board_gate) as board:
        assert not board_gate.knows_time
        assert await ask(board, alice, "echo", "run") == {"served": "run"}
        assert abs(board_gate.now_s() - time.time()) < 5.0
        assert board_gate.own_offset_s() < -DAY_S
        assert alice.streams.gate.own_offset_s() == 0.0


@trio_test
async def test_where_no_clock_was_ever_set_dates_say_nothing(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home", now_s=100.0)
    bob_is = admit(alice_is, tmp_path / "b", now_s=30 * DAY_S)
    unset = [Gate(MeshClock(), wall_s=lambda: 60 * DAY_S) for _ in range(2)]
    async with (
        peer(alice_is, serve, gate=unset[0]) as alice,
        peer(bob_is, serve, gate=unset[1]) as bob,
    ):
        assert await ask(bob, alice, "echo", "run") == {"served": "run"}
        assert await ask(alice, bob, "echo", "run") == {"served": "run"}


@trio_test
async def test_one_clock_among_three_cannot_expire_anybody(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    others = [admit(alice_is, tmp_path / str(number)) for number in range(2)]
    ahead = gate(lambda: 3_650 * DAY_S)
    async with (
        peer(alice_is, serve) as alice,
        peer(others[0], serve) as bob,
        peer(others[1], serve, gate=ahead) as liar,
    ):
        assert await ask(alice, bob, "echo", "run") == {"served": "run"}
        # To the one that is wrong, a first member has expired; two peers show it the time, and so would an issuer.
        with pytest.raises(RemoteRefused):
            await ask(bob, liar, "echo", "run")
        assert await ask(alice, liar, "echo", "run") == {"served": "run"}
        assert await ask(bob, liar, "echo", "run") == {"served": "run"}
        assert alice.streams.gate.far_off().keys() == {liar.node}
        assert abs(alice.streams.gate.own_offset_s()) < 5.0


@trio_test
async def test_a_revoked_peer_is_cut_off_and_told_why(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    bob_is = admit(alice_is, tmp_path / "b")
    decrees = decrees_of(alice_is)
    async with peer(alice_is, serve, gate=gate(decrees=decrees)) as alice, peer(bob_is) as bob:
        assert await ask(bob, alice, "echo", "run") == {"served": "run"}
        revoke(decrees, alice_is, bob.node)
        alice.streams.recheck()
        await settled(lambda: bob.streams.connected() == ())
        assert alice.streams.connected() == ()
        [(sender, _, payload)] = bob.gossip
        assert sender == alice.node
        revocation = decrees.revocation(bob.node)
        assert revocation is not None
        assert revocation.raw in payload
        with pytest.raises(StreamLost):
            await ask(bob, alice, TRUST_ID, RENEW)
        with pytest.raises(PeerRejected, match="was revoked by") as rejected:
            await ask(alice, bob, "echo", "run")
        assert rejected.value.code == "revoked"


@trio_test
async def test_who_was_let_in_by_a_revoked_issuer_is_served_a_renewal_only(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    issuer = admit(alice_is, tmp_path / "i", role=Role.ISSUER)
    bob_is = admit(issuer, tmp_path / "b")
    decrees = decrees_of(alice_is)
    revoke(decrees, alice_is, issuer.node_id)
    async with (
        peer(alice_is, serve, gate=gate(decrees=decrees)) as alice,
        peer(bob_is, serve) as bob,
    ):
        with pytest.raises(RemoteRefused) as refused:
            await ask(bob, alice, "echo", "run")
        assert refused.value.code == "issuer_revoked"
        assert await ask(bob, alice, TRUST_ID, RENEW) == {"served": "renew"}


@trio_test
async def test_a_certificate_that_ends_while_its_connection_lives_has_to_come_anew(
    tmp_path: Path,
) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    bob_is = admit(alice_is, tmp_path / "b", days=1.0)
    ahead_s = [0.0]
    async with (
        peer(alice_is, serve, gate=gate(lambda: ahead_s[0])) as alice,
        peer(bob_is, serve, gate=gate(lambda: ahead_s[0])) as bob,
    ):
        assert await ask(bob, alice, "echo", "run") == {"served": "run"}
        alice.streams.recheck()
        assert len(alice.streams.connected()) == 1
        ahead_s[0] = 2 * DAY_S
        alice.streams.gate.forget(bob.node)
        bob.streams.gate.forget(alice.node)
        alice.streams.recheck()
        await settled(lambda: alice.streams.statistics.connections == 0)
        with pytest.raises(RemoteRefused):
            await ask(bob, alice, "echo", "run")
        renewed = alice_is.issue(bob_is.signer.public_key, Role.MEMBER, time.time() + 2 * DAY_S)
        bob.streams.use_identity(bob_is.with_chain(renewed))
        await settled(lambda: alice.streams.statistics.connections == 0)
        assert await ask(bob, alice, "echo", "run") == {"served": "run"}


@trio_test
async def test_a_renewal_cuts_off_no_call(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    bob_is = admit(alice_is, tmp_path / "b")
    begun, go_on = trio.Event(), trio.Event()

    async def slow(call: IncomingCall) -> Value:
        begun.set()
        await go_on.wait()
        return "done"

    async with peer(alice_is, slow) as alice, peer(bob_is) as bob:
        answers: list[Value] = []

        async def long_call() -> None:
            answers.append(await ask(bob, alice, "echo", "run"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(long_call)
            await begun.wait()
            renewed = alice_is.issue(bob_is.signer.public_key, Role.MEMBER, time.time())
            bob.streams.use_identity(bob_is.with_chain(renewed))
            again = alice_is.issue(alice_is.signer.public_key, Role.ISSUER, time.time())
            alice.streams.use_identity(alice_is.with_chain(again))
            go_on.set()
        assert answers == ["done"]
        assert await ask(bob, alice, "echo", "run") == "done"
        assert alice.streams.statistics.connections_lost == 0


@trio_test
async def test_an_observer_asks_and_is_not_asked(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    observer_is = admit(alice_is, tmp_path / "o", role=Role.OBSERVER)
    async with peer(alice_is, serve) as alice, peer(observer_is, serve) as observer:
        assert await ask(observer, alice, "echo", "run") == {"served": "run"}
        assert await ask(alice, observer, "meshd/inspection", "about") == {"served": "about"}
        with pytest.raises(PeerRejected, match="serves nothing") as rejected:
            await ask(alice, observer, "echo", "run")
        assert rejected.value.code == "observer"


@trio_test
async def test_an_observer_refuses_what_is_sent_to_it_all_the_same(tmp_path: Path) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    observer_is = admit(alice_is, tmp_path / "o", role=Role.OBSERVER)
    async with (
        peer(observer_is, serve) as observer,
        bare_client(alice_is, observer.address) as bare,
    ):
        await bare.say(hello(alice_is), Call(1, header(), None))
        assert isinstance(await bare.hear(), Hello)
        refusal = await bare.hear()
        assert isinstance(refusal, Refuse)
        assert refusal.code == "observer"


@pytest.mark.parametrize("side", ["dials", "accepts"])
@trio_test
async def test_an_older_tls_is_refused(tmp_path: Path, side: str) -> None:
    alice_is = init_mesh(tmp_path / "a", "home")
    bob_is = admit(alice_is, tmp_path / "b")
    old = bob_is.client_context if side == "dials" else bob_is.server_context
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with peer(alice_is, serve) as alice, peer(bob_is, serve) as bob:
        source, target = (bob, alice) if side == "dials" else (alice, bob)
        with pytest.raises(PeerUnreachable):
            await answer(source, target)
        assert source.streams.statistics.connections == 0
        assert target.streams.statistics.accepted == 0
