"""Joining over real TLS on loopback: who gets in, who does not, and what each is told."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from tests.shell.support_joining import (
    KEY,
    Clients,
    Clock,
    accepted,
    ended_after,
    inviter,
    knock,
    listening,
    offer_of,
    offered,
    said,
    serving,
    session_with,
)
from tests.shell.support_log import KeptLog
from tests.shell.support_streams import trio_test

from meshd.shell.files import LocalFiles
from meshd.shell.joining_client import (
    Admission,
    ClientAdmission,
    Joiner,
    join_by_token,
)
from meshd.shell.joining_desk import CannotInvite
from meshd.shell.joining_files import check_may_join, settle
from meshd.shell.joining_server import FAILURES_BURST, JOINS_PER_SOURCE_MAX
from meshd.shell.joining_wire import receive_body, send_message
from meshd.shell.storage import Storage
from meshd.trust.certificates import Role, verify_chain
from meshd.trust.identity import Identity, IdentityExists, admit, init_mesh
from meshd.trust.join_errors import (
    InviterUnreachable,
    InviterWrong,
    JoinRefused,
    Refusal,
)
from meshd.trust.join_messages import (
    VERSION,
    Hello,
    Proof,
    Refused,
    Welcome,
    decode_from_inviter,
    decode_from_joiner,
)
from meshd.trust.join_proofs import invite_id
from meshd.trust.join_token import JoinToken
from meshd_cms import node_id_of


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return init_mesh(tmp_path_factory.mktemp("founder") / "state", "home")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """The founder of another mesh."""
    return init_mesh(tmp_path_factory.mktemp("stranger") / "state", "home")


async def refusal(joining: JoinToken, joiner: Joiner | None = None) -> Refusal:
    with pytest.raises(JoinRefused) as raised:
        await join_by_token(joining, joiner or Joiner("board"))
    return raised.value.refusal


# -- by token ----------------------------------------------------------------------------------------------


@trio_test
async def test_a_token_makes_a_member(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path / "inviter")) as home:
        admission = await join_by_token(await home.token(), Joiner("board"))
        assert isinstance(admission, Admission)
        check_may_join(tmp_path / "state")
        node = settle(tmp_path / "state", admission, KeptLog())
        assert (node.mesh_id, node.mesh_name) == (founder.mesh_id, "home")
        assert (node.key_generation, node.datagram_key) == (3, KEY)
        assert (node.role, node.authority, node.is_issuer) == (Role.MEMBER, (), False)
        assert node.credential.issuer == founder.node_id
        assert Storage(tmp_path / "state").load_peers() == (home.address,)
        assert admission.decrees == home.facts.raws
        assert [use.node for use in home.desk.invites()[0][0].uses] == [node.node_id]
        with pytest.raises(IdentityExists):
            check_may_join(tmp_path / "state")


@trio_test
async def test_an_issuer_can_let_others_in(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path / "0")) as home:
        first = await join_by_token(await home.token(Role.ISSUER), Joiner("first"))
    assert isinstance(first, Admission)
    issuer = settle(tmp_path / "1", first, KeptLog())
    async with serving(inviter(issuer, tmp_path / "1")) as second:
        joined = await join_by_token(await second.token(Role.OBSERVER), Joiner("second"))
    assert isinstance(joined, Admission)
    assert verify_chain(joined.chain, founder.root).role is Role.OBSERVER


@trio_test
async def test_a_client_gets_a_key_and_no_certificate(founder: Identity, tmp_path: Path) -> None:
    clients = Clients()
    async with serving(inviter(founder, tmp_path, clients=clients)) as home:
        got = await join_by_token(await home.token(Role.CLIENT), Joiner("laptop"))
        assert got == ClientAdmission(
            "home", "https://192.0.2.1:9443", "key-of-laptop", "sha256//pin"
        )
        assert clients.names == ["laptop"]
    with pytest.raises(CannotInvite, match=r"\[http\] host"):
        await inviter(founder, tmp_path).desk.invite(Role.CLIENT, 1, 60.0)


@trio_test
async def test_a_member_cannot_invite(founder: Identity, tmp_path: Path) -> None:
    member = admit(founder, tmp_path / "member")
    with pytest.raises(CannotInvite, match="issuer"):
        await inviter(member, tmp_path / "member").desk.invite(Role.MEMBER, 1, 60.0)


@trio_test
async def test_a_token_works_once_and_its_joiner_may_come_again(
    founder: Identity, tmp_path: Path
) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        token, first = await home.token(), Joiner("first")
        one = await join_by_token(token, first)
        again = await join_by_token(token, first)
        assert isinstance(one, Admission)
        assert isinstance(again, Admission)
        assert again.private_key == one.private_key
        assert await refusal(token, Joiner("second")) is Refusal.USED
        assert len(home.desk.invites()[0][0].uses) == 1


@trio_test
async def test_of_two_at_once_one_gets_in(founder: Identity, tmp_path: Path) -> None:
    outcomes: list[str] = []
    async with serving(inviter(founder, tmp_path)) as home:
        token = await home.token()

        async def join(name: str) -> None:
            try:
                await join_by_token(token, Joiner(name))
                outcomes.append("in")
            except JoinRefused as error:
                outcomes.append(error.code)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(join, name)
    assert sorted(outcomes) == ["in", "used", "used"]


@trio_test
async def test_a_token_for_several_counts_them(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        token = await home.token(uses=2)
        for name in ("a", "b"):
            assert isinstance(await join_by_token(token, Joiner(name)), Admission)
        assert await refusal(token) is Refusal.USED


@trio_test
async def test_what_is_wrong_with_a_token_is_told(founder: Identity, tmp_path: Path) -> None:
    clock = Clock()
    async with serving(inviter(founder, tmp_path, clock=clock)) as home:
        expiring, revoked, good = [await home.token(ttl_s=ttl_s) for ttl_s in (60.0, 900.0, 900.0)]
        await home.desk.revoke(invite_id(revoked.secret))
        clock.now_s += 61.0
        assert await refusal(expiring) is Refusal.EXPIRED
        assert await refusal(revoked) is Refusal.REVOKED
        assert await refusal(replace(good, secret=bytes(16))) is Refusal.UNKNOWN
        key = Joiner("revoked")
        home.facts.revoked.add(node_id_of(key.public_key))
        assert await refusal(good, key) is Refusal.NODE_REVOKED
        assert isinstance(await join_by_token(good, Joiner("board")), Admission)
        assert home.refused() == {"expired": 1, "revoked": 1, "unknown": 1, "node_revoked": 1}


@trio_test
async def test_invites_survive_a_restart(founder: Identity, tmp_path: Path) -> None:
    before = inviter(founder, tmp_path)
    before.facts.reached = [("127.0.0.1", 1)]
    used, fresh = await before.token(), await before.token()
    async with serving(before):
        at = before.facts.reached[0]
        assert isinstance(
            await join_by_token(replace(used, addresses=(at,)), Joiner("a")), Admission
        )
    after = inviter(founder, tmp_path)
    async with serving(after):
        at = after.facts.reached[0]
        assert await refusal(replace(used, addresses=(at,))) is Refusal.USED
        assert isinstance(
            await join_by_token(replace(fresh, addresses=(at,)), Joiner("b")), Admission
        )
    kept = (tmp_path / "invites").read_bytes()
    assert used.secret not in kept
    assert (tmp_path / "invites").stat().st_mode & 0o777 == 0o600


class _Refusing(LocalFiles):
    refuses = False

    def write(self, path: Path, content: bytes) -> None:
        if self.refuses:
            raise OSError(28, "No space left on device", str(path))
        super().write(path, content)


@trio_test
async def test_nobody_is_let_in_by_a_use_that_is_not_on_disk(
    founder: Identity, tmp_path: Path
) -> None:
    files = _Refusing()
    async with serving(inviter(founder, tmp_path, files=files)) as home:
        token = await home.token()
        files.refuses = True
        assert await refusal(token) is Refusal.NOT_KEPT
        files.refuses = False
        assert isinstance(await join_by_token(token, Joiner("board")), Admission)


# -- who is at the other end -------------------------------------------------------------------------------


@trio_test
async def test_an_inviter_of_another_mesh_is_told_nothing(
    founder: Identity, stranger: Identity, tmp_path: Path
) -> None:
    ours = inviter(founder, tmp_path / "a")
    ours.facts.reached = [("127.0.0.1", 1)]
    token = await ours.token()
    async with serving(inviter(stranger, tmp_path / "b")) as theirs:
        await theirs.token()
        with pytest.raises(InviterWrong, match="not of the mesh"):
            await join_by_token(replace(token, addresses=(theirs.address,)), Joiner("board"))
        assert theirs.server.statistics.admitted == 0


@trio_test
async def test_one_in_between_is_found_out(
    founder: Identity, stranger: Identity, tmp_path: Path
) -> None:
    """It passes on what the true inviter says of itself, over a TLS session of its own."""

    async def pass_on(stream: trio.SocketStream) -> None:
        session = await accepted(stream, stranger)
        await receive_body(session)
        await send_message(session, offer_of(founder))

    async with serving(inviter(founder, tmp_path)) as home, listening(pass_on) as address:
        token = await home.token()
        with pytest.raises(InviterWrong, match="stands in between"):
            await join_by_token(replace(token, addresses=(address,)), Joiner("board"))
        assert home.desk.invites()[0][0].uses == ()


@trio_test
async def test_a_member_that_plays_inviter_learns_nothing_that_lets_it_in(
    founder: Identity, tmp_path: Path
) -> None:
    """It has a good certificate; what a joiner proves to it is of no use at the true inviter."""
    member = admit(founder, tmp_path / "member")
    heard: list[Proof] = []

    async def fish(stream: trio.SocketStream) -> None:
        session = await accepted(stream, member)
        await receive_body(session)
        await send_message(session, offer_of(member))
        proof = decode_from_joiner(await receive_body(session))
        assert isinstance(proof, Proof)
        heard.append(proof)
        await send_message(session, Refused(Refusal.USED))

    async with serving(inviter(founder, tmp_path / "a")) as home:
        token = await home.token()
        async with listening(fish) as address:
            assert await refusal(replace(token, addresses=(address,))) is Refusal.USED
        session, _ = await offered(home)
        assert await said(session, heard[0]) == Refused(Refusal.WRONG_SECRET)
        assert isinstance(await join_by_token(token, Joiner("board")), Admission)


@trio_test
async def test_an_address_that_leads_elsewhere_is_passed_over(
    founder: Identity, stranger: Identity, tmp_path: Path
) -> None:
    async with (
        serving(inviter(founder, tmp_path / "a")) as home,
        serving(inviter(stranger, tmp_path / "b")) as other,
    ):
        await other.token()
        token = await home.token()
        addresses = (("127.0.0.1", 1), other.address, home.address)
        admission = await join_by_token(replace(token, addresses=addresses), Joiner("board"))
        assert isinstance(admission, Admission)


@trio_test
async def test_nobody_there_and_nothing_open_are_told(founder: Identity, tmp_path: Path) -> None:
    home = inviter(founder, tmp_path)
    home.facts.reached = [("127.0.0.1", 1)]
    token = await home.token()
    with pytest.raises(InviterUnreachable, match=r"127\.0\.0\.1:1.*meshd status"):
        await join_by_token(token, Joiner("board"))
    async with serving(inviter(founder, tmp_path / "empty")) as empty:
        with pytest.raises(InviterUnreachable, match="no invitation open"):
            await join_by_token(replace(token, addresses=(empty.address,)), Joiner("board"))


# -- strangers ---------------------------------------------------------------------------------------------


@trio_test
async def test_a_wrong_secret_is_refused_and_many_are_turned_away(
    founder: Identity, tmp_path: Path
) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        token = await home.token()
        for _ in range(FAILURES_BURST):
            assert await knock(home, token, wrong_mac=True) == Refused(Refusal.WRONG_SECRET)
        assert await knock(home, token, wrong_mac=True) == Refused(Refusal.TOO_MANY_ATTEMPTS)
        assert home.refused() == {"wrong_secret": FAILURES_BURST}
        while home.server.statistics.turned_away == 0:  # at first it is told so each time
            await ended_after(home, b"J")


@trio_test
async def test_a_key_that_is_not_its_own_is_refused(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        token = await home.token()
        assert await knock(home, token, wrong_possession=True) == Refused(Refusal.MALFORMED)
        assert isinstance(await knock(home, token), Welcome)


@trio_test
async def test_another_release_is_told(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        await home.token()
        session = await session_with(home)
        await send_message(session, Hello(VERSION + 1, b""))
        answer = decode_from_inviter(await receive_body(session))
        assert answer == Refused(Refusal.OTHER_RELEASE)


@trio_test
async def test_garbage_before_tls_ends_the_connection(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        token = await home.token()
        for noise in (
            b"",
            b"J",
            b"J" + bytes(64),
            b"\x16\x03\x01\x00\x05hello",
            b"JGET / HTTP/1.1\r\n",
        ):
            await ended_after(home, noise)
        assert isinstance(await join_by_token(token, Joiner("board")), Admission)


@trio_test
async def test_garbage_inside_tls_is_refused_whatever_it_is(
    founder: Identity, tmp_path: Path
) -> None:
    rng = random.Random(7)
    bodies = [rng.randbytes(rng.randrange(1, 60)) for _ in range(6)]
    bodies += [b"\x93\x01\x01\x01", b"\xff\xff\xff\xff"]
    clock_free = inviter(founder, tmp_path)
    async with serving(clock_free) as home:
        await home.token()
        for body in bodies:
            session = await session_with(home)
            await session.send_all(len(body).to_bytes(4, "big") + body)
            answer = decode_from_inviter(await receive_body(session))
            assert answer == Refused(Refusal.MALFORMED), body
        session = await session_with(home)
        await session.send_all((1 << 30).to_bytes(4, "big"))
        answer = decode_from_inviter(await receive_body(session))
        assert answer == Refused(Refusal.MALFORMED)


@trio_test
async def test_slow_strangers_leave_room_for_others(founder: Identity, tmp_path: Path) -> None:
    """Of one source, so many wait at most; the next is closed at once."""
    async with serving(inviter(founder, tmp_path)) as home:
        await home.token()
        slow = [await session_with(home) for _ in range(JOINS_PER_SOURCE_MAX)]
        async with await trio.open_tcp_stream(*home.address) as late:
            assert await late.receive_some() == b""
        assert home.server.statistics.turned_away == 1
        for session in slow:
            await session.transport_stream.aclose()
