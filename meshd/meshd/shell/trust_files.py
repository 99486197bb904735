"""What a node keeps on disk of its standing in the mesh, beside its identity, which never changes.

Under `<state_dir>/trust/`, directory 0700, files 0600, each replaced as a whole, with a checksum::

    certificate   the chain that was issued last
    authority     what makes this node an issuer, where it was appointed after it had joined
    keyring       the mesh's datagram keys: the one in force and those before it
    decrees       who is out, and which key is in force, as the authorities signed it
    roster        who was known as a member, and in which role

A file that is damaged is set aside and what it held comes back: decrees and keys from peers, the certificate from
an issuer. Nothing here raises because of what is on the disk, or because the disk refuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeGuard, TypeVar

from cryptography import x509

from meshd.core.decrees import DECREE_BYTES_MAX, DECREES_MAX
from meshd.shell.envelope import Flaw, FlawedFile, disclose, enclose
from meshd.shell.files import FileSystem, LocalFiles
from meshd.trust.certificates import CertificateError, Role, der, parse_der
from meshd.trust.keyring import DatagramKey
from meshd_cms import CodecError, NodeId
from meshd_cms.packing import pack, unpack
from meshd_plugins.api import Logger

FORMAT: Final = 1
ROSTER_MAX: Final = 4_096
NAME_CHARS_MAX: Final = 63
ASIDE_MAX: Final = 4

T = TypeVar("T")

_KEY_BYTES: Final = 32
_NODE_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    bytes_max: int


_CERTIFICATE: Final = _File("certificate", 16 * 1024)
_AUTHORITY: Final = _File("authority", 16 * 1024)
_KEYRING: Final = _File("keyring", 16 * 1024)
_DECREES: Final = _File("decrees", DECREES_MAX * (DECREE_BYTES_MAX + 8) + 4_096)
_ROSTER: Final = _File("roster", ROSTER_MAX * 128 + 4_096)


@dataclass(frozen=True, slots=True)
class Known:
    """A node that was a member once."""

    node: NodeId
    role: Role
    name: str = ""


class TrustFiles:
    """The files of one node. All calls block: once the daemon is up, they belong in a thread.

    Args:
        state_dir: the folder of the node.
        log: what is damaged, and what the disk refuses, is said here.
        files: the file system.
    """

    def __init__(self, state_dir: Path, log: Logger, files: FileSystem | None = None) -> None:
        self._folder = state_dir / "trust"
        self._files: FileSystem = LocalFiles() if files is None else files
        self._log = log
        self._refusing = False
        try:
            self._files.make_folder(self._folder)
        except OSError as error:
            self._refused(self._folder.name, error)

    # -- the five files ----------------------------------------------------------------------------------

    def certificate(self) -> tuple[x509.Certificate, ...] | None:
        """The chain that was issued last; None when there is none, or none that can be believed."""
        return self._load(_CERTIFICATE, _chain)

    def keep_certificate(self, chain: Sequence[x509.Certificate]) -> bool:
        """Replace it; False when the disk refused."""
        return self._replace(_CERTIFICATE, list(der(chain)))

    def authority(self) -> tuple[x509.Certificate, ...] | None:
        """The chain by which this node was appointed; None when there is none, or none that can be believed."""
        return self._load(_AUTHORITY, _chain)

    def keep_authority(self, chain: Sequence[x509.Certificate]) -> bool:
        """Replace it; False when the disk refused."""
        return self._replace(_AUTHORITY, list(der(chain)))

    def keyring(self) -> tuple[DatagramKey, ...]:
        """The keys that were held; empty when there are none, or none that can be believed."""

        def key(each: object) -> DatagramKey:
            match each:
                case [int(generation), bytes(key)] if generation >= 0 and len(key) == _KEY_BYTES:
                    return DatagramKey(generation, key)
                case _:
                    raise _MalformedError

        return self._load(_KEYRING, lambda content: _each(content, key)) or ()

    def keep_keyring(self, keys: Iterable[DatagramKey]) -> bool:
        """Replace it; False when the disk refused."""
        return self._replace(_KEYRING, [[each.generation, each.key] for each in keys])

    def decrees(self) -> tuple[bytes, ...]:
        """The decrees that were held, as they travel; who loads them checks them."""

        def raw(each: object) -> bytes:
            if not isinstance(each, bytes):
                raise _MalformedError
            return each

        return self._load(_DECREES, lambda content: _each(content, raw)) or ()

    def keep_decrees(self, raws: Iterable[bytes]) -> bool:
        """Replace them; False when the disk refused."""
        return self._replace(_DECREES, list(raws))

    def roster(self) -> tuple[Known, ...]:
        """Who was known."""

        def known(each: object) -> Known:
            match each:
                case [bytes(node), str(role), str(name)] if len(node) == _NODE_BYTES:
                    if role not in {one.value for one in Role} or len(name) > NAME_CHARS_MAX:
                        raise _MalformedError
                    return Known(NodeId(node), Role(role), name)
                case _:
                    raise _MalformedError

        return self._load(_ROSTER, lambda content: _each(content, known)) or ()

    def keep_roster(self, roster: Iterable[Known]) -> bool:
        """Replace it; False when the disk refused."""
        return self._replace(_ROSTER, [[each.node, each.role.value, each.name] for each in roster])

    # -- files -------------------------------------------------------------------------------------------

    def _load(self, file: _File, read: Callable[[object], T]) -> T | None:
        path = self._folder / file.name
        try:
            return read(unpack(disclose(file.name, FORMAT, self._files.read(path, file.bytes_max))))
        except FileNotFoundError:
            return None
        except FlawedFile as flawed:
            self._set_aside(path, f"it is {flawed.flaw.value}")
        except (CodecError, _MalformedError):
            self._set_aside(path, f"it is {Flaw.NOT_OURS.value}")
        except OSError as error:
            self._set_aside(path, f"it cannot be read: {error.strerror or error}")
        return None

    def _replace(self, file: _File, content: object) -> bool:
        path = self._folder / file.name
        beside = self._folder / f".{file.name}.new"
        try:
            self._files.write(beside, enclose(file.name, FORMAT, pack(content)))
            self._files.rename(beside, path)
            self._files.sync_folder(self._folder)
        except OSError as error:
            self._refused(file.name, error)
            return False
        self._refusing = False
        return True

    def _refused(self, name: str, error: OSError) -> None:
        if not self._refusing:  # one line when it begins
            self._log.warning(
                "trust.write_refused",
                file=str(self._folder / name),
                error=str(error),
                do=f"{self._folder}: free some space, or make it writable for the user that runs meshd",
            )
        self._refusing = True

    def _set_aside(self, path: Path, why: str) -> None:
        stem = f"{path.name}.damaged-"
        aside = self._folder / f"{stem}{time.time_ns() // 1_000_000}"
        kept_as: str | None = None
        try:
            self._files.rename(path, aside)
            kept_as = str(aside)
            kept = [name for name in self._files.names(self._folder) if name.startswith(stem)]
            for name in kept[:-ASIDE_MAX]:
                self._files.remove(self._folder / name)
        except OSError as error:
            self._refused(path.name, error)
        self._log.warning(
            "trust.set_aside",
            file=str(path),
            why=why,
            kept_as=kept_as,
            do="nothing: peers give back what it held; if this happens again, replace the disk",
        )


class _MalformedError(Exception):
    """The content has a good checksum and is not what this release writes."""


def _each(content: object, read: Callable[[object], T]) -> tuple[T, ...]:
    if not _is_list(content):
        raise _MalformedError
    return tuple(read(each) for each in content)


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _are_bytes(values: list[object]) -> TypeGuard[list[bytes]]:
    return all(isinstance(each, bytes) for each in values)


def _chain(content: object) -> tuple[x509.Certificate, ...]:
    if not _is_list(content) or not content or not _are_bytes(content):
        raise _MalformedError
    try:
        return parse_der(content)
    except CertificateError:
        raise _MalformedError from None
