"""Who this node is: founding a mesh, loading an identity, and letting others in.

The files are described in `meshd.trust.identity_files`. Joining a mesh over the network is in
`meshd.shell.joining`; `admit` does the same within one process, for whoever holds both state folders.
"""

from __future__ import annotations

import secrets
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meshd.trust import certificates, tls
from meshd.trust import identity_files as files
from meshd.trust.certificates import CERTIFICATE_DAYS, CertificateError, Credential, Role
from meshd.trust.identity_errors import (
    IdentityDamaged,
    IdentityError,
    IdentityExists,
    IdentityUnreadable,
    IdentityUnsafe,
    NoIdentity,
    NotAnIssuer,
)
from meshd.trust.identity_files import identity_dir
from meshd.trust.keys import Ed25519Signer, raw_public_key, verify
from meshd_cms.types import MeshId, NodeId

__all__ = [
    "Identity",
    "IdentityDamaged",
    "IdentityError",
    "IdentityExists",
    "IdentityUnreadable",
    "IdentityUnsafe",
    "NoIdentity",
    "NotAnIssuer",
    "Role",
    "admit",
    "admitted_files",
    "identity_dir",
    "init_mesh",
    "load_identity",
]


@dataclass(frozen=True, slots=True)
class Identity:
    """This node in its mesh, ready to use. Secrets are not in its `repr`."""

    mesh_id: MeshId
    mesh_name: str
    node_id: NodeId
    credential: Credential  # what our certificate says
    chain: tuple[x509.Certificate, ...] = field(repr=False)  # as presented: without the root
    root: x509.Certificate = field(repr=False)
    authority: tuple[x509.Certificate, ...] = field(repr=False)  # ours as an authority; () if none
    signer: Ed25519Signer
    key_generation: int  # of `datagram_key`; the founder's is 0
    datagram_key: bytes = field(repr=False)  # in force when this node joined
    private_key: Ed25519PrivateKey = field(repr=False)
    key_file: Path = field(repr=False)
    root_file: Path = field(repr=False)
    client_context: ssl.SSLContext = field(repr=False)
    server_context: ssl.SSLContext = field(repr=False)
    is_founder: bool  # holds the root key, and so can appoint authorities of rank 1

    @property
    def role(self) -> Role:
        """What our certificate lets us do."""
        return self.credential.role

    @property
    def is_issuer(self) -> bool:
        """Whether this node can let others in."""
        return bool(self.authority) and self.role is Role.ISSUER

    def verify(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        """`meshd.trust.keys.verify`: the `Verifier` of the capability store."""
        return verify(public_key, message, signature)

    def issue(
        self, public_key: bytes, role: Role, now_s: float, days: float = CERTIFICATE_DAYS
    ) -> tuple[x509.Certificate, ...]:
        """A chain for the node with this raw public key, its certificate first; `now_s` since 1970.

        Raises:
            NotAnIssuer: this node may let nobody in.
            CertificateError: the key is not one, or the role is not that of a node.
        """
        if role is Role.CLIENT:
            raise CertificateError("a client is no node, and gets an API key")
        return (
            certificates.node_certificate(
                self.mesh_id,
                _parsed(public_key),
                role,
                self._own_authority(),
                self.private_key,
                now_s=now_s,
                days=days,
            ),
            *self.authority,
        )

    def appoint(self, public_key: bytes) -> tuple[x509.Certificate, ...]:
        """A chain that makes the node with this raw public key an authority, one rank below this one.

        Raises:
            NotAnIssuer: this node may let nobody in, or is an authority of the last rank.
            CertificateError: the key is not one.
        """
        self.check_may_invite(Role.ISSUER)
        own, key = self._own_authority(), _parsed(public_key)
        return (
            certificates.authority_certificate(key, own, self.private_key),
            *self.authority,
        )

    def check_may_invite(self, role: Role) -> None:
        """Raise NotAnIssuer unless this node can let others in with this role."""
        self._own_authority()
        if role is Role.ISSUER and len(self.authority) >= certificates.RANK_MAX:
            raise NotAnIssuer(
                "this node may let nodes in, and may not make issuers of them: it was let in by one that "
                "was let in by one. Run `meshd invite --role issuer` on the node that founded the mesh, or "
                "on one that it invited itself"
            )

    def with_chain(self, chain: Sequence[x509.Certificate]) -> Identity:
        """This identity with a renewed certificate, and new TLS contexts that show it.

        Raises:
            CertificateError: the chain does not lead to our root, or is not for our key.
            IdentityError: no TLS context could be made of it.
        """
        credential = certificates.verify_chain(chain, self.root)
        if credential.node != self.node_id:
            raise CertificateError("the renewed certificate is for another node")
        try:
            with files.as_file(certificates.pem(*chain)) as chain_file:
                client = tls.client_context(self.root_file, chain_file, self.key_file)
                server = tls.server_context(self.root_file, chain_file, self.key_file)
        except ssl.SSLError as error:
            raise IdentityDamaged(f"the renewed certificate does not fit: {error}") from error
        except OSError as error:
            raise files.unreadable(error) from error
        return replace(
            self,
            credential=credential,
            chain=tuple(chain),
            client_context=client,
            server_context=server,
        )

    def with_authority(self, authority: Sequence[x509.Certificate]) -> Identity:
        """This identity as an authority; it takes the role of an issuer with a certificate that says so.

        Raises:
            CertificateError: the chain does not lead to our root, or is not for our key; nothing was changed.
        """
        if certificates.verify_authorities(authority, self.root) != self.node_id:
            raise CertificateError("the authority is for another node")
        return replace(self, authority=tuple(authority))

    def _own_authority(self) -> x509.Certificate:
        if not self.is_issuer:
            raise NotAnIssuer(
                f"this node is {_A_ROLE[self.role]} and may let nobody in: do it on an issuer, such as the "
                "node that founded the mesh (`meshd peers` shows who is one)"
            )
        return self.authority[0]


_A_ROLE: Mapping[Role, str] = {
    Role.MEMBER: "a member",
    Role.ISSUER: "an issuer",
    Role.OBSERVER: "an observer",
    Role.CLIENT: "a client",
}


def init_mesh(state_dir: Path, name: str, *, now_s: float | None = None) -> Identity:
    """Found a mesh called `name` and make this node its first, an issuer; `now_s` is seconds since 1970.

    Raises:
        IdentityExists: this node belongs to a mesh already; nothing was changed.
        IdentityError: the name cannot be one.
        IdentityUnreadable: the files cannot be written; nothing was left behind.
    """
    files.check_mesh_name(name)
    root_key, node_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    root = certificates.root_certificate(root_key)
    authority = certificates.authority_certificate(node_key.public_key(), root, root_key)
    node = certificates.node_certificate(
        certificates.mesh_id_of(root_key.public_key()),
        node_key.public_key(),
        Role.ISSUER,
        authority,
        node_key,
        now_s=time.time() if now_s is None else now_s,
    )
    content = admitted_files(
        name,
        root,
        node_key,
        (node, authority),
        (authority,),
        key_generation=0,
        datagram_key=secrets.token_bytes(files.DATAGRAM_KEY_BYTES),
    )
    content |= {files.ROOT_KEY_FILE: certificates.private_pem(root_key)}
    files.write_identity(state_dir, content)
    return load_identity(state_dir)


def admit(
    inviter: Identity,
    state_dir: Path,
    *,
    role: Role = Role.MEMBER,
    now_s: float | None = None,
    days: float = CERTIFICATE_DAYS,
) -> Identity:
    """Make `state_dir` that of a node which `inviter` lets in: joining without a network.

    Raises:
        NotAnIssuer: the inviter may not do that; nothing was written.
        IdentityExists: the folder belongs to a node already; nothing was changed.
        IdentityUnreadable: the files cannot be written; nothing was left behind.
    """
    key = Ed25519PrivateKey.generate()
    public = raw_public_key(key.public_key())
    chain = inviter.issue(public, role, time.time() if now_s is None else now_s, days)
    authority = inviter.appoint(public) if role is Role.ISSUER else ()
    files.write_identity(
        state_dir,
        admitted_files(
            inviter.mesh_name,
            inviter.root,
            key,
            chain,
            authority,
            key_generation=inviter.key_generation,
            datagram_key=inviter.datagram_key,
        ),
    )
    return load_identity(state_dir)


def admitted_files(
    name: str,
    root: x509.Certificate,
    node_key: Ed25519PrivateKey,
    chain: Sequence[x509.Certificate],
    authority: Sequence[x509.Certificate],
    *,
    key_generation: int,
    datagram_key: bytes,
) -> dict[str, bytes]:
    """The contents of an identity's files, by name, for `write_identity`; `name` was checked."""
    root_key = root.public_key()
    assert isinstance(root_key, Ed25519PublicKey), "the root was verified"
    content = {
        files.MESH_FILE: files.mesh_file(certificates.mesh_id_of(root_key), name),
        files.ROOT_CERTIFICATE_FILE: certificates.pem(root),
        files.NODE_KEY_FILE: certificates.private_pem(node_key),
        files.NODE_CERTIFICATE_FILE: certificates.pem(*chain),
        files.DATAGRAM_KEY_FILE: files.datagram_key_file(key_generation, datagram_key),
    }
    if authority:
        content[files.AUTHORITY_FILE] = certificates.pem(*authority)
    return content


def load_identity(state_dir: Path) -> Identity:
    """Read and check the identity of this node. Whether its certificate is still valid is not looked at.

    Raises:
        NoIdentity: there is none yet.
        IdentityUnsafe: others may read it; the message has the chmod command.
        IdentityUnreadable: we may not read it.
        IdentityDamaged: it is incomplete or does not fit together.
    """
    directory = identity_dir(state_dir)
    try:
        files.check_permissions(directory)
        files.check_sums(directory)
        return _loaded(directory)
    except ssl.SSLError as error:
        raise IdentityDamaged(
            f"the certificates in {directory} do not fit: {error}; {files.RESTORE}"
        ) from error
    except OSError as error:
        raise files.unreadable(error) from error
    except ValueError as error:
        raise IdentityDamaged(f"{directory} is damaged: {error}; {files.RESTORE}") from error


def _loaded(directory: Path) -> Identity:
    """The identity in these files. Raises IdentityError, ssl.SSLError, OSError, ValueError."""
    mesh, name = files.read_mesh(directory)
    key_file, chain_file = directory / files.NODE_KEY_FILE, directory / files.NODE_CERTIFICATE_FILE
    root_file = directory / files.ROOT_CERTIFICATE_FILE
    key = certificates.parse_private_pem(key_file.read_bytes())
    root = x509.load_pem_x509_certificate(root_file.read_bytes())
    chain = tuple(x509.load_pem_x509_certificates(chain_file.read_bytes()))
    certificates.verify_root(root, mesh)
    credential = certificates.verify_chain(chain, root)
    if chain[0].public_key() != key.public_key():
        raise IdentityDamaged(f"{chain_file} is not the certificate of {key_file}; {files.RESTORE}")
    generation, datagram_key = files.read_datagram_key(directory)
    return Identity(
        mesh_id=mesh,
        mesh_name=name,
        node_id=credential.node,
        credential=credential,
        chain=chain,
        root=root,
        authority=_authority(directory, root, credential),
        signer=Ed25519Signer(key),
        key_generation=generation,
        datagram_key=datagram_key,
        private_key=key,
        key_file=key_file,
        root_file=root_file,
        client_context=tls.client_context(root_file, chain_file, key_file),
        server_context=tls.server_context(root_file, chain_file, key_file),
        is_founder=(directory / files.ROOT_KEY_FILE).exists(),
    )


def _authority(
    directory: Path, root: x509.Certificate, credential: Credential
) -> tuple[x509.Certificate, ...]:
    file = directory / files.AUTHORITY_FILE
    if not file.exists():
        return ()
    authority = tuple(x509.load_pem_x509_certificates(file.read_bytes()))
    if certificates.verify_authorities(authority, root) != credential.node:
        raise IdentityDamaged(f"{file} is of another node; {files.RESTORE}")
    return authority


def _parsed(public_key: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError as error:
        raise CertificateError(f"not a public key: {error}") from error
