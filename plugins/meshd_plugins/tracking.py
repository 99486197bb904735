"""A plugin's own view of the node's capabilities: what it added, so that it can be withdrawn."""

from __future__ import annotations

import contextlib

from meshd_plugins.api import Capabilities, Capability


class TrackedCapabilities:
    """Passes on to the daemon's registry and remembers; closed once the plugin is quarantined.

    Invariant: `ids` are the capabilities of this plugin that are announced now.
    """

    def __init__(self, inner: Capabilities) -> None:
        self._inner = inner
        self._ids: dict[str, None] = {}  # ordered as they were added
        self._closed = False

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of what this plugin announces, in the order of registration."""
        return tuple(self._ids)

    def add(self, capability: Capability) -> None:
        """Announce one. Raises ValueError as `Capabilities.add`, or when the plugin is quarantined."""
        if self._closed:
            raise ValueError("this plugin is quarantined: it cannot add capabilities any more")
        capability_id = capability.descriptor.id
        self._inner.add(capability)
        self._ids[capability_id] = None

    def replace(self, capability: Capability) -> None:
        """Announce a new descriptor. Raises KeyError if the id is not one of this plugin's."""
        if capability.descriptor.id not in self._ids:
            raise KeyError(capability.descriptor.id)
        self._inner.replace(capability)

    def remove(self, capability_id: str) -> None:
        """Withdraw one. Raises KeyError if the id is not one of this plugin's."""
        if capability_id not in self._ids:
            raise KeyError(capability_id)
        del self._ids[capability_id]
        self._inner.remove(capability_id)

    def withdraw_all(self) -> None:
        """Withdraw everything and accept nothing more."""
        self._closed = True
        for capability_id in tuple(self._ids):
            with contextlib.suppress(KeyError):  # the daemon may have dropped it already
                self.remove(capability_id)
