"""sd_notify against a real datagram socket, by path and in the abstract namespace."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from meshd.shell.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The service manager's end, and NOTIFY_SOCKET for it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@meshd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name if request.param == "path" else "\0" + name[1:])
        receiver.setblocking(False)
        yield receiver, name


def received(receiver: socket.socket) -> list[str]:
    messages: list[str] = []
    while True:
        try:
            messages.append(receiver.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_ready_status_and_stopping(manager: tuple[socket.socket, str]) -> None:
    receiver, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("kitchen in home")
    notifier.status("3 members\nREADY=0")
    notifier.stopping()
    assert received(receiver) == [
        "READY=1\nSTATUS=kitchen in home",
        "STATUS=3 members READY=0",
        "STOPPING=1\nSTATUS=stopping",
    ]
    assert (notifier.sent, notifier.lost) == (3, 0)


def test_watchdog_speaks_at_half_its_period(manager: tuple[socket.socket, str]) -> None:
    receiver, name = manager
    notifier = Notifier(
        {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    )
    assert notifier.watchdog_interval_s == 15.0

    async def main() -> None:
        with trio.move_on_after(46):
            await notifier.watchdog()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert received(receiver) == ["WATCHDOG=1"] * 4  # at 0, 15, 30 and 45 s


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "30000000"},
        {"NOTIFY_SOCKET": "/absent"},
        {"NOTIFY_SOCKET": "/absent", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/absent", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/absent", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "vsock:2:9999", "WATCHDOG_USEC": "30000000"},
    ],
)
def test_no_watchdog_unless_it_is_meant_for_us(environment: dict[str, str]) -> None:
    notifier = Notifier(environment)
    assert notifier.watchdog_interval_s is None
    trio.run(notifier.watchdog)


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({})
    notifier.ready("up")
    notifier.stopping()
    assert not notifier.enabled
    assert (notifier.sent, notifier.lost) == (0, 0)


def test_a_manager_that_went_away_is_counted_and_never_raises(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notifier.ready("up")
    assert (notifier.sent, notifier.lost) == (0, 1)


def test_a_full_socket_never_blocks_the_loop(manager: tuple[socket.socket, str]) -> None:
    _, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    for _ in range(2000):
        notifier.status("x" * 500)
    assert notifier.lost > 0
    assert notifier.sent + notifier.lost == 2000
