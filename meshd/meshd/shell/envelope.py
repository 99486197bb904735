r"""The first line of every file that a node rewrites: what it is, in which format, and a checksum.

    meshd-state KIND FORMAT LENGTH CHECKSUM\n

then LENGTH bytes of content. CHECKSUM is blake2b-16 in hex over "KIND FORMAT LENGTH\n" and the content. A
line of text, so that `head -1 FILE` tells a person what a file is.

Any change of any byte is found. That a file is of another format is believed only with the right checksum,
which covers the format too: a flipped bit is damage, and not a file of another release.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

_MAGIC: Final = b"meshd-state"
_CHECKSUM_BYTES: Final = 16
HEADER_BYTES_MAX: Final = 128


class Flaw(StrEnum):
    """Why a file is not believed; the value completes "the file is ..."."""

    CUT_SHORT = "cut short"
    NOT_OURS = "not one that meshd wrote"
    DAMAGED = "damaged: its checksum does not fit"
    OTHER_KIND = "another file of meshd under this name"
    OTHER_FORMAT = "of another release of meshd"


class FlawedFile(Exception):
    """The bytes are not what was written under this name. Holds the reason; nothing was changed."""

    code = "flawed_file"

    def __init__(self, flaw: Flaw) -> None:
        self.flaw = flaw
        super().__init__(flaw.value)


def enclose(kind: str, form: int, content: bytes) -> bytes:
    """The bytes of a file of this kind (a word) and format."""
    return _header(kind.encode(), form, content) + content


def disclose(kind: str, form: int, data: bytes) -> bytes:
    """The content of a file of this kind and format.

    Raises:
        FlawedFile: it is not one, or not as it was written; nothing else is raised on any bytes.
    """
    line, newline, content = data.partition(b"\n")
    if not newline or len(line) >= HEADER_BYTES_MAX:
        begun = line[:HEADER_BYTES_MAX].startswith(_MAGIC) or _MAGIC.startswith(line)
        raise FlawedFile(Flaw.CUT_SHORT if begun else Flaw.NOT_OURS)
    fields = line.split(b" ")
    if fields[0] != _MAGIC or len(fields) != 5:
        raise FlawedFile(Flaw.NOT_OURS)
    written, number, length = fields[1], fields[2], fields[3]
    if not (number.isdigit() and length.isdigit() and len(number) < 10 and len(length) < 16):
        raise FlawedFile(Flaw.NOT_OURS)
    if len(content) < int(length):
        raise FlawedFile(Flaw.CUT_SHORT)
    if _header(written, int(number), content) != line + newline:
        raise FlawedFile(Flaw.DAMAGED)
    if written != kind.encode():
        raise FlawedFile(Flaw.OTHER_KIND)
    if int(number) != form:
        raise FlawedFile(Flaw.OTHER_FORMAT)
    return content


def _header(kind: bytes, form: int, content: bytes) -> bytes:
    covered = b"%b %d %d" % (kind, form, len(content))
    checksum = hashlib.blake2b(covered + b"\n" + content, digest_size=_CHECKSUM_BYTES)
    return b"%b %b %b\n" % (_MAGIC, covered, checksum.hexdigest().encode())
