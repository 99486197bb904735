"""Attackers at the door: stolen, used, expired and revoked tokens, guessers of PINs, floods and impostors.

Each attack plays against a real daemon that invites; true joiners use the command line, on hosts of their own.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.integration.support_attackers import Attacker, Wiretap, attacking, heard
from tests.integration.support_intruder import TURNED_AWAY, guessed, intruding, tried
from tests.integration.support_namespaces import LISTEN_PORT, Host, LanMesh, why_unavailable
from tests.integration.support_town import status
from tests.support_daemons import Daemon, Mesh, UnixConnection

from meshd.core.effects import Address
from meshd.trust.certificates import der
from meshd.trust.identity import Identity, load_identity
from meshd.trust.join_messages import JOIN_BYTE, NONCE_BYTES, Offer, encode_message
from meshd.trust.join_tls import inviter_context
from meshd.trust.join_token import JoinToken, decode_token, encode_token
from meshd.trust.pins import ATTEMPTS_MAX, joiner_exchange

pytestmark = pytest.mark.namespaces

JOIN_DEADLINE_S = 60.0
GUESSES = 300
AT_ONCE = 30
QUIET = "[discovery]\nannounce_models = false\n"


@dataclass(frozen=True, slots=True)
class Door:
    """A node that lets others in, a host for who was invited, and two for who was not."""

    switch: Wiretap
    mesh: LanMesh
    daemon: Daemon
    host: Host
    guest: Host
    attacker: Attacker
    other: Attacker
    third: Attacker
    folder: Path

    @property
    def address(self) -> Address:
        return (self.host.address, LISTEN_PORT)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = UnixConnection(self.daemon.socket)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            told: dict[str, Any] = json.loads(answer.read())
        finally:
            connection.close()
        assert answer.status == 200, told
        return told

    def invite(self, **wanted: object) -> tuple[JoinToken, dict[str, Any]]:
        told = self.ask("POST", "/mesh/v1/invites", dict(wanted))
        return decode_token(told["token"]), told

    def states(self) -> dict[str, str]:
        told = self.ask("GET", "/mesh/v1/invites")
        return {row["id"]: row["state"] for row in told["invites"]}

    def join(self, name: str, *how: str) -> subprocess.CompletedProcess[str]:
        """`meshd join` on the guest's host."""
        state = self.folder / name / "state"
        command = [sys.executable, "-m", "meshd", "join", *how, "--state-dir", str(state)]
        return subprocess.run(
            self.guest.command(*command),
            capture_output=True,
            text=True,
            timeout=JOIN_DEADLINE_S,
            check=False,
        )

    def joined(self, name: str) -> Identity:
        return load_identity(self.folder / name / "state")

    def check_unharmed(self) -> None:
        assert status(self.daemon)
        assert "Traceback" not in self.daemon.log()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    reason = why_unavailable(Wiretap)
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("door")
    with ExitStack() as stack:
        switch = stack.enter_context(Wiretap())
        mesh = stack.enter_context(LanMesh(folder / "mesh"))
        host, guest = switch.add_host(), switch.add_host()
        attacker = stack.enter_context(attacking(switch.add_host()))
        other = stack.enter_context(attacking(switch.add_host()))
        third = stack.enter_context(attacking(switch.add_host()))
        daemon = mesh.start_on(host, "inviter", sections=QUIET)
        yield Door(switch, mesh, daemon, host, guest, attacker, other, third, folder)


# -- tokens ------------------------------------------------------------------------------------------------


def test_the_wire_of_a_join_shows_no_secret_and_the_token_lets_one_in(door: Door) -> None:
    token, told = door.invite()
    began = door.switch.frames_seen
    done = door.join("first", told["token"], "--name", "platypus-shed")
    assert done.returncode == 0, done.stdout + done.stderr
    identity = door.joined("first")
    capture = door.switch.capture(began)
    assert sum(map(len, capture.streams(LISTEN_PORT))) > 500
    for needle in (
        token.secret,
        token.mesh_id,
        told["token"].encode()[7:],
        identity.datagram_key,
        identity.private_key.private_bytes_raw(),
        b"platypus-shed",
        identity.mesh_name.encode() + b"\xa6",
    ):
        assert capture.find(needle) == []
    # A second device, and one that says it was the first but has another key.
    again = door.join("second", told["token"])
    assert again.returncode != 0
    assert "used already" in again.stderr
    assert tried(door.attacker, door.address, token) == "used"
    assert not (door.folder / "second" / "state" / "identity").exists()
    door.check_unharmed()


def test_a_token_that_was_revoked_or_has_expired_lets_nobody_in_and_says_so(door: Door) -> None:
    token, told = door.invite()
    door.ask("DELETE", f"/mesh/v1/invites/{told['id']}")
    late, expiring = door.invite(ttl_s=1)
    refused = door.join("revoked", told["token"])
    assert refused.returncode != 0
    assert "revoked" in refused.stderr
    assert tried(door.attacker, door.address, token) == "revoked"
    door.mesh.wait(
        "the end of a token", door.daemon, lambda: door.states()[expiring["id"]] == "expired"
    )
    assert tried(door.attacker, door.address, late) == "expired"
    refused = door.join("expired", expiring["token"])
    assert refused.returncode != 0
    assert "expired" in refused.stderr
    door.check_unharmed()


def test_half_a_token_is_worth_nothing_and_guessing_is_ended(door: Door) -> None:
    """Who saw the invite's id on the inviter's screen, or made up both."""
    token, told = door.invite()
    outcomes = Counter(
        tried(door.attacker, door.address, token, secret=secrets.token_bytes(16)) for _ in range(14)
    )
    assert outcomes["wrong_secret"] >= 5
    assert outcomes["too_many_attempts"] >= 1
    assert set(outcomes) <= {"wrong_secret", "too_many_attempts", TURNED_AWAY}
    # The token is as good as before, for somebody else.
    done = door.join("patient", told["token"])
    assert done.returncode == 0, done.stderr
    door.check_unharmed()


def test_many_at_once_with_one_token_let_one_in(door: Door) -> None:
    token, _ = door.invite()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        hosts = [door.other] * 3
        outcomes = Counter(pool.map(partial(tried, address=door.address, token=token), hosts))
    assert outcomes["Welcome"] == 1
    assert outcomes["used"] + outcomes[TURNED_AWAY] == len(hosts) - 1
    door.check_unharmed()


# -- impostors ---------------------------------------------------------------------------------------------


def test_an_impostor_with_another_mesh_learns_nothing_from_a_joiner(door: Door) -> None:
    token, told = door.invite()
    impostor = load_identity(Mesh(door.folder / "other").init("impostor") / "state")
    listening = door.attacker.listen(LISTEN_PORT)
    heard: list[bytes] = []

    def serve() -> None:
        """As an inviter would: with its own certificate, and the best offer that it can make."""
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            assert connection.recv(1) == JOIN_BYTE
            with inviter_context(impostor).wrap_socket(connection, server_side=True) as secured:
                secured.recv(65_536)
                secured.sendall(encode_message(impostors_offer(impostor)))
                while part := secured.recv(65_536):
                    heard.append(part)

    server = threading.Thread(target=serve)
    server.start()
    lured = replace(token, addresses=((door.attacker.host.address, LISTEN_PORT),))
    refused = door.join("lured", encode_token(lured))
    server.join()
    assert refused.returncode != 0
    assert b"".join(heard) == b""  # neither a proof, nor a key, nor a name
    assert not (door.folder / "lured" / "state" / "identity").exists()
    done = door.join("lured", told["token"])
    assert done.returncode == 0, done.stderr


def impostors_offer(impostor: Identity) -> Offer:
    return Offer(bytes(NONCE_BYTES), der(impostor.chain), der((impostor.root,))[0])


# -- PINs --------------------------------------------------------------------------------------------------


def test_a_pin_is_gone_after_three_guesses_however_many_are_made_at_once(door: Door) -> None:
    told = door.ask("POST", "/mesh/v1/invites", {"pin": True})
    message = joiner_exchange("000000", bytes(32)).message
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = Counter(
            pool.map(
                partial(guessed, address=door.address, message=message),
                [door.attacker, door.other] * (GUESSES // 2),
            )
        )
    assert outcomes["wrong_pin"] <= ATTEMPTS_MAX
    assert "PinAccepted" not in outcomes
    assert set(outcomes) <= {"wrong_pin", "no_pin", "busy", "too_many_attempts", TURNED_AWAY}
    if outcomes["wrong_pin"] == ATTEMPTS_MAX:
        refused = door.join("late", "--pin", told["pin"], "--at", at(door.address))
        assert refused.returncode != 0
        assert door.ask("GET", "/mesh/v1/invites")["pin"] is None
    door.check_unharmed()


def test_what_is_no_message_of_the_exchange_ends_the_session_and_nothing_else(door: Door) -> None:
    door.ask("POST", "/mesh/v1/invites", {"pin": True})
    for message in (b"A" + b"\xff" * 32, b"A" + bytes(32), b"B" + bytes(32), b"A" + b"\x02" * 32):
        assert guessed(door.third, door.address, message) != "PinAccepted"
    door.ask("DELETE", "/mesh/v1/invites/pin")
    door.check_unharmed()


def at(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


# -- floods ------------------------------------------------------------------------------------------------


def test_half_open_and_broken_joins_of_one_host_keep_nobody_else_out(door: Door) -> None:
    _, told = door.invite()
    held = [door.attacker.dial(door.address) for _ in range(40)]
    for connection in held:
        with suppress(OSError):
            connection.sendall(JOIN_BYTE)
    ended = threading.Event()
    broken = 0

    def flood() -> None:
        nonlocal broken
        while not ended.is_set():
            with suppress(OSError):
                connection = door.other.dial(door.address)
                connection.sendall((b"J", b"J\x16\x03\x01\x02\x00", b"J" + bytes(300))[broken % 3])
                connection.shutdown(socket.SHUT_WR)
                heard(connection)  # until it was seen, so that the next one is not one too many
                connection.close()
                broken += 1

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        door.mesh.wait("more failures than are borne", door.daemon, lambda: broken > 200)
        done = door.join("through", told["token"])
    finally:
        ended.set()
        flooding.join()
    assert done.returncode == 0, done.stderr
    for connection in held:
        connection.close()
    door.check_unharmed()


def test_a_message_longer_than_any_is_not_waited_for(door: Door) -> None:
    door.invite()
    with intruding(door.other, door.address) as session:
        if session is not None:
            session.throw(b"\xff\xff\xff\xff" + bytes(2_000))
            assert session.refusal() in {"malformed", "too_many_attempts", TURNED_AWAY}
    door.check_unharmed()
