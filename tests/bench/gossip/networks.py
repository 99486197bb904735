"""Where the nodes of a bench live: private network namespaces, deleted on exit whatever happened inside.

`Loopback`: all nodes in one namespace, each with an address of its own on the loopback interface; nothing is
in the way, so what is measured is the implementations. `Switched`: each node is a host on a switch in user
space, which can lose, delay and partition. Loss on `Loopback` needs an iptables module; where that is
missing, `lossy` falls back on `Switched`, which needs none.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from tests.integration.support_namespaces import NoNamespacesError, ip
from tests.integration.support_switch import Quality, Switch

NAMESPACE = "gossip-bench"
PORT = 7946
ADDRESSES_PER_BLOCK = 250
COMMAND_DEADLINE_S = 20.0
SWITCH_DELAY_S = 0.001
_serial = itertools.count(1)


class Network(Protocol):
    """Addresses, and processes that have them."""

    def address(self, number: int) -> str:
        """IPv4 literal of a node."""
        ...

    def command(self, number: int, argv: Sequence[str]) -> list[str]:
        """A command line that runs where that node lives; the process keeps its id."""
        ...

    def lose(self, share: float) -> None:
        """From now on this share of all packets is lost, of every protocol."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Loopback:
    """One namespace with a loopback interface, and nothing else."""

    def __init__(self) -> None:
        self._name = f"{NAMESPACE}-{os.getpid()}-{next(_serial)}"

    def __enter__(self) -> Self:
        ip("netns", "add", self._name)
        try:
            ip("-n", self._name, "link", "set", "lo", "up")
        except BaseException:
            ip("netns", "delete", self._name)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ip("netns", "delete", self._name)

    def address(self, number: int) -> str:
        """All of 127.0.0.0/8 is there."""
        block, place = divmod(number, ADDRESSES_PER_BLOCK)
        return f"127.77.{block}.{place + 1}"

    def command(self, number: int, argv: Sequence[str]) -> list[str]:
        """The same for all nodes."""
        return ["ip", "netns", "exec", self._name, *argv]

    def lose(self, share: float) -> None:
        """Drop packets as they come in; each passes once.

        Raises:
            NoNamespacesError: the machine cannot; nothing is lost then.
        """
        rule = ["-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
        command = self.command(0, ["iptables-legacy", "-A", "INPUT", *rule])
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False
        )
        if done.returncode != 0:
            raise NoNamespacesError(f"iptables-legacy: {done.stderr.strip()}")


class Switched:
    """Hosts on a switch, a millisecond apart."""

    def __init__(self, count: int) -> None:
        self._switch = Switch()
        self._count = count
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._switch)
            self._hosts = [self._switch.add_host() for _ in range(self._count)]
            self._switch.set_all(Quality(delay_s=SWITCH_DELAY_S))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def address(self, number: int) -> str:
        """That of the host."""
        return self._hosts[number].address

    def command(self, number: int, argv: Sequence[str]) -> list[str]:
        """On that host."""
        return self._hosts[number].command(*argv)

    def lose(self, share: float) -> None:
        """Frames are lost between any two hosts, each way."""
        self._switch.set_all(Quality(delay_s=SWITCH_DELAY_S, loss=share))

    def part(self, sides: Sequence[Sequence[int]]) -> None:
        """Nothing passes between hosts of different sides."""
        self._switch.partition(*[[self._hosts[number] for number in side] for side in sides])

    def heal(self) -> None:
        """Everything passes again."""
        self._switch.set_all(Quality(delay_s=SWITCH_DELAY_S))


def why_unavailable() -> str | None:
    """What keeps this process from making a `Loopback`; None if nothing does."""
    if shutil.which("ip") is None:
        return "needs the command `ip` (Debian package iproute2)"
    if os.geteuid() != 0:
        return "needs root: network namespaces are made"
    try:
        with Loopback():
            return None
    except NoNamespacesError as error:
        return f"this machine refuses network namespaces: {error}"


def lossy(count: int) -> Network:
    """A network that can lose packets on this machine."""
    try:
        with Loopback() as trial:
            trial.lose(0.1)
    except (NoNamespacesError, OSError):  # OSError: there is no such command
        return Switched(count)
    return Loopback()


def sweep() -> int:
    """Delete namespaces of benches that were killed before they could; how many."""
    listed = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
    ).stdout
    swept = 0
    for line in listed.splitlines():
        name = line.split()[0]
        if name.startswith(f"{NAMESPACE}-") and not Path(f"/proc/{name.split('-')[2]}").exists():
            ip("netns", "delete", name)
            swept += 1
    return swept
