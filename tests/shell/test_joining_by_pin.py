"""Joining by PIN over real TLS on loopback: the right one, wrong ones, and those who stand in between."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from tests.shell.support_joining import (
    Clock,
    accepted,
    begun_with,
    inviter,
    listening,
    offer_of,
    said,
    serving,
    session_with,
)
from tests.shell.support_streams import trio_test

from meshd.shell.joining_client import (
    Admission,
    Joiner,
    join_by_pin,
)
from meshd.shell.joining_server import EXCHANGES_BURST, JOINS_PER_SOURCE_MAX
from meshd.shell.joining_wire import receive_body, send_message
from meshd.trust.certificates import Role, der, verify_chain
from meshd.trust.identity import Identity, IdentityExists, init_mesh
from meshd.trust.join_errors import (
    InviterUnreachable,
    InviterWrong,
    JoinRefused,
    Refusal,
)
from meshd.trust.join_messages import (
    VERSION,
    Hello,
    PinAccepted,
    PinConfirm,
    PinReply,
    Refused,
    decode_from_inviter,
    decode_from_joiner,
)
from meshd.trust.join_proofs import certificate_hash, pin_inviter_mac
from meshd.trust.pins import ATTEMPTS_MAX, inviter_exchange


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return init_mesh(tmp_path_factory.mktemp("founder") / "state", "home")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """The founder of another mesh."""
    return init_mesh(tmp_path_factory.mktemp("stranger") / "state", "home")


@trio_test
async def test_a_pin_makes_a_member_once(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        opened = home.desk.open_pin(Role.MEMBER, 300.0)
        roles: list[Role] = []
        got = await join_by_pin(opened.pin, [home.address], Joiner("board"), roles.append)
        assert isinstance(got, Admission)
        assert verify_chain(got.chain, founder.root).role is Role.MEMBER
        assert roles == [Role.MEMBER]
        with pytest.raises(InviterUnreachable, match="no invitation open"):
            await join_by_pin(opened.pin, [home.address], Joiner("other"))


@trio_test
async def test_three_wrong_pins_and_it_is_gone(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        await home.token()
        opened = home.desk.open_pin(Role.MEMBER, 300.0)
        for guess in range(ATTEMPTS_MAX):
            with pytest.raises(JoinRefused) as raised:
                await join_by_pin(_other(opened.pin, guess), [home.address], Joiner("thief"))
            assert raised.value.refusal is Refusal.WRONG_PIN
        with pytest.raises(JoinRefused) as raised:
            await join_by_pin(opened.pin, [home.address], Joiner("board"))
        assert raised.value.refusal is Refusal.NO_PIN


@trio_test
async def test_guesses_made_at_once_are_no_more_than_three(
    founder: Identity, tmp_path: Path
) -> None:
    """All exchanges are begun before the first is confirmed."""
    async with serving(inviter(founder, tmp_path)) as home:
        opened = home.desk.open_pin(Role.MEMBER, 300.0)
        begun = [await begun_with(home, _other(opened.pin, 0)) for _ in range(JOINS_PER_SOURCE_MAX)]
        answers: list[object] = []
        for session, mac in begun:
            await send_message(session, PinConfirm(mac))
            answers.append(decode_from_inviter(await receive_body(session)))
        wrong, gone = Refused(Refusal.WRONG_PIN), Refused(Refusal.NO_PIN)
        assert answers == [wrong] * ATTEMPTS_MAX + [gone] * (JOINS_PER_SOURCE_MAX - ATTEMPTS_MAX)
        assert home.desk.pins.current is None


@trio_test
async def test_noise_in_place_of_spake2_is_refused_and_costs_no_attempt(
    founder: Identity, tmp_path: Path
) -> None:
    rng = random.Random(11)
    async with serving(inviter(founder, tmp_path)) as home:
        home.desk.open_pin(Role.MEMBER, 300.0)
        for _ in range(EXCHANGES_BURST):
            noise = b"A" + rng.randbytes(32)
            answer = await said(await session_with(home), Hello(VERSION, noise))
            assert isinstance(answer, Refused | PinReply)  # one point in eight is good
        assert "join.failed" not in home.log.events()
        current = home.desk.pins.current
        assert current is not None
        assert current.attempts_left == ATTEMPTS_MAX


@trio_test
async def test_a_pin_ends_by_itself(founder: Identity, tmp_path: Path) -> None:
    clock = Clock()
    async with serving(inviter(founder, tmp_path, clock=clock)) as home:
        await home.token()
        opened = home.desk.open_pin(Role.MEMBER, 300.0)
        clock.now_s += 301.0
        with pytest.raises(JoinRefused) as raised:
            await join_by_pin(opened.pin, [home.address], Joiner("board"))
        assert raised.value.refusal is Refusal.NO_PIN


@trio_test
async def test_what_the_joiner_objects_to_costs_no_pin(founder: Identity, tmp_path: Path) -> None:
    async with serving(inviter(founder, tmp_path)) as home:
        opened = home.desk.open_pin(Role.MEMBER, 300.0)

        def object_to(_role: Role) -> None:
            raise IdentityExists("it is one already")

        with pytest.raises(IdentityExists):
            await join_by_pin(opened.pin, [home.address], Joiner("board"), object_to)
        assert isinstance(await join_by_pin(opened.pin, [home.address], Joiner("board")), Admission)


@trio_test
async def test_a_pin_exchange_that_is_passed_on_fails(
    founder: Identity, stranger: Identity, tmp_path: Path
) -> None:
    """One in between shows its own certificate, so the keys of the two ends differ."""
    async with serving(inviter(founder, tmp_path)) as home:
        opened = home.desk.open_pin(Role.MEMBER, 300.0)

        async def relay(stream: trio.SocketStream) -> None:
            front = await accepted(stream, stranger)
            back = await session_with(home)
            for _ in range(2):
                body = await receive_body(front)
                await back.send_all(len(body).to_bytes(4, "big") + body)
                answer = await receive_body(back)
                await front.send_all(len(answer).to_bytes(4, "big") + answer)

        async with listening(relay) as address:
            with pytest.raises(JoinRefused) as raised:
                await join_by_pin(opened.pin, [address], Joiner("board"))
        assert raised.value.refusal is Refusal.WRONG_PIN
        current = home.desk.pins.current
        assert current is not None
        assert current.attempts_left == ATTEMPTS_MAX - 1


@trio_test
async def test_an_inviter_that_does_not_know_the_pin_is_found_out(stranger: Identity) -> None:
    """It guesses, and says that the PIN was right, whatever the joiner confirms."""

    async def lie(stream: trio.SocketStream) -> None:
        session = await accepted(stream, stranger)
        certificate = certificate_hash(der(stranger.chain)[0])
        hello = decode_from_joiner(await receive_body(session))
        assert isinstance(hello, Hello)
        exchange = inviter_exchange("000000", certificate)
        await send_message(session, PinReply(exchange.message))
        shared = exchange.finish(hello.pin_message)
        await receive_body(session)
        offer = offer_of(stranger)
        mac = pin_inviter_mac(shared, offer.root, Role.MEMBER.value)
        await send_message(session, PinAccepted(mac, Role.MEMBER, offer))

    async with listening(lie) as address:
        with pytest.raises(InviterWrong, match="does not know the PIN"):
            await join_by_pin("481516", [address], Joiner("board"))


def _other(pin: str, which: int) -> str:
    return f"{(int(pin) + 1 + which) % 1_000_000:06d}"
