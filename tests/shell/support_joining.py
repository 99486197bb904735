"""An inviter on loopback, with real TLS and a real state folder, and joiners that misbehave."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio
from tests.shell.support_log import KeptLog

from meshd.core.effects import Address
from meshd.shell.files import FileSystem
from meshd.shell.joining_client import Joiner
from meshd.shell.joining_desk import ClientGrant, ClientKeys, JoinDesk, NoClients
from meshd.shell.joining_server import JoinServer
from meshd.shell.joining_wire import Secured, receive_body, secured, send_message
from meshd.trust.certificates import Role, der
from meshd.trust.identity import Identity
from meshd.trust.join_messages import (
    JOIN_BYTE,
    VERSION,
    FromInviter,
    FromJoiner,
    Hello,
    Offer,
    PinReply,
    Proof,
    decode_from_inviter,
)
from meshd.trust.join_proofs import (
    Transcript,
    certificate_hash,
    invite_id,
    invite_key,
    pin_joiner_mac,
)
from meshd.trust.join_tls import inviter_context, joiner_context
from meshd.trust.join_token import JoinToken, decode_token
from meshd.trust.pins import joiner_exchange
from meshd_cms import NodeId

NOW_S = 1_800_000_000.0
KEY = bytes(range(32))


@dataclass
class Clock:
    """Both clocks of an inviter; they move when told to."""

    now_s: float = NOW_S

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Facts:
    """What joiners are told."""

    reached: list[Address] = field(default_factory=list[Address])
    others: list[Address] = field(default_factory=list[Address])
    revoked: set[NodeId] = field(default_factory=set[NodeId])
    raws: tuple[bytes, ...] = (b"a decree", b"another")
    generation: int = 3
    authority_holds: bool = True

    def datagram_key(self) -> tuple[int, bytes]:
        return self.generation, KEY

    def decrees(self) -> Sequence[bytes]:
        return self.raws

    def addresses(self) -> Sequence[Address]:
        return self.reached

    def members(self) -> Sequence[Address]:
        return self.others

    def is_revoked(self, node: NodeId) -> bool:
        return node in self.revoked

    def may_issue(self) -> bool:
        return self.authority_holds


@dataclass
class Clients:
    """API keys of an edge that is reachable."""

    names: list[str] = field(default_factory=list[str])

    def is_reachable(self) -> bool:
        return True

    def create(self, name: str) -> ClientGrant:
        self.names.append(name)
        return ClientGrant("https://192.0.2.1:9443", f"key-of-{name}", "sha256//pin")


@dataclass
class Inviter:
    """A node that lets others in."""

    identity: Identity
    folder: Path
    clock: Clock
    facts: Facts
    desk: JoinDesk
    server: JoinServer
    log: KeptLog
    sessions: list[Secured] = field(default_factory=list[Secured])  # closed at the end

    @property
    def address(self) -> Address:
        return self.facts.reached[0]

    async def token(
        self, role: Role = Role.MEMBER, *, uses: int = 1, ttl_s: float = 600.0
    ) -> JoinToken:
        text, _ = await self.desk.invite(role, uses, ttl_s)
        return decode_token(text)

    def refused(self) -> dict[str, int]:
        return dict(self.server.statistics.refused)


def inviter(
    identity: Identity,
    folder: Path,
    *,
    clock: Clock | None = None,
    clients: ClientKeys | None = None,
    files: FileSystem | None = None,
) -> Inviter:
    """One that nobody reaches yet."""
    folder.mkdir(exist_ok=True)
    clock, facts, log = clock or Clock(), Facts(), KeptLog()
    desk = JoinDesk(
        lambda: identity,
        folder,
        facts,
        clients=clients or NoClients(),
        wall=clock,
        clock=clock,
        log=log,
        files=files,
    )
    return Inviter(
        identity, folder, clock, facts, desk, JoinServer(lambda: identity, desk, log), log
    )


@asynccontextmanager
async def serving(one: Inviter) -> AsyncGenerator[Inviter]:
    """It listens on loopback until the block ends."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    one.facts.reached = [listeners[0].socket.getsockname()[:2]]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, one.server.accept, listeners)
        try:
            yield one
        finally:
            for session in one.sessions:
                await trio.aclose_forcefully(session.transport_stream)
            nursery.cancel_scope.cancel()


# -- ends of the channel by hand ---------------------------------------------------------------------------


@asynccontextmanager
async def listening(
    serve: Callable[[trio.SocketStream], Awaitable[None]],
) -> AsyncGenerator[Address]:
    """Somebody else on loopback; its handler is over before the block is."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    served = trio.Event()

    async def once(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some(1)  # JOIN_BYTE
            await serve(stream)
        await trio.aclose_forcefully(stream)
        served.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, once, listeners)
        yield listeners[0].socket.getsockname()[:2]
        await served.wait()
        nursery.cancel_scope.cancel()


async def accepted(stream: trio.SocketStream, identity: Identity) -> Secured:
    """The inviter's end of TLS."""
    session = secured(stream, inviter_context(identity), server_side=True)
    await session.do_handshake()
    return session


def offer_of(identity: Identity) -> Offer:
    """What a node says of itself."""
    return Offer(secrets.token_bytes(32), der(identity.chain), der((identity.root,))[0])


async def session_with(home: Inviter) -> Secured:
    """The joiner's end of TLS."""
    stream = await trio.open_tcp_stream(*home.address)
    await stream.send_all(JOIN_BYTE)
    session = secured(stream, joiner_context(), server_side=False)
    home.sessions.append(session)
    await session.do_handshake()
    return session


async def said(session: Secured, message: FromJoiner) -> FromInviter:
    """The answer to a message."""
    await send_message(session, message)
    return decode_from_inviter(await receive_body(session))


async def offered(home: Inviter) -> tuple[Secured, Offer]:
    """A session in which the inviter waits for the proof."""
    session = await session_with(home)
    offer = await said(session, Hello(VERSION, b""))
    assert isinstance(offer, Offer)
    return session, offer


async def knock(
    home: Inviter, token: JoinToken, *, wrong_mac: bool = False, wrong_possession: bool = False
) -> FromInviter:
    """Join by hand, with something wrong."""
    session = await session_with(home)
    offer = await said(session, Hello(VERSION, b""))
    if not isinstance(offer, Offer):
        return offer
    joiner, other = Joiner("knocks"), Joiner("another")
    transcript = Transcript(
        mesh_id=token.mesh_id,
        certificate=certificate_hash(offer.chain[0]),
        inviter_nonce=offer.nonce,
        joiner_nonce=bytes(32),
        public_key=joiner.public_key,
        name=joiner.name,
    )
    mac = transcript.joiner_mac(invite_key(token.secret))
    return await said(
        session,
        Proof(
            invite=invite_id(token.secret),
            public_key=joiner.public_key,
            nonce=transcript.joiner_nonce,
            name=joiner.name,
            possession=transcript.sign(other.key if wrong_possession else joiner.key),
            mac=bytes(32) if wrong_mac else mac,
        ),
    )


async def begun_with(home: Inviter, pin: str) -> tuple[Secured, bytes]:
    """A PIN exchange up to its confirmation, which is the second value."""
    session = await session_with(home)
    shown = session.getpeercert(binary_form=True)
    assert shown is not None
    exchange = joiner_exchange(pin, certificate_hash(shown))
    reply = await said(session, Hello(VERSION, exchange.message))
    assert isinstance(reply, PinReply)
    return session, pin_joiner_mac(exchange.finish(reply.pin_message))


async def ended_after(home: Inviter, bytes_said: bytes) -> None:
    """Say something that is no TLS, and wait for the end of the connection."""
    stream = await trio.open_tcp_stream(*home.address)
    with suppress(trio.BrokenResourceError):
        await stream.send_all(bytes_said)
        await stream.send_eof()
        while await stream.receive_some():
            pass
    await stream.aclose()
