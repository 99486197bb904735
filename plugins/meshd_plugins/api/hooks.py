"""What the hooks of a plugin return, and raise."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from meshd_plugins.api.requests import Value


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something that a plugin thinks an operator should know: `meshd doctor` shows it."""

    message: str  # what is wrong, one sentence
    remedy: str  # what to do about it
    is_error: bool = False  # something does not work; else it works worse than it should


class PluginConfigError(Exception):
    """The plugin's configuration table is wrong. The message names key, value and what would be right."""


BackgroundTask: TypeAlias = Callable[[], Awaitable[None]]

PluginOperation: TypeAlias = (
    "Callable[[Mapping[str, Value]], AsyncGenerator[Mapping[str, Value], None]]"
)
"""Something that whoever administers the node can have a plugin do: called with the arguments, it yields
items of progress and, as the last one, `{"done": {...}}`; or it raises a `CapabilityError`. It is closed
when nobody waits for it any more, and then stops. One that changes nothing is a `Reading`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Implements `PluginOperation`: one that changes nothing.

    The audit trail, which says who did what, has no line for it.
    """

    run: PluginOperation

    def __call__(
        self, arguments: Mapping[str, Value], /
    ) -> AsyncGenerator[Mapping[str, Value], None]:
        """Run it."""
        return self.run(arguments)
