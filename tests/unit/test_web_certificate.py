"""The certificate that a node makes for its HTTP port."""

from __future__ import annotations

import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from meshd.trust.web_certificate import (
    RENEW_DAYS,
    VALID_DAYS,
    WebCertificate,
    WebCertificateError,
    certificate_pin,
    ensure_certificate,
    read_certificate,
)

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NAMES = ("board", "board.local", "192.0.2.1", "2001:db8::1")
DAY = datetime.timedelta(days=1)


def ensure(
    folder: Path, now: datetime.datetime = NOW, names: tuple[str, ...] = NAMES
) -> WebCertificate:
    return ensure_certificate(folder / "edge" / "c.pem", folder / "edge" / "k.pem", names, now)


def test_it_is_made_once_for_names_and_addresses(tmp_path: Path) -> None:
    made = ensure(tmp_path)
    assert made.names == set(NAMES)
    assert made.covers(["BOARD", "192.0.2.1"])
    assert not made.covers(["192.0.2.2"])
    assert made.not_after == NOW + VALID_DAYS * DAY
    before = (tmp_path / "edge" / "c.pem").read_bytes()
    assert ensure(tmp_path) == made
    assert (tmp_path / "edge" / "c.pem").read_bytes() == before
    for path in (tmp_path / "edge").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "edge" / "c.pem", tmp_path / "edge" / "k.pem")
    certificate = x509.load_pem_x509_certificate(before)
    assert type(certificate.public_key()).__name__ == "ECPublicKey"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    ("now", "names"),
    [
        (NOW + (VALID_DAYS - RENEW_DAYS + 1) * DAY, NAMES),  # about to end
        (NOW + 1000 * DAY, NAMES),  # ended while the node was off
        (NOW - 3650 * DAY, NAMES),  # made under a clock that was far ahead
        (NOW, (*NAMES, "198.51.100.4")),  # another network
    ],
)
def test_it_is_renewed_and_its_pin_stays(
    tmp_path: Path, now: datetime.datetime, names: tuple[str, ...]
) -> None:
    first = ensure(tmp_path)
    again = ensure(tmp_path, now, names)
    assert again.pin == first.pin
    assert again.not_after == now + VALID_DAYS * DAY
    assert again.covers(names)


@pytest.mark.parametrize("name", ["c.pem", "k.pem"])
@pytest.mark.parametrize("content", [b"", b"noise", b"-----BEGIN CERTIFICATE-----\n"])
def test_damaged_files_are_made_anew(tmp_path: Path, name: str, content: bytes) -> None:
    first = ensure(tmp_path)
    (tmp_path / "edge" / name).write_bytes(content)
    again = ensure(tmp_path)
    assert (again.pin == first.pin) == (name == "c.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "edge" / "c.pem", tmp_path / "edge" / "k.pem")


def test_a_pin_is_of_the_key(tmp_path: Path) -> None:
    made = ensure(tmp_path)
    certificate = x509.load_pem_x509_certificate((tmp_path / "edge" / "c.pem").read_bytes())
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "edge" / "c.pem").read_text())
    assert certificate_pin(der) == made.pin == read_certificate(tmp_path / "edge" / "c.pem").pin
    assert made.pin.startswith("sha256//")
    assert len(made.pin) == len("sha256//") + 44
    assert certificate.subject == certificate.issuer
    assert ensure(tmp_path / "other").pin != made.pin


def test_a_certificate_that_cannot_be_read_or_written_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WebCertificateError, match=r"http\.certificate"):
        read_certificate(tmp_path / "none.pem")
    (tmp_path / "noise.pem").write_text("noise")
    with pytest.raises(WebCertificateError, match="no certificate in PEM form"):
        read_certificate(tmp_path / "noise.pem")
    (tmp_path / "edge").write_text("a file where the folder should be")
    with pytest.raises(WebCertificateError, match="cannot write"):
        ensure(tmp_path)


def test_no_link_is_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "k.pem").symlink_to(precious)
    ensure(tmp_path)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "edge" / "k.pem").is_symlink()
