"""The warden on real sockets: renewing, revoking, changing keys, and coming back after a long sleep."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.shell.support_log import KeptLog
from tests.shell.support_streams import settled, trio_test
from tests.shell.support_trust import Book, TrustNode, node

from meshd.core.decrees import DecreeKind
from meshd.core.frames import CallHeader
from meshd.shell.streams import RemoteRefused, StreamError
from meshd.shell.trust_calls import TrustClient
from meshd.shell.trust_state import NodeRevoked, load_trust
from meshd.trust.certificates import der
from meshd.trust.decree_proofs import sign_decree
from meshd.trust.identity import Role, admit, init_mesh, load_identity
from meshd.trust.identity_errors import NotAnIssuer

DAY_S = 86_400.0
CALLS = 1_000


async def joined(*nodes: TrustNode) -> None:
    for each in nodes[1:]:
        each.join(nodes[0])
    everybody = {each.node for each in nodes}
    await settled(lambda: all(each.live() == everybody for each in nodes))


async def echo(source: TrustNode, target: TrustNode, body: int) -> object:
    header = CallHeader("request", "", "echo", "run", remaining_s=10.0)
    async with source.streams.call(target.node, target.address, header, body) as call:
        assert await call.receive() is None
        return call.trailer


@trio_test
async def test_an_expired_node_renews_by_itself_and_then_works(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    admit(founder, tmp_path / "b", now_s=time.time() - 30 * DAY_S)
    book = Book()
    async with node(tmp_path / "a", book) as alice, node(tmp_path / "b", book) as bob:
        await settled(lambda: bob.state.verdict.is_good)
        assert bob.identity.credential.not_after_s > time.time() + 6 * DAY_S
        assert bob.identity.credential.issuer == alice.node
        assert await echo(bob, alice, 7) == 7
        assert await echo(alice, bob, 8) == 8
        assert "certificate.renewed" in bob.log.events()
        await bob.warden.save()
    kept = load_trust(
        tmp_path / "b", load_identity(tmp_path / "b"), certificate_days=7.0, log=KeptLog()
    )
    assert kept.verdict.is_good
    assert {each.node for each in kept.roster} >= {alice.node}


@trio_test
async def test_a_board_without_a_clock_that_was_off_for_a_month_comes_back(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    admit(founder, tmp_path / "b", now_s=time.time() - 30 * DAY_S)
    book = Book()
    async with (
        node(tmp_path / "a", book) as alice,
        node(tmp_path / "b", book, ahead_s=100.0 - time.time()) as board,
    ):
        assert not board.state.gate.knows_time
        await settled(lambda: board.state.verdict.is_good and board.state.gate.knows_time)
        assert board.identity.credential.not_after_s > time.time() + 6 * DAY_S
        assert await echo(board, alice, 7) == 7
        board.warden.unsealed(alice.address)  # wakes it
        await settled(lambda: "clock.off" in board.log.events())


@trio_test
async def test_a_board_whose_clock_is_far_ahead_asks_others_than_the_issuer_what_time_it_is(
    tmp_path: Path,
) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    admit(founder, tmp_path / "b", now_s=time.time() - 60 * DAY_S)
    for name in "cd":
        admit(founder, tmp_path / name)
    town, known = Book(), Book()
    async with (
        node(tmp_path / "a", town) as alice,
        node(tmp_path / "c", town) as carol,
        node(tmp_path / "d", town) as dave,
        node(tmp_path / "b", known, ahead_s=400 * DAY_S) as board,
    ):
        await settled(
            lambda: "no issuer" in board.warden.last_error
        )  # it asked when it knew nobody
        known.nodes += (alice, carol, dave)
        board.warden.member_seen(alice.node, "a")
        # With the issuer's clock alone it would believe its own, and have no certificate that is not long over.
        await settled(lambda: board.state.verdict.is_good)
        assert abs(board.state.gate.now_s() - time.time()) < DAY_S
        assert await echo(board, alice, 7) == 7


@trio_test
async def test_a_certificate_is_renewed_before_it_ends_and_an_issuer_renews_its_own(
    tmp_path: Path,
) -> None:
    founder = init_mesh(tmp_path / "a", "home", now_s=time.time() - 12 * DAY_S)
    admit(founder, tmp_path / "b", now_s=time.time() - 12 * DAY_S)
    book = Book()
    async with node(tmp_path / "a", book) as alice, node(tmp_path / "b", book) as bob:
        for each in (alice, bob):
            await settled(
                lambda each=each: each.identity.credential.not_before_s > time.time() - DAY_S
            )
        assert bob.warden.renews_at_s > time.time() + 2 * DAY_S  # a third of seven


@trio_test
async def test_without_an_issuer_it_is_tried_again_and_the_reason_is_told(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    admit(founder, tmp_path / "b", now_s=time.time() - 30 * DAY_S)
    admit(founder, tmp_path / "c")
    book = Book()
    async with node(tmp_path / "b", book) as bob, node(tmp_path / "c", book) as carol:
        book.strangers.append(carol.address)  # a member, and no issuer
        await settled(lambda: "no issuer" in bob.warden.last_error)
        async with node(tmp_path / "a", book) as alice:
            bob.warden.member_seen(alice.node, "a")
            await settled(lambda: bob.state.verdict.is_good)
            assert bob.warden.last_error == ""


@trio_test
async def test_who_was_let_in_by_a_revoked_issuer_renews_if_it_was_known(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    issuer = admit(founder, tmp_path / "i", role=Role.ISSUER)
    admit(issuer, tmp_path / "b")
    admit(issuer, tmp_path / "c", role=Role.OBSERVER)
    admit(issuer, tmp_path / "x")
    book = Book()
    async with (
        node(tmp_path / "a", book) as alice,
        node(tmp_path / "b", book) as bob,
        node(tmp_path / "c", book) as carol,
    ):
        await joined(alice, bob, carol)
        await alice.warden.revoke(issuer.node_id, "stolen", rotate=True)
        await settled(
            lambda: all(each.identity.credential.issuer == alice.node for each in (bob, carol))
        )
        assert bob.identity.role is Role.MEMBER
        assert carol.identity.role is Role.OBSERVER
        async with node(tmp_path / "x", book) as unknown:
            await settled(lambda: "not known here before" in unknown.warden.last_error)
            assert unknown.node not in alice.live()


@trio_test
async def test_who_is_appointed_lets_nodes_in_and_renews_and_what_it_revoked_outlives_it(
    tmp_path: Path,
) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    for name in ("b", "c", "d"):
        admit(founder, tmp_path / name, now_s=time.time() - (30 * DAY_S if name == "d" else 0.0))
    book = Book()
    async with node(tmp_path / "a", book) as alice, node(tmp_path / "c", book) as carol:
        async with node(tmp_path / "b", book) as bob:
            await joined(alice, bob, carol)
            with pytest.raises(NotAnIssuer):
                await carol.warden.appoint(bob.node, bob.address, bob.identity.signer.public_key)
            await alice.warden.appoint(bob.node, bob.address, bob.identity.signer.public_key)
            assert (bob.identity.role, bob.state.is_issuer) == (Role.ISSUER, True)
            with pytest.raises(NotAnIssuer, match="not make issuers"):
                await bob.warden.appoint(carol.node, carol.address, bytes(32))
            assert admit(bob.identity, tmp_path / "e").credential.issuer == bob.node
            await settled((tmp_path / "b/trust/authority").exists)
            await settled((tmp_path / "b/trust/certificate").exists)
        # It is on disk, and the founder is not needed any more.
        async with (
            node(tmp_path / "b", book, epoch=2) as again,
            node(tmp_path / "d", book) as dora,
        ):
            assert again.state.is_issuer
            book.nodes.remove(alice)
            dora.warden.member_seen(again.node, "b")
            await settled(lambda: dora.state.verdict.is_good)
            book.nodes.append(alice)
            await joined(alice, again, carol, dora)
            await again.warden.revoke(carol.node, "lost", rotate=True)
            await settled(lambda: alice.state.decrees.is_revoked(carol.node))
            await alice.warden.revoke(again.node, "stolen", rotate=False)
            generation = alice.state.decrees.generation
            assert generation is not None
            assert generation.authority == alice.node  # the key was the revoked issuer's own
            assert set(alice.state.decrees.revoked()) == {carol.node, again.node}
            await settled(lambda: dora.identity.credential.issuer == alice.node)


@trio_test
async def test_whom_a_revoked_issuer_had_shut_out_does_not_keep_the_key(tmp_path: Path) -> None:
    """Its revocations may be heard of before the key that it decreed with them, which is then void."""
    founder = init_mesh(tmp_path / "a", "home")
    issuer = admit(founder, tmp_path / "i", role=Role.ISSUER)
    member = admit(founder, tmp_path / "c")
    async with node(tmp_path / "a", Book()) as alice:
        raw = sign_decree(issuer, DecreeKind.REVOCATION, made_at_s=time.time(), node=member.node_id)
        alice.driver.post(lambda core, now_s: core.decree(raw, now_s))
        await settled(lambda: alice.state.decrees.is_revoked(member.node_id))
        assert await alice.warden.revoke(issuer.node_id, "stolen", rotate=False) == 1
        assert set(alice.state.decrees.revoked()) == {issuer.node_id, member.node_id}
        generation = alice.state.decrees.generation
        assert generation is not None
        assert generation.authority == alice.node


@trio_test
async def test_nobody_is_appointed_by_what_is_no_appointment_of_it(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    for name in ("b", "c"):
        admit(founder, tmp_path / name)
    other = init_mesh(tmp_path / "z", "home")
    book = Book()
    async with node(tmp_path / "a", book) as alice, node(tmp_path / "b", book) as bob:
        await joined(alice, bob)
        key, client = bob.identity.signer.public_key, TrustClient(alice.streams)
        theirs = load_identity(tmp_path / "c").signer.public_key
        now_s = time.time()
        good = (founder.issue(key, Role.ISSUER, now_s), founder.appoint(key))
        wrong = (
            # of another mesh, of another node, another's authority, a member's certificate, no authority
            (other.issue(key, Role.ISSUER, now_s), other.appoint(key)),
            (founder.issue(theirs, Role.ISSUER, now_s), founder.appoint(theirs)),
            (good[0], founder.appoint(theirs)),
            (founder.issue(key, Role.MEMBER, now_s), good[1]),
            (good[0], good[0]),
        )
        before = bob.identity
        for chain, authority in wrong:
            with pytest.raises(RemoteRefused, match="no appointment"):
                await client.appoint(bob.node, bob.address, der(chain), der(authority))
        assert bob.identity == before


@trio_test
async def test_a_revoked_node_is_out_everywhere_and_stops(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    for name in ("b", "c"):
        admit(founder, tmp_path / name)
    book = Book()
    async with (
        node(tmp_path / "a", book) as alice,
        node(tmp_path / "b", book) as bob,
        node(tmp_path / "c", book) as carol,
    ):
        await joined(alice, bob, carol)
        assert await echo(carol, bob, 1) == 1
        assert await alice.warden.revoke(carol.node, "lost", rotate=True) == 1
        await settled(lambda: carol.node not in alice.live() | bob.live())
        await settled(lambda: carol.node not in bob.streams.connected())
        await settled(lambda: len(carol.out) == 1)
        assert ": lost. It stops now" in carol.out[0]
        with pytest.raises(StreamError):
            await echo(carol, bob, 2)
        await settled(lambda: bob.generation() == 1 == alice.generation())
        assert carol.state.ring.current.generation == 0
        await bob.warden.save()
        await carol.warden.save()
    with pytest.raises(NodeRevoked, match="meshd join"):
        load_trust(
            tmp_path / "c", load_identity(tmp_path / "c"), certificate_days=7.0, log=KeptLog()
        )
    again = load_trust(
        tmp_path / "b", load_identity(tmp_path / "b"), certificate_days=7.0, log=KeptLog()
    )
    assert again.gate.is_revoked(carol.node)
    assert again.ring.current.generation == 1


@trio_test
async def test_a_node_that_slept_through_its_revocation_hears_of_it_when_it_comes_back(
    tmp_path: Path,
) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    sleeper = admit(founder, tmp_path / "b")
    book = Book()
    async with node(tmp_path / "a", book) as alice:
        await alice.warden.revoke(sleeper.node_id, "lost", rotate=True)
        async with node(tmp_path / "b", book) as bob:
            await settled(lambda: len(bob.out) == 1)
            assert alice.live() == {alice.node}


@trio_test
async def test_only_an_issuer_revokes_and_rotates(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    admit(founder, tmp_path / "b")
    book = Book()
    async with node(tmp_path / "a", book) as alice, node(tmp_path / "b", book) as bob:
        for attempt in (bob.warden.rotate, lambda: bob.warden.revoke(alice.node, "", rotate=False)):
            with pytest.raises(NotAnIssuer):
                await attempt()
        assert len(bob.state.ring.held()) == 1


@trio_test
async def test_the_key_changes_while_calls_and_datagrams_run_and_none_is_lost(
    tmp_path: Path,
) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    for name in ("b", "c"):
        admit(founder, tmp_path / name)
    book = Book()
    async with (
        node(tmp_path / "a", book) as alice,
        node(tmp_path / "b", book) as bob,
        node(tmp_path / "c", book) as carol,
    ):
        everybody = (alice, bob, carol)
        await joined(*everybody)
        answers: list[object] = []

        async def call(source: TrustNode, target: TrustNode) -> None:
            number = 0
            while number < CALLS // 3 or not all(each.generation() == 1 for each in everybody):
                answers.append(await echo(source, target, number) == number)
                number += 1

        async with trio.open_nursery() as nursery:
            for source, target in ((alice, bob), (bob, carol), (carol, alice)):
                nursery.start_soon(call, source, target)
            assert await alice.warden.rotate() == 1
        assert len(answers) >= CALLS - 3
        assert all(answers)
        await settled(
            lambda: all(
                each.opener.key_of(other.node) == alice.state.ring.current.key
                for each in everybody
                for other in everybody
                if other is not each
            )
        )
        for each in everybody:
            assert each.opener.statistics()["bad_seal"] == 0
            assert each.live() == {other.node for other in everybody}


@trio_test
async def test_a_node_that_slept_through_a_change_of_keys_comes_back_by_itself(
    tmp_path: Path,
) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    admit(founder, tmp_path / "b")
    book = Book()
    async with node(tmp_path / "a", book) as alice:
        async with node(tmp_path / "b", book) as bob:
            await joined(alice, bob)
        for generation in (1, 2):
            assert await alice.warden.rotate() == generation
        await settled(lambda: alice.generation() == 2)
        alice.opener.use_keys((alice.state.ring.current.key,))  # as if the old ones had faded
        async with node(tmp_path / "b", book, epoch=2) as bob:
            assert bob.generation() == 0
            await settled(lambda: bob.generation() == 2)
            await settled(lambda: alice.live() == bob.live() == {alice.node, bob.node})
            assert bob.rejoined


@trio_test
async def test_so_does_one_that_hears_datagrams_it_cannot_open(tmp_path: Path) -> None:
    """As after a suspend: it runs, it has nobody to ask but where the datagrams come from."""
    founder = init_mesh(tmp_path / "a", "home")
    admit(founder, tmp_path / "b")
    book, empty = Book(), Book()
    async with node(tmp_path / "a", book) as alice:
        await alice.warden.rotate()
        await settled(lambda: alice.generation() == 1)
        alice.opener.use_keys((alice.state.ring.current.key,))
        async with node(tmp_path / "b", empty) as bob:
            bob.join(alice)  # alice cannot open it, and asks back over a stream
            await settled(lambda: bob.generation() == 1)


@trio_test
async def test_a_decree_of_who_is_no_issuer_any_more_changes_nothing(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "a", "home")
    second = admit(founder, tmp_path / "i", role=Role.ISSUER)
    member = admit(founder, tmp_path / "b")
    book = Book()
    async with node(tmp_path / "a", book) as alice, node(tmp_path / "b", book) as bob:
        await joined(alice, bob)
        await alice.warden.revoke(second.node_id, "", rotate=False)
        await settled(lambda: bob.state.gate.is_revoked(second.node_id))
        raw = sign_decree(second, DecreeKind.REVOCATION, made_at_s=time.time(), node=member.node_id)
        bob.driver.post(lambda core, now_s: core.decree(raw, now_s))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert bob.out == []
        assert not bob.state.gate.is_revoked(bob.node)
