"""TLS between peers: 1.3 only, both ends with a certificate of the mesh, and the check of who it is."""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509

from meshd.trust.certificates import CertificateError, node_of
from meshd_cms.types import MeshId, NodeId


def client_context(root: Path, chain: Path, key: Path) -> ssl.SSLContext:
    """For dialing. Host names play no part: the peer's key is what is checked, by `peer_node`."""
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
    context.load_verify_locations(cafile=root)  # the mesh's root and no other authority
    context.load_cert_chain(chain, key)
    return context


def peer_node(certificate: bytes | None, mesh: MeshId) -> NodeId:
    """The node at the other end, from its verified certificate (DER).

    Raises:
        CertificateError: it is not that of a node of this mesh.
    """
    if certificate is None:
        raise CertificateError("the peer showed no certificate")
    try:
        return node_of(x509.load_der_x509_certificate(certificate), mesh)
    except CertificateError:
        raise
    except ValueError as error:
        raise CertificateError(f"the peer's certificate cannot be read: {error}") from error
