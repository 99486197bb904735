"""TLS between peers: 1.3 only, both ends with a certificate of the mesh, and the check of who it is.

OpenSSL checks that the certificates lead to the mesh's root, and not when they are valid: a board without a clock
chip would shut everybody out. Validity is judged after the handshake, by the clock of the mesh
(`meshd.trust.standing`), from the `PeerProof` that is read here.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshd.trust.certificates import (
    CertificateError,
    Credential,
    authorities_of,
    parse_der,
    verify_chain,
)
from meshd.trust.keys import raw_public_key
from meshd_cms.types import NodeId

PROOFS_KEPT: Final = 256
"""Chains that are not checked again when their peer comes back: one a node takes about 2 kB."""

_NO_CHECK_TIME: Final = (
    0x200000  # X509_V_FLAG_NO_CHECK_TIME of x509_vfy.h; Python has no name for it
)
_ENCODING_DER: Final = 2


@dataclass(frozen=True, slots=True)
class PeerProof:
    """Who is at the other end of a connection, and who says so."""

    credential: Credential
    public_key: bytes  # raw
    authorities: tuple[
        NodeId, ...
    ]  # the issuer, then who appointed it, and so on, without the root


def client_context(root: Path, chain: Path, key: Path) -> ssl.SSLContext:
    """For dialing. Host names play no part: the peer's key is what is checked, by `peer_proof`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _finished(context, root, chain, key)


def server_context(root: Path, chain: Path, key: Path) -> ssl.SSLContext:
    """For accepting; a client without a certificate of the mesh gets no further than the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Resumption would skip the certificates; connections last, so it would save nothing either.
    context.num_tickets = 0
    return _finished(context, root, chain, key)


def _finished(context: ssl.SSLContext, root: Path, chain: Path, key: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
    context.load_verify_locations(cafile=root)  # the mesh's root and no other authority
    context.load_cert_chain(chain, key)
    return context


def peer_proof(stream: object, root: x509.Certificate) -> PeerProof:
    """What the other end of a connection showed and proved in its handshake, which is over.

    Args:
        stream: a `trio.SSLStream`.
        root: the mesh's.

    Raises:
        CertificateError: it is not the certificate of a node of this mesh.
    """
    return _proved(_shown(stream), root)


@lru_cache(maxsize=PROOFS_KEPT)
def _proved(shown: tuple[bytes, ...], root: x509.Certificate) -> PeerProof:
    """What a chain proves; OpenSSL has checked who signed what, and the rules about names and ranks are ours."""
    chain = parse_der(shown)
    credential = verify_chain(chain, root)
    key = chain[0].public_key()
    assert isinstance(key, Ed25519PublicKey), "the chain was verified"
    return PeerProof(credential, raw_public_key(key), authorities_of(chain))


def _shown(stream: object) -> tuple[bytes, ...]:
    """The certificates that the peer showed, DER, its own first.

    The leaf, which is all that Python shows in public before 3.13, does not tell who appointed its issuer.
    """
    session: Any = getattr(stream, "_ssl_object")  # noqa: B009 - neither trio nor ssl has it in public
    shown = session._sslobj.get_unverified_chain()
    if not shown:
        raise CertificateError("the peer showed no certificate")
    return tuple(each.public_bytes(_ENCODING_DER) for each in shown)
