"""The certificate that this node shows to HTTP clients, where nobody gave it one: self-signed, ECDSA P-256.

Apart from the mesh's certificates, and on purpose: those are for nodes, which check the mesh's root; a laptop
that asks is no node. It is not Ed25519, which browsers and many clients do not take in TLS.

Clients that cannot ask an authority pin the *key*: SHA-256 of its SubjectPublicKeyInfo, written
`sha256//BASE64` as curl's `--pinnedpubkey` takes it. The key stays when the certificate is renewed, because
it is about to end or the node has other addresses, so a pin goes on working.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.trust.private_files import read_private, replace_private

VALID_DAYS: Final = 397
"""What browsers take at most."""
RENEW_DAYS: Final = 120
"""Renewed with this many days left."""
NAMES_MAX: Final = 64
_FILE_BYTES_MAX: Final = 65_536
_DAY: Final = datetime.timedelta(days=1)


class WebCertificateError(Exception):
    """The certificate cannot be used or made; the message says what to do."""

    code = "web_certificate"


@dataclass(frozen=True, slots=True)
class WebCertificate:
    """What is known of a certificate in use."""

    pin: str  # `sha256//BASE64` of its key
    names: frozenset[str]  # DNS names and addresses that it is for, lower case
    not_after: datetime.datetime

    def covers(self, names: Iterable[str]) -> bool:
        """Whether it is for all of these."""
        return self.names.issuperset(name.lower() for name in names)


def read_certificate(path: Path) -> WebCertificate:
    """The first certificate of a PEM file.

    Raises:
        WebCertificateError: there is none.
    """
    try:
        certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except OSError as error:
        raise WebCertificateError(
            f"{path}: {error.strerror or error}; see http.certificate, and that meshd's user may read it"
        ) from error
    except ValueError as error:
        raise WebCertificateError(
            f"{path} holds no certificate in PEM form; see http.certificate"
        ) from error
    return _known(certificate)


def certificate_pin(der: bytes) -> str:
    """The pin of a certificate, as a TLS connection gives it. Raises ValueError on what is none."""
    return _pin(x509.load_der_x509_certificate(der))


def ensure_certificate(
    certificate_path: Path, key_path: Path, names: Iterable[str], now: datetime.datetime
) -> WebCertificate:
    """The node's own certificate; made, or made anew, where it is missing, damaged, ending or for other names.

    The key is kept as long as it can be read. Both files have mode 0600.

    Raises:
        WebCertificateError: the files cannot be written.
    """
    wanted = list(dict.fromkeys(name.lower() for name in names))[:NAMES_MAX]
    try:
        key = _key(key_path)
        if key is not None and (found := _usable(certificate_path, key, wanted, now)):
            return found
        if key is None:
            key = ec.generate_private_key(ec.SECP256R1())
            replace_private(key_path, _key_pem(key))
        made = _self_signed(key, wanted, now)
        replace_private(certificate_path, made.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise WebCertificateError(
            f"cannot write {certificate_path}: {error.strerror or error}; see that meshd's user may write "
            "there, or give http.certificate and http.key"
        ) from error
    return _known(made)


def _key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    """The key in a file, None where there is none or it cannot be believed."""
    try:
        key = serialization.load_pem_private_key(read_private(path, _FILE_BYTES_MAX), None)
    except (OSError, ValueError, TypeError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _usable(
    path: Path, key: ec.EllipticCurvePrivateKey, names: list[str], now: datetime.datetime
) -> WebCertificate | None:
    try:
        certificate = x509.load_pem_x509_certificate(read_private(path, _FILE_BYTES_MAX))
        fits = certificate.public_key() == key.public_key()
    except (OSError, ValueError):
        return None
    begun = certificate.not_valid_before_utc <= now
    lasts = certificate.not_valid_after_utc - now > RENEW_DAYS * _DAY
    found = _known(certificate)
    return found if fits and begun and lasts and found.covers(names) else None


def _self_signed(
    key: ec.EllipticCurvePrivateKey, names: list[str], now: datetime.datetime
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meshd")])
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)  # clients whose clocks are behind
        .not_valid_after(now + VALID_DAYS * _DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_DIGITAL_SIGNATURE, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
        .sign(key, hashes.SHA256())
    )


_DIGITAL_SIGNATURE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _known(certificate: x509.Certificate) -> WebCertificate:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        found: list[str] = []
    else:
        found = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
        found += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return WebCertificate(_pin(certificate), frozenset(found), certificate.not_valid_after_utc)


def _pin(certificate: x509.Certificate) -> str:
    info = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return "sha256//" + base64.b64encode(hashlib.sha256(info).digest()).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
