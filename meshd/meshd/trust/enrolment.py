"""Enrolment by file: how a second node gets into a mesh.

The file holds the mesh's datagram key and an enrolment authority with its key: WHOEVER HOLDS IT CAN JOIN
THE MESH, any number of times, until the mesh's keys are changed. Carry it by hand or over an encrypted
channel and delete it afterwards. The root key is not in it and never leaves the founder.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any, Final, TypeGuard, cast

import msgpack
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.trust import certificates
from meshd.trust.identity import (
    DATAGRAM_KEY_BYTES,
    ROOT_CERTIFICATE_FILE,
    ROOT_KEY_FILE,
    Identity,
    check_mesh_name,
    identity_dir,
    identity_files,
    load_identity,
    unreadable,
    write_identity,
    write_private,
)
from meshd.trust.identity_errors import (
    EnrolmentError,
    EnrolmentFileExists,
    IdentityDamaged,
    IdentityError,
    NotTheRoot,
)
from meshd_cms.types import MESH_ID_BYTES, MeshId

FORMAT: Final = 1
FILE_BYTES_MAX: Final = 64 * 1024

_BEGIN: Final = "-----BEGIN MESHD ENROLMENT-----"
_END: Final = "-----END MESHD ENROLMENT-----"
_HEADER: Final = """\
# Enrolment file of the meshd mesh "{name}".
#
# WHOEVER HOLDS THIS FILE CAN JOIN THE MESH and read its traffic between nodes. Copy it to the new
# device by hand or over an encrypted channel, run there
#     meshd init --enrol FILE
# and delete every copy. It serves any number of devices and does not expire by itself.
"""
_DAMAGED: Final = (
    "it was cut short or changed on its way: copy it again from the node that wrote it"
)


def write_enrolment(state_dir: Path, path: Path) -> None:
    """Write, on the node that founded the mesh, a file (0600) with which other nodes can join.

    Each file has an enrolment authority of its own. Whoever holds the file can join: see the module.

    Raises:
        NotTheRoot: this node does not hold the root key.
        EnrolmentFileExists: `path` exists; it is untouched.
        IdentityError: this node's identity cannot be read, or the file not be written.
    """
    identity = load_identity(state_dir)
    directory = identity_dir(state_dir)
    try:
        root_key = certificates.parse_private_pem((directory / ROOT_KEY_FILE).read_bytes())
        root = x509.load_pem_x509_certificate((directory / ROOT_CERTIFICATE_FILE).read_bytes())
    except FileNotFoundError:
        raise NotTheRoot(
            f"the root key of mesh {identity.mesh_name!r} is not on this node: write the enrolment file "
            "on the node where `meshd init` founded the mesh"
        ) from None
    except OSError as error:
        raise unreadable(error) from error
    except ValueError as error:
        raise IdentityDamaged(f"the root of the mesh in {directory} is damaged: {error}") from error
    key = Ed25519PrivateKey.generate()
    authority = certificates.enrolment_certificate(
        identity.mesh_id, key.public_key(), root, root_key
    )
    content = cast(
        "bytes",
        msgpack.packb(  # pyright: ignore[reportUnknownMemberType]
            [
                identity.mesh_id,
                identity.mesh_name,
                identity.datagram_key,
                root.public_bytes(serialization.Encoding.DER),
                authority.public_bytes(serialization.Encoding.DER),
                key.private_bytes_raw(),
            ]
        ),
    )
    try:
        write_private(path, _armoured(identity.mesh_name, content).encode("ascii"))
    except FileExistsError:
        raise EnrolmentFileExists(f"{path} exists: move it away, or name another file") from None
    except OSError as error:
        raise unreadable(error) from error


def enrol(state_dir: Path, file: Path) -> Identity:
    """Make this node a member of the mesh that `file` (by `write_enrolment`) is of.

    Its key is made here and never leaves this node. The file is left where it is.

    Raises:
        EnrolmentError: the file is not an enrolment file, or is damaged; nothing was done.
        IdentityExists: this node belongs to a mesh already; nothing was changed.
        IdentityUnreadable: the file cannot be read, or the identity not be written.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise unreadable(error) from error
    mesh, name, datagram_key, root, authority, authority_key = _parsed(text, file)
    key = Ed25519PrivateKey.generate()
    certificate = certificates.node_certificate(mesh, key.public_key(), authority, authority_key)
    files = identity_files(mesh, name, root, key, (certificate, authority), datagram_key)
    write_identity(state_dir, files)
    return load_identity(state_dir)


def _armoured(name: str, content: bytes) -> str:
    sealed = bytes([FORMAT]) + hashlib.sha256(content).digest() + content
    body = base64.encodebytes(sealed).decode("ascii")
    return f"{_HEADER.format(name=name)}{_BEGIN}\n{body}{_END}\n"


def _unarmoured(text: bytes, file: Path) -> bytes:
    lines = [line.strip() for line in text.decode("ascii", "replace").splitlines()]
    if len(text) > FILE_BYTES_MAX or _BEGIN not in lines:
        raise EnrolmentError(
            f"{file} is not an enrolment file: take the one that `meshd init` wrote on the first node"
        )
    if _END not in lines:
        raise EnrolmentError(f"{file} has no end: {_DAMAGED}")
    body = "".join(lines[lines.index(_BEGIN) + 1 : lines.index(_END)])
    try:
        sealed = base64.b64decode(body, validate=True)
    except ValueError as error:  # binascii.Error is one, and so is what a byte beyond ASCII raises
        raise EnrolmentError(f"{file} is damaged: {_DAMAGED}") from error
    if sealed and sealed[0] != FORMAT:
        raise EnrolmentError(
            f"{file} has format {sealed[0]}, this release of meshd knows {FORMAT}: install the same "
            "release on both nodes"
        )
    digest, content = sealed[1:33], sealed[33:]
    if hashlib.sha256(content).digest() != digest:
        raise EnrolmentError(f"{file} is damaged: {_DAMAGED}")
    return content


def _parsed(
    text: bytes, file: Path
) -> tuple[MeshId, str, bytes, x509.Certificate, x509.Certificate, Ed25519PrivateKey]:
    content = _unarmoured(text, file)
    try:
        fields = _unpacked(content)
        if not _is_list_of(fields, bytes, str, bytes, bytes, bytes, bytes):
            raise EnrolmentError(f"{file} does not hold what an enrolment file holds: {_DAMAGED}")
        mesh, name, datagram_key = fields[:3]
        root = x509.load_der_x509_certificate(fields[3])
        authority = x509.load_der_x509_certificate(fields[4])
        key = Ed25519PrivateKey.from_private_bytes(fields[5])
        check_mesh_name(name)
        authority.verify_directly_issued_by(root)
        fits = authority.public_key() == key.public_key()
        if not fits or len(mesh) != MESH_ID_BYTES or len(datagram_key) != DATAGRAM_KEY_BYTES:
            raise EnrolmentError(f"the parts of {file} do not fit together: {_DAMAGED}")
    except (ValueError, TypeError, InvalidSignature, msgpack.UnpackException) as error:
        raise EnrolmentError(f"{file} is damaged ({error}): {_DAMAGED}") from error
    except EnrolmentError:
        raise
    except IdentityError as error:
        raise EnrolmentError(f"{file}: {error}") from error
    return MeshId(mesh), name, datagram_key, root, authority, key


def _unpacked(content: bytes) -> object:
    return cast("object", msgpack.unpackb(content))  # pyright: ignore[reportUnknownMemberType]


def _is_list_of(value: object, *types: type) -> TypeGuard[list[Any]]:
    if not _is_list(value):
        return False
    return [type(each) for each in value] == list(types)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)
