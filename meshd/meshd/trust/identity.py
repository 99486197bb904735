"""Who this node is: founding a mesh, loading an identity, and the files both rest on.

Under `<state_dir>/identity/`, directory 0700, files 0600::

    mesh.toml       format, mesh id (hex) and mesh name
    root.crt        the mesh's root certificate
    node.key        this node's Ed25519 key
    node.crt        its certificate, and the enrolment authority's where that signed it
    datagram.key    the mesh's datagram key (hex)
    root.key        the mesh's root key: only on the node that founded the mesh
    SHA256SUMS      of all these, as `sha256sum --check` reads it

The directory appears whole or not at all (it is written beside and renamed), and is never overwritten.
Nothing in it changes after that, so a sum of each file tells a bit that flipped: a datagram key or a
certificate that is wrong in one bit reads well, and the node would be shut out without a word.
Enrolling further nodes is in `meshd.trust.enrolment`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import ssl
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.trust import certificates, tls
from meshd.trust.identity_errors import (
    IdentityDamaged,
    IdentityError,
    IdentityExists,
    IdentityUnreadable,
    IdentityUnsafe,
    NoIdentity,
)
from meshd.trust.keys import Ed25519Signer, verify
from meshd_cms.types import MESH_ID_BYTES, MeshId, NodeId

__all__ = [
    "Identity",
    "IdentityDamaged",
    "IdentityError",
    "IdentityExists",
    "IdentityUnreadable",
    "IdentityUnsafe",
    "NoIdentity",
    "init_mesh",
    "load_identity",
]

FORMAT: Final = 1
DATAGRAM_KEY_BYTES: Final = 32
MESH_NAME_LENGTH_MAX: Final = 63
"""A mesh's name becomes a DNS label."""

MESH_FILE: Final = "mesh.toml"
ROOT_CERTIFICATE_FILE: Final = "root.crt"
ROOT_KEY_FILE: Final = "root.key"
NODE_CERTIFICATE_FILE: Final = "node.crt"
NODE_KEY_FILE: Final = "node.key"
DATAGRAM_KEY_FILE: Final = "datagram.key"
SUMS_FILE: Final = "SHA256SUMS"
_REQUIRED: Final = frozenset(
    {
        MESH_FILE,
        ROOT_CERTIFICATE_FILE,
        NODE_CERTIFICATE_FILE,
        NODE_KEY_FILE,
        DATAGRAM_KEY_FILE,
        SUMS_FILE,
    }
)


@dataclass(frozen=True, slots=True)
class Identity:
    """This node in its mesh, ready to use. Secrets are not in its `repr`."""

    mesh_id: MeshId
    mesh_name: str
    node_id: NodeId
    signer: Ed25519Signer
    datagram_key: bytes = field(repr=False)
    client_context: ssl.SSLContext = field(repr=False)
    server_context: ssl.SSLContext = field(repr=False)
    is_founder: bool  # holds the root key, so it can write enrolment files

    def verify(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        """`meshd.trust.keys.verify`: the `Verifier` of the capability store."""
        return verify(public_key, message, signature)


def init_mesh(state_dir: Path, name: str) -> Identity:
    """Found a mesh called `name` and make this node its first.

    Raises:
        IdentityExists: this node belongs to a mesh already; nothing was changed.
        IdentityError: the name cannot be one.
        IdentityUnreadable: the files cannot be written; nothing was left behind.
    """
    check_mesh_name(name)
    mesh = MeshId(secrets.token_bytes(MESH_ID_BYTES))
    root_key, node_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    root = certificates.root_certificate(mesh, root_key)
    node = certificates.node_certificate(mesh, node_key.public_key(), root, root_key)
    files = identity_files(
        mesh, name, root, node_key, (node,), secrets.token_bytes(DATAGRAM_KEY_BYTES)
    )
    write_identity(state_dir, files | {ROOT_KEY_FILE: certificates.private_pem(root_key)})
    return load_identity(state_dir)


def load_identity(state_dir: Path) -> Identity:
    """Read and check the identity of this node.

    Raises:
        NoIdentity: there is none yet.
        IdentityUnsafe: others may read it; the message has the chmod command.
        IdentityUnreadable: we may not read it.
        IdentityDamaged: it is incomplete or does not fit together.
    """
    directory = identity_dir(state_dir)
    try:
        _check_permissions(directory)
        _check_sums(directory)
        mesh, name = _read_mesh(directory)
        key_file, chain_file = directory / NODE_KEY_FILE, directory / NODE_CERTIFICATE_FILE
        root_file = directory / ROOT_CERTIFICATE_FILE
        key = certificates.parse_private_pem(key_file.read_bytes())
        chain = x509.load_pem_x509_certificates(chain_file.read_bytes())
        signer = Ed25519Signer(key)
        node = certificates.node_of(chain[0], mesh)
        if chain[0].public_key() != key.public_key():
            raise IdentityDamaged(f"{chain_file} is not the certificate of {key_file}; {_RESTORE}")
        datagram_key = bytes.fromhex((directory / DATAGRAM_KEY_FILE).read_text("ascii"))
        if len(datagram_key) != DATAGRAM_KEY_BYTES:
            raise IdentityDamaged(f"{directory / DATAGRAM_KEY_FILE} is cut short; {_RESTORE}")
        return Identity(
            mesh_id=mesh,
            mesh_name=name,
            node_id=node,
            signer=signer,
            datagram_key=datagram_key,
            client_context=tls.client_context(root_file, chain_file, key_file),
            server_context=tls.server_context(root_file, chain_file, key_file),
            is_founder=(directory / ROOT_KEY_FILE).exists(),
        )
    except ssl.SSLError as error:
        raise IdentityDamaged(
            f"the certificates in {directory} do not fit: {error}; {_RESTORE}"
        ) from error
    except OSError as error:
        raise unreadable(error) from error
    except ValueError as error:
        raise IdentityDamaged(f"{directory} is damaged: {error}; {_RESTORE}") from error


_RESTORE: Final = (
    "restore the directory from a backup, or move it away and join the mesh anew as another node "
    "(`meshd init --enrol FILE`)"
)


def identity_dir(state_dir: Path) -> Path:
    """Where the identity's files are."""
    return state_dir / "identity"


def check_mesh_name(name: str) -> None:
    """Raise IdentityError unless `name` is 1 to 63 of a-z, 0-9 and -, not at an end a hyphen."""
    allowed = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
    well_formed = 1 <= len(name) <= MESH_NAME_LENGTH_MAX and allowed.issuperset(name)
    if not well_formed or name.startswith("-") or name.endswith("-"):
        raise IdentityError(
            f"{name!r} cannot be the name of a mesh: take 1 to {MESH_NAME_LENGTH_MAX} of a-z, 0-9 "
            "and '-', with a letter or digit at both ends, for example `meshd init home`"
        )


def identity_files(
    mesh: MeshId,
    name: str,
    root: x509.Certificate,
    node_key: Ed25519PrivateKey,
    chain: tuple[x509.Certificate, ...],
    datagram_key: bytes,
) -> dict[str, bytes]:
    """The contents of the identity's files, by name; `name` was checked, so TOML needs no escapes."""
    return {
        MESH_FILE: f'format = {FORMAT}\nid = "{mesh.hex()}"\nname = "{name}"\n'.encode(),
        ROOT_CERTIFICATE_FILE: certificates.pem(root),
        NODE_KEY_FILE: certificates.private_pem(node_key),
        NODE_CERTIFICATE_FILE: certificates.pem(*chain),
        DATAGRAM_KEY_FILE: datagram_key.hex().encode(),
    }


def write_identity(state_dir: Path, files: Mapping[str, bytes]) -> None:
    """Write a new identity: all of it or nothing.

    Raises:
        IdentityExists: there is one; it is untouched.
        IdentityUnreadable: the system refused; nothing was left behind.
    """
    directory = identity_dir(state_dir)
    if directory.exists():
        raise _exists(directory)
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".identity-", dir=state_dir))  # 0700
        try:
            for name, content in {**files, SUMS_FILE: _sums(files)}.items():
                write_private(new / name, content)
            _sync_directory(new)
            new.rename(
                directory
            )  # fails if somebody else was faster: a full directory is in the way
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        _sync_directory(state_dir)
    except OSError as error:
        if directory.exists():
            raise _exists(directory) from error
        raise unreadable(error) from error


def write_private(path: Path, content: bytes) -> None:
    """Create a file that only its owner can read, and see it onto the disk.

    Raises:
        OSError: FileExistsError when it exists; otherwise no part of it is left behind.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def unreadable(error: OSError) -> IdentityUnreadable:
    """`error` as something a person can act on."""
    return IdentityUnreadable(
        f"{error.filename}: {error.strerror}; run as the user that owns it, or give it to this one "
        f"with `chown -R {os.geteuid()} STATE_DIR`"
    )


def _exists(directory: Path) -> IdentityExists:
    return IdentityExists(
        f"{directory} exists: this node belongs to a mesh already. To leave that mesh for good, stop "
        "the daemon, move the directory away and run the command again"
    )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_permissions(directory: Path) -> None:
    try:
        mode = stat.S_IMODE(directory.stat().st_mode)
    except FileNotFoundError:
        raise NoIdentity(
            f"no mesh identity in {directory}: run `meshd init NAME` to found a mesh, or `meshd init "
            "--enrol FILE` with the enrolment file of an existing one"
        ) from None
    if mode & 0o077:
        raise IdentityUnsafe(f"others can look into {directory}: run `chmod 700 {directory}`")
    missing = sorted(_REQUIRED.difference(path.name for path in directory.iterdir()))
    if missing:
        raise IdentityDamaged(f"{directory / missing[0]} is missing; {_RESTORE}")
    for path in sorted(directory.iterdir()):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise IdentityUnsafe(f"others can read {path}: run `chmod 600 {path}`")


def _sums(files: Mapping[str, bytes]) -> bytes:
    return b"".join(
        b"%b  %b\n" % (hashlib.sha256(content).hexdigest().encode(), name.encode())
        for name, content in files.items()
    )


def _check_sums(directory: Path) -> None:
    """Raise IdentityDamaged unless every file is as it was written. The root key may have been moved away."""
    lines = (directory / SUMS_FILE).read_bytes().splitlines()
    sums = {name: digest for digest, _, name in (line.partition(b"  ") for line in lines)}
    for path in sorted(directory.iterdir()):
        listed = sums.pop(path.name.encode(), None)
        ours = path.name in _REQUIRED or path.name == ROOT_KEY_FILE
        if path.name == SUMS_FILE or not ours:
            continue
        if listed != hashlib.sha256(path.read_bytes()).hexdigest().encode():
            raise IdentityDamaged(f"{path} is not as it was written; {_RESTORE}")
    if sums.keys() - {ROOT_KEY_FILE.encode()}:
        raise IdentityDamaged(f"{directory / SUMS_FILE} is not as it was written; {_RESTORE}")


def _read_mesh(directory: Path) -> tuple[MeshId, str]:
    table = tomllib.loads((directory / MESH_FILE).read_text("utf-8"))
    if table.get("format") != FORMAT:
        raise IdentityDamaged(
            f"{directory / MESH_FILE} has format {table.get('format')!r}, this release knows {FORMAT}: "
            "install the release of meshd that wrote it"
        )
    mesh, name = bytes.fromhex(str(table.get("id"))), str(table.get("name"))
    if len(mesh) != MESH_ID_BYTES:
        raise IdentityDamaged(f"{directory / MESH_FILE} holds no mesh id; {_RESTORE}")
    check_mesh_name(name)
    return MeshId(mesh), name
