"""Fuzz targets: what strangers and members may say about who they are, before anybody believes it."""

from __future__ import annotations

import math
import random
import struct
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import thread_time
from typing import Final, cast

from tests.fuzz.support_figures import Broken
from tests.fuzz.support_mutation import flip, mutant
from tests.fuzz.support_targets import Target

from meshd.core.decrees import DECREE_BYTES_MAX, Decree, DecreeKind
from meshd.core.frame_codec import LENGTH_BYTES
from meshd.core.frame_codec import encode as encode_frame
from meshd.core.frames import CLOCK_MAX_S, CallHeader, Hello, ProtocolError
from meshd.core.mux import Mux, MuxConfig, Up
from meshd.orchestrate.callers import Caller, Passports
from meshd.trust.certificates import CertificateError, Role, der, parse_der, verify_chain
from meshd.trust.decree_proofs import decree_verifier, sign_decree
from meshd.trust.identity import Identity, admit, init_mesh
from meshd.trust.join_errors import MalformedMessage, Refusal, TokenWrong
from meshd.trust.join_messages import (
    MAC_BYTES,
    NONCE_BYTES,
    SPAKE2_BYTES,
    ClientWelcome,
    FromInviter,
    FromJoiner,
    Offer,
    PinAccepted,
    PinConfirm,
    PinReply,
    Proof,
    Refused,
    Welcome,
    body_length,
    decode_from_inviter,
    decode_from_joiner,
    encode_message,
)
from meshd.trust.join_messages import Hello as JoinHello
from meshd.trust.join_token import JoinToken, decode_token, encode_token
from meshd.trust.keys import verify
from meshd.trust.pins import inviter_exchange, joiner_exchange, parse_pin
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.types import Epoch, NodeId
from meshd_plugins.api import Operation, Privacy, Request
from meshd_plugins.api import Refused as CallRefused

NOW_S: Final = 1_800_000_000.0
_SIGNATURE_BYTES: Final = 64
_REVOKED: Final = NodeId(b"somebody to lose")


@dataclass(frozen=True, slots=True)
class Trusted:
    """A mesh: its founder, an issuer that it let in, and a member that this one let in."""

    founder: Identity
    issuer: Identity
    member: Identity
    stranger: Identity  # of another mesh


@cache
def trusted() -> Trusted:
    """One for all targets: keys are made at random, and no oracle depends on which."""
    with tempfile.TemporaryDirectory(prefix="fuzz-trust-") as name:
        folder = Path(name)
        founder = init_mesh(folder / "founder", "fuzzed", now_s=NOW_S)
        issuer = admit(founder, folder / "issuer", role=Role.ISSUER, now_s=NOW_S)
        member = admit(issuer, folder / "member", now_s=NOW_S)
        stranger = init_mesh(folder / "stranger", "other", now_s=NOW_S)
    return Trusted(founder, issuer, member, stranger)


# -- joining -----------------------------------------------------------------------------------------------


class JoinTarget(Target):
    """Messages of the join channel: each decodes to what encodes to it, or is malformed; nothing else is raised."""

    name = "join"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._corpus = [encode_message(one)[LENGTH_BYTES:] for one in _join_messages()]

    def case(self) -> bytes:
        return bytes((self.rng.randrange(2),)) + mutant(self._corpus, self.rng)

    def feed(self, data: bytes) -> None:
        if not data:
            return
        decode = decode_from_joiner if data[0] % 2 else decode_from_inviter
        began_s = thread_time()
        try:
            body_length(data[1 : 1 + LENGTH_BYTES])
            outcome = "a length"
        except MalformedMessage:
            outcome = "no length"
        try:
            message: FromJoiner | FromInviter = decode(data[1:])
        except MalformedMessage:
            outcome = f"malformed, {outcome}"
        else:
            outcome = type(message).__name__
            if decode(encode_message(message)[LENGTH_BYTES:]) != message:
                raise Broken(f"{outcome} does not survive the codec")
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


def _join_messages() -> tuple[FromJoiner | FromInviter, ...]:
    here = trusted()
    mac, nonce = bytes(MAC_BYTES), bytes(NONCE_BYTES)
    chain, root = der(here.founder.chain), der((here.founder.root,))[0]
    offer = Offer(nonce, chain, root)
    public_key = here.member.signer.public_key
    decree = sign_decree(
        here.founder, DecreeKind.REVOCATION, made_at_s=NOW_S, node=_REVOKED, reason="lost"
    )
    members = (("10.0.0.1", 7946), ("fd00::1", 7946))
    return (
        JoinHello(1, b""),
        JoinHello(1, bytes(SPAKE2_BYTES)),
        offer,
        PinReply(bytes(SPAKE2_BYTES)),
        PinConfirm(mac),
        PinAccepted(mac, Role.MEMBER, offer),
        Proof(b"abcde", public_key, nonce, "kitchen", bytes(_SIGNATURE_BYTES), mac),
        Welcome(mac, "home", Role.ISSUER, chain, chain[1:], 3, bytes(32), (decree,), members),
        ClientWelcome(mac, "home", "https://10.0.0.1:8642", "sk-meshd-x", "ab" * 32),
        *(Refused(refusal) for refusal in Refusal),
    )


class TokenTarget(Target):
    """What people paste: a token, or what is wrong with it; no token has two spellings."""

    name = "token"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        mesh = trusted().founder.mesh_id
        self._corpus = [
            encode_token(JoinToken(mesh, bytes(range(16)), role, 1_800_000_000, addresses))
            for role in (Role.MEMBER, Role.CLIENT)
            for addresses in (
                (("10.0.0.1", 7946),),
                (("10.0.0.1", 1), ("192.0.2.7", 1), ("198.51.100.1", 1)),
                (("fd00::1", 7946),),
            )
        ] + ["481-516", "481516"]

    def case(self) -> bytes:
        rng, text = self.rng, self.rng.choice(self._corpus)
        way = rng.random()
        if way < 0.3:
            return mutant([one.encode() for one in self._corpus], rng)
        at = rng.randrange(len(text) + 1)
        if way < 0.7:
            letters = "abcXYZ019-_=+/ \n\u200b\u0660\u00e9"
            return (text[:at] + rng.choice(letters) + text[at + rng.randrange(2) :]).encode()
        return text[:at].encode()

    def feed(self, data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        began_s = thread_time()
        try:
            token = decode_token(text)
            outcome = "token"
            if encode_token(token) != "".join(text.split()):
                raise Broken("a token has two spellings")
        except TokenWrong:
            outcome = "no token"
        try:
            pin = parse_pin(text)
            outcome = "pin"
            if len(pin) != 6 or not pin.isdecimal() or not pin.isascii():
                raise Broken(f"{pin!r} is no PIN")
        except TokenWrong:
            pass
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


class ExchangeTarget(Target):
    """SPAKE2: whatever the other side says, a key that it has only if it knows the PIN, or nothing."""

    name = "exchange"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._certificate = bytes(32)
        self._corpus = [joiner_exchange(pin, self._certificate).message for pin in ("000000", "1")]

    def case(self) -> bytes:
        way = self.rng.random()
        if way < 0.2:  # of a joiner that knows another PIN
            return self.rng.choice(self._corpus)
        if way < 0.4:  # points of a small order, and none
            small = (bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f", b"\xff" * 32)
            return b"A" + self.rng.choice(small)
        return mutant(self._corpus, self.rng)

    def feed(self, data: bytes) -> None:
        began_s = thread_time()
        try:
            shared = inviter_exchange("481516", self._certificate).finish(data)
            outcome = "a key"
            if len(shared) != 32:
                raise Broken("a key of another length")
        except MalformedMessage:
            outcome = "malformed"
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


# -- certificates and decrees ------------------------------------------------------------------------------


def _spoilt_chain(chain: list[bytes], rng: random.Random) -> list[bytes]:
    """A chain of which one certificate is not what it was."""
    spoilt = list(chain)
    at = rng.randrange(len(spoilt))
    one = bytearray(spoilt[at])
    match rng.randrange(4):
        case 0:
            spoilt[at] = flip(bytes(one), rng)
        case 1:  # a number of its DER is another, most of all kinds of fields, lengths and versions
            one[rng.randrange(len(one))] = rng.choice(
                (0, 1, 2, 3, 4, 5, 0x0F, 0x11, 0x13, 0x30, 0x80, 255)
            )
            spoilt[at] = bytes(one)
        case 2:  # an extension is named as another one
            names = (b"\x55\x1d\x0f", b"\x55\x1d\x13", b"\x55\x1d\x11", b"\x55\x1d\x25")
            spoilt[at] = bytes(one).replace(rng.choice(names), rng.choice(names))
        case _:
            spoilt[at] = rng.choice(spoilt)
            rng.shuffle(spoilt)
    return spoilt[: rng.choice((1, 2, 3, 4))]


class CertificateTarget(Target):
    """Chains that peers show: only true ones are believed, and the others are refused in one way."""

    name = "certificate"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        here = trusted()
        self._chains = [list(der(one.chain)) for one in (here.founder, here.issuer, here.member)]
        self._true = {tuple(chain): chain[0] for chain in self._chains}
        self._chains.append(list(der(here.stranger.chain)))

    def case(self) -> bytes:
        chain = self.rng.choice(self._chains)
        return pack(_spoilt_chain(chain, self.rng) if self.rng.random() < 0.95 else chain)

    def feed(self, data: bytes) -> None:
        chain = _octets(data)
        if chain is None:
            self.figures.outcomes["no chain"] += 1
            return
        began_s = thread_time()
        try:
            credential = verify_chain(parse_der(chain), trusted().founder.root)
        except CertificateError:
            outcome = "refused"
        else:
            outcome = credential.role.value
            if tuple(chain) not in self._true:
                raise Broken("a chain was believed that nobody signed")
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


def _octets(data: bytes) -> list[bytes] | None:
    """The items of a packed list of bytes."""
    try:
        value = unpack(data)
    except CodecError:
        return None
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    octets = [one for one in items if isinstance(one, bytes)]
    return octets if len(octets) == len(items) else None


class DecreeTarget(Target):
    """Decrees: what no authority signed is none, whatever its bytes; nothing is raised."""

    name = "decree"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        here = trusted()
        self._verify = decree_verifier(here.founder.root, here.founder.mesh_id)
        self._true = {
            raw
            for who in (here.founder, here.issuer)
            for raw in (
                sign_decree(
                    who, DecreeKind.REVOCATION, made_at_s=NOW_S, node=_REVOKED, reason="lost"
                ),
                sign_decree(
                    who,
                    DecreeKind.KEY_GENERATION,
                    made_at_s=NOW_S,
                    generation=7,
                    commitment=bytes(32),
                ),
            )
        }
        foreign = sign_decree(
            here.stranger, DecreeKind.REVOCATION, made_at_s=NOW_S, node=_REVOKED, reason=""
        )
        self._corpus = [*sorted(self._true), foreign]

    def case(self) -> bytes:
        rng, raw = self.rng, self.rng.choice(self._corpus)
        way = rng.random()
        body, signature = raw[:-_SIGNATURE_BYTES], raw[-_SIGNATURE_BYTES:]
        if way < 0.2:
            return mutant(self._corpus, rng)
        if way < 0.5:
            return mutant([body], rng) + signature
        fields = cast("list[object]", unpack(body))
        chain = _octets(pack(fields[4]))
        assert chain is not None
        return pack([*fields[:4], _spoilt_chain(chain, rng)]) + signature

    def feed(self, data: bytes) -> None:
        began_s = thread_time()
        decree: Decree | None = self._verify(data)
        outcome = "none" if decree is None else decree.kind.name
        if decree is not None and (data not in self._true or len(data) > DECREE_BYTES_MAX):
            raise Broken("a decree was believed that nobody signed")
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


# -- what a peer says of itself ----------------------------------------------------------------------------


class HelloTarget(Target):
    """The first frame of a stream: what a peer says of itself, its clock among it, or a fault."""

    name = "hello"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        here = trusted()
        self._me, self._peer = here.founder.node_id, here.member.node_id
        self._mesh = here.founder.mesh_id
        self._corpus = [
            encode_frame(Hello(self._mesh, self._peer, Epoch(5), clock_s=clock_s))[LENGTH_BYTES:]
            for clock_s in (0.0, NOW_S, CLOCK_MAX_S)
        ]

    def case(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.3:  # another number in place of the clock
            clock_s = rng.choice(
                (math.nan, math.inf, -math.inf, -1.0, 1e300, 5e-324, CLOCK_MAX_S * 2)
            )
            return self._corpus[1].replace(struct.pack(">d", NOW_S), struct.pack(">d", clock_s))
        return mutant(self._corpus, rng)

    def feed(self, data: bytes) -> None:
        mux = Mux(MuxConfig(), self._mesh, self._me, Epoch(1), self._peer, dialer=True)
        began_s = thread_time()
        mux.receive(len(data).to_bytes(LENGTH_BYTES, "big") + data)
        try:
            event = mux.next_event()
            outcome = type(event).__name__
        except ProtocolError as error:
            event, outcome = None, error.code
        if isinstance(event, Up) and not 0.0 <= event.hello.clock_s <= CLOCK_MAX_S:
            raise Broken(f"a clock of {event.hello.clock_s} was believed")
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


class PassportTarget(Target):
    """Who asks, as another node passes it on: only the origin's own word for this name and class counts."""

    name = "passport"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        here = trusted()
        keys = {
            one.node_id: one.signer.public_key for one in (here.founder, here.issuer, here.member)
        }
        mesh, origin = here.founder.mesh_id, here.issuer
        issued = Passports(mesh, origin.node_id, origin.signer, verify, keys.get, lambda: NOW_S)
        self._here = Passports(
            mesh, here.founder.node_id, here.founder.signer, verify, keys.get, lambda: NOW_S
        )
        self._relay = here.member.node_id
        self._request = Request(
            name="knowledge.gpt/general",
            operation=Operation.CHAT,
            body={},
            request_id="0123456789abcdef",
            privacy=Privacy.LAN,
            deadline_s=60.0,
        )
        self._caller = Caller(origin.node_id, "key:kitchen")
        self._passport = issued.of(self._caller, self._request)

    def case(self) -> bytes:
        rng, request = self.rng, self._request
        fields: list[object] = [
            request.request_id,
            request.name,
            self._caller.node,
            self._caller.principal,
            self._passport,
            int(request.privacy),
        ]
        return mutant([pack(fields)], rng)

    def feed(self, data: bytes) -> None:
        said = _said(data)
        if said is None:
            self.figures.outcomes["no header"] += 1
            return
        request_id, name, caller, principal, passport, privacy = said
        header = CallHeader(
            request_id=request_id,
            name=name,
            capability_id="a#b",
            operation="chat",
            caller=caller,
            privacy=Privacy(privacy),
            principal=principal,
            passport=passport,
        )
        began_s = thread_time()
        try:
            found = self._here.read(header, self._relay)
        except CallRefused:
            outcome = "refused"
        else:
            outcome = "the relay" if found.node == self._relay else "the origin"
            told = (name, caller, principal, passport)
            true = (
                self._request.name,
                self._caller.node,
                self._caller.principal,
                self._passport,
            )
            if found.node != self._relay and (told != true or privacy > self._request.privacy):
                raise Broken("a caller was believed that nobody gave a word for")
        self.figures.note(outcome, data, thread_time() - began_s)
        self.figures.outcomes[outcome] += 1


def _said(data: bytes) -> tuple[str, str, bytes, str, bytes, int] | None:
    """What of a header says who asks for what, as the frame codec lets it through."""
    try:
        match unpack(data):
            case [
                str(request_id),
                str(name),
                bytes(caller),
                str(principal),
                bytes(passport),
                int(privacy),
            ] if privacy in tuple(Privacy):
                return request_id, name, caller, principal, passport, privacy
            case _:
                return None
    except CodecError:
        return None
