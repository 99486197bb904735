"""How a decree is signed, and how anybody tells a true one. See `meshd.core.decrees` for what they mean.

    decree    = body, then the Ed25519 signature (64 bytes) of the authority over
                "meshd decree v1" + mesh id + body
    body      = msgpack of [1, kind, made_at_s, subject, [certificate, ...]]
    subject   = [node id, reason] of a revocation, [generation, commitment] of a key generation

The certificates are the authority's own, then those above it, without the root, DER. They are in what is
signed, so nobody can give a decree another rank; and the bytes are signed as they stand, so nobody can make
two decrees of one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeGuard, assert_never, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshd.core.decrees import (
    COMMITMENT_BYTES,
    DECREE_BYTES_MAX,
    DECREES_MAX,
    GENERATION_MAX,
    Decree,
    DecreeKind,
    DecreeVerifier,
)
from meshd.trust.certificates import CertificateError, der, parse_der, verify_authorities
from meshd.trust.identity import Identity
from meshd.trust.identity_errors import IdentityError, NotAnIssuer
from meshd.trust.keys import raw_public_key, verify
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.types import MeshId, NodeId

FORMAT: Final = 1
REASON_BYTES_MAX: Final = 64
"""Of a revocation, in UTF-8."""
SIGNATURE_BYTES: Final = 64
MADE_AT_MAX_S: Final = 2**40

_DOMAIN: Final = b"meshd decree v1"
_NODE_BYTES: Final = 16
_CHAINS_KEPT: Final = 64  # chains of authorities that were checked; a mesh has a handful


class DecreeTooLong(IdentityError):
    """With the certificates of this authority the decree does not fit a datagram. Nothing was signed."""

    code = "decree_too_long"


def sign_decree(
    identity: Identity,
    kind: DecreeKind,
    *,
    made_at_s: float,
    node: NodeId | None = None,
    reason: str = "",
    generation: int = 0,
    commitment: bytes = b"",
) -> bytes:
    """Decree as this node: shut `node` out for good, or put the datagram key with this hash in force.

    The reason is folded into one line and cut to `REASON_BYTES_MAX`.

    Raises:
        NotAnIssuer: this node may not decree.
        DecreeTooLong: see there.
    """
    if not identity.is_issuer:
        raise NotAnIssuer(
            "this node is no issuer and cannot decree: do it on one, such as the node that founded the mesh "
            "(`meshd trust` shows who is one)"
        )
    match kind:
        case DecreeKind.REVOCATION:
            assert node is not None
            line = "".join(each for each in " ".join(reason.split()) if each.isprintable())
            cut = line.encode()[:REASON_BYTES_MAX].decode("utf-8", "ignore")
            subject: list[object] = [node, cut]
        case DecreeKind.KEY_GENERATION:
            assert 0 < generation <= GENERATION_MAX
            assert len(commitment) == COMMITMENT_BYTES
            subject = [generation, commitment]
        case _:
            assert_never(kind)
    made_at = min(max(int(made_at_s), 0), MADE_AT_MAX_S)
    body = pack([FORMAT, int(kind), made_at, subject, list(der(identity.authority))])
    raw = body + identity.signer.sign(_DOMAIN + identity.mesh_id + body)
    if len(raw) > DECREE_BYTES_MAX:
        raise DecreeTooLong(
            f"the decree of an authority of rank {len(identity.authority)} has {len(raw)} bytes, and "
            f"{DECREE_BYTES_MAX} fit a datagram: give a shorter reason, or do it on an issuer that is "
            "closer to the founder"
        )
    return raw


def decree_verifier(root: x509.Certificate, mesh: MeshId) -> DecreeVerifier:
    """What tells a true decree of this mesh; `root` was checked by `verify_root`. It never raises."""

    @lru_cache(maxsize=_CHAINS_KEPT)
    def authority(chain: tuple[bytes, ...]) -> tuple[NodeId, bytes] | None:
        """The node that a chain makes an authority, and its key."""
        try:
            certificates = parse_der(chain)
            node = verify_authorities(certificates, root)
            key = certificates[0].public_key()
        except (CertificateError, ValueError, TypeError):
            return None
        return node, raw_public_key(cast("Ed25519PublicKey", key))

    @lru_cache(maxsize=2 * DECREES_MAX)
    def checked(raw: bytes) -> Decree | None:
        body, signature = raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:]
        parsed = _parsed(body)
        if parsed is None:
            return None
        kind, made_at, subject, chain = parsed
        found = authority(chain)
        if found is None or not verify(found[1], _DOMAIN + mesh + body, signature):
            return None
        return _decree(kind, found[0], len(chain), made_at, raw, subject)

    def check(raw: bytes) -> Decree | None:
        return checked(raw) if len(raw) <= DECREE_BYTES_MAX else None

    return check


def _parsed(
    body: bytes,
) -> tuple[DecreeKind, int, tuple[NodeId, str] | tuple[int, bytes], tuple[bytes, ...]] | None:
    """The fields of a body, None when it is none."""
    try:
        fields = unpack(body)
    except CodecError:
        return None
    match fields:
        case [
            1,
            int(kind),
            int(made_at),
            [object() as first, object() as second],
            object() as chain,
        ] if type(kind) is int and type(made_at) is int and _are_bytes(chain):
            if not 0 <= made_at <= MADE_AT_MAX_S or not chain:
                return None
        case _:
            return None
    match kind, first, second:
        case (DecreeKind.REVOCATION, bytes(node), str(reason)) if len(node) == _NODE_BYTES:
            if len(reason) > REASON_BYTES_MAX or not reason.isprintable():
                return None
            return DecreeKind.REVOCATION, made_at, (NodeId(node), reason), tuple(chain)
        case (DecreeKind.KEY_GENERATION, int(generation), bytes(commitment)) if (
            type(generation) is int and len(commitment) == COMMITMENT_BYTES
        ):
            if not 0 < generation <= GENERATION_MAX:
                return None
            return DecreeKind.KEY_GENERATION, made_at, (generation, commitment), tuple(chain)
        case _:
            return None


def _decree(
    kind: DecreeKind,
    authority: NodeId,
    rank: int,
    made_at: int,
    raw: bytes,
    subject: tuple[NodeId, str] | tuple[int, bytes],
) -> Decree:
    first, second = subject
    if isinstance(first, int):
        assert isinstance(second, bytes)
        return Decree(
            kind, authority, rank, float(made_at), raw, generation=first, commitment=second
        )
    assert isinstance(second, str)
    return Decree(kind, authority, rank, float(made_at), raw, node=first, reason=second)


def _are_bytes(value: object) -> TypeGuard[list[bytes]]:
    if not isinstance(value, list):
        return False
    return all(isinstance(each, bytes) for each in cast("list[object]", value))
