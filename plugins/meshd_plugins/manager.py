"""Finds, loads, calls and, where they fail, quarantines plugins.

Invariants: a plugin is `active`, `disabled` or `quarantined`, and never leaves `quarantined`. A plugin
that raises, anywhere, loses its own capabilities and background task and nobody else's. Every plugin
has a pluggy manager of its own: one raising hook cannot end the call of the others, and a misspelt hook
is blamed on the plugin that has it. Plugins are called in the order of their names.

The order of a life: construct (checks the selection), `load`, `register`, then `run` in the daemon's
nursery; `facts`, `load_figures` and `status` at any time.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import pluggy
import trio

from meshd_plugins.api import (
    BackgroundTask,
    Complaint,
    Logger,
    PluginConfigError,
    PluginContext,
    PluginOperation,
    Reading,
    Value,
)
from meshd_plugins.hookspecs import HOOKS, PROJECT, HookSpecs
from meshd_plugins.operations import Take, run_operation
from meshd_plugins.sources import (
    OFF_BY_DEFAULT,
    Source,
    check_selection,
    entry_points,
    nearest,
)
from meshd_plugins.tracking import TrackedCapabilities

SLOW_CALL_S: Final = 0.05
"""A facts or load call that takes longer is counted and logged once: it holds up the whole node."""

COMPLAINTS_MAX: Final = 16
"""Of one plugin at a time."""

TRACE_FRAMES: Final = 3
"""Frames of a traceback that are kept in a reason, the innermost ones."""


class State(StrEnum):
    """What has become of a plugin."""

    ACTIVE = "active"
    DISABLED = "disabled"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class _Plugin:
    source: Source
    state: State
    reason: str = ""
    hooks: pluggy.PluginManager | None = None
    context: PluginContext | None = None
    capabilities: TrackedCapabilities | None = None
    background: trio.CancelScope | None = None
    slow_calls: Counter[str] = field(default_factory=Counter[str])


class PluginManager:
    """All plugins of one node."""

    def __init__(
        self,
        context_for: Callable[[str], PluginContext],
        *,
        log: Logger,
        clock: Callable[[], float],
        sources: Sequence[Source] | None = None,
        enabled: Sequence[str] = (),
        disabled: Sequence[str] = (),
        configured: Collection[str] = (),
    ) -> None:
        """Take the selection; nothing is imported yet.

        Args:
            context_for: makes the context of the plugin of a name; its capabilities are wrapped here.
            log: for what happens to plugins.
            clock: monotonic seconds, to measure slow calls.
            sources: what could be loaded; the installed entry points when None.
            enabled: names to load although they are off by default.
            disabled: names not to load.
            configured: names that have a table in the configuration, checked for existence only.

        Raises:
            UnknownPluginError: a name is not installed, or both enabled and disabled.
        """
        found = entry_points() if sources is None else tuple(sources)
        by_name = {source.name: source for source in found}
        check_selection(by_name, enabled, disabled, configured)
        off = (OFF_BY_DEFAULT - set(enabled)) | set(disabled)
        self._context_for = context_for
        self._log = log
        self._clock = clock
        self._conflicts: Counter[str] = Counter()
        self._plugins = {
            name: _Plugin(by_name[name], State.DISABLED if name in off else State.ACTIVE)
            for name in sorted(by_name)
        }
        for name, plugin in self._plugins.items():
            if name in disabled:
                plugin.reason = "disabled by the configuration"
            elif plugin.state is State.DISABLED:
                plugin.reason = "off by default: name it in plugins.enable"

    # -- life ------------------------------------------------------------------------------------

    def load(self) -> None:
        """Import the plugins and check their hooks. Raises nothing: what fails is quarantined."""
        for name, plugin in self._active():
            try:
                plugin.hooks = _hooks_of(plugin.source.load())
                context = self._context_for(name)
                plugin.capabilities = TrackedCapabilities(context.capabilities)
                plugin.context = replace(context, capabilities=plugin.capabilities)
            except Exception as error:  # noqa: BLE001 (the plugin boundary)
                self.quarantine(name, error)

    def register(self) -> None:
        """Call every plugin's `meshd_register`. Raises nothing: what fails is quarantined."""
        for name, _ in self._active():
            self._call(name, "meshd_register")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the background tasks until cancelled; `started` once all have been started."""
        async with trio.open_nursery() as nursery:
            for name, plugin in self._active():
                task = cast("BackgroundTask | None", self._call(name, "meshd_background"))
                if task is not None:
                    plugin.background = trio.CancelScope()
                    nursery.start_soon(
                        partial(self._background, name, task, plugin.background),
                        name=f"plugin {name}",
                    )
            task_status.started()
            await trio.sleep_forever()

    async def _background(self, name: str, task: BackgroundTask, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await task()
            except* Exception as group:  # noqa: BLE001 (the plugin boundary; Cancelled passes)
                self.quarantine(name, _only(group))

    def quarantine(self, name: str, error: BaseException, *, hook: str = "") -> None:
        """Take a plugin out: its capabilities are withdrawn, its background task is cancelled."""
        plugin = self._plugins[name]
        if plugin.state is State.QUARANTINED:
            return
        plugin.state = State.QUARANTINED
        plugin.reason = _reason(error, hook)
        if plugin.capabilities is not None:
            plugin.capabilities.withdraw_all()
        if plugin.background is not None:
            plugin.background.cancel()
        self._log.error("plugin.quarantined", plugin=name, reason=plugin.reason)

    # -- what an administrator asks for ----------------------------------------------------------

    def operation(self, name: str, verb: str) -> PluginOperation:
        """One of a plugin's operations. Raises LookupError: there is none; the message says what is."""
        plugin = self._plugins.get(name)
        if plugin is None or plugin.state is not State.ACTIVE:
            state = "not installed" if plugin is None else str(plugin.state)
            reason = f": {plugin.reason}" if plugin is not None and plugin.reason else ""
            raise LookupError(f"the plugin {name!r} is {state}{reason}")
        found = self._call(name, "meshd_operations")
        operations: Mapping[str, PluginOperation] = {}
        if isinstance(found, Mapping):
            operations = cast("Mapping[str, PluginOperation]", found)
        if verb not in operations:
            known = ", ".join(sorted(operations)) or "nothing"
            raise LookupError(f"the plugin {name!r} has no operation {verb!r}; it has {known}")
        return operations[verb]

    def only_reads(self, name: str, verb: str) -> bool:
        """Whether an operation changes nothing, as its plugin says; False for what there is not."""
        try:
            return isinstance(self.operation(name, verb), Reading)
        except LookupError:
            return False

    async def operate(
        self, name: str, verb: str, arguments: Mapping[str, Value], take: Take
    ) -> None:
        """Run one, its items going to `take`. Raises LookupError, and as `run_operation`."""
        operation = self.operation(name, verb)
        await run_operation(operation, f"{name} {verb}", arguments, take, self._log)

    # -- questions -------------------------------------------------------------------------------

    def facts(self) -> dict[str, Value]:
        """What the device is, from all plugins; on a conflict the first by name wins."""
        return self._merged("meshd_facts")

    def load_figures(self) -> dict[str, Value]:
        """How busy the device is, from all plugins; on a conflict the first by name wins."""
        return self._merged("meshd_load")

    def complaints(self) -> dict[str, tuple[Complaint, ...]]:
        """What plugins think is wrong now, by their names, and which are left out."""
        found: dict[str, tuple[Complaint, ...]] = {}
        for name, plugin in self._active():
            if plugin.hooks is None:
                continue
            told = self._call(name, "meshd_complaints")
            if isinstance(told, list | tuple):
                items = cast("Sequence[object]", told)
                mine = tuple(item for item in items if isinstance(item, Complaint))
                if mine:
                    found[name] = mine[:COMPLAINTS_MAX]
        for name, plugin in self._plugins.items():
            if plugin.state is State.QUARANTINED:
                found[name] = (
                    Complaint(
                        f"the plugin {name} is left out: {plugin.reason}",
                        f"mend what it names (its table is [plugins.{name}]) and restart meshd; or "
                        "leave it out yourself: plugins.disable",
                        is_error=True,
                    ),
                )
        return found

    def status(self) -> list[dict[str, Value]]:
        """Plain data for `meshd plugins`, sorted by name."""
        return [
            {
                "name": name,
                "version": plugin.source.version,
                "state": str(plugin.state),
                "reason": plugin.reason,
                "capabilities": list(plugin.capabilities.ids) if plugin.capabilities else [],
                "slow_calls": plugin.slow_calls.total(),
            }
            for name, plugin in self._plugins.items()
        ]

    def statistics(self) -> Mapping[str, int]:
        """Counters: plugins by state, slow calls, conflicting keys."""
        states = Counter(str(plugin.state) for plugin in self._plugins.values())
        return {
            **{f"plugins_{state}": states[state] for state in State},
            "slow_calls": sum(plugin.slow_calls.total() for plugin in self._plugins.values()),
            "conflicting_keys": self._conflicts.total(),
        }

    # -- inside ----------------------------------------------------------------------------------

    def _active(self) -> list[tuple[str, _Plugin]]:
        return [item for item in self._plugins.items() if item[1].state is State.ACTIVE]

    def _call(self, name: str, hook: str) -> object:
        """Call one hook of one plugin; None when it has none or raised."""
        plugin = self._plugins[name]
        assert plugin.hooks is not None, "load() comes before every call"
        try:
            results = cast("list[object]", getattr(plugin.hooks.hook, hook)(context=plugin.context))
        except Exception as error:  # noqa: BLE001 (the plugin boundary)
            self.quarantine(name, error, hook=hook)
            return None
        return results[0] if results else None

    def _merged(self, hook: str) -> dict[str, Value]:
        merged: dict[str, Value] = {}
        for name, plugin in self._active():
            if plugin.hooks is None:
                continue
            before = self._clock()
            result = self._call(name, hook)
            self._watch(name, plugin, hook, self._clock() - before)
            if result is None:
                continue
            if not isinstance(result, Mapping):
                error = TypeError(f"returned {type(result).__name__}, not a mapping")
                self.quarantine(name, error, hook=hook)
                continue
            for key, value in cast("Mapping[str, Value]", result).items():
                if key not in merged:
                    merged[key] = value
                    continue
                self._conflicts[key] += 1
                if self._conflicts[key] == 1:
                    self._log.warning("plugin.key_conflicted", plugin=name, hook=hook, key=key)
        return merged

    def _watch(self, name: str, plugin: _Plugin, hook: str, took_s: float) -> None:
        if took_s <= SLOW_CALL_S:
            return
        plugin.slow_calls[hook] += 1
        if plugin.slow_calls[hook] == 1:
            self._log.warning("plugin.call_slowed", plugin=name, hook=hook, took_s=took_s)


def _hooks_of(plugin: object) -> pluggy.PluginManager:
    """Read a plugin's hooks. Raises what pluggy raises, or PluginConfigError for a misspelt hook."""
    for name in dir(plugin):
        function: Any = getattr(plugin, name)
        if not name.startswith(f"{PROJECT}_") or not callable(function):
            continue
        if name not in HOOKS:
            raise PluginConfigError(f"{name} is no hook of meshd; {nearest(name, HOOKS)}")
        if not hasattr(function, f"{PROJECT}_impl"):
            raise PluginConfigError(f"{name} is not marked with @hookimpl, so it is never called")
    hooks = pluggy.PluginManager(PROJECT)
    hooks.add_hookspecs(HookSpecs)
    hooks.register(plugin)
    try:
        hooks.check_pending()
    except pluggy.PluginValidationError as error:  # under another name than its hook's
        raise PluginConfigError(f"{error}; the hooks are: {', '.join(HOOKS)}") from error
    return hooks


def _only(group: BaseExceptionGroup[Exception]) -> BaseException:
    """The one exception of a group, however deep; the group itself when there are several."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        members = cast("BaseExceptionGroup[BaseException]", inner).exceptions
        if len(members) != 1:
            return group
        inner = members[0]
    return inner


def _reason(error: BaseException, hook: str) -> str:
    """One line: a configuration error says it all; any other is told with where it came from."""
    if isinstance(error, PluginConfigError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-TRACE_FRAMES:]
    where = " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )
    during = f" in {hook}" if hook else ""
    return f"{type(error).__name__}{during}: {error}" + (f" [{where}]" if where else "")
