"""Real daemons for benches and end-to-end tests: processes of their own, on loopback, found by seeds.

with Mesh(tmp) as mesh:
    entry = mesh.start("entry", plugins=["hardware"])
    peer = mesh.start("peer", plugins=["echo"], tables="[plugins.echo]\\nslots = 64\\n")
    mesh.wait_for_capability(entry, "computation.gpt/echo")
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from meshd.trust.identity import Identity, Role, admit, init_mesh

HOST = "127.0.0.1"
READY_DEADLINE_S = 20.0
STOP_DEADLINE_S = 15.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float = 15.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(slots=True)
class Daemon:
    """One running daemon."""

    name: str
    folder: Path
    port: int
    http_port: int
    process: subprocess.Popen[bytes]
    started_s: float = field(default_factory=time.monotonic)

    @property
    def socket(self) -> Path:
        return self.folder / "meshd.sock"

    def get(self, path: str) -> Any:
        """A GET of the mesh API, decoded; raises OSError while the daemon is not up."""
        connection = UnixConnection(self.socket)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise OSError(f"{path}: {answer.status} {body}")
        return body

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def resident_bytes(self) -> int:
        """RSS, from /proc."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096

    def cpu_s(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100.0


class Mesh:
    """Daemons of one mesh in one folder; all ended on exit, by id."""

    def __init__(self, folder: Path, *, command: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.command = list(command or [sys.executable, "-m", "meshd"])
        self.daemons: list[Daemon] = []
        self._founder: Identity | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        running = [daemon.process for daemon in self.daemons if daemon.process.poll() is None]
        for process in running:
            process.terminate()
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        for process in running:
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def init(self, name: str) -> Path:
        """A state folder with an identity; the first one founds the mesh.

        As the commands do it, without half a second for a process each time.
        """
        folder = self.folder / name
        folder.mkdir(parents=True)
        self.admit(folder / "state")
        return folder

    def admit(self, state: Path, role: Role = Role.MEMBER) -> Identity:
        """Give a state folder an identity in this mesh; the first one is the founder's."""
        if self._founder is None:
            self._founder = init_mesh(state, "bench")
            return self._founder
        return admit(self._founder, state, role=role)

    def start(
        self,
        name: str,
        *,
        plugins: Sequence[str] = ("hardware",),
        tables: str = "",
        sections: str = "",
        mdns: bool = False,
        wait: bool = True,
    ) -> Daemon:
        """Start a daemon and, if `wait`, return when it is ready."""
        folder = self.folder / name
        if not folder.exists():
            self.init(name)
        port, http_port = free_port(), free_port()
        seeds = [] if mdns or not self.daemons else [f"{HOST}:{self.daemons[0].port}"]
        (folder / "meshd.toml").write_text(
            f"""[node]
name = "{name}"
state_dir = "{folder / "state"}"
[listen]
host = "{HOST}"
port = {port}
[discovery]
mdns = {str(mdns).lower()}
seeds = {json.dumps(seeds)}
[http]
port = {http_port}
socket = "{folder / "meshd.sock"}"
[plugins]
enable = {json.dumps(list(plugins))}
{sections}
{tables}
"""
        )
        return self.launch(name, port, http_port, wait=wait)

    def launch(self, name: str, port: int, http_port: int, *, wait: bool = True) -> Daemon:
        """Start a daemon whose configuration is there already."""
        folder = self.folder / name
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [*self.command, "--config", str(folder / "meshd.toml"), "run"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        daemon = Daemon(name, folder, port, http_port, process)
        self.daemons.append(daemon)
        if wait:
            self.wait(f"{name} to be ready", daemon, lambda: bool(daemon.get("/mesh/v1/status")))
        return daemon

    def wait(
        self,
        what: str,
        daemon: Daemon,
        done: Callable[[], bool],
        deadline_s: float = READY_DEADLINE_S,
        poll_s: float = 0.02,
    ) -> float:
        """Poll until `done()`, which may raise OSError; seconds it took."""
        began_s = time.monotonic()
        while True:
            try:
                if done():
                    return time.monotonic() - began_s
            except (OSError, http.client.HTTPException):
                pass
            if daemon.process.poll() is not None:
                raise AssertionError(f"{daemon.name} ended:\n{daemon.log()[-3000:]}")
            if time.monotonic() - began_s > deadline_s:
                raise AssertionError(f"not in {deadline_s} s: {what}\n{daemon.log()[-3000:]}")
            time.sleep(poll_s)

    def wait_for_capability(self, daemon: Daemon, name: str, holders: int = 1) -> float:
        """Wait until a daemon knows that many live holders of a name."""

        def known() -> bool:
            rows = daemon.get("/mesh/v1/capabilities")["capabilities"]
            live = [row for row in rows if row["name"] == name and row["state"] == "alive"]
            return len(live) >= holders

        return self.wait(f"{name} to be known", daemon, known)

    def wait_for_members(self, daemon: Daemon, count: int, deadline_s: float = 20.0) -> float:
        """Wait until a daemon sees that many live members, itself counted."""

        def seen() -> bool:
            rows = daemon.get("/mesh/v1/peers")["peers"]
            return sum(row["state"] == "alive" for row in rows) == count

        return self.wait(f"{count} members", daemon, seen, deadline_s)


def free_port() -> int:
    """A port that was free for TCP and UDP a moment ago."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        tcp.bind((HOST, 0))
        port: int = tcp.getsockname()[1]
        udp.bind((HOST, port))
        return port
