"""The joiner's end of the join channel: finds the inviter, makes sure of it, and comes back with what it got.

Invariant: nothing about this device is told, and no invitation is used up, before the other end has shown that it
is of the mesh that the token pins (or knows the PIN). All that comes back is checked against that mesh's root.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, cast

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.core.effects import Address
from meshd.shell.joining_wire import Secured, receive_body, secured, send_message
from meshd.trust.certificates import (
    CertificateError,
    Role,
    mesh_id_of_root,
    parse_der,
    verify_authorities,
    verify_chain,
    verify_root,
)
from meshd.trust.identity_errors import IdentityError
from meshd.trust.identity_files import check_mesh_name
from meshd.trust.join_errors import (
    InviterUnreachable,
    InviterWrong,
    JoinBroken,
    JoinError,
    JoinRefused,
    MalformedMessage,
)
from meshd.trust.join_messages import (
    JOIN_BYTE,
    MESSAGE_BYTES_MAX,
    NONCE_BYTES,
    VERSION,
    WELCOME_BYTES_MAX,
    ClientWelcome,
    FromInviter,
    Hello,
    Offer,
    PinAccepted,
    PinConfirm,
    PinReply,
    Proof,
    Refused,
    Welcome,
    decode_from_inviter,
)
from meshd.trust.join_proofs import (
    Transcript,
    certificate_hash,
    equal,
    invite_id,
    invite_key,
    pin_inviter_mac,
    pin_joiner_mac,
    pin_session_key,
)
from meshd.trust.join_tls import joiner_context
from meshd.trust.join_token import JoinToken
from meshd.trust.keys import raw_public_key
from meshd.trust.pins import joiner_exchange
from meshd_cms import MeshId, NodeId, node_id_of

CONNECT_S: Final = 3.0
EXCHANGE_S: Final = 15.0
TRIES_MAX: Final = 8
"""Addresses where somebody answers."""
STAGGER_S: Final = 0.2
"""Between the first tries of an inviter's addresses: some lead nowhere, and the best comes first."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What makes this device a node: all of it checked."""

    mesh_name: str
    role: Role
    root: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    authority: tuple[x509.Certificate, ...]
    key_generation: int
    datagram_key: bytes = field(repr=False)
    private_key: Ed25519PrivateKey = field(repr=False)
    decrees: tuple[bytes, ...] = field(repr=False)
    members: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class ClientAdmission:
    """What makes this device a client of a node's HTTP edge."""

    mesh_name: str
    url: str
    key: str = field(repr=False)
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Joiner:
    """This device, as it joins."""

    name: str  # what it calls itself; for people
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate, repr=False)

    @property
    def public_key(self) -> bytes:
        """32 bytes, raw."""
        return raw_public_key(self.key.public_key())


@dataclass(frozen=True, slots=True)
class _Met:
    """An inviter that was made sure of."""

    root: x509.Certificate
    mesh_id: MeshId
    offer: Offer
    invite: bytes
    key: bytes = field(repr=False)  # of the proofs


async def join_by_token(token: JoinToken, joiner: Joiner) -> Admission | ClientAdmission:
    """Join the mesh that a token is of.

    Raises:
        JoinError: with what is wrong and what to do.
    """

    async def meet(session: Secured) -> _Met:
        await send_message(session, Hello(VERSION, b""))
        offer = await _hear(session)
        if not isinstance(offer, Offer):
            raise JoinBroken("the inviter said something else than who it is")
        return _Met(
            root=_checked(offer, token.mesh_id, _shown(session)),
            mesh_id=token.mesh_id,
            offer=offer,
            invite=invite_id(token.secret),
            key=invite_key(token.secret),
        )

    try:
        return await _join(token.addresses, joiner, meet, tries=TRIES_MAX)
    except JoinBroken:
        # It may have counted us: the same key comes again without counting twice.
        return await _join(token.addresses, joiner, meet, tries=TRIES_MAX)


async def join_by_pin(
    pin: str,
    addresses: Sequence[Address],
    joiner: Joiner,
    may_be: Callable[[Role], None] = lambda _role: None,
) -> Admission | ClientAdmission:
    """Join by the PIN that the one inviter at these addresses shows. One guess is all that this costs.

    Args:
        pin: six digits.
        addresses: of one inviter.
        joiner: who joins.
        may_be: called with the role before the PIN is used up; what it raises is raised.

    Raises:
        JoinError: with what is wrong and what to do.
    """

    async def meet(session: Secured) -> _Met:
        certificate = _shown(session)
        exchange = await trio.to_thread.run_sync(
            joiner_exchange, pin, certificate_hash(certificate)
        )
        await send_message(session, Hello(VERSION, exchange.message))
        reply = await _hear(session)
        if not isinstance(reply, PinReply):
            raise JoinBroken("the inviter does not do what goes with a PIN")
        shared = await trio.to_thread.run_sync(exchange.finish, reply.pin_message)
        await send_message(session, PinConfirm(pin_joiner_mac(shared)))
        accepted = await _hear(session)
        if not isinstance(accepted, PinAccepted):
            raise JoinBroken("the inviter does not do what goes with a PIN")
        offer = accepted.offer
        if not equal(pin_inviter_mac(shared, offer.root, accepted.role.value), accepted.mac):
            raise InviterWrong(
                "who answered does not know the PIN: it is not the device that shows it"
            )
        mesh = _mesh_of(offer.root)
        root = _checked(offer, mesh, certificate)
        may_be(accepted.role)
        return _Met(root, mesh, offer, b"", pin_session_key(shared))

    return await _join(addresses, joiner, meet, tries=1)


# -- one exchange ------------------------------------------------------------------------------------------


async def _join(
    addresses: Sequence[Address],
    joiner: Joiner,
    meet: Callable[[Secured], Awaitable[_Met]],
    *,
    tries: int,
) -> Admission | ClientAdmission:
    """Join through the first of `addresses` where the inviter is, of at most `tries` that answer."""
    async with trio.open_nursery() as nursery:
        send, receive = trio.open_memory_channel[trio.SocketStream](len(addresses))
        nursery.start_soon(_connect_all, addresses, send)
        outcome = await _first_that_fits(receive, joiner, meet, tries)
        nursery.cancel_scope.cancel()
    with suppress(trio.WouldBlock, trio.EndOfChannel):
        while True:  # addresses of one inviter, and one connection was enough
            await trio.aclose_forcefully(receive.receive_nowait())
    if outcome is None:
        raise _nobody(addresses)
    if isinstance(outcome, JoinError | IdentityError):
        raise outcome
    return outcome


async def _first_that_fits(
    streams: trio.MemoryReceiveChannel[trio.SocketStream],
    joiner: Joiner,
    meet: Callable[[Secured], Awaitable[_Met]],
    tries: int,
) -> Admission | ClientAdmission | JoinError | IdentityError | None:
    """What came of it, errors too: raised inside a nursery they would come out as a group."""
    outcome: JoinError | None = None
    async for stream in streams:
        try:
            with trio.fail_after(EXCHANGE_S):
                return await _exchange(stream, joiner, meet)
        except (InviterWrong, InviterUnreachable) as error:
            outcome = error  # somebody else has that address here: another may be the inviter's
        except (JoinError, IdentityError) as error:
            return error
        except trio.TooSlowError:
            outcome = JoinBroken(f"the inviter did not answer within {EXCHANGE_S:g} s")
        finally:
            await trio.aclose_forcefully(stream)
        tries -= 1
        if tries <= 0:
            break
    return outcome


async def _connect_all(
    addresses: Sequence[Address], connected: trio.MemorySendChannel[trio.SocketStream]
) -> None:
    """Try all addresses, each a little later than the one before; close the channel when all were tried."""

    async def connect(address: Address, wait_s: float) -> None:
        with suppress(OSError), trio.move_on_after(CONNECT_S):
            await trio.sleep(wait_s)
            connected.send_nowait(await trio.open_tcp_stream(*address))

    async with connected, trio.open_nursery() as nursery:
        for index, address in enumerate(addresses):
            nursery.start_soon(connect, address, index * STAGGER_S)


async def _exchange(
    stream: trio.SocketStream, joiner: Joiner, meet: Callable[[Secured], Awaitable[_Met]]
) -> Admission | ClientAdmission:
    """One exchange with whoever answers. Raises JoinError, IdentityError."""
    session = await _greeted(stream)
    try:
        met = await meet(session)
        transcript = Transcript(
            mesh_id=met.mesh_id,
            certificate=certificate_hash(met.offer.chain[0]),
            inviter_nonce=met.offer.nonce,
            joiner_nonce=secrets.token_bytes(NONCE_BYTES),
            public_key=joiner.public_key,
            name=joiner.name,
        )
        await send_message(
            session,
            Proof(
                invite=met.invite,
                public_key=transcript.public_key,
                nonce=transcript.joiner_nonce,
                name=transcript.name,
                possession=transcript.sign(joiner.key),
                mac=transcript.joiner_mac(met.key),
            ),
        )
        welcome = await _hear(session, WELCOME_BYTES_MAX)
    except MalformedMessage as error:
        raise JoinBroken(
            f"the inviter said what this release does not understand ({error}): install one release on both"
        ) from error
    if not isinstance(welcome, Welcome | ClientWelcome):
        raise JoinBroken("the inviter said something else than welcome")
    if not equal(transcript.inviter_mac(met.key), welcome.mac):
        raise InviterWrong(
            "who answers does not know the secret: it is not who made the invitation"
        )
    if isinstance(welcome, ClientWelcome):
        return ClientAdmission(welcome.mesh_name, welcome.url, welcome.key, welcome.fingerprint)
    return _admission(welcome, met, joiner)


async def _greeted(stream: trio.SocketStream) -> Secured:
    """TLS with whoever answers. Raises InviterUnreachable, InviterWrong."""
    session = secured(stream, joiner_context(), server_side=False)
    try:
        await stream.send_all(JOIN_BYTE)
        await session.do_handshake()
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        if isinstance(error.__cause__, ssl.SSLError) and "EOF" not in str(error.__cause__):
            raise InviterWrong(
                "what answers there is not meshd, or is of another release: look at the inviter"
            ) from error
        raise InviterUnreachable(
            "the inviter answers and closes the connection at once: it has no invitation open (it was "
            "revoked or used, or has expired), or too many devices join at once. Make another one there "
            "with `meshd invite`, or try again in a minute"
        ) from error
    return session


async def _hear(session: Secured, bytes_max: int = MESSAGE_BYTES_MAX) -> FromInviter:
    """What the inviter says next. Raises JoinRefused, JoinBroken, MalformedMessage."""
    message = decode_from_inviter(await receive_body(session, bytes_max))
    if isinstance(message, Refused):
        raise JoinRefused(message.refusal)
    return message


def _shown(session: Secured) -> bytes:
    """The certificate in the TLS handshake, DER."""
    shown = session.getpeercert(binary_form=True)
    if shown is None:
        raise InviterWrong("what answers there shows no certificate, so it is not the inviter")
    return cast("bytes", shown)


def _checked(offer: Offer, mesh: MeshId, shown: bytes) -> x509.Certificate:
    """The root, after all that the inviter says of itself was held against it. Raises InviterWrong."""
    try:
        root = parse_der([offer.root])[0]
        verify_root(root, mesh)
        verify_chain(parse_der(offer.chain), root)
    except CertificateError as error:
        raise InviterWrong(
            f"the node that answers is not of the mesh that the invitation is for ({error}): somebody else "
            "has the inviter's address now, or stands in between. Nothing was told to it"
        ) from error
    if offer.chain[0] != shown:
        raise InviterWrong(
            "the node that answers shows a certificate that is not its own: somebody stands in between. "
            "Nothing was told to it"
        )
    return root


def _mesh_of(root: bytes) -> MeshId:
    """The id of the mesh that this root (DER) is of; that it is a root is checked elsewhere."""
    try:
        return mesh_id_of_root(parse_der([root])[0])
    except CertificateError as error:
        raise InviterWrong(f"the inviter shows no root certificate: {error}") from error


def _admission(welcome: Welcome, met: _Met, joiner: Joiner) -> Admission:
    """What we got, held against the root and our own key. Raises JoinBroken."""
    node = node_id_of(joiner.public_key)
    try:
        check_mesh_name(welcome.mesh_name)
        chain, authority = parse_der(welcome.chain), parse_der(welcome.authority)
        credential = verify_chain(chain, met.root)
        authorities = {verify_authorities(authority, met.root)} if authority else set[NodeId]()
    except (CertificateError, IdentityError) as error:
        raise JoinBroken(f"what the inviter gave is not good: {error}") from error
    wanted = {node} if welcome.role is Role.ISSUER else set[NodeId]()
    if (credential.node, credential.role) != (node, welcome.role) or authorities != wanted:
        raise JoinBroken("the inviter gave the certificate of another node or role")
    return Admission(
        mesh_name=welcome.mesh_name,
        role=welcome.role,
        root=met.root,
        chain=chain,
        authority=authority,
        key_generation=welcome.key_generation,
        datagram_key=welcome.datagram_key,
        private_key=joiner.key,
        decrees=welcome.decrees,
        members=welcome.members,
    )


def _nobody(addresses: Sequence[Address]) -> InviterUnreachable:
    tried = ", ".join(
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in addresses
    )
    return InviterUnreachable(
        f"the inviter does not answer at {tried}: see that its daemon runs (`meshd status` there), that this "
        "device is on the same network, and that no firewall blocks the port"
    )
