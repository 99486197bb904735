"""The background task: one keeper a server."""

from __future__ import annotations

import trio

from meshd_plugins.api import Complaint, PluginContext
from meshd_plugins.builtin.adopt.config import Settings
from meshd_plugins.builtin.adopt.keeper import Keeper


class AdoptPlugin:
    """Watches the configured servers, and the well-known ports of this machine."""

    def __init__(self, context: PluginContext, settings: Settings) -> None:
        self.keepers = (
            *(Keeper(context, server, is_expected=True) for server in settings.servers),
            *(Keeper(context, server, is_expected=False) for server in settings.probed()),
        )

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            for keeper in self.keepers:
                nursery.start_soon(keeper.run, name=f"adopt {keeper.url}")

    def complaints(self) -> tuple[Complaint, ...]:
        """What is wrong with all of them."""
        return tuple(complaint for keeper in self.keepers for complaint in keeper.complaints())
