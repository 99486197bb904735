"""What stands in the way of a daemon that is not running: the facts that `meshd doctor` checks without one.

Everything is tried as the daemon would at its start, and undone at once: keys are read, the ports bound and
closed, a file written to the state folder and deleted.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import trio

from meshd.cli.failures import CommandError
from meshd.config import Config
from meshd.edge.errors import EdgeError
from meshd.edge.exposure import keys_for
from meshd.edge.sockets import open_tcp_socket
from meshd.health import ClockFacts, Facts, Trouble, TroubleKind, examine
from meshd.orchestrate.lookout import report_value
from meshd.shell.addresses import ListenError, listen
from meshd.shell.surroundings import machine_facts
from meshd.trust.identity import IdentityError, load_identity

if TYPE_CHECKING:
    from pathlib import Path

    from meshd.cli.settings import Settings
    from meshd_plugins.api import Value


def report_without_daemon(settings: Settings, path: str, denied: str) -> Mapping[str, Value]:
    """The report when no daemon answers.

    Args:
        settings: of the command line.
        path: the socket that was tried, "" when the configuration does not even say that.
        denied: why this user may not use the socket, "" when that is not it; a daemon then holds the
            ports, and nothing is said of them.
    """
    troubles: list[Trouble] = []
    try:
        config = settings.config()
    except CommandError as error:
        config = Config()
        troubles.append(Trouble(TroubleKind.CONFIG, error.message))
    if denied:
        troubles.append(Trouble(TroubleKind.SOCKET_DENIED, denied))
    elif not troubles:
        troubles.extend(_obstacles(config))
    listening, discovery = config.listen, config.discovery

    async def look() -> Facts:
        machine = await machine_facts(listening.host, discovery.interfaces, mdns=discovery.mdns)
        return Facts(
            clock=ClockFacts(time.time()),
            machine=machine,
            troubles=tuple(troubles),
            socket=path or str(config.http.socket),
        )

    return report_value(examine(trio.run(look)))


def _obstacles(config: Config) -> Iterator[Trouble]:
    """Whatever would keep the daemon from starting now."""
    folder = config.node.state_dir
    try:
        load_identity(folder)
    except IdentityError as error:
        yield Trouble(TroubleKind.IDENTITY, str(error))
    if message := _not_writable(folder):
        yield Trouble(TroubleKind.DISK, message)
    try:
        listen(config.listen.host, config.listen.port).close()
    except ListenError as error:
        yield Trouble(TroubleKind.PORT, str(error))
    try:
        keys_for(config)
        open_tcp_socket(config.http.host, config.http.port).close()
    except EdgeError as error:
        yield Trouble(TroubleKind.PORT, str(error))


def _not_writable(folder: Path) -> str:
    """Why the state folder takes no file; "" when it does, or when it is not ours to try."""
    try:
        if not folder.is_dir() or os.geteuid() not in (0, folder.stat().st_uid):
            return ""
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"the state folder {folder} takes no file: {error.strerror or error}"
    return ""
