"""Whether a port of this machine is open to others, from /proc."""

from __future__ import annotations

from pathlib import Path
from typing import Final

TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LINES_MAX: Final = 10_000  # listening sockets come first in the kernel's tables
_LISTEN: Final = "0A"
_LOOPBACK_4: Final = "7F"  # addresses are little-endian words: the first byte comes last
_LOOPBACK_6: Final = "00000000000000000000000001000000"
_MAPPED: Final = "0000000000000000FFFF0000"


def is_exposed(port: int, tables: tuple[Path, ...] = TABLES) -> bool:
    """Whether somebody listens on `port` of an address beyond loopback. Blocks; False where it cannot be told."""
    wanted = f"{port:04X}"
    for path in tables:
        try:
            with path.open() as file:
                for number, line in enumerate(file):
                    if number > LINES_MAX:
                        break
                    fields = line.split()
                    if len(fields) < 4 or fields[3] != _LISTEN:
                        continue
                    address, _, found = fields[1].partition(":")
                    if found == wanted and not _is_loopback(address):
                        return True
        except OSError:
            continue
    return False


def _is_loopback(address: str) -> bool:
    if len(address) == 8:
        return address.endswith(_LOOPBACK_4)
    return address == _LOOPBACK_6 or (address.startswith(_MAPPED) and address.endswith(_LOOPBACK_4))
