"""The join channel by hand, message by message: what nobody who was invited would say."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.integration.support_attackers import Attacker

from meshd.core.effects import Address
from meshd.trust.join_messages import (
    JOIN_BYTE,
    LENGTH_BYTES,
    NONCE_BYTES,
    SPAKE2_BYTES,
    VERSION,
    FromInviter,
    FromJoiner,
    Hello,
    Offer,
    PinConfirm,
    PinReply,
    Proof,
    Refused,
    decode_from_inviter,
    encode_message,
)
from meshd.trust.join_proofs import Transcript, certificate_hash, invite_id, invite_key
from meshd.trust.join_tls import joiner_context
from meshd.trust.join_token import JoinToken
from meshd.trust.keys import raw_public_key
from meshd_cms.types import MeshId

T = TypeVar("T")

TURNED_AWAY: Final = "turned away"
"""The connection was closed before anything was said, or without an answer."""


class Secured:
    """TLS over a socket that stays its caller's to close.

    `SSLContext.wrap_socket` takes the socket, and loses it when the peer is gone before it begins.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        self._done(self._tls.do_handshake)

    def sendall(self, data: bytes) -> None:
        """Send all of it. Raises OSError."""
        self._done(lambda: self._tls.write(data))

    def recv(self, count: int) -> bytes:
        """Some bytes; none: the peer closed. Raises OSError."""
        try:
            return self._done(lambda: self._tls.read(count))
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    def _done(self, call: Callable[[], T]) -> T:
        while True:
            try:
                result = call()
            except ssl.SSLWantReadError:
                self._flush()
                received = self._connection.recv(65_536)
                if received:
                    self._incoming.write(received)
                else:
                    self._incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._connection.sendall(self._outgoing.read())


class Intruder:
    """One session with an inviter."""

    def __init__(self, secured: Secured) -> None:
        self._secured = secured

    def say(self, message: FromJoiner) -> None:
        """Send a message. Raises OSError."""
        self._secured.sendall(encode_message(message))

    def throw(self, data: bytes) -> None:
        """Send bytes as they are. Raises OSError."""
        self._secured.sendall(data)

    def hear(self) -> FromInviter | None:
        """The next message; None: the inviter closed."""
        try:
            header = self._exactly(LENGTH_BYTES)
            return decode_from_inviter(self._exactly(int.from_bytes(header, "big")))
        except (EOFError, OSError):
            return None

    def refusal(self) -> str:
        """How it ends: the code of a refusal, the name of another message, or TURNED_AWAY."""
        heard = self.hear()
        if heard is None:
            return TURNED_AWAY
        return heard.refusal.value if isinstance(heard, Refused) else type(heard).__name__

    def meet(self) -> Offer | None:
        """Begin by token."""
        self.say(Hello(VERSION, b""))
        heard = self.hear()
        return heard if isinstance(heard, Offer) else None

    def _exactly(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            some = self._secured.recv(count - len(received))
            if not some:
                raise EOFError
            received += some
        return bytes(received)


@contextmanager
def intruding(attacker: Attacker, address: Address) -> Generator[Intruder | None]:
    """A session; None: the inviter had nothing to say."""
    with attacker.dial(address) as connection:
        try:
            connection.sendall(JOIN_BYTE)
            intruder = Intruder(Secured(connection, joiner_context()))
        except OSError:
            intruder = None
        yield intruder


def proof(
    offer: Offer,
    mesh: MeshId,
    secret: bytes,
    key: Ed25519PrivateKey,
    *,
    identifier: bytes | None = None,
) -> Proof:
    """What somebody with this secret proves; `identifier` in place of the secret's own."""
    public_key, nonce = raw_public_key(key.public_key()), bytes(NONCE_BYTES)
    transcript = Transcript(
        mesh_id=mesh,
        certificate=certificate_hash(offer.chain[0]),
        inviter_nonce=offer.nonce,
        joiner_nonce=nonce,
        public_key=public_key,
        name="intruder",
    )
    return Proof(
        invite=invite_id(secret) if identifier is None else identifier,
        public_key=public_key,
        nonce=nonce,
        name="intruder",
        possession=transcript.sign(key),
        mac=transcript.joiner_mac(invite_key(secret)),
    )


def tried(
    attacker: Attacker,
    address: Address,
    token: JoinToken,
    *,
    secret: bytes | None = None,
    key: Ed25519PrivateKey | None = None,
) -> str:
    """How an attempt with a token ends; `secret` in place of the token's, told as if it was that one."""
    with intruding(attacker, address) as session:
        if session is None:
            return TURNED_AWAY
        session.say(Hello(VERSION, b""))
        heard = session.hear()
        if isinstance(heard, Refused):
            return heard.refusal.value
        if not isinstance(heard, Offer):
            return TURNED_AWAY
        known = token.secret if secret is None else secret
        made = Ed25519PrivateKey.generate() if key is None else key
        session.say(proof(heard, token.mesh_id, known, made, identifier=invite_id(token.secret)))
        return session.refusal()


def guessed(attacker: Attacker, address: Address, message: bytes) -> str:
    """How an attempt ends that knows no PIN: with a valid SPAKE2 message, and a confirmation of nothing."""
    assert len(message) == SPAKE2_BYTES
    with intruding(attacker, address) as session:
        if session is None:
            return TURNED_AWAY
        session.say(Hello(VERSION, message))
        heard = session.hear()
        if isinstance(heard, Refused):
            return heard.refusal.value
        if not isinstance(heard, PinReply):
            return TURNED_AWAY
        session.say(PinConfirm(bytes(32)))
        return session.refusal()
