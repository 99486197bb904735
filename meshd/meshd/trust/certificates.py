"""The certificates of a mesh: root, authorities, nodes.

    root (self-signed)
      '-- authority of rank 1: the founder, or another node that the root appointed
            |-- node
            '-- authority of rank 2: an issuer that one of rank 1 let in; it appoints nobody
                  '-- node

The mesh's id is the hash of the root's key, so whoever knows the id can tell the root. An authority's
certificate is for the node key of the issuer, and does not expire: it is revoked. A node's certificate lasts
days, and says CN = node id as text and SAN = URI:meshd://<mesh id hex>/<node id>,
URI:meshd://<mesh id hex>/role/<role>. A chain, as it is presented, is the node's certificate, then the
authorities from the one that signed it up to, and without, the root.

Nothing here asks what time it is: a board without a clock chip must still get into its mesh to learn the time
(decision 0020). Who judges validity has the mesh's clock, and `Credential` has the dates.

Authorities are told from nodes by an OU in their names: a founder signs its own node certificate with its own
key, and under one name for both TLS libraries would take that for a self-signed one.
"""

from __future__ import annotations

import datetime
import hashlib
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.trust.keys import raw_public_key
from meshd_cms.types import (
    MESH_ID_BYTES,
    MeshId,
    NodeId,
    node_id_of,
    node_id_parse,
    node_id_text,
)

RANK_MAX: Final = 2
"""Authorities between the root and a node, at most."""
CERTIFICATE_BYTES_MAX: Final = 1_024
"""One certificate, DER. Ours have about 300 (authorities) and 450 (nodes)."""
CHAIN_MAX: Final = 1 + RANK_MAX
"""Certificates in a chain as it is presented."""
CERTIFICATE_DAYS: Final = 28.0
"""How long a node's certificate lasts where nothing else is configured."""
BACKDATED_S: Final = 3_600.0
"""A node's certificate is valid from this long before it was made: clocks differ."""

_DAY_S: Final = 86_400.0
_TIME_MAX_S: Final = 253_402_300_799.0  # the last second of 9999: RFC 5280, section 4.1.2.5
_VALID_FROM: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_AUTHORITY_UNIT: Final = "ca"
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    Warning,
)
"""What `cryptography` raises when a certificate is none, at whichever part of it is looked at first."""


class CertificateError(ValueError):
    """A certificate or a chain that is not one of a node of this mesh; the message says in what."""


class Role(StrEnum):
    """What somebody who was let in may do."""

    MEMBER = "member"  # asks and serves
    ISSUER = "issuer"  # a member that may also invite, renew, revoke and rotate
    OBSERVER = "observer"  # a node that sees, may ask, and serves nothing
    CLIENT = "client"  # asks, and is no node: it has an API key and no certificate


@dataclass(frozen=True, slots=True)
class Credential:
    """What the certificate of a node says."""

    node: NodeId
    role: Role
    issuer: NodeId | None  # the authority that signed it; None: the root itself
    not_before_s: float  # seconds since 1970
    not_after_s: float


# -- making them -------------------------------------------------------------------------------------------


def mesh_id_of(root_key: Ed25519PublicKey) -> MeshId:
    """The id of the mesh with this root key."""
    return MeshId(hashlib.sha256(raw_public_key(root_key)).digest()[:MESH_ID_BYTES])


def root_certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    """The self-signed root of a mesh."""
    name = _root_name(mesh_id_of(key.public_key()))
    return _authority(name, name, key.public_key(), key, path_length=RANK_MAX)


def authority_certificate(
    key: Ed25519PublicKey, issuer: x509.Certificate, issuer_key: Ed25519PrivateKey
) -> x509.Certificate:
    """Make the node with this key an authority, one rank below `issuer` (the root, or another authority).

    Raises:
        CertificateError: the issuer's rank is the last one.
    """
    path_length = _path_length(issuer)
    if path_length < 1:
        raise CertificateError("an authority of the last rank appoints no others")
    subject = _authority_name(node_id_of(raw_public_key(key)))
    return _authority(subject, issuer.subject, key, issuer_key, path_length=path_length - 1)


def node_certificate(
    mesh: MeshId,
    key: Ed25519PublicKey,
    role: Role,
    issuer: x509.Certificate,
    issuer_key: Ed25519PrivateKey,
    *,
    now_s: float,
    days: float = CERTIFICATE_DAYS,
) -> x509.Certificate:
    """The certificate of the node with this key, valid for `days` from `now_s` (seconds since 1970)."""
    assert role is not Role.CLIENT, "a client is no node"
    node = node_id_of(raw_public_key(key))
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    names = [x509.UniformResourceIdentifier(uri) for uri in _uris(mesh, node, role)]
    return (
        _builder(_node_name(node), issuer.subject, key)
        .not_valid_before(_date(now_s - BACKDATED_S))
        .not_valid_after(_date(now_s + days * _DAY_S))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key, None)
    )


# -- reading them ------------------------------------------------------------------------------------------


def credential_of(certificate: x509.Certificate, mesh: MeshId) -> Credential:
    """What the certificate of a node says. That its chain leads to the root is checked by `verify_chain`.

    Raises:
        CertificateError: not the certificate of a node, or of a node of another mesh.
    """
    with _reading():
        return _credential(certificate, mesh)


def _credential(certificate: x509.Certificate, mesh: MeshId) -> Credential:
    node = _node_of_key(certificate)
    if certificate.subject != _node_name(node):
        raise CertificateError("the certificate's name is not the hash of its key")
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        raise CertificateError("the certificate names no mesh") from None
    uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    role = next((each for each in Role if uris == _uris(mesh, node, each)), None)
    if role is None or role is Role.CLIENT:
        raise CertificateError(f"the certificate is for {uris}, not {_uris(mesh, node, None)}")
    return Credential(
        node=node,
        role=role,
        issuer=_issuer_of(certificate, mesh),
        not_before_s=certificate.not_valid_before_utc.timestamp(),
        not_after_s=certificate.not_valid_after_utc.timestamp(),
    )


def node_of(certificate: x509.Certificate, mesh: MeshId) -> NodeId:
    """The node that a certificate is for: see `credential_of`."""
    return credential_of(certificate, mesh).node


def authorities_of(chain: Sequence[x509.Certificate]) -> tuple[NodeId, ...]:
    """The nodes whose authority a chain (or a chain of authorities) rests on, the lowest rank first.

    Raises:
        CertificateError: a key is not Ed25519.
    """
    with _reading():
        return tuple(_node_of_key(each) for each in chain if _is_authority_name(each.subject))


def mesh_id_of_root(root: x509.Certificate) -> MeshId:
    """The id of the mesh whose root this would be.

    Raises:
        CertificateError: its key is not Ed25519.
    """
    with _reading():
        return mesh_id_of(_ed25519(root))


def verify_root(root: x509.Certificate, mesh: MeshId) -> None:
    """Check that this is the root of the mesh with this id.

    Raises:
        CertificateError: it is not.
    """
    with _reading():
        if mesh_id_of(_ed25519(root)) != mesh:
            raise CertificateError("the root certificate is that of another mesh")
        _check_signed(root, root)
        if _path_length(root) != RANK_MAX:
            raise CertificateError("the root certificate is not one of a mesh")


def verify_chain(chain: Sequence[x509.Certificate], root: x509.Certificate) -> Credential:
    """What the first certificate says, once each is signed by the next and the last by the root.

    `root` itself was checked by `verify_root`. Validity in time is not looked at.

    Raises:
        CertificateError: the chain does not lead to the root, or is not one of a node.
    """
    if not 1 <= len(chain) <= CHAIN_MAX:
        raise CertificateError(f"a chain of {len(chain)} certificates")
    leaf, authorities = chain[0], chain[1:]
    if authorities:
        verify_authorities(authorities, root)
    with _reading():
        _check_signed(leaf, authorities[0] if authorities else root)
        if _basic(leaf).ca:
            raise CertificateError("the certificate is that of an authority, not of a node")
        return _credential(leaf, mesh_id_of(_ed25519(root)))


def verify_authorities(chain: Sequence[x509.Certificate], root: x509.Certificate) -> NodeId:
    """The node whose authority this chain of authorities (without the root) proves; its rank is the length.

    Raises:
        CertificateError: the chain does not lead to the root, or is not one of authorities.
    """
    if not 1 <= len(chain) <= RANK_MAX:
        raise CertificateError(f"a chain of {len(chain)} authorities")
    with _reading():
        for certificate, issuer in zip(chain, (*chain[1:], root), strict=True):
            _check_signed(certificate, issuer)
            if certificate.subject != _authority_name(_node_of_key(certificate)):
                raise CertificateError("the name of an authority is not the hash of its key")
            if _path_length(certificate) != _path_length(issuer) - 1:
                raise CertificateError("an authority has another rank than its place in the chain")
        return _node_of_key(chain[0])


@contextmanager
def _reading() -> Generator[None]:
    """Whatever makes a certificate unreadable is a CertificateError."""
    try:
        yield
    except CertificateError:
        raise
    except _UNREADABLE as error:
        raise CertificateError(f"a certificate cannot be read: {error}") from error


def _check_signed(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Raise CertificateError unless `issuer` may sign certificates and signed this one."""
    try:
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        if not _basic(issuer).ca or not usage.key_cert_sign:
            raise CertificateError("a certificate is signed by one that is no authority")
        certificate.verify_directly_issued_by(issuer)
        # Its own bytes are not signed: a count of bits to leave out, where those are 0, would be another file
        # that says the same.
        whole = certificate.public_bytes(serialization.Encoding.DER)
        if whole[-1 - len(certificate.signature)] != 0:
            raise CertificateError("the signature of a certificate is not written as it was made")
    except x509.ExtensionNotFound:
        raise CertificateError("a certificate lacks the extensions that ours have") from None
    except InvalidSignature:
        raise CertificateError("a certificate was not signed by the one that it names") from None


def _basic(certificate: x509.Certificate) -> x509.BasicConstraints:
    extensions = certificate.extensions
    for each in extensions:
        if each.critical and isinstance(each.value, x509.UnrecognizedExtension):
            raise CertificateError("a certificate has a critical extension unknown to us")
    try:
        return extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise CertificateError("a certificate does not say whether it is an authority") from None


def _path_length(certificate: x509.Certificate) -> int:
    """How many ranks there can be below it."""
    basic = _basic(certificate)
    if not basic.ca or basic.path_length is None or not 0 <= basic.path_length <= RANK_MAX:
        raise CertificateError("a certificate is not that of an authority of a mesh")
    return basic.path_length


def _ed25519(certificate: x509.Certificate) -> Ed25519PublicKey:
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateError("the certificate's key is not Ed25519")
    return key


def _node_of_key(certificate: x509.Certificate) -> NodeId:
    return node_id_of(raw_public_key(_ed25519(certificate)))


def _issuer_of(certificate: x509.Certificate, mesh: MeshId) -> NodeId | None:
    """Raises ValueError."""
    if certificate.issuer == _root_name(mesh):
        return None
    names = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not _is_authority_name(certificate.issuer):
        raise CertificateError("the certificate's issuer is no authority of this mesh")
    return node_id_parse(str(names[0].value))


# -- bytes -------------------------------------------------------------------------------------------------


def pem(*certificates: x509.Certificate) -> bytes:
    """A chain as PEM, leaf first."""
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def der(certificates: Sequence[x509.Certificate]) -> tuple[bytes, ...]:
    """A chain as DER, for the wire."""
    return tuple(each.public_bytes(serialization.Encoding.DER) for each in certificates)


def parse_der(certificates: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    """What `der` gave; nothing about it is checked but its form.

    Raises:
        CertificateError: too many, too long, or no certificates.
    """
    if len(certificates) > CHAIN_MAX or any(
        len(each) > CERTIFICATE_BYTES_MAX for each in certificates
    ):
        raise CertificateError("a chain of certificates is longer than ours are")
    with _reading(), warnings.catch_warnings():
        warnings.simplefilter("error")  # what the library only frowns upon is none of ours either
        return tuple(x509.load_der_x509_certificate(each) for each in certificates)


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


# -- parts of them -----------------------------------------------------------------------------------------


def _uris(mesh: MeshId, node: NodeId, role: Role | None) -> list[str]:
    """How a certificate names a node of a mesh, and its role."""
    first = f"meshd://{mesh.hex()}/{node_id_text(node)}"
    return [first] if role is None else [first, f"meshd://{mesh.hex()}/role/{role.value}"]


def _root_name(mesh: MeshId) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"meshd root {mesh.hex()}")])


def _node_name(node: NodeId) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id_text(node))])


def _authority_name(node: NodeId) -> x509.Name:
    unit = x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, _AUTHORITY_UNIT)
    return x509.Name([unit, *_node_name(node)])


def _is_authority_name(name: x509.Name) -> bool:
    units = name.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    return [each.value for each in units] == [_AUTHORITY_UNIT]


def _date(time_s: float) -> datetime.datetime:
    """Whole seconds, within what a certificate can say."""
    within_s = min(max(time_s, 0.0), _TIME_MAX_S)
    return datetime.datetime.fromtimestamp(int(within_s), datetime.UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey
) -> x509.CertificateBuilder:
    # No key identifiers: a name is the hash of its key already, and decrees carry authorities in a datagram.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
    )


def _authority(
    subject: x509.Name,
    issuer: x509.Name,
    key: Ed25519PublicKey,
    issuer_key: Ed25519PrivateKey,
    *,
    path_length: int,
) -> x509.Certificate:
    return (
        _builder(subject, issuer, key)
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
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
