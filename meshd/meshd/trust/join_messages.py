"""The messages of the join channel, and their bytes. Pure; what comes in is from strangers.

Inside TLS 1.3, in which only the inviter shows a certificate, each message is 4 bytes of length and a msgpack
array: the number of its kind, then its fields. Two ways in, one way on:

    joiner                         inviter
    Hello, by token      ------->
                         <-------  Offer               the joiner checks: root, chain, TLS leaf

    Hello, by PIN        ------->                      with its SPAKE2 message
                         <-------  PinReply            the inviter's SPAKE2 message
    PinConfirm           ------->
                         <-------  PinAccepted         confirms too, and has an Offer in it

    Proof                ------->                      the invite, its key, possession, name
                         <-------  Welcome, or ClientWelcome

Refused may come instead of any message of the inviter, and is the last one. Every decoder takes any bytes and
raises `MalformedMessage`, nothing else. docs/protocol.md has the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeGuard

from meshd.core.effects import Address
from meshd.trust.certificates import CERTIFICATE_BYTES_MAX, CHAIN_MAX, Role
from meshd.trust.join_errors import MalformedMessage, Refusal
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.types import PUBLIC_KEY_BYTES, SIGNATURE_BYTES

JOIN_BYTE: Final = b"J"
"""What a joiner sends first on the stream port; TLS follows."""
VERSION: Final = 1
LENGTH_BYTES: Final = 4
MESSAGE_BYTES_MAX: Final = 8_192
"""Of any message but a welcome."""
WELCOME_BYTES_MAX: Final = 2 << 20
"""A welcome carries the decrees in force; it comes from an inviter that has proved itself."""

NONCE_BYTES: Final = 32
MAC_BYTES: Final = 32
INVITE_ID_BYTES: Final = 5
SPAKE2_BYTES: Final = 33
NAME_BYTES_MAX: Final = 63
TEXT_BYTES_MAX: Final = 256
DECREES_MAX: Final = 4_096
DECREE_BYTES_MAX: Final = 4_096
MEMBERS_MAX: Final = 64
GENERATION_MAX: Final = 2**32 - 1
KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Hello:
    """The joiner's first word."""

    version: int
    pin_message: bytes  # the SPAKE2 message of a joiner by PIN; b"" by token


@dataclass(frozen=True, slots=True)
class Offer:
    """Who the inviter is."""

    nonce: bytes
    chain: tuple[bytes, ...]  # DER, its own certificate first, without the root
    root: bytes  # DER


@dataclass(frozen=True, slots=True)
class PinReply:
    """The inviter's SPAKE2 message."""

    pin_message: bytes


@dataclass(frozen=True, slots=True)
class PinConfirm:
    """The joiner has the same key."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class PinAccepted:
    """The inviter has the same key too; now it says who it is, and what it would make of the joiner."""

    mac: bytes
    role: Role
    offer: Offer


@dataclass(frozen=True, slots=True)
class Proof:
    """The joiner's key, and the proof that it was invited."""

    invite: bytes  # the invite's id; b"" by PIN
    public_key: bytes  # raw Ed25519
    nonce: bytes
    name: str  # what the device calls itself, for people
    possession: bytes  # a signature with that key
    mac: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """Everything that makes the joiner a node."""

    mac: bytes
    mesh_name: str
    role: Role
    chain: tuple[bytes, ...]  # DER, the joiner's certificate first
    authority: tuple[
        bytes, ...
    ]  # DER, the joiner's as an authority first; () unless it is an issuer
    key_generation: int
    datagram_key: bytes = field(repr=False)
    decrees: tuple[bytes, ...]
    members: tuple[Address, ...]  # where to find the mesh, the inviter first


@dataclass(frozen=True, slots=True)
class ClientWelcome:
    """Everything that makes the joiner a client of the inviter's HTTP edge."""

    mac: bytes
    mesh_name: str
    url: str
    key: str = field(repr=False)
    fingerprint: str  # of the edge's certificate: SHA-256, hex


@dataclass(frozen=True, slots=True)
class Refused:
    """No, and why."""

    refusal: Refusal


FromJoiner: TypeAlias = Hello | PinConfirm | Proof
FromInviter: TypeAlias = Offer | PinReply | PinAccepted | Welcome | ClientWelcome | Refused

_HELLO, _PIN_CONFIRM, _PROOF = 1, 2, 3
_OFFER, _PIN_REPLY, _PIN_ACCEPTED, _WELCOME, _CLIENT_WELCOME, _REFUSED = 11, 12, 13, 14, 15, 16
_COUNTS: Final[Mapping[int, int]] = {  # of the fields after the number
    _HELLO: 2,
    _PIN_CONFIRM: 1,
    _PROOF: 6,
    _OFFER: 3,
    _PIN_REPLY: 1,
    _PIN_ACCEPTED: 5,
    _WELCOME: 9,
    _CLIENT_WELCOME: 5,
    _REFUSED: 1,
}


# -- to bytes ----------------------------------------------------------------------------------------------


def encode_message(message: FromJoiner | FromInviter) -> bytes:
    """The bytes of a message, with their length before them."""
    body = pack(_fields(message))
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def _fields(message: FromJoiner | FromInviter) -> list[object]:
    match message:
        case Hello():
            return [_HELLO, message.version, message.pin_message]
        case Offer():
            return [_OFFER, *_offer_fields(message)]
        case PinReply():
            return [_PIN_REPLY, message.pin_message]
        case PinConfirm():
            return [_PIN_CONFIRM, message.mac]
        case PinAccepted():
            return [
                _PIN_ACCEPTED,
                message.mac,
                message.role.value,
                *_offer_fields(message.offer),
            ]
        case Proof():
            return [
                _PROOF,
                message.invite,
                message.public_key,
                message.nonce,
                message.name,
                message.possession,
                message.mac,
            ]
        case Welcome():
            return [
                _WELCOME,
                message.mac,
                message.mesh_name,
                message.role.value,
                list(message.chain),
                list(message.authority),
                message.key_generation,
                message.datagram_key,
                list(message.decrees),
                [list(address) for address in message.members],
            ]
        case ClientWelcome():
            return [
                _CLIENT_WELCOME,
                message.mac,
                message.mesh_name,
                message.url,
                message.key,
                message.fingerprint,
            ]
        case Refused():
            return [_REFUSED, message.refusal.value]


def _offer_fields(offer: Offer) -> list[object]:
    return [offer.nonce, list(offer.chain), offer.root]


# -- from bytes --------------------------------------------------------------------------------------------


def body_length(header: bytes, bytes_max: int = MESSAGE_BYTES_MAX) -> int:
    """How many bytes follow these LENGTH_BYTES.

    Raises:
        MalformedMessage: more than `bytes_max`, or none.
    """
    length = int.from_bytes(header, "big")
    if len(header) != LENGTH_BYTES or not 0 < length <= bytes_max:
        raise MalformedMessage(f"a message of {length} bytes")
    return length


def decode_from_joiner(body: bytes) -> FromJoiner:
    """The message of a joiner, as it came after its length.

    Raises:
        MalformedMessage: it is none.
    """
    kind, fields = _opened(body)
    match kind:
        case 1:
            return Hello(_whole(fields[0], 255), _bytes(fields[1], 0, SPAKE2_BYTES))
        case 2:
            return PinConfirm(_bytes(fields[0], MAC_BYTES))
        case 3:
            return Proof(
                invite=_bytes(fields[0], 0, INVITE_ID_BYTES),
                public_key=_bytes(fields[1], PUBLIC_KEY_BYTES),
                nonce=_bytes(fields[2], NONCE_BYTES),
                name=_text(fields[3], NAME_BYTES_MAX),
                possession=_bytes(fields[4], SIGNATURE_BYTES),
                mac=_bytes(fields[5], MAC_BYTES),
            )
        case _:
            raise MalformedMessage(f"a joiner says nothing of kind {kind}")


def decode_from_inviter(body: bytes) -> FromInviter:
    """The message of an inviter, as it came after its length.

    Raises:
        MalformedMessage: it is none.
    """
    kind, fields = _opened(body)
    match kind:
        case 11:
            return _offer(fields)
        case 12:
            return PinReply(_bytes(fields[0], SPAKE2_BYTES))
        case 13:
            return PinAccepted(_bytes(fields[0], MAC_BYTES), _role(fields[1]), _offer(fields[2:]))
        case 14:
            return _welcome(fields)
        case 15:
            return ClientWelcome(
                mac=_bytes(fields[0], MAC_BYTES),
                mesh_name=_text(fields[1], TEXT_BYTES_MAX),
                url=_text(fields[2], TEXT_BYTES_MAX),
                key=_text(fields[3], TEXT_BYTES_MAX),
                fingerprint=_text(fields[4], TEXT_BYTES_MAX),
            )
        case 16:
            try:
                return Refused(Refusal(_text(fields[0], TEXT_BYTES_MAX)))
            except ValueError as error:
                raise MalformedMessage("refused for a reason unknown here") from error
        case _:
            raise MalformedMessage(f"an inviter says nothing of kind {kind}")


def _opened(body: bytes) -> tuple[int, list[object]]:
    try:
        value = unpack(body)
    except CodecError as error:
        raise MalformedMessage(str(error)) from error
    items = _items(value, 1 + max(_COUNTS.values()))
    if not items:
        raise MalformedMessage("an empty message")
    kind = _whole(items[0], 255)
    if len(items) - 1 != _COUNTS.get(kind):
        raise MalformedMessage(f"kind {kind} with {len(items) - 1} fields")
    return kind, items[1:]


def _offer(fields: list[object]) -> Offer:
    return Offer(
        nonce=_bytes(fields[0], NONCE_BYTES),
        chain=_certificates(fields[1], at_least=1),
        root=_bytes(fields[2], 1, CERTIFICATE_BYTES_MAX),
    )


def _welcome(fields: list[object]) -> Welcome:
    decrees = _items(fields[7], DECREES_MAX)
    return Welcome(
        mac=_bytes(fields[0], MAC_BYTES),
        mesh_name=_text(fields[1], NAME_BYTES_MAX),
        role=_role(fields[2]),
        chain=_certificates(fields[3], at_least=1),
        authority=_certificates(fields[4], at_least=0),
        key_generation=_whole(fields[5], GENERATION_MAX),
        datagram_key=_bytes(fields[6], KEY_BYTES),
        decrees=tuple(_bytes(each, 1, DECREE_BYTES_MAX) for each in decrees),
        members=tuple(_address(each) for each in _items(fields[8], MEMBERS_MAX)),
    )


def _certificates(value: object, *, at_least: int) -> tuple[bytes, ...]:
    items = _items(value, CHAIN_MAX)
    if len(items) < at_least:
        raise MalformedMessage("a chain without a certificate")
    return tuple(_bytes(each, 1, CERTIFICATE_BYTES_MAX) for each in items)


def _address(value: object) -> Address:
    items = _items(value, 2)
    if len(items) != 2:
        raise MalformedMessage("an address is a host and a port")
    port = _whole(items[1], 65_535)
    if port == 0:
        raise MalformedMessage("port 0")
    return _text(items[0], TEXT_BYTES_MAX), port


def _role(value: object) -> Role:
    try:
        return Role(_text(value, TEXT_BYTES_MAX))
    except ValueError as error:
        raise MalformedMessage("a role unknown here") from error


def _items(value: object, items_max: int) -> list[object]:
    if not _is_list(value) or len(value) > items_max:
        raise MalformedMessage(f"not a list of at most {items_max}")
    return value


def _bytes(value: object, least: int, most: int | None = None) -> bytes:
    if not isinstance(value, bytes) or not least <= len(value) <= (least if most is None else most):
        raise MalformedMessage("bytes of another length, or none")
    return value


def _text(value: object, bytes_max: int) -> str:
    """Text that a terminal can show."""
    if not isinstance(value, str) or not value.isprintable():
        raise MalformedMessage("not printable text")
    if len(value.encode("utf-8", "replace")) > bytes_max:
        raise MalformedMessage("text that is too long")
    return value


def _whole(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise MalformedMessage("not a whole number in its range")
    return value


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)
