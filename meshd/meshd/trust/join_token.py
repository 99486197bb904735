"""The token that `meshd invite` prints: one short line that a device joins with. Pure.

    meshd1-<base64url of: head, mesh id, secret, expiry, port, addresses, check>

    head       1 byte: 2 bits role, 2 bits number of IPv4 addresses, 1 bit an IPv6 address, 3 bits zero
    mesh id    16 bytes: the hash of the root's key, so it pins the root
    secret     16 random bytes
    expiry     4 bytes, seconds since 1970
    port       2 bytes, the same at each address
    addresses  4 bytes each, then 16 bytes for the IPv6 one
    check      the first 4 bytes of SHA-256 over the prefix and all before it: a typo is told from a wrong token

No token has two spellings. With two IPv4 addresses it is 75 characters long.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from meshd.core.effects import Address
from meshd.trust.certificates import Role
from meshd.trust.join_errors import TokenWrong
from meshd_cms.types import MESH_ID_BYTES, MeshId

PREFIX: Final = "meshd1-"
SECRET_BYTES: Final = 16
CHARACTERS_MAX: Final = 200
"""Of a text that is looked at; every token is shorter."""
V4_MAX: Final = 3
EXPIRY_MAX_S: Final = 2**32 - 1

_ROLES: Final = (Role.MEMBER, Role.ISSUER, Role.OBSERVER, Role.CLIENT)
_CHECK_BYTES: Final = 4
_FIXED_BYTES: Final = 1 + MESH_ID_BYTES + SECRET_BYTES + 4 + 2
_COPY: Final = "copy the whole line that `meshd invite` printed, from `meshd1-` to its end"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a token says."""

    mesh_id: MeshId
    secret: bytes = field(repr=False)  # SECRET_BYTES
    role: Role
    expires_at_s: int  # since 1970, by the inviter's clock
    addresses: tuple[Address, ...]  # of the inviter, best first: IPv4 before IPv6, one port


def reachable(addresses: Sequence[Address]) -> tuple[Address, ...]:
    """Those of `addresses`, best first, that go into a token: up to three IPv4 or one IPv6, of one port."""
    found: list[Address] = []
    for host, port in addresses:
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:  # a name, or an address with a zone, which means something here only
            continue
        if isinstance(ip, ipaddress.IPv6Address) and (ip.is_link_local or ip.scope_id):
            continue
        address = (ip.compressed, port)
        if address not in found and (not found or port == found[0][1]):
            found.append(address)
    v4 = [each for each in found if ":" not in each[0]][:V4_MAX]
    return tuple(v4 or found[:1])


def encode_token(token: JoinToken) -> str:
    """The line for people; `addresses` are some that `reachable` gave, and not empty."""
    hosts = [ipaddress.ip_address(host) for host, _ in token.addresses]
    v4 = [host.packed for host in hosts if host.version == 4]
    v6 = [host.packed for host in hosts if host.version == 6]
    assert hosts, "a token without an address leads nowhere"
    assert len(v4) <= V4_MAX, "see reachable"
    assert len(v6) <= 1, "see reachable"
    assert len(token.secret) == SECRET_BYTES, "of another length"
    head = _ROLES.index(token.role) << 6 | len(v4) << 4 | len(v6) << 3
    body = b"".join(
        (
            bytes([head]),
            token.mesh_id,
            token.secret,
            min(token.expires_at_s, EXPIRY_MAX_S).to_bytes(4, "big"),
            token.addresses[0][1].to_bytes(2, "big"),
            *v4,
            *v6,
        )
    )
    return PREFIX + _base64(body + _check(body))


def decode_token(text: str) -> JoinToken:
    """What `encode_token` made; white space around it, and line breaks in it, do no harm.

    Raises:
        TokenWrong: it is none, with what is wrong in the message; nothing else is raised on any text.
    """
    text = "".join(text[: 4 * CHARACTERS_MAX].split())
    if not text:
        raise TokenWrong(f"there is no token: {_COPY}")
    if not text.startswith(PREFIX):
        if text.startswith("meshd") and text[5:6].isdigit():
            raise TokenWrong(
                "this token is of another release of meshd: install one release on both devices"
            )
        raise TokenWrong(f"this is no token, which begins with {PREFIX}: {_COPY}")
    encoded = text.removeprefix(PREFIX)
    body = _decoded(encoded)
    wanted = _length(body)
    if len(body) < wanted:
        missing = _characters(wanted) - len(encoded)
        raise TokenWrong(f"the token is cut short, about {missing} characters are missing: {_COPY}")
    if len(body) > wanted:
        raise TokenWrong(f"the token is longer than it says, something was added to it: {_COPY}")
    is_spelt_so = _base64(body) == encoded  # the last character has bits to spare
    body, check = body[:-_CHECK_BYTES], body[-_CHECK_BYTES:]
    if _check(body) != check or not is_spelt_so:
        raise TokenWrong(f"the token has a typo: {_COPY}")
    token = _parsed(body)
    if token is None or encode_token(token) != text:
        raise TokenWrong(
            "this token says something that this release does not know: install one release on both"
        )
    return token


def _decoded(encoded: str) -> bytes:
    whole = encoded[:-1] if len(encoded) % 4 == 1 else encoded  # no bytes end there: it is cut
    try:
        padded = whole + "=" * (-len(whole) % 4)
        body = base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        stray = sorted({each for each in encoded if not _is_base64url(each)})
        if stray:
            raise TokenWrong(f"no token contains {stray[0]!r}: {_COPY}") from None
        raise TokenWrong(f"the token is cut short, or has a typo: {_COPY}") from None
    if not body:
        raise TokenWrong(f"the token is cut short after {PREFIX}: {_COPY}")
    return body


def _base64(body: bytes) -> str:
    return base64.urlsafe_b64encode(body).decode("ascii").rstrip("=")


def _is_base64url(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character in "-_")


def _length(body: bytes) -> int:
    """How many bytes there should be, by the head."""
    v4, v6 = body[0] >> 4 & 0b11, body[0] >> 3 & 1
    return _FIXED_BYTES + 4 * v4 + 16 * v6 + _CHECK_BYTES


def _characters(length: int) -> int:
    return -(-length * 4 // 3)


def _check(body: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + body).digest()[:_CHECK_BYTES]


def _parsed(body: bytes) -> JoinToken | None:
    """The fields of a body whose length and check are right."""
    head, at = body[0], _FIXED_BYTES
    port = int.from_bytes(body[at - 2 : at], "big")
    addresses: list[Address] = []
    for _ in range(head >> 4 & 0b11):
        addresses.append((ipaddress.IPv4Address(body[at : at + 4]).compressed, port))
        at += 4
    if head >> 3 & 1:
        addresses.append((ipaddress.IPv6Address(body[at : at + 16]).compressed, port))
    if not addresses or not port or head & 0b111:
        return None
    secret = 1 + MESH_ID_BYTES
    return JoinToken(
        mesh_id=MeshId(body[1:secret]),
        secret=body[secret : secret + SECRET_BYTES],
        role=_ROLES[head >> 6],
        expires_at_s=int.from_bytes(body[secret + SECRET_BYTES : secret + SECRET_BYTES + 4], "big"),
        addresses=tuple(addresses),
    )
