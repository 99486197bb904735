"""The face of a node towards its edges: HTTP, Unix socket, and whatever comes later.

The edge knows this protocol and nothing below it, so it can be tested with a fake mesh.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from meshd.orchestrate.events import Ask, AskEvent
from meshd_plugins.api import Value


class MeshService(Protocol):
    """Everything a person can ask of a node."""

    def ask(self, ask: Ask) -> AbstractAsyncContextManager[AsyncIterator[AskEvent]]:
        """Run one ask. Leaving the context cancels what still runs, here and on peers.

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
        """This node: identity, mesh, uptime, members by state, load, counters."""
        ...

    def peers(self) -> list[Mapping[str, Value]]:
        """Members, this node first: node, name, address, state, age, round trip, load with its age."""
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
