"""Founding a mesh, letting others in, and every way in which the files can be wrong."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshd.trust.certificates import (
    CertificateError,
    Role,
    authorities_of,
    mesh_id_of,
    parse_der,
    verify_authorities,
    verify_chain,
)
from meshd.trust.identity import Identity, admit, init_mesh, load_identity
from meshd.trust.identity_errors import (
    IdentityDamaged,
    IdentityError,
    IdentityExists,
    IdentityUnreadable,
    IdentityUnsafe,
    NoIdentity,
    NotAnIssuer,
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
    "authority.crt",
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
    mesh = f"meshd://{identity.mesh_id.hex()}"
    assert uris == [f"{mesh}/{text}", f"{mesh}/role/issuer"]
    assert certificate.issuer.rfc4514_string() == f"CN={text},OU=ca"
    lasts = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lasts == datetime.timedelta(days=28, hours=1)
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
    with pytest.raises(NoIdentity, match=r"`meshd init NAME`.*`meshd join TOKEN`"):
        load_identity(tmp_path)


def test_an_identity_is_never_overwritten(tmp_path: Path) -> None:
    founded = init_mesh(tmp_path, "home")
    other = init_mesh(tmp_path / "other", "other")
    with pytest.raises(IdentityExists, match="belongs to a mesh already"):
        init_mesh(tmp_path, "other")
    with pytest.raises(IdentityExists):
        admit(other, tmp_path)
    assert load_identity(tmp_path).node_id == founded.node_id
    assert names(tmp_path) == {"identity", "other"}


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


# -- letting others in -------------------------------------------------------------------------------------


def appointed(founder: Identity, folder: Path) -> list[Identity]:
    """The founder, and issuers each let in by the one before."""
    return [founder, admit(founder, folder / "issuer", role=Role.ISSUER)]


def test_the_mesh_id_is_the_hash_of_the_root_key(tmp_path: Path) -> None:
    identity = init_mesh(tmp_path, "home")
    key = identity.root.public_key()
    assert isinstance(key, Ed25519PublicKey)
    assert identity.mesh_id == mesh_id_of(key)
    assert identity.root.subject.rfc4514_string() == f"CN=meshd root {identity.mesh_id.hex()}"


def test_one_that_was_let_in_is_of_the_mesh_and_holds_no_root_key(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "1", "home")
    second, third = admit(founder, tmp_path / "2"), admit(founder, tmp_path / "3")
    assert len({founder.node_id, second.node_id, third.node_id}) == 3
    for node in (second, third):
        assert (node.mesh_id, node.mesh_name) == (founder.mesh_id, "home")
        assert (node.key_generation, node.datagram_key) == (0, founder.datagram_key)
        assert (node.role, node.is_founder, node.is_issuer) == (Role.MEMBER, False, False)
        assert node.credential.issuer == founder.node_id
    assert names(tmp_path / "2/identity") == ALL_FILES - {"root.key", "authority.crt"}
    with pytest.raises(NotAnIssuer, match="the node that founded the mesh"):
        admit(second, tmp_path / "4")
    assert not (tmp_path / "4").exists()


def test_issuers_let_in_issuers_down_to_the_last_rank(tmp_path: Path) -> None:
    founder, second = appointed(init_mesh(tmp_path / "1", "home"), tmp_path)
    member = admit(second, tmp_path / "member", role=Role.OBSERVER)
    assert member.role is Role.OBSERVER
    assert authorities_of(member.chain) == (second.node_id, founder.node_id)
    assert verify_authorities(second.authority, founder.root) == second.node_id
    with pytest.raises(NotAnIssuer, match="--role issuer"):
        admit(second, tmp_path / "fourth", role=Role.ISSUER)


def test_a_renewed_chain_takes_the_place_of_the_first(tmp_path: Path) -> None:
    founder = init_mesh(tmp_path / "1", "home")
    member, other = admit(founder, tmp_path / "2"), admit(founder, tmp_path / "3")
    renewed = member.with_chain(
        founder.issue(member.signer.public_key, Role.MEMBER, 2_000_000_000.0, 2.0)
    )
    assert renewed.credential.not_before_s == 2_000_000_000.0 - 3_600.0
    assert renewed.credential.not_after_s == 2_000_000_000.0 + 2 * 86_400.0
    assert renewed.client_context is not member.client_context
    with pytest.raises(CertificateError, match="another node"):
        member.with_chain(other.chain)
    stranger = init_mesh(tmp_path / "4", "home")
    foreign = stranger.issue(member.signer.public_key, Role.MEMBER, 0.0)
    with pytest.raises(CertificateError):
        member.with_chain(foreign)


def test_chains_that_do_not_lead_to_the_root_are_refused(tmp_path: Path) -> None:
    founder, second = appointed(init_mesh(tmp_path / "1", "home"), tmp_path)
    root = founder.root
    member = admit(second, tmp_path / "member")
    stranger = init_mesh(tmp_path / "other", "home")
    wrong = {
        "nothing": (),
        "a gap": (member.chain[0], *member.chain[2:]),
        "the wrong order": (member.chain[0], *reversed(member.chain[1:])),
        "another mesh": stranger.chain,
        "a leaf of ours under their authority": (member.chain[0], *stranger.chain[1:]),
        "an authority in place of a node": second.authority,
        "signed by a node": (second.chain[0], member.chain[0], member.chain[1]),
        "too long": (member.chain[0], *second.authority, *second.authority),
    }
    for what, chain in wrong.items():
        with pytest.raises(CertificateError):
            pytest.fail(f"{what} passed: {verify_chain(chain, root)}")
    for chain in ((), member.chain, second.authority[:1], stranger.authority):
        with pytest.raises(CertificateError):
            pytest.fail(f"passed for {verify_authorities(chain, root)!r}")


def test_a_signature_that_hides_its_last_bits_is_refused(tmp_path: Path) -> None:
    """DER lets a string of bits end within its last byte; what is left out there changes nothing for a reader."""
    even = (
        identity
        for number in range(64)
        if (identity := init_mesh(tmp_path / str(number), "home")).chain[0].signature[-1] % 2 == 0
    )
    found = next(even)
    leaf, *authorities = found.chain
    changed = bytearray(leaf.public_bytes(Encoding.DER))
    at = len(changed) - len(leaf.signature) - 1
    assert changed[at] == 0
    changed[at] = 1
    assert verify_chain(found.chain, found.root).node == found.node_id
    with pytest.raises(CertificateError, match="signature"):
        verify_chain((*parse_der([bytes(changed)]), *authorities), found.root)
