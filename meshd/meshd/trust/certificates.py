"""The certificates of a mesh: root, enrolment authority, node.

    root (self-signed, path length 1)
      '-- node of the founder
      '-- enrolment authority (path length 0), travels with its key in the enrolment file
            '-- node that enrolled with it

A node's certificate says CN = node id as text and SAN = URI:meshd://<mesh id hex>/<node id>. Validity is
from 1970 to 9999 on purpose: a board without a clock chip starts in the past, and must still get into
its mesh to learn the time (decision 0006).
"""

from __future__ import annotations

import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.trust.keys import raw_public_key
from meshd_cms.types import MeshId, NodeId, node_id_of, node_id_text

VALID_FROM: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
VALID_UNTIL: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
"""RFC 5280 section 4.1.2.5: "no well-defined expiration date"."""


class CertificateError(ValueError):
    """A certificate that is not one of a node of this mesh; the message says in what."""


def root_certificate(mesh: MeshId, key: Ed25519PrivateKey) -> x509.Certificate:
    """The self-signed root of a mesh."""
    name = _common_name(f"meshd root {mesh.hex()}")
    return _authority(name, name, key.public_key(), key, key.public_key(), path_length=1)


def enrolment_certificate(
    mesh: MeshId, key: Ed25519PublicKey, root: x509.Certificate, root_key: Ed25519PrivateKey
) -> x509.Certificate:
    """An authority that may sign nodes and nothing else."""
    # The key is part of the name, so that two authorities of a mesh are never mistaken for each other.
    name = _common_name(f"meshd enrolment {mesh.hex()[:8]} {raw_public_key(key).hex()[:16]}")
    return _authority(name, root.subject, key, root_key, root_key.public_key(), path_length=0)


def node_certificate(
    mesh: MeshId, key: Ed25519PublicKey, issuer: x509.Certificate, issuer_key: Ed25519PrivateKey
) -> x509.Certificate:
    """The certificate of the node with this key."""
    node = node_id_of(raw_public_key(key))
    subject = _common_name(node_id_text(node))
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _builder(subject, issuer.subject, key, issuer_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(node_uri(mesh, node))]),
            critical=False,
        )
        .sign(issuer_key, None)
    )


def node_uri(mesh: MeshId, node: NodeId) -> str:
    """How a certificate names a node of a mesh."""
    return f"meshd://{mesh.hex()}/{node_id_text(node)}"


def node_of(certificate: x509.Certificate, mesh: MeshId) -> NodeId:
    """The node that a certificate is for. That its chain leads to the root was checked elsewhere.

    Raises:
        CertificateError: not the certificate of a node, or of a node of another mesh.
    """
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateError("the certificate's key is not Ed25519")
    node = node_id_of(raw_public_key(key))
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if [name.value for name in names] != [node_id_text(node)]:
        raise CertificateError("the certificate's name is not the hash of its key")
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        raise CertificateError("the certificate names no mesh") from None
    uris = alternatives.value.get_values_for_type(x509.UniformResourceIdentifier)
    if uris != [node_uri(mesh, node)]:
        raise CertificateError(f"the certificate is for {uris}, not {node_uri(mesh, node)}")
    return node


def pem(*certificates: x509.Certificate) -> bytes:
    """A chain as PEM, leaf first."""
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """A private key as unencrypted PKCS 8 PEM; the file's permissions protect it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def parse_private_pem(data: bytes) -> Ed25519PrivateKey:
    """What `private_pem` wrote.

    Raises:
        ValueError: it is not an Ed25519 private key.
    """
    try:
        key = serialization.load_pem_private_key(data, None)
    except TypeError as error:  # it is encrypted
        raise ValueError(str(error)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")
    return key


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey, issuer_key: Ed25519PublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_UNTIL)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _authority(
    subject: x509.Name,
    issuer: x509.Name,
    key: Ed25519PublicKey,
    issuer_key: Ed25519PrivateKey,
    issuer_public_key: Ed25519PublicKey,
    *,
    path_length: int,
) -> x509.Certificate:
    return (
        _builder(subject, issuer, key, issuer_public_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(issuer_key, None)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
