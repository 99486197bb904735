"""The hooks that a plugin may implement.

A plugin is a module (or any object) with functions marked by `@hookimpl` under these names, found
through the entry-point group "meshd". Each is called once per plugin, with that plugin's own context;
an exception quarantines that plugin and no other. docs/plugins.md has a complete example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, cast

import pluggy

from meshd_plugins.api import BackgroundTask, Complaint, PluginContext, PluginOperation, Value

PROJECT: Final = "meshd"
"""The name of the hook project and of the entry-point group."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Marker(Protocol):
    def __call__(self, function: _Function, /) -> _Function: ...


hookspec = cast("_Marker", pluggy.HookspecMarker(PROJECT))
hookimpl = cast("_Marker", pluggy.HookimplMarker(PROJECT))
"""Marks a function of a plugin as the implementation of the hook of its name."""


class HookSpecs:
    """The specifications; pluggy reads names and parameters from here."""

    @hookspec
    def meshd_register(self, context: PluginContext) -> None:
        """Check `context.config` and add capabilities; called once, before the node is ready.

        Must return at once (no network, no long computation: use a background task for those).

        Raises:
            PluginConfigError: the plugin's table is wrong; its message is shown as it is.
        """

    @hookspec
    def meshd_background(self, context: PluginContext) -> BackgroundTask | None:
        """Return an async function to run beside the node; it is cancelled when the node stops.

        It may return early; when it raises, the plugin is quarantined.
        """

    @hookspec
    def meshd_facts(self, context: PluginContext) -> Mapping[str, Value] | None:
        """Return what this device is: facts for the `hw` key of the node's record."""

    @hookspec
    def meshd_load(self, context: PluginContext) -> Mapping[str, Value] | None:
        """Return how busy this device is; sampled about every second, so within milliseconds."""

    @hookspec
    def meshd_operations(self, context: PluginContext) -> Mapping[str, PluginOperation] | None:
        """Return what an administrator can have this plugin do, by verb; see `PluginOperation`.

        Called when one is asked for. The daemon runs them at `POST /mesh/v1/plugins/PLUGIN/VERB`.
        """

    @hookspec
    def meshd_complaints(self, context: PluginContext) -> Sequence[Complaint] | None:
        """Return what is wrong now, for `meshd doctor`; read often, so within milliseconds."""


HOOKS: Final = tuple(name for name in vars(HookSpecs) if name.startswith("meshd_"))
