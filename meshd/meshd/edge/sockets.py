"""The sockets of the edge: TCP on loopback, and a Unix socket with a mode and a group.

Opening them is separate from serving, so that a port in use is known before the node says it is ready.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshd.edge.errors import EdgePortInUse, EdgeSocketDenied, EdgeSocketInUse

if TYPE_CHECKING:
    from meshd.config import HttpSection

_BACKLOG: Final = 128
_PROBE_S: Final = 0.5  # that a daemon on a stale-looking socket has to accept
_MODE: Final = 0o660
_PATH_BYTES_MAX: Final = 107  # sockaddr_un.sun_path, less its final zero


@dataclass(frozen=True, slots=True)
class EdgeSockets:
    """Open, listening sockets and how connections on them are kept."""

    tcp: socket.socket
    unix: socket.socket
    path: Path  # of `unix`
    file_id: tuple[int, int]  # device and inode of `path`
    connections_max: int  # further ones wait in the backlog
    keep_alive_s: float  # that an idle connection is kept

    @property
    def port(self) -> int:
        """The TCP port; the one that the system chose, where 0 was asked for."""
        port: int = self.tcp.getsockname()[1]
        return port

    def close(self) -> None:
        """Close both and remove the Unix socket's file, if it is still ours. May be called again."""
        if _file_id(self.path) == self.file_id:
            self.path.unlink(missing_ok=True)
        self.tcp.close()
        self.unix.close()


def open_edge_sockets(http: HttpSection) -> EdgeSockets:
    """Open both sockets, or neither.

    Raises:
        EdgePortInUse: the TCP address is taken.
        EdgeSocketInUse: a daemon answers on the Unix socket.
        EdgeSocketDenied: its file cannot be made.
    """
    tcp = open_tcp_socket(http.host, http.port)
    try:
        # Connections inherit it. Without it the system grows the buffer of a client that does not read to MiBs.
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, http.send_buffer_bytes)
        unix = open_unix_socket(http.socket, http.socket_group)
    except BaseException:
        tcp.close()
        raise
    return EdgeSockets(
        tcp=tcp,
        unix=unix,
        path=http.socket,
        file_id=_file_id(http.socket),
        connections_max=http.connections_max,
        keep_alive_s=http.keep_alive_s,
    )


def open_tcp_socket(host: str, port: int) -> socket.socket:
    """Listen on a TCP port.

    Raises:
        EdgePortInUse: the address is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise EdgePortInUse(
                f"port {port} on {host} is in use: is another meshd running (`meshd status`)? "
                "Otherwise set http.port to a free one, or to 0 for any"
            ) from error
        raise EdgePortInUse(
            f"cannot listen on {host} port {port}: {error.strerror}; set http.host and http.port"
        ) from error
    return listening


def open_unix_socket(path: Path, group: str) -> socket.socket:
    """Listen on a Unix socket of mode 0660, of `group` where that exists and we may give it away.

    A socket file on which nobody answers is left over from a crash, and is replaced.

    Raises:
        EdgeSocketInUse: a daemon answers there.
        EdgeSocketDenied: the file cannot be made.
    """
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise EdgeSocketDenied(
            f"the path of the Unix socket is over {_PATH_BYTES_MAX} bytes: {path}; "
            "set http.socket to a shorter one"
        )
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        # The mode is right from the first moment: between bind and chmod anyone could connect.
        before = os.umask(0o777 & ~_MODE)
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(before)
        _give_to(path, group)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise EdgeSocketDenied(
            f"cannot make the Unix socket {path}: {error.strerror}; "
            "set http.socket to a path in a folder that this user may write"
        ) from error
    return listening


def _remove_stale(path: Path) -> None:
    try:
        mode = path.stat(follow_symlinks=False).st_mode
    except OSError:
        return  # not there, or not ours to see: binding says which
    if not stat.S_ISSOCK(mode):
        raise EdgeSocketDenied(f"{path} exists and is no socket; remove it, or set http.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise EdgeSocketDenied(
                f"{path} belongs to another user; set http.socket to another path"
            ) from error
        except (TimeoutError, BlockingIOError):
            pass  # somebody holds it and is busy
    raise EdgeSocketInUse(
        f"another meshd answers on {path}; stop it, or give this one its own node.state_dir "
        "or http.socket"
    )


def _give_to(path: Path, group: str) -> None:
    """Set the group. Without it only the daemon's own user reaches the socket, which is safe."""
    if not group:
        return
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    except (KeyError, PermissionError):
        return


def _file_id(path: Path) -> tuple[int, int]:
    """What tells our socket file from one that a later daemon put in its place."""
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return (0, 0)
    return (status.st_dev, status.st_ino)
