"""The files of an identity: where they are, how they appear, and how one tells that they are whole.

Under `<state_dir>/identity/`, directory 0700, files 0600::

    mesh.toml       format, mesh id (hex) and mesh name
    root.crt        the mesh's root certificate
    node.key        this node's Ed25519 key
    node.crt        its first certificate, and those of the authorities above it
    datagram.key    the mesh's datagram key when this node joined: `generation:hex`
    authority.crt   its own certificate as an authority, and those above it: only on an issuer
    root.key        the mesh's root key: only on the node that founded the mesh
    SHA256SUMS      of all these, as `sha256sum --check` reads it

The directory appears whole or not at all (it is written beside and renamed), and is never overwritten.
Nothing in it changes after that, so a sum of each file tells a bit that flipped: a datagram key or a
certificate that is wrong in one bit reads well, and the node would be shut out without a word. What comes
later, renewed certificates and rotated keys, is in `<state_dir>/trust/`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from meshd.trust.identity_errors import (
    IdentityDamaged,
    IdentityError,
    IdentityExists,
    IdentityUnreadable,
    IdentityUnsafe,
    NoIdentity,
)
from meshd_cms.types import MESH_ID_BYTES, MeshId

FORMAT: Final = 2
DATAGRAM_KEY_BYTES: Final = 32
MESH_NAME_LENGTH_MAX: Final = 63
"""A mesh's name becomes a DNS label."""

MESH_FILE: Final = "mesh.toml"
ROOT_CERTIFICATE_FILE: Final = "root.crt"
ROOT_KEY_FILE: Final = "root.key"
NODE_CERTIFICATE_FILE: Final = "node.crt"
NODE_KEY_FILE: Final = "node.key"
DATAGRAM_KEY_FILE: Final = "datagram.key"
AUTHORITY_FILE: Final = "authority.crt"
SUMS_FILE: Final = "SHA256SUMS"
RESTORE: Final = (
    "restore the directory from a backup, or move it away and join the mesh anew as another node "
    "(`meshd invite` on an issuer, then `meshd join TOKEN` here)"
)
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
_OPTIONAL: Final = frozenset({ROOT_KEY_FILE, AUTHORITY_FILE})


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


def mesh_file(mesh: MeshId, name: str) -> bytes:
    """The content of MESH_FILE; `name` was checked, so TOML needs no escapes."""
    return f'format = {FORMAT}\nid = "{mesh.hex()}"\nname = "{name}"\n'.encode()


def datagram_key_file(generation: int, key: bytes) -> bytes:
    """The content of DATAGRAM_KEY_FILE."""
    return f"{generation}:{key.hex()}".encode()


def read_datagram_key(directory: Path) -> tuple[int, bytes]:
    """Generation and key, as `datagram_key_file` wrote them.

    Raises:
        IdentityDamaged, OSError, ValueError: the file is not as it was written.
    """
    path = directory / DATAGRAM_KEY_FILE
    generation, _, text = path.read_text("ascii").partition(":")
    key = bytes.fromhex(text)
    if len(key) != DATAGRAM_KEY_BYTES or not generation.isdecimal():
        raise IdentityDamaged(f"{path} is cut short; {RESTORE}")
    return int(generation), key


def check_unclaimed(state_dir: Path) -> None:
    """Raise IdentityExists if there is an identity already."""
    directory = identity_dir(state_dir)
    if directory.exists():
        raise _exists(directory)


def write_identity(state_dir: Path, files: Mapping[str, bytes]) -> None:
    """Write a new identity: all of it or nothing.

    Raises:
        IdentityExists: there is one; it is untouched.
        IdentityUnreadable: the system refused; nothing was left behind.
    """
    check_unclaimed(state_dir)
    directory = identity_dir(state_dir)
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


def check_permissions(directory: Path) -> None:
    """Raise an IdentityError or OSError unless all files are there, and for their owner alone."""
    try:
        mode = stat.S_IMODE(directory.stat().st_mode)
    except FileNotFoundError:
        raise NoIdentity(
            f"no mesh identity in {directory}: run `meshd init NAME` to found a mesh, or `meshd join TOKEN` "
            "with a token that `meshd invite` printed on a node of an existing one"
        ) from None
    if mode & 0o077:
        raise IdentityUnsafe(f"others can look into {directory}: run `chmod 700 {directory}`")
    missing = sorted(_REQUIRED.difference(path.name for path in directory.iterdir()))
    if missing:
        raise IdentityDamaged(f"{directory / missing[0]} is missing; {RESTORE}")
    for path in sorted(directory.iterdir()):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise IdentityUnsafe(f"others can read {path}: run `chmod 600 {path}`")


def _sums(files: Mapping[str, bytes]) -> bytes:
    return b"".join(
        b"%b  %b\n" % (hashlib.sha256(content).hexdigest().encode(), name.encode())
        for name, content in files.items()
    )


def check_sums(directory: Path) -> None:
    """Raise IdentityDamaged unless every file is as it was written. The root key may have been moved away."""
    lines = (directory / SUMS_FILE).read_bytes().splitlines()
    sums = {name: digest for digest, _, name in (line.partition(b"  ") for line in lines)}
    for path in sorted(directory.iterdir()):
        listed = sums.pop(path.name.encode(), None)
        ours = path.name in _REQUIRED or path.name in _OPTIONAL
        if path.name == SUMS_FILE or not ours:
            continue
        if listed != hashlib.sha256(path.read_bytes()).hexdigest().encode():
            raise IdentityDamaged(f"{path} is not as it was written; {RESTORE}")
    if sums.keys() - {ROOT_KEY_FILE.encode()}:
        raise IdentityDamaged(f"{directory / SUMS_FILE} is not as it was written; {RESTORE}")


def read_mesh(directory: Path) -> tuple[MeshId, str]:
    """Id and name, as `mesh_file` wrote them; raises what is wrong with them."""
    table = tomllib.loads((directory / MESH_FILE).read_text("utf-8"))
    if table.get("format") != FORMAT:
        raise IdentityDamaged(
            f"{directory / MESH_FILE} has format {table.get('format')!r}, this release knows {FORMAT}: "
            "install the release of meshd that wrote it"
        )
    mesh, name = bytes.fromhex(str(table.get("id"))), str(table.get("name"))
    if len(mesh) != MESH_ID_BYTES:
        raise IdentityDamaged(f"{directory / MESH_FILE} holds no mesh id; {RESTORE}")
    check_mesh_name(name)
    return MeshId(mesh), name


@contextmanager
def as_file(content: bytes) -> Generator[Path]:
    """A file in memory with this content, for an API that only takes paths; no disk can refuse it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("meshd-chain", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield Path(f"/proc/self/fd/{descriptor}")
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(content)
            named.flush()
            yield Path(named.name)
