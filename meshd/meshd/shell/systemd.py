"""What the daemon tells systemd: that it is ready, how it is, that it stops, and that it still runs.

The protocol is sd_notify(3): datagrams of `NAME=value` lines to the socket in NOTIFY_SOCKET. Without
that variable every call does nothing. A datagram that cannot be sent is counted and never an error: the
service manager must not be able to break the service.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

import trio

STATUS_CHARS_MAX: Final = 200


class Notifier:
    """Speaks to the service manager, where there is one.

    Args:
        environment: by default the process's own.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = _socket_address(environment.get("NOTIFY_SOCKET", ""))
        self.watchdog_interval_s = _watchdog_interval_s(environment) if self._address else None
        self.sent = 0
        self.lost = 0

    @property
    def enabled(self) -> bool:
        """Whether there is a service manager to tell."""
        return self._address is not None

    def ready(self, status: str = "") -> None:
        """The daemon serves."""
        self._send("READY=1", *_status_lines(status))

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(*_status_lines(text))

    def stopping(self, status: str = "stopping") -> None:
        """The daemon has begun to stop."""
        self._send("STOPPING=1", *_status_lines(status))

    async def watchdog(self) -> None:
        """Say every half watchdog period that the event loop runs, until cancelled.

        A loop that hangs does not get here, and systemd restarts the service. Returns at once where no
        watchdog is asked for.
        """
        if self.watchdog_interval_s is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await trio.sleep(self.watchdog_interval_s)

    def _send(self, *lines: str) -> None:
        if self._address is None or not lines:
            return
        message = "\n".join(lines).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(message, self._address)
        except OSError:
            self.lost += 1
        else:
            self.sent += 1


def _socket_address(text: str) -> str | None:
    """For `sendto`. "@" stands for the NUL of the abstract namespace; other families are not ours."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else None


def _watchdog_interval_s(environment: Mapping[str, str]) -> float | None:
    """Half of WATCHDOG_USEC, as sd_watchdog_enabled(3) advises; None when it is not meant for us."""
    pid = environment.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    period = environment.get("WATCHDOG_USEC", "")
    return (
        int(period) / 2_000_000
        if period.isascii() and period.isdigit() and int(period) > 0
        else None
    )


def _status_lines(text: str) -> tuple[str, ...]:
    folded = " ".join(text.split())[:STATUS_CHARS_MAX]
    return (f"STATUS={folded}",) if folded else ()
