"""What a device writes when it has joined: the identity, and where to find the mesh. All calls block."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from meshd.shell.storage import Storage, StorageError
from meshd.shell.trust_files import TrustFiles
from meshd.trust.identity import admitted_files, identity_dir, load_identity
from meshd.trust.identity_errors import IdentityUnreadable
from meshd.trust.identity_files import check_unclaimed, unreadable, write_identity
from meshd.trust.private_files import replace_private

if TYPE_CHECKING:
    from meshd.shell.joining_client import Admission, ClientAdmission
    from meshd.trust.identity import Identity
    from meshd_plugins.api import Logger


def check_may_join(state_dir: Path) -> None:
    """See that this device can become a node, before an invitation is spent on it.

    Raises:
        IdentityExists: it is one already.
        IdentityUnreadable: its state folder cannot be written.
    """
    check_unclaimed(state_dir)
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise unreadable(error) from error
    if not os.access(state_dir, os.W_OK | os.X_OK):
        raise IdentityUnreadable(
            f"{state_dir} cannot be written by this user: run the command as root, or as the user that "
            "meshd runs as"
        )


def settle(state_dir: Path, admission: Admission, log: Logger) -> Identity:
    """Make this device the node that was admitted. The identity comes last, whole or not at all.

    Where root does it for a service, the files go to whom the state folder belongs to.

    Raises:
        IdentityError: it could not be written, and there is none.
    """
    try:
        Storage(state_dir).save_peers(admission.members)  # a hint: without it there is mDNS
    except StorageError as error:
        raise IdentityUnreadable(str(error)) from error
    if admission.decrees:
        TrustFiles(state_dir, log).keep_decrees(admission.decrees)
    write_identity(
        state_dir,
        admitted_files(
            admission.mesh_name,
            admission.root,
            admission.private_key,
            admission.chain,
            admission.authority,
            key_generation=admission.key_generation,
            datagram_key=admission.datagram_key,
        ),
    )
    _give_to_owner(state_dir)
    return load_identity(state_dir)


def _give_to_owner(state_dir: Path) -> None:
    """What root wrote here, and nothing else: the folder's owner may have put anything beside it."""
    if os.geteuid() != 0 or (owner := state_dir.stat()).st_uid == 0:
        return
    identity, trust = identity_dir(state_dir), state_dir / "trust"
    written = [*identity.iterdir(), identity, trust / "decrees", trust, state_dir / "peers"]
    try:
        for path in written:
            with suppress(FileNotFoundError):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    except OSError as error:
        raise unreadable(error) from error


def write_client(path: Path, admission: ClientAdmission) -> None:
    """Write what `meshd` reads where no daemon runs, for its owner alone; what was there is replaced.

    Raises:
        OSError: the system refused; it is as it was.
    """
    lines = (
        f"# A client of the mesh {admission.mesh_name}. The key is secret.",
        f"url = {_quoted(admission.url)}",
        f"key = {_quoted(admission.key)}",
        f"fingerprint = {_quoted(admission.fingerprint)}",
        "",
    )
    replace_private(path, "\n".join(lines).encode())


def _quoted(text: str) -> str:
    """A TOML string; `text` is printable, as everything that comes over the join channel."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
