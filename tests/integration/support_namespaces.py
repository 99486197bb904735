"""Hosts of one local network: network namespaces joined by an Ethernet bridge, and daemons on them.

The bridge and every link live in namespaces of their own, so nothing of the machine's own network is
touched, and deleting the namespaces deletes all. Names hold the id of this process; addresses are private
and exist in these namespaces only.

with Bridge() as lan, LanMesh(tmp) as mesh:
    one = mesh.start_on(lan.add_host(), "one")
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support_daemons import STOP_DEADLINE_S, Daemon, Mesh

NETWORK = "10.77.0"  # /24, private, and only in these namespaces
NETWORK_V6 = "fd77::"  # /64, the same
INTERFACE = "eth0"
COMMAND_DEADLINE_S = 20.0
LISTEN_PORT = 7946  # the daemon's defaults: every host has all its ports to itself
HTTP_PORT = 8642
_serial = itertools.count(1)


class NoNamespacesError(Exception):
    """This machine does not let us make namespaces or what is in them; the text says what was refused."""


def why_unavailable(lan: type[Lan]) -> str | None:
    """What keeps this process from making such a network; None if nothing does."""
    if shutil.which("ip") is None:
        return "needs the command `ip` (Debian package iproute2)"
    if os.geteuid() != 0:
        return "needs root: network namespaces and interfaces are made"
    try:
        with lan() as made:
            made.add_host()
    except NoNamespacesError as error:
        return f"this machine refuses network namespaces: {error}"
    return None


def ip(*arguments: str) -> None:
    """Run `ip`; its refusal is raised with what it said."""
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False
    )
    if done.returncode != 0:
        raise NoNamespacesError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine of a network; its interface is `eth0`."""

    namespace: str
    address: str = field(compare=False)  # IPv4 literal; on eth0 once it is plugged in
    number: int  # its port, from 1

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs on this host; the process keeps its id."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    @property
    def address_v6(self) -> str:
        """Given by `Lan.use_ipv6_only`."""
        return f"{NETWORK_V6}{self.number}"


class Lan(ABC):
    """A network with hosts; all are deleted on exit, whatever happened inside."""

    def __init__(self) -> None:
        self._name = f"meshd-{os.getpid()}-{next(_serial)}"
        self._cleanup = ExitStack()
        self._hosts = itertools.count(1)

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def add_host(self, *, plugged_in: bool = True) -> Host:
        """One more host; unless `plugged_in`, it has the loopback interface and nothing else."""
        number = next(self._hosts)
        name = f"{self._name}-host{number}"
        host = Host(name, f"{NETWORK}.{number}", number)
        self._add_namespace(name)
        ip("-n", name, "link", "set", "lo", "up")
        if plugged_in:
            self.plug_in(host)
        return host

    def plug_in(self, host: Host) -> None:
        """Give the host an interface with its address, and connect it to the network."""
        self._add_interface(host)
        ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        ip("-n", host.namespace, "link", "set", INTERFACE, "up")

    def remove_interface(self, host: Host) -> None:
        """The interface is gone, as a USB adapter that is pulled out; `plug_in` brings it back."""
        ip("-n", host.namespace, "link", "delete", INTERFACE)

    @abstractmethod
    def unplug(self, host: Host) -> None:
        """Pull the cable: the host sees that its link is down."""

    @abstractmethod
    def plug_back(self, host: Host) -> None:
        """Undo `unplug`."""

    @abstractmethod
    def cut(self, host: Host) -> None:
        """Nothing passes any more, and the host's link stays up: a switch or a cable further on fails."""

    @abstractmethod
    def heal(self, host: Host) -> None:
        """Undo `cut`."""

    def add_containers(self, host: Host) -> None:
        """The bridge of a container runtime with a container on it: every such host has this address."""
        ip("-n", host.namespace, "link", "add", "docker0", "type", "bridge")
        ip("-n", host.namespace, "address", "add", "172.17.0.1/16", "dev", "docker0")
        ip("-n", host.namespace, "link", "add", "box0", "type", "veth", "peer", "name", "box1")
        ip("-n", host.namespace, "link", "set", "box0", "master", "docker0", "up")
        ip("-n", host.namespace, "link", "set", "box1", "up")
        ip("-n", host.namespace, "link", "set", "docker0", "up")

    def change_address(self, host: Host, address: str) -> Host:
        """The host's address is replaced, as by another lease."""
        self._flush(host)
        ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
        return Host(host.namespace, address, host.number)

    def use_ipv6_only(self, host: Host) -> None:
        """Replace the host's IPv4 address by `host.address_v6`."""
        self._flush(host)
        wanted = ["address", "add", f"{host.address_v6}/64", "dev", INTERFACE, "nodad"]
        ip("-n", host.namespace, "-6", *wanted)

    def take_down(self, host: Host) -> None:
        """The interface is switched off; it keeps its IPv4 address."""
        ip("-n", host.namespace, "link", "set", INTERFACE, "down")

    def bring_up(self, host: Host) -> None:
        """Undo `take_down`."""
        ip("-n", host.namespace, "link", "set", INTERFACE, "up")

    def _flush(self, host: Host) -> None:
        ip("-n", host.namespace, "-4", "address", "flush", "dev", INTERFACE, "scope", "global")

    def _add_namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self._cleanup.callback(ip, "netns", "delete", name)

    @abstractmethod
    def _build(self) -> None:
        """Make what joins the hosts."""

    @abstractmethod
    def _add_interface(self, host: Host) -> None:
        """Make `eth0` on the host; it is down and has no address."""


class Bridge(Lan):
    """Hosts on the kernel's own Ethernet bridge."""

    def _build(self) -> None:
        self._bridge = f"{self._name}-bridge"
        self._add_namespace(self._bridge)
        ip("-n", self._bridge, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self._bridge, "link", "set", "bridge0", "up")

    def _add_interface(self, host: Host) -> None:
        end = ["name", INTERFACE, "netns", host.namespace]
        ip("-n", self._bridge, "link", "add", f"port{host.number}", "type", "veth", "peer", *end)
        self._port(host, "master", "bridge0", "up")

    def unplug(self, host: Host) -> None:
        self._port(host, "down")

    def plug_back(self, host: Host) -> None:
        self._port(host, "up")

    def cut(self, host: Host) -> None:
        self._port(host, "nomaster")

    def heal(self, host: Host) -> None:
        self._port(host, "master", "bridge0")

    def _port(self, host: Host, *change: str) -> None:
        ip("-n", self._bridge, "link", "set", "dev", f"port{host.number}", *change)


class LanMesh(Mesh):
    """Daemons of one mesh on hosts of a `Lan`, with the default settings for listening and discovery."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, command=[sys.executable, "-m", "meshd"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The hosts lose their power: how a daemon stops is tested elsewhere, and takes longer."""
        for daemon in self.daemons:
            daemon.process.kill()
        for daemon in self.daemons:
            daemon.process.wait(STOP_DEADLINE_S)

    def start_on(
        self,
        host: Host,
        name: str,
        *,
        plugins: Sequence[str] = ("hardware",),
        sections: str = "",
        wait: bool = True,
    ) -> Daemon:
        """Start a daemon on a host and, if `wait`, return when it is ready.

        Its Unix socket lies in a file system that all hosts share: the test asks it from outside.
        """
        folder = self.init(name)
        (folder / "meshd.toml").write_text(
            f"""[node]
name = "{name}"
state_dir = "{folder / "state"}"
[http]
socket = "{folder / "meshd.sock"}"
[plugins]
enable = {json.dumps(list(plugins))}
{sections}
"""
        )
        return self.boot(host, name, wait=wait)

    def boot(self, host: Host, name: str, *, wait: bool = True) -> Daemon:
        """Start a daemon whose folder is there already: as after a crash, or on another host."""
        folder = self.folder / name
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                host.command(*self.command, "--config", str(folder / "meshd.toml"), "run"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        daemon = Daemon(name, folder, LISTEN_PORT, HTTP_PORT, process)
        self.daemons.append(daemon)
        if wait:
            self.wait(f"{name} to be ready", daemon, lambda: bool(daemon.get("/mesh/v1/status")))
        return daemon


def freeze(daemon: Daemon) -> None:
    """Stop the process where it is; nothing of it runs until `thaw`."""
    daemon.process.send_signal(signal.SIGSTOP)


def thaw(daemon: Daemon) -> None:
    """Undo `freeze`."""
    daemon.process.send_signal(signal.SIGCONT)
