"""Founding a mesh, enrolling into it, and every way in which the files can be wrong."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from cryptography import x509

from meshd.trust.enrolment import enrol, write_enrolment
from meshd.trust.identity import init_mesh, load_identity
from meshd.trust.identity_errors import (
    EnrolmentError,
    EnrolmentFileExists,
    IdentityDamaged,
    IdentityError,
    IdentityExists,
    IdentityUnreadable,
    IdentityUnsafe,
    NoIdentity,
    NotTheRoot,
)
from meshd.trust.keys import verify
from meshd_cms.types import node_id_of, node_id_text

ALL_FILES = {
    "SHA256SUMS",
    "mesh.toml",
    "root.crt",
    "root.key",
    "node.key",
    "node.crt",
    "datagram.key",
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_founded_mesh_loads_again(tmp_path: Path) -> None:
    founded = init_mesh(tmp_path / "state", "home")
    loaded = load_identity(tmp_path / "state")
    assert loaded.node_id == founded.node_id == node_id_of(loaded.signer.public_key)
    assert (loaded.mesh_id, loaded.mesh_name) == (founded.mesh_id, "home")
    assert loaded.datagram_key == founded.datagram_key
    assert len(loaded.datagram_key) == 32
    assert loaded.is_founder
    directory = tmp_path / "state" / "identity"
    assert names(directory) == ALL_FILES
    assert names(tmp_path / "state") == {"identity"}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_two_meshes_have_nothing_in_common(tmp_path: Path) -> None:
    one, other = init_mesh(tmp_path / "1", "home"), init_mesh(tmp_path / "2", "home")
    assert one.mesh_id != other.mesh_id
    assert one.node_id != other.node_id
    assert one.datagram_key != other.datagram_key


def test_secrets_are_not_printed(tmp_path: Path) -> None:
    identity = init_mesh(tmp_path, "home")
    assert repr(identity.datagram_key) not in repr(identity)
    assert identity.datagram_key.hex() not in repr(identity)


def test_the_certificate_says_what_the_protocol_page_says(tmp_path: Path) -> None:
    identity = init_mesh(tmp_path, "home")
    certificate = x509.load_pem_x509_certificate((tmp_path / "identity/node.crt").read_bytes())
    text = node_id_text(identity.node_id)
    assert certificate.subject.rfc4514_string() == f"CN={text}"
    names_of = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names_of.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == [f"meshd://{identity.mesh_id.hex()}/{text}"]
    assert certificate.not_valid_before_utc.year == 1970  # boards without a clock chip
    assert certificate.not_valid_after_utc.year == 9999
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca


def test_signatures(tmp_path: Path) -> None:
    identity = init_mesh(tmp_path, "home")
    signature = identity.signer.sign(b"message")
    public_key = identity.signer.public_key
    assert identity.verify(public_key, b"message", signature)
    assert not verify(public_key, b"massage", signature)
    assert not verify(public_key, b"message", signature[:-1])
    assert not verify(public_key, b"message", b"")
    assert not verify(b"short", b"message", signature)
    assert not verify(bytes(32), b"message", signature)


def test_without_an_identity_the_message_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(NoIdentity, match=r"`meshd init NAME`.*`meshd init --enrol FILE`"):
        load_identity(tmp_path)


def test_an_identity_is_never_overwritten(tmp_path: Path) -> None:
    founded = init_mesh(tmp_path, "home")
    write_enrolment(tmp_path, tmp_path / "file")
    with pytest.raises(IdentityExists, match="belongs to a mesh already"):
        init_mesh(tmp_path, "other")
    with pytest.raises(IdentityExists):
        enrol(tmp_path, tmp_path / "file")
    assert load_identity(tmp_path).node_id == founded.node_id
    assert names(tmp_path) == {"identity", "file"}


@pytest.mark.parametrize("name", ["", "Home", "ho me", '"', "-home", "home-", "x" * 64, "höme"])
def test_a_name_that_cannot_be_a_label_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(IdentityError, match="cannot be the name of a mesh"):
        init_mesh(tmp_path / "state", name)
    assert names(tmp_path) == set()


def test_loose_permissions_are_refused_with_the_command_that_mends_them(tmp_path: Path) -> None:
    init_mesh(tmp_path, "home")
    key = tmp_path / "identity" / "node.key"
    key.chmod(0o640)
    with pytest.raises(IdentityUnsafe, match=f"chmod 600 {key}"):
        load_identity(tmp_path)
    key.chmod(0o600)
    (tmp_path / "identity").chmod(0o755)
    with pytest.raises(IdentityUnsafe, match="chmod 700"):
        load_identity(tmp_path)
    (tmp_path / "identity").chmod(0o700)
    load_identity(tmp_path)


@pytest.mark.parametrize("name", sorted(ALL_FILES - {"root.key"}))
@pytest.mark.parametrize("content", [None, b"", b"half", b"\xff\x00"])
def test_a_damaged_file_is_named_and_nothing_else_is_raised(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    init_mesh(tmp_path, "home")
    path = tmp_path / "identity" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(IdentityError, match=str(tmp_path)):
        load_identity(tmp_path)


@pytest.mark.parametrize("name", sorted(ALL_FILES))
def test_a_bit_that_flipped_in_any_byte_is_found_and_the_file_named(
    tmp_path: Path, name: str
) -> None:
    init_mesh(tmp_path, "home")
    path = tmp_path / "identity" / name
    content = path.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(IdentityDamaged, match=str(tmp_path)):
            load_identity(tmp_path)
    path.write_bytes(content)
    load_identity(tmp_path)


def test_the_root_key_may_be_moved_away_and_back(tmp_path: Path) -> None:
    init_mesh(tmp_path, "home")
    key, safe = tmp_path / "identity" / "root.key", tmp_path / "safe"
    key.rename(safe)
    assert not load_identity(tmp_path).is_founder
    safe.rename(key)
    assert load_identity(tmp_path).is_founder


def test_files_of_two_identities_do_not_mix(tmp_path: Path) -> None:
    init_mesh(tmp_path / "1", "home")
    init_mesh(tmp_path / "2", "home")
    for name in ("node.key", "node.crt", "mesh.toml"):
        ours, theirs = tmp_path / "1/identity" / name, tmp_path / "2/identity" / name
        kept = ours.read_bytes()
        ours.write_bytes(theirs.read_bytes())
        with pytest.raises(IdentityDamaged):
            load_identity(tmp_path / "1")
        ours.write_bytes(kept)
    load_identity(tmp_path / "1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_the_system_refuses_is_said(tmp_path: Path) -> None:
    init_mesh(tmp_path, "home")
    (tmp_path / "identity" / "node.key").chmod(0)
    with pytest.raises(IdentityUnreadable, match="chown"):
        load_identity(tmp_path)


def test_a_state_dir_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IdentityUnreadable, match="file"):
        init_mesh(tmp_path / "file" / "state", "home")


def test_an_enrolled_node_is_of_the_mesh_and_holds_no_root_key(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "1", "home")
    file = tmp_path / "enrolment"
    write_enrolment(tmp_path / "1", file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert "WHOEVER HOLDS THIS FILE CAN JOIN" in file.read_text()
    second, third = enrol(tmp_path / "2", file), enrol(tmp_path / "3", file)
    assert len({founder.node_id, second.node_id, third.node_id}) == 3
    for node in (second, third):
        assert (node.mesh_id, node.mesh_name) == (founder.mesh_id, "home")
        assert node.datagram_key == founder.datagram_key
        assert not node.is_founder
    assert names(tmp_path / "2/identity") == ALL_FILES - {"root.key"}
    with pytest.raises(NotTheRoot, match="`meshd init` founded"):
        write_enrolment(tmp_path / "2", tmp_path / "more")


def test_the_root_key_does_not_travel(tmp_path: Path) -> None:
    init_mesh(tmp_path / "1", "home")
    write_enrolment(tmp_path / "1", tmp_path / "enrolment")
    pem = (tmp_path / "1/identity/root.key").read_text().splitlines()[1]
    secret = base64.b64decode(pem)[-32:]
    lines = (tmp_path / "enrolment").read_text().splitlines()
    body = [line for line in lines if line and not line.startswith(("#", "-"))]
    assert secret not in base64.b64decode("".join(body))


def test_an_enrolment_file_never_overwrites(tmp_path: Path) -> None:
    init_mesh(tmp_path, "home")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(EnrolmentFileExists):
        write_enrolment(tmp_path, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_damaged_enrolment_file_does_nothing(tmp_path: Path) -> None:
    init_mesh(tmp_path / "1", "home")
    write_enrolment(tmp_path / "1", tmp_path / "good")
    good = (tmp_path / "good").read_text()
    lines = good.splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if line.startswith("-----BEGIN")) + 1
    wrong = {
        "empty": "",
        "other": "hello",
        "cut": "".join(lines[:-3]),
        "line_lost": "".join(lines[: first + 2] + lines[first + 3 :]),
        "changed": good.replace(lines[first + 4], lines[first + 4].swapcase()),
        "no_base64": good.replace(lines[first + 4], "!?\n"),
        "newer": good.replace(lines[first], "B" + lines[first][1:]),
        "huge": good + "#" * 100_000,
    }
    for name, text in wrong.items():
        file = tmp_path / name
        file.write_text(text)
        with pytest.raises(EnrolmentError, match=str(file)):
            enrol(tmp_path / "2", file)
    with pytest.raises(IdentityUnreadable):
        enrol(tmp_path / "2", tmp_path / "missing")
    assert not (tmp_path / "2").exists()


def test_an_enrolment_file_survives_mail_and_windows(tmp_path: Path) -> None:
    init_mesh(tmp_path / "1", "home")
    write_enrolment(tmp_path / "1", tmp_path / "good")
    text = (tmp_path / "good").read_text()
    (tmp_path / "mailed").write_bytes(("> hello\n\n" + text).replace("\n", "  \r\n").encode())
    enrol(tmp_path / "2", tmp_path / "mailed")
