"""The inviter's end of the join channel: carries one joiner from its first byte to its certificate.

Who comes here is a stranger until its proof is judged. Until then it costs a TLS handshake and little messages, in
`DEADLINE_S` and all; a source that fails often is turned away before that, and only few are served at once. With
no invitation open there is nothing to say, and the connection is closed unheard.
"""

from __future__ import annotations

import ipaddress
import secrets
import ssl
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from meshd.core.allowance import Allowance
from meshd.shell.joining_desk import JoinDesk
from meshd.shell.joining_wire import Secured, receive_body, secured, send_message
from meshd.trust.certificates import der
from meshd.trust.identity import Identity
from meshd.trust.join_errors import (
    JoinBroken,
    JoinRefused,
    MalformedMessage,
    Refusal,
)
from meshd.trust.join_messages import (
    JOIN_BYTE,
    NONCE_BYTES,
    SPAKE2_BYTES,
    VERSION,
    ClientWelcome,
    Hello,
    Offer,
    PinAccepted,
    PinConfirm,
    PinReply,
    Proof,
    Refused,
    Welcome,
    decode_from_joiner,
)
from meshd.trust.join_proofs import (
    Transcript,
    certificate_hash,
    pin_inviter_mac,
    pin_session_key,
)
from meshd.trust.join_tls import inviter_context
from meshd.trust.pins import OpenPin, inviter_exchange
from meshd_plugins.api import Logger

DEADLINE_S: Final = 10.0
"""For one joiner, from its first byte to its certificate."""
JOINS_MAX: Final = 16
"""Joiners at once."""
JOINS_PER_SOURCE_MAX: Final = 4
FAILURES_PER_S: Final = 10 / 60
FAILURES_BURST: Final = 10
"""Failed attempts of one source; more are turned away until some time has passed."""
ALL_FAILURES_PER_S: Final = 2.0
ALL_FAILURES_BURST: Final = 120
SOURCES_MAX: Final = 1_024
TOLD_OFF_PER_S: Final = 2.0
TOLD_OFF_BURST: Final = 10
"""Those turned away for their failures who are told so; the others are closed unheard."""
EXCHANGES_PER_S: Final = 4.0
EXCHANGES_BURST: Final = 8
"""SPAKE2 exchanges, each 25 ms of a core."""


@dataclass(slots=True)
class JoinStatistics:
    """What came over the join channel."""

    admitted: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])
    turned_away: int = 0  # before anything was said: too many, or nothing to say
    broken: int = 0


class Failures:
    """How often sources failed: a bucket for each, the one not heard longest forgotten, and one for all."""

    def __init__(self) -> None:
        self._all = Allowance(ALL_FAILURES_PER_S, ALL_FAILURES_BURST)
        self._by_source: OrderedDict[str, Allowance] = OrderedDict()

    def note(self, source: str, now_s: float) -> None:
        """A source failed."""
        bucket = self._by_source.get(source)
        if bucket is None:
            bucket = self._by_source[source] = Allowance(FAILURES_PER_S, FAILURES_BURST)
            if len(self._by_source) > SOURCES_MAX:
                self._by_source.popitem(last=False)
        self._by_source.move_to_end(source)
        bucket.take(now_s)
        self._all.take(now_s)

    def are_too_many(self, source: str, now_s: float) -> bool:
        """Whether this source has failed too often, or all together have."""
        bucket = self._by_source.get(source)
        return self._all.left(now_s) < 1 or (bucket is not None and bucket.left(now_s) < 1)


class JoinServer:
    """Serves joiners.

    Args:
        identity: who we are now.
        desk: judges and admits.
        log: bound logger.
    """

    def __init__(self, identity: Callable[[], Identity], desk: JoinDesk, log: Logger) -> None:
        self._identity = identity
        self._desk = desk
        self._log = log
        self._context: tuple[Identity, ssl.SSLContext] | None = None
        self._sources: Counter[str] = Counter()
        self._failures = Failures()
        self._exchanges = Allowance(EXCHANGES_PER_S, EXCHANGES_BURST)
        self._told_off = Allowance(TOLD_OFF_PER_S, TOLD_OFF_BURST)
        self._one_at_a_time = trio.CapacityLimiter(1)
        self.statistics = JoinStatistics()

    async def accept(self, stream: trio.SocketStream) -> None:
        """Serve one joiner to its end; the stream's next byte is JOIN_BYTE. Closes it. Never raises."""
        source = _source(stream)
        if not self._desk.is_open or self._is_full(source) or self._is_a_nuisance(source):
            self.statistics.turned_away += 1
            await trio.aclose_forcefully(stream)
            return
        self._sources[source] += 1
        try:
            with trio.move_on_after(DEADLINE_S) as limit:
                await self._serve(stream, source)
            if limit.cancelled_caught:
                self._failed(source, "timed_out")
        except (JoinBroken, trio.BrokenResourceError, trio.ClosedResourceError):
            self.statistics.broken += 1
            self._failures.note(source, trio.current_time())
        except Exception as error:  # noqa: BLE001 - what a stranger sends must not end the daemon
            self._failures.note(source, trio.current_time())
            self._log.error("join.failed", source=source, error=type(error).__name__)
        finally:
            self._sources[source] -= 1
            self._sources += Counter[str]()  # drops those at zero
            await trio.aclose_forcefully(stream)

    def _is_full(self, source: str) -> bool:
        return self._sources.total() >= JOINS_MAX or self._sources[source] >= JOINS_PER_SOURCE_MAX

    def _is_a_nuisance(self, source: str) -> bool:
        """Whether it failed too often, and was told so often enough: being told takes a TLS handshake."""
        now_s = trio.current_time()
        return self._failures.are_too_many(source, now_s) and not self._told_off.take(now_s)

    async def _serve(self, stream: trio.SocketStream, source: str) -> None:
        """Raises JoinBroken, or what trio raises when a stream breaks."""
        if await stream.receive_some(1) != JOIN_BYTE:
            raise JoinBroken("not a joiner")
        identity = self._identity()
        session = secured(stream, self._context_of(identity), server_side=True)
        await session.do_handshake()
        try:
            if self._failures.are_too_many(source, trio.current_time()):
                raise JoinRefused(Refusal.TOO_MANY_ATTEMPTS)
            await send_message(session, await self._exchange(session, identity))
            self.statistics.admitted += 1
        except JoinRefused as error:
            if error.refusal is not Refusal.TOO_MANY_ATTEMPTS:
                self._failed(source, error.code)
            await send_message(session, Refused(error.refusal))
        except MalformedMessage as error:
            self._failed(source, str(error))
            await send_message(session, Refused(Refusal.MALFORMED))
        await session.aclose()

    async def _exchange(self, session: Secured, identity: Identity) -> Welcome | ClientWelcome:
        """From the joiner's first word to what it gets.

        Raises:
            JoinRefused, MalformedMessage: it gets nothing, and is told so.
            JoinBroken: the connection ended.
        """
        offer = Offer(
            nonce=secrets.token_bytes(NONCE_BYTES),
            chain=der(identity.chain),
            root=der((identity.root,))[0],
        )
        certificate = certificate_hash(offer.chain[0])
        hello = decode_from_joiner(await receive_body(session))
        if not isinstance(hello, Hello):
            raise MalformedMessage("a joiner begins with Hello")
        if hello.version != VERSION:
            raise JoinRefused(Refusal.OTHER_RELEASE)
        by_pin: tuple[OpenPin, bytes] | None = None
        if hello.pin_message:
            by_pin = await self._pin(session, hello.pin_message, certificate, offer)
        else:
            await send_message(session, offer)
        proof = decode_from_joiner(await receive_body(session))
        if not isinstance(proof, Proof):
            raise MalformedMessage("after the offer comes a proof")
        transcript = Transcript(
            mesh_id=identity.mesh_id,
            certificate=certificate,
            inviter_nonce=offer.nonce,
            joiner_nonce=proof.nonce,
            public_key=proof.public_key,
            name=proof.name,
        )
        if by_pin is None:
            key = self._desk.judge_token(proof, transcript)
            return await self._desk.let_in(proof, transcript, key, None)
        opened, key = by_pin
        self._desk.judge_session(proof, transcript, key)
        return await self._desk.let_in(proof, transcript, key, opened.pin)

    async def _pin(
        self, session: Secured, message: bytes, certificate: bytes, offer: Offer
    ) -> tuple[OpenPin, bytes]:
        """SPAKE2, and confirmation both ways: the PIN, and what keys the proof."""
        opened = self._desk.pins.required()
        if len(message) != SPAKE2_BYTES:
            raise MalformedMessage("not a message of SPAKE2")
        if not self._exchanges.take(trio.current_time()):
            raise JoinRefused(Refusal.BUSY)

        def exchanged() -> tuple[bytes, bytes]:
            exchange = inviter_exchange(opened.pin, certificate)
            return exchange.message, exchange.finish(message)

        reply, shared = await trio.to_thread.run_sync(exchanged, limiter=self._one_at_a_time)
        await send_message(session, PinReply(reply))
        confirm = decode_from_joiner(await receive_body(session))
        if not isinstance(confirm, PinConfirm):
            raise MalformedMessage("after the PIN's exchange comes its confirmation")
        opened = self._desk.judge_pin(opened.pin, shared, confirm.mac)
        mac = pin_inviter_mac(shared, offer.root, opened.role.value)
        await send_message(session, PinAccepted(mac, opened.role, offer))
        return opened, pin_session_key(shared)

    def _failed(self, source: str, code: str) -> None:
        self.statistics.refused[code if code in _CODES else "other"] += 1
        self._failures.note(source, trio.current_time())
        self._log.warning("join.refused", source=source, code=code)

    def _context_of(self, identity: Identity) -> ssl.SSLContext:
        """Made anew when the certificate was renewed."""
        if self._context is None or self._context[0] is not identity:
            self._context = (identity, inviter_context(identity))
        return self._context[1]


_CODES: Final = frozenset({*Refusal, "timed_out"})


def _source(stream: trio.SocketStream) -> str:
    """The host at the other end; an IPv6 host has a whole /64 to itself."""
    try:
        host = str(stream.socket.getpeername()[0])
    except OSError:
        return ""
    if ":" not in host:
        return host
    network = ipaddress.ip_network((host.partition("%")[0], 64), strict=False)
    return str(network.network_address)
