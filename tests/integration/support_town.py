"""A small mesh on a switch, and what its daemons say of each other.

The daemons are asked over their own API. Waiting is polling with a generous deadline; how long something
took is no verdict. That something never happened is read from the logs, which miss nothing.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.integration.support_namespaces import LISTEN_PORT, Host, Lan, LanMesh
from tests.integration.support_switch import Switch
from tests.support_daemons import Daemon

ECHO = "computation.gpt/echo"
LOCAL = '[gossip]\npreset = "local"\n'
ECHO_AT = "two"
SETTLED_DEADLINE_S = 40.0  # a silent host is declared dead after six seconds and more
ANSWER_DEADLINE_S = 30.0
ALIVE, SUSPECT, DEAD, LEFT = "alive", "suspect", "dead", "left"


def status(daemon: Daemon) -> dict[str, Any]:
    told: dict[str, Any] = daemon.get("/mesh/v1/status")
    return told


def peers(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in daemon.get("/mesh/v1/peers")["peers"]}


def states(daemon: Daemon) -> dict[str, str]:
    return {name: row["state"] for name, row in peers(daemon).items()}


def counter(daemon: Daemon, name: str, area: str = "gossip") -> int:
    return int(status(daemon)["counters"][area].get(name, 0))


def sees(**expected: str) -> Callable[[Daemon], bool]:
    """Whether a daemon holds these members, by name, in these states."""
    return lambda daemon: expected.items() <= states(daemon).items()


def misses(*names: str) -> Callable[[Daemon], bool]:
    """Whether a daemon would send nothing to any of these now."""

    def missed(daemon: Daemon) -> bool:
        held = states(daemon)
        return all(held[name] in {SUSPECT, DEAD} for name in names)

    return missed


def heard(daemon: Daemon, event: str, since: int = 0) -> list[str]:
    """Names of the members that an event in its log was about, after `since` characters."""
    told = (json.loads(line) for line in daemon.log()[since:].splitlines() if event in line)
    return [str(line.get("name")) for line in told if line.get("event") == event]


def answered_by(mesh: LanMesh, daemon: Daemon, prompt: str) -> str:
    """Ask the echo through this daemon; the name of the node that answered, correctly."""
    done = subprocess.run(
        [*mesh.command, "--socket", str(daemon.socket), "ask", "--json", ECHO, prompt],
        capture_output=True,
        text=True,
        timeout=ANSWER_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + daemon.log()[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(event.get("text", "") for event in told if event["event"] == "piece") == prompt
    return str(told[-1]["parts"][0]["node"])


def start_all(
    lan: Lan,
    mesh: LanMesh,
    names: Sequence[str] = ("one", "two", "three"),
    *,
    sections: str = "",
    hosts: Sequence[Host] = (),
) -> tuple[list[Host], list[Daemon]]:
    """Daemons on hosts of their own, each knowing the others and the echo, which `two` has."""
    on = list(hosts) or [lan.add_host() for _ in names]
    daemons = [
        mesh.start_on(
            host,
            name,
            plugins=["echo"] if name == ECHO_AT else ["hardware"],
            sections=sections,
            wait=False,
        )
        for host, name in zip(on, names, strict=True)
    ]
    for daemon in daemons:
        mesh.wait_for_members(daemon, len(names))
        mesh.wait_for_capability(daemon, ECHO)
    return on, daemons


class Town:
    """Daemons with default settings on hosts of one network; all know each other on entry.

    Args:
        lan: where the hosts are added.
        folder: for states and logs.
        names: of the daemons, each on a host of its own; `two` has the echo.
    """

    def __init__(self, lan: Lan, folder: Path, names: Sequence[str]) -> None:
        self._lan = lan
        self._names = names
        self._stack = ExitStack()
        self._marks: dict[str, int] = {}
        self.mesh = LanMesh(folder)
        self.hosts: dict[str, Host] = {}
        self.daemons: dict[str, Daemon] = {}

    def __enter__(self) -> Self:
        try:
            self._stack.enter_context(self.mesh)
            hosts, daemons = start_all(self._lan, self.mesh, self._names)
        except BaseException:
            self._stack.close()
            raise
        self.hosts = dict(zip(self._names, hosts, strict=True))
        self.daemons = dict(zip(self._names, daemons, strict=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Daemon:
        return self.daemons[name]

    def others(self, *names: str) -> list[Daemon]:
        return [daemon for name, daemon in self.daemons.items() if name not in names]

    def mark(self) -> None:
        """From here on the logs are read by `deaths`, `count` and `told`."""
        self._marks = {name: len(daemon.log()) for name, daemon in self.daemons.items()}

    def told(self, event: str, *by: str) -> set[tuple[str, str]]:
        """(who said so, about whom) of each such event since the mark, by these daemons or by all."""
        return {
            (name, about)
            for name in by or self.daemons
            for about in heard(self[name], event, self._marks.get(name, 0))
        }

    def count(self, event: str) -> int:
        """How often it was told since the mark."""
        marks = self._marks
        return sum(len(heard(self[name], event, marks.get(name, 0))) for name in self.daemons)

    def deaths(self) -> set[tuple[str, str]]:
        return self.told("member.failed")

    def wait(
        self,
        what: str,
        done: Callable[[Daemon], bool],
        daemons: Iterable[Daemon] | None = None,
        deadline_s: float = SETTLED_DEADLINE_S,
    ) -> None:
        """Until it is so at each of these daemons, at all of them by default."""
        for daemon in daemons if daemons is not None else self.daemons.values():
            self.mesh.wait(f"{what}, at {daemon.name}", daemon, partial(done, daemon), deadline_s)

    def wait_until_whole(self) -> None:
        """Until each sees each alive at its address, and nobody else."""
        everybody = {
            name: (ALIVE, f"{host.address}:{LISTEN_PORT}") for name, host in self.hosts.items()
        }

        def whole(daemon: Daemon) -> bool:
            rows = peers(daemon).items()
            held = {name: (row["state"], row["address"]) for name, row in rows}
            return {name: row for name, row in held.items() if row[0] != LEFT} == everybody

        self.wait("everybody to be there", whole)

    def wait_for_probes(self, count: int, daemons: Iterable[Daemon] | None = None) -> None:
        """Until one of them has probed others that many times more: time enough for a wrong accusation.

        One, for who has trouble probes less often.
        """
        probing = list(daemons if daemons is not None else self.daemons.values())
        before = {daemon.name: counter(daemon, "probes") for daemon in probing}
        self.mesh.wait(
            f"{count} more probes",
            probing[0],
            lambda: any(counter(each, "probes") >= before[each.name] + count for each in probing),
            SETTLED_DEADLINE_S,
            poll_s=0.1,
        )

    def all_answered(self, prompt: str) -> None:
        """The echo answers through every daemon."""
        for daemon in self.daemons.values():
            assert answered_by(self.mesh, daemon, prompt) == ECHO_AT


@dataclass(frozen=True, slots=True)
class Net:
    """A town and the switch that it is on."""

    town: Town
    switch: Switch

    def host(self, name: str) -> Host:
        return self.town.hosts[name]


class SharedTown:
    """One town on a switch for many tests: each finds it whole, or else gets another.

    Args:
        folder: for states and logs.
        names: of the daemons.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        self._built = 0
        self._stack = ExitStack()
        self._held: Net | None = None

    def take(self) -> Net:
        """The town, whole, and its switch, perfect."""
        if self._held is None:
            self._built += 1
            folder = self._folder / str(self._built)
            try:
                switch = self._stack.enter_context(Switch())
                town = self._stack.enter_context(Town(switch, folder, self._names))
            except BaseException:
                self._stack.close()
                raise
            self._held = Net(town, switch)
        self._held.town.mark()
        return self._held

    def give_back(self) -> None:
        """After a test. Raises AssertionError when it left the town such that it does not heal."""
        assert self._held is not None
        try:
            self._held.switch.repair()
            self._held.town.wait_until_whole()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._held = None
        self._stack.close()
