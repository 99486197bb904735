"""The face of a node towards its edges: HTTP, Unix socket, and whatever comes later.

The edge knows this protocol and nothing below it, so it can be tested with a fake mesh.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from meshd.orchestrate.audit import Wanted
from meshd.orchestrate.events import Ask, AskEvent
from meshd.orchestrate.metrics import Family
from meshd_plugins.api import Value

Take: TypeAlias = Callable[[AskEvent], Awaitable[None]]
"""Where the events of an ask go, in order."""


class AccessService(Protocol):
    """Who may use what at a node, and what left it."""

    def access(self) -> Mapping[str, Value]:
        """The rules in force, what they are about here, and how often each decided."""
        ...

    def record(self, kind: str, /, **fields: Value) -> None:
        """Note in the trail that something happened; never content."""
        ...

    async def check(self, name: str, caller: str, privacy: str, at: str) -> Mapping[str, Value]:
        """How a request would be decided, question by question; `""` stands for the default.

        Raises:
            meshd_naming.NamingError: the name is malformed.
            meshd_plugins.api.CapabilityError: no such caller, class or node; or it did not answer.
        """
        ...

    async def audit(self, wanted: Wanted) -> Mapping[str, Value]:
        """`{"audit": [...]}`, oldest first. Raises CapabilityError: it cannot be read."""
        ...

    async def audit_verify(self) -> Mapping[str, Value]:
        """Whether the trail is as it was written. Raises CapabilityError: it cannot be read."""
        ...


class MeshService(Protocol):
    """Everything a person can ask of a node."""

    async def ask(self, ask: Ask, take: Take) -> None:
        """Run one ask; return when `take` has had `Answered`, its last event.

        Events come one at a time for a plan of one subtask; those of subtasks that run side by side
        may overlap where `take` waits. The plan goes no faster than `take` returns. Cancelling cancels
        what still runs, here and on peers; so does an error of `take`, which is raised as it is.

        Raises:
            meshd_naming.NamingError: the target is malformed (nothing was done).
            meshd_plugins.api.CapabilityError: nobody can do it, or it broke; `.code` says which.
        """
        ...

    def resolve(self, name: str) -> Mapping[str, Value]:
        """Resolution of a name: `{"query", "candidates": [...], "left_out": [...]}`, plain data.

        Raises:
            meshd_naming.NamingError: with the column and the nearest valid thing.
        """
        ...

    def status(self) -> Mapping[str, Value]:
        """This node: identity, mesh, uptime, health, members by state, load, counters."""
        ...

    def metrics(self) -> Sequence[Family]:
        """Counters and gauges of this node."""
        ...

    def store(self, node: str) -> Mapping[str, Value]:
        """`{"records": [...]}` held here: all in short, or with a node's name or id, its one in full.

        Raises:
            meshd_plugins.api.CapabilityError: `unknown_node`, `ambiguous_node`.
        """
        ...

    async def store_diff(self, node: str) -> Mapping[str, Value]:
        """What this node holds beside what another one holds, asked of that node itself.

        Raises:
            meshd_plugins.api.CapabilityError: as `store`; `own_node`; or the peer did not answer.
        """
        ...

    async def doctor(self) -> Mapping[str, Value]:
        """`{"worst", "tally", "findings": [...]}`: asks peers and tests the network; takes seconds."""
        ...

    def peers(self) -> list[Mapping[str, Value]]:
        """Members, this node first: who, where, state, round trip, what they serve, load and its age."""
        ...

    def capabilities(self) -> list[Mapping[str, Value]]:
        """Every capability known in the mesh with its owner and the record's age."""
        ...

    def plugins(self) -> list[Mapping[str, Value]]:
        """Plugins of this node: name, state, why it is quarantined, capabilities, workers."""
        ...

    def config(self) -> list[Mapping[str, Value]]:
        """Every configuration value in force: key, value, origin; secrets redacted."""
        ...

    async def leave(self) -> None:
        """Announce a graceful leave and stop the daemon. Returns once the leave was sent."""
        ...
